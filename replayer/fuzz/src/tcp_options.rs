//! The options parser, against one that is not ours, and the header record that carries what it found.

use etherparse::{TcpOptionElement, TcpOptionsIterator};
use replayer_common::response::{ResponseHeader, present};
use replayer_common::tcp_options::{TcpOptions, parse};

/// Parses `data` as a segment's options.
///
/// # Panics
/// Where the parsers disagree or a record does not survive the wire.
pub fn run(data: &[u8]) {
    let found = parse(data);
    assert!(found.sack_count <= 4);
    let unused = &found.sack[usize::from(found.sack_count)..];
    assert!(unused.iter().all(|block| *block == (0, 0)), "a block that does not count: {found:?}");

    let mut record = ResponseHeader::default();
    record.set_options(&found);
    assert_eq!(record.has(present::TIMESTAMPS), found.timestamps.is_some());
    assert_eq!(record.has(present::MSS).then_some(record.mss), found.mss);
    assert_eq!(record.has(present::WINDOW_SCALE).then_some(record.window_scale), found.window_scale);
    assert!(record.sack_count <= 3);
    assert_eq!(ResponseHeader::decode(&record.encode()), record);
    // Any bytes are a record.
    for bytes in data.as_chunks().0 {
        let record = ResponseHeader::decode(bytes);
        assert_eq!(ResponseHeader::decode(&record.encode()), record);
    }

    // No header has more than 40 bytes of options.
    if data.len() <= 40
        && let Some(theirs) = judge(data)
    {
        assert_eq!(found, theirs, "{data:02x?}");
    }
}

/// `None`: there is an option that etherparse does not know.
fn judge(data: &[u8]) -> Option<TcpOptions> {
    let mut options = TcpOptions::default();
    for element in TcpOptionsIterator::from_slice(data) {
        match element.ok()? {
            TcpOptionElement::Noop => {}
            TcpOptionElement::MaximumSegmentSize(mss) => options.mss = Some(mss),
            TcpOptionElement::WindowScale(shift) => options.window_scale = Some(shift),
            TcpOptionElement::SelectiveAcknowledgementPermitted => options.sack_permitted = true,
            TcpOptionElement::SelectiveAcknowledgement(first, rest) => {
                for block in [Some(first)].into_iter().chain(rest).flatten() {
                    if let Some(place) = options.sack.get_mut(usize::from(options.sack_count)) {
                        *place = block;
                        options.sack_count += 1;
                    }
                }
            }
            TcpOptionElement::Timestamp(value, echo) => options.timestamps = Some((value, echo)),
        }
    }
    Some(options)
}
