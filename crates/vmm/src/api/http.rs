//! As much of HTTP/1.1 as the API needs.

use std::io::{self, Read, Write};

/// Longest body, in bytes.
pub const BODY_MAX: usize = 51_200;
/// Longest request line and headers together, in bytes.
const HEAD_MAX: usize = 8192;
const HEADERS_MAX: usize = 32;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// GET, PUT or PATCH; what else there is the API does not know.
    pub method: String,
    /// The path, with its first slash.
    pub path: String,
    /// The body; empty when there is none.
    pub body: Vec<u8>,
    /// Whether the connection stays open.
    pub keep_alive: bool,
}

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client went, or is too slow.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not HTTP.
    #[error("Invalid request: {0}.")]
    Syntax(#[from] httparse::Error),
    /// Something that HTTP allows and this server does not.
    #[error("Invalid request: {0}.")]
    Unsupported(&'static str),
    /// Too long.
    #[error("Request payload with size {0} is larger than the limit of {BODY_MAX} allowed by server.")]
    TooLong(usize),
}

/// Reads one request; `buffer` keeps what came of the next. `None` at the end of the connection.
pub fn read(stream: &mut (impl Read + Write), buffer: &mut Vec<u8>) -> Result<Option<Message>, Error> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(head) = request.parse(buffer)? {
            let method = request.method.unwrap_or_default().to_owned();
            let path = request.path.unwrap_or_default().to_owned();
            let framing = Framing::of(request.headers)?;
            if framing.expects_continue && buffer.len() == head && framing.length > 0 {
                stream.write_all(b"HTTP/1.1 100 \r\n\r\n")?;
            }
            while buffer.len() < head + framing.length {
                if !fill(stream, buffer)? {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
            let body = buffer[head..head + framing.length].to_vec();
            buffer.drain(..head + framing.length);
            return Ok(Some(Message { method, path, body, keep_alive: framing.keep_alive }));
        }
        if buffer.len() > HEAD_MAX {
            return Err(Error::Unsupported("the headers are too long"));
        }
        if !fill(stream, buffer)? {
            return if buffer.is_empty() {
                Ok(None)
            } else {
                Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
            };
        }
    }
}

fn fill(stream: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut bytes = [0; 4096];
    let count = stream.read(&mut bytes)?;
    buffer.extend_from_slice(&bytes[..count]);
    Ok(count > 0)
}

struct Framing {
    length: usize,
    keep_alive: bool,
    expects_continue: bool,
}

impl Framing {
    fn of(headers: &[httparse::Header<'_>]) -> Result<Self, Error> {
        let mut framing = Framing { length: 0, keep_alive: true, expects_continue: false };
        let mut seen_length = false;
        for header in headers {
            let value = std::str::from_utf8(header.value)
                .map_err(|_| Error::Unsupported("a header is not text"))?
                .trim();
            match header.name.to_ascii_lowercase().as_str() {
                // Two lengths are how requests are smuggled.
                "content-length" if seen_length => return Err(Error::Unsupported("there are two lengths")),
                "content-length" => {
                    seen_length = true;
                    framing.length =
                        value.parse().map_err(|_| Error::Unsupported("the length is not a number"))?;
                }
                "transfer-encoding" => {
                    return Err(Error::Unsupported("transfer encodings are not supported"));
                }
                "connection" => framing.keep_alive = !value.eq_ignore_ascii_case("close"),
                "expect" => framing.expects_continue = value.eq_ignore_ascii_case("100-continue"),
                _ => {}
            }
        }
        if framing.length > BODY_MAX {
            return Err(Error::TooLong(framing.length));
        }
        Ok(framing)
    }
}

/// Writes a response; without a body when it is empty.
pub fn write(stream: &mut impl Write, status: u16, body: &str, keep_alive: bool) -> io::Result<()> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let mut response = format!("HTTP/1.1 {status} \r\nServer: kapsel-vmm\r\nConnection: {connection}\r\n");
    if !body.is_empty() {
        response.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
    }
    response.push_str("\r\n");
    response.push_str(body);
    stream.write_all(response.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its input in pieces of `step` bytes and forgets what is written.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(into.len());
            into[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    impl Write for Pieces<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn read_one(text: &str) -> Result<Option<Message>, Error> {
        read(&mut Pieces(text.as_bytes(), 7), &mut Vec::new())
    }

    #[test]
    fn two_requests_in_any_pieces_are_two_requests() {
        let text =
            b"PUT /vm HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.1\r\nconnection: close\r\n\r\n";
        for step in 1..text.len() {
            let (mut stream, mut buffer) = (Pieces(text, step), Vec::new());
            let first = read(&mut stream, &mut buffer).unwrap().unwrap();
            assert_eq!(
                (first.method.as_str(), first.path.as_str(), first.body.as_slice()),
                ("PUT", "/vm", &b"{}"[..])
            );
            let second = read(&mut stream, &mut buffer).unwrap().unwrap();
            assert_eq!((second.method.as_str(), second.keep_alive), ("GET", false));
            assert_eq!(read(&mut stream, &mut buffer).unwrap(), None);
        }
    }

    #[test]
    fn what_is_too_long_or_ambiguous_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(HEAD_MAX));
        assert!(matches!(read_one(&long[..HEAD_MAX + 10]), Err(Error::Unsupported(_))));
        let header = |header: &str| read_one(&format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n"));
        assert!(matches!(header("Content-Length: 51201"), Err(Error::TooLong(51_201))));
        assert!(header("Content-Length: -1").is_err());
        assert!(header("Content-Length: 18446744073709551616").is_err());
        assert!(header("Content-Length: 0\r\nContent-Length: 5").is_err());
        assert!(header("Transfer-Encoding: chunked").is_err());
        assert!(header("Content-Length: 5").is_err(), "the body is missing");
        assert!(read_one("nonsense\r\n\r\n").is_err());
    }

    #[test]
    fn any_prefix_and_any_changed_byte_is_an_error_or_a_request_but_never_a_panic() {
        let text = b"PATCH /drives/a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody";
        for end in 0..text.len() {
            let _ = read(&mut Pieces(&text[..end], 5), &mut Vec::new());
            for byte in [0, b' ', b'\r', b'\n', b'9', 0xff] {
                let mut changed = text.to_vec();
                changed[end] = byte;
                let _ = read(&mut Pieces(&changed, 64), &mut Vec::new());
            }
        }
    }
}
