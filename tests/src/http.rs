//! As much of HTTP/1.1 as `loadgen` speaks: requests with an id, answers with a Content-Length.

use std::net::SocketAddr;

/// No head of an answer is longer, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// The head of request `id`: GET, or POST of `body` bytes; `last` asks the server to close after its answer.
pub fn request(path: &str, id: u64, host: SocketAddr, body: u32, last: bool) -> String {
    let method = if body == 0 { "GET" } else { "POST" };
    let mut head = format!("{method} {path}?id={id} HTTP/1.1\r\nHost: {host}\r\n");
    if body > 0 {
        head += &format!("Content-Length: {body}\r\n");
    }
    if last {
        head += "Connection: close\r\n";
    }
    head += "\r\n";
    head
}

/// Reads answers out of a stream that comes in pieces.
#[derive(Debug)]
pub struct Reader {
    expected_server: Option<String>,
    head: Vec<u8>,
    /// Body bytes of the present answer that are still to come.
    body_left: u64,
}

impl Reader {
    /// A reader; each answer must have the header `X-Server` with the value `expected_server`, if given.
    pub fn new(expected_server: Option<String>) -> Self {
        Self { expected_server, head: Vec::new(), body_left: 0 }
    }

    /// Takes the next bytes; calls `complete` for each answer that ends in them. An error says what is wrong.
    pub fn read(&mut self, mut bytes: &[u8], mut complete: impl FnMut()) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let count = self.body_left.min(bytes.len() as u64);
                self.body_left -= count;
                bytes = &bytes[count as usize..];
                if self.body_left == 0 {
                    complete();
                }
                continue;
            }
            // The end of the head may lie across two pieces.
            let searched = self.head.len().saturating_sub(3);
            let before = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(end) = self.head[searched..].windows(4).position(|window| window == b"\r\n\r\n") else {
                return if self.head.len() > MAX_HEAD { Err("a head without an end".into()) } else { Ok(()) };
            };
            let end = searched + end + 4;
            bytes = &bytes[end - before..];
            self.head.truncate(end);
            self.body_left = self.check_head()?;
            self.head.clear();
            if self.body_left == 0 {
                complete();
            }
        }
        Ok(())
    }

    /// The length of the body that follows the head.
    fn check_head(&self) -> Result<u64, String> {
        let head = std::str::from_utf8(&self.head).map_err(|_| "a head that is not text".to_owned())?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(format!("answer: {}", head.lines().next().unwrap_or_default()));
        }
        let field = |name: &str| {
            head.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        if let Some(expected) = &self.expected_server
            && field("X-Server") != Some(expected)
        {
            return Err(format!("an answer of {:?}", field("X-Server")));
        }
        let length = field("Content-Length").ok_or("an answer without Content-Length")?;
        length.parse().map_err(|_| format!("Content-Length: {length}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERS: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Server: online\r\n\r\nhello\
                           HTTP/1.1 200 OK\r\nX-Server: online\r\ncontent-length: 0\r\n\r\n";

    fn count(reader: &mut Reader, size: usize) -> Result<usize, String> {
        let mut complete = 0;
        for piece in ANSWERS.as_bytes().chunks(size) {
            reader.read(piece, || complete += 1)?;
        }
        Ok(complete)
    }

    #[test]
    fn answers_are_counted_however_they_are_cut() {
        for size in [1, 2, 3, 17, ANSWERS.len()] {
            assert_eq!(count(&mut Reader::new(Some("online".into())), size), Ok(2));
        }
    }

    #[test]
    fn an_answer_of_another_server_is_an_error() {
        assert!(count(&mut Reader::new(Some("target".into())), 1000).is_err());
    }

    #[test]
    fn a_request_carries_its_id() {
        let host = "172.28.0.11:8080".parse().unwrap();
        assert_eq!(
            request("/r", 7, host, 0, false),
            "GET /r?id=7 HTTP/1.1\r\nHost: 172.28.0.11:8080\r\n\r\n"
        );
        let post = request("/r", 8, host, 5, true);
        assert!(
            post.starts_with("POST /r?id=8 ")
                && post.contains("Content-Length: 5\r\nConnection: close\r\n\r\n")
        );
    }
}
