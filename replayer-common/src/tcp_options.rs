//! TCP options (RFC 9293 section 3.1, RFC 7323, RFC 2018): read from hostile bytes, never longer than 40.

/// What this product knows of a segment's options; unknown ones are passed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// Maximum segment size, bytes.
    pub mss: Option<u16>,
    /// Window scale shift, as sent (RFC 7323 allows at most 14; not clamped here).
    pub window_scale: Option<u8>,
    /// SACK permitted.
    pub sack_permitted: bool,
    /// TSval and TSecr.
    pub timestamps: Option<(u32, u32)>,
    /// SACK blocks, left and right edge.
    pub sack: [(u32, u32); 4],
    /// How many of `sack` count.
    pub sack_count: u8,
}

/// Reads the bytes between the fixed header and the payload. Malformed options end the reading: what came before counts.
#[inline]
pub fn parse(mut options: &[u8]) -> TcpOptions {
    let mut found = TcpOptions::default();
    // The layout that Linux, the BSDs and Windows send on every established segment.
    if let [1, 1, 8, 10, v0, v1, v2, v3, e0, e1, e2, e3] = *options {
        found.timestamps = Some((u32::from_be_bytes([v0, v1, v2, v3]), u32::from_be_bytes([e0, e1, e2, e3])));
        return found;
    }
    while let [kind, rest @ ..] = options {
        match kind {
            0 => break,
            1 => {
                options = rest;
                continue;
            }
            _ => {}
        }
        let Some(&length) = rest.first() else { break };
        // The length counts the kind and itself: RFC 9293 section 3.1.
        let Some(body_len) = usize::from(length).checked_sub(2) else { break };
        let Some((body, after)) = rest[1..].split_at_checked(body_len) else { break };
        match (*kind, body) {
            (2, &[a, b]) => found.mss = Some(u16::from_be_bytes([a, b])),
            (3, &[shift]) => found.window_scale = Some(shift),
            (4, []) => found.sack_permitted = true,
            (5, blocks) => {
                let (blocks, _) = blocks.as_chunks::<8>();
                for block in blocks {
                    let [a, b, c, d, e, f, g, h] = *block;
                    // 40 bytes hold no more than four.
                    let Some(place) = found.sack.get_mut(usize::from(found.sack_count)) else { break };
                    *place = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
                    found.sack_count += 1;
                }
            }
            (8, &[a, b, c, d, e, f, g, h]) => {
                found.timestamps = Some((u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])));
            }
            _ => {}
        }
        options = after;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linux_syn() {
        let options = parse(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 7, 0, 0, 0, 0, 1, 3, 3, 7]);
        assert_eq!(options.mss, Some(1460));
        assert_eq!(options.window_scale, Some(7));
        assert_eq!(options.timestamps, Some((7, 0)));
        assert!(options.sack_permitted);
    }

    #[test]
    fn sack_blocks_after_timestamps() {
        let options = parse(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1, 5, 10, 0, 0, 0, 3, 0, 0, 0, 4]);
        assert_eq!((options.sack_count, options.sack[0]), (1, (3, 4)));
        assert_eq!(options.timestamps, Some((1, 2)));
    }

    #[test]
    fn two_sack_options_do_not_overflow() {
        let mut bytes = [0u8; 40];
        bytes[..2].copy_from_slice(&[5, 26]);
        bytes[26..28].copy_from_slice(&[5, 10]);
        assert_eq!(parse(&bytes[..36]).sack_count, 4);
    }

    #[test]
    fn malformed_lengths_end_the_reading() {
        assert_eq!(parse(&[2, 0, 5, 5]), TcpOptions::default());
        assert_eq!(parse(&[2, 1, 5, 5]), TcpOptions::default());
        assert_eq!(parse(&[2, 200, 5]), TcpOptions::default());
        assert_eq!(parse(&[2]), TcpOptions::default());
        assert_eq!(parse(&[3, 3, 9, 8, 10, 1]).window_scale, Some(9));
    }
}
