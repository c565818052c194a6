//! What the first bytes of a client's stream say of the protocol, where that decides how it is replayed.

/// The versions that the header of a TLS record names: SSL 3.0 to TLS 1.3 (RFC 8446 section 5.1 and appendix D).
const RECORD_VERSIONS: core::ops::RangeInclusive<u8> = 0..=4;
/// The longest record, bytes / 256: 2^14 and what encryption may add, up to TLS 1.2 (RFC 5246 section 6.2.3).
const RECORD_LENGTH: core::ops::RangeInclusive<u8> = 0..=0x48;
/// Content types change_cipher_spec, alert, handshake, application_data (RFC 8446 section 5.1).
const RECORD_TYPES: core::ops::RangeInclusive<u8> = 20..=23;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;

/// The beginning of every HTTP/2 connection (RFC 9113 section 3.4).
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Fewer bytes say nothing.
const ENOUGH: usize = 3;

/// The most bytes that are looked at.
pub(crate) const LOOK: usize = HTTP2.len();

/// How the stream must be treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    /// A TLS ClientHello: what follows is encrypted with keys that the target does not have.
    Tls,
    /// HTTP/2 without TLS: responses come while other requests are on their way.
    Http2,
    /// Anything else.
    Other,
}

/// Judges the first bytes of a stream. What does not fit into the first segment is taken to be as it should.
pub(crate) fn opening(bytes: &[u8]) -> Opening {
    if bytes.len() < ENOUGH {
        return Opening::Other;
    }
    if bytes[0] == HANDSHAKE && tls_record(bytes) && bytes.get(5).is_none_or(|&kind| kind == CLIENT_HELLO) {
        return Opening::Tls;
    }
    if HTTP2.starts_with(&bytes[..bytes.len().min(HTTP2.len())]) {
        return Opening::Http2;
    }
    Opening::Other
}

/// Whether the bytes, which begin a turn in the middle of a stream, begin with the header of a TLS record.
pub(crate) fn tls_record(bytes: &[u8]) -> bool {
    bytes.len() >= ENOUGH
        && RECORD_TYPES.contains(&bytes[0])
        && bytes[1] == 3
        && RECORD_VERSIONS.contains(&bytes[2])
        && bytes.get(3).is_none_or(|high| RECORD_LENGTH.contains(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_hellos_are_seen_and_nothing_else() {
        let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
        for len in 3..=hello.len() {
            assert_eq!(opening(&hello[..len]), Opening::Tls, "{len} bytes");
        }
        for other in
            [&hello[..2], b"", b"GET / HTTP/1.1\r\n", b"*1\r\n$4\r\nPING\r\n", &[0x16, 3, 9, 0, 0, 1]]
        {
            assert_eq!(opening(other), Opening::Other, "{other:?}");
        }
        // A ServerHello, a record that is too long, application data: not the beginning of a client's stream.
        for other in [[0x16, 3, 1, 2, 0, 2], [0x16, 3, 1, 0x50, 0, 1], [0x17, 3, 3, 2, 0, 1]] {
            assert_eq!(opening(&other), Opening::Other, "{other:?}");
        }
        assert!(tls_record(&[0x17, 3, 3, 0, 80, 7, 7]));
        assert!(!tls_record(b"{\"id\":1}"));
    }

    #[test]
    fn http2_is_seen() {
        assert_eq!(opening(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0"), Opening::Http2);
        assert_eq!(opening(b"PRI"), Opening::Http2);
        assert_eq!(opening(b"PRINT 1\r\n"), Opening::Other);
    }
}
