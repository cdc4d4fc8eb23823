//! As much of HTTP/1.1 as the API needs.

/// Longest body, in bytes, unless the command line says another.
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
    /// Not HTTP.
    #[error("Invalid request: {0}.")]
    Syntax(#[from] httparse::Error),
    /// Something that HTTP allows and this server does not.
    #[error("Invalid request: {0}.")]
    Unsupported(&'static str),
    /// Too long.
    #[error("Request payload with size {0} is larger than the limit of {1} allowed by server.")]
    TooLong(usize, usize),
}

/// What a connection's bytes so far amount to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// More have to come.
    Incomplete {
        /// The client waits for leave to send the body.
        asks: bool,
    },
    /// A request, and how many of the bytes it took.
    Complete(Message, usize),
}

/// Looks for a request at the beginning of `bytes`, whose body has at most `body_max` bytes.
///
/// # Errors
/// [`Error`]; where the next request would begin is not known then.
pub fn parse(bytes: &[u8], body_max: usize) -> Result<Progress, Error> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = request.parse(bytes)? else {
        return if bytes.len() > HEAD_MAX {
            Err(Error::Unsupported("the headers are too long"))
        } else {
            Ok(Progress::Incomplete { asks: false })
        };
    };
    // However it came: a head that was too long while it was incomplete shall not pass when it comes at once.
    if head > HEAD_MAX {
        return Err(Error::Unsupported("the headers are too long"));
    }
    let framing = Framing::of(request.headers, body_max)?;
    let end = head.saturating_add(framing.length);
    let Some(body) = bytes.get(head..end) else {
        return Ok(Progress::Incomplete { asks: framing.expects_continue && bytes.len() == head });
    };
    let message = Message {
        method: request.method.unwrap_or_default().to_owned(),
        path: request.path.unwrap_or_default().to_owned(),
        body: body.to_vec(),
        keep_alive: framing.keep_alive,
    };
    Ok(Progress::Complete(message, end))
}

struct Framing {
    length: usize,
    keep_alive: bool,
    expects_continue: bool,
}

impl Framing {
    fn of(headers: &[httparse::Header<'_>], body_max: usize) -> Result<Self, Error> {
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
        if framing.length > body_max {
            return Err(Error::TooLong(framing.length, body_max));
        }
        Ok(framing)
    }
}

/// Leave to send a body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 \r\n\r\n";

/// A response; without a body when it is empty.
pub fn response(status: u16, body: &str, keep_alive: bool) -> Vec<u8> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let mut response = format!("HTTP/1.1 {status} \r\nServer: kapsel-vmm\r\nConnection: {connection}\r\n");
    if !body.is_empty() {
        response.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
    }
    response.push_str("\r\n");
    response.push_str(body);
    response.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Progress, Error> {
        super::parse(bytes, BODY_MAX)
    }

    fn message(text: &str) -> Result<Message, Error> {
        match parse(text.as_bytes())? {
            Progress::Complete(message, _) => Ok(message),
            Progress::Incomplete { .. } => panic!("{text:?} is incomplete"),
        }
    }

    #[test]
    fn two_requests_are_two_requests_and_nothing_less_is_one() {
        let first = "PUT /vm HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
        let text = format!("{first}GET / HTTP/1.1\r\nconnection: close\r\n\r\n");
        for end in 0..first.len() {
            assert_eq!(parse(&text.as_bytes()[..end]).unwrap(), Progress::Incomplete { asks: false });
        }
        let Progress::Complete(message, used) = parse(text.as_bytes()).unwrap() else {
            panic!("a whole request is there")
        };
        assert_eq!((used, message.path.as_str(), message.body.as_slice()), (first.len(), "/vm", &b"{}"[..]));
        let Progress::Complete(message, used) = parse(&text.as_bytes()[used..]).unwrap() else {
            panic!("another one is there")
        };
        assert_eq!(
            (used, message.method.as_str(), message.keep_alive),
            (text.len() - first.len(), "GET", false)
        );
    }

    #[test]
    fn a_client_that_waits_for_leave_is_noticed_once_its_headers_are_there() {
        let text = "PUT /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{";
        let asks = |end| parse(&text.as_bytes()[..end]).unwrap();
        assert_eq!(asks(text.len() - 2), Progress::Incomplete { asks: false });
        assert_eq!(asks(text.len() - 1), Progress::Incomplete { asks: true });
        assert_eq!(asks(text.len()), Progress::Incomplete { asks: false });
    }

    #[test]
    fn what_is_too_long_or_ambiguous_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nx: {}", "y".repeat(HEAD_MAX));
        assert!(matches!(message(&long), Err(Error::Unsupported(_))));
        assert!(matches!(message(&format!("{long}\r\n\r\n")), Err(Error::Unsupported(_))));
        let header = |header: &str| message(&format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n"));
        assert!(matches!(header("Content-Length: 51201"), Err(Error::TooLong(51_201, BODY_MAX))));
        let larger = super::parse(b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n", 51_201);
        assert!(matches!(larger, Ok(Progress::Incomplete { .. })));
        let largest = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", usize::MAX);
        assert!(matches!(super::parse(largest.as_bytes(), usize::MAX), Ok(Progress::Incomplete { .. })));
        assert!(header("Content-Length: -1").is_err());
        assert!(header("Content-Length: 18446744073709551616").is_err());
        assert!(header("Content-Length: 0\r\nContent-Length: 5").is_err());
        assert!(header("Transfer-Encoding: chunked").is_err());
        assert!(message("nonsense\r\n\r\n").is_err());
    }

    #[test]
    fn any_prefix_and_any_changed_byte_is_an_error_or_a_request_but_never_a_panic() {
        let text = b"PATCH /drives/a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody";
        for end in 0..text.len() {
            let _ = parse(&text[..end]);
            for byte in [0, b' ', b'\r', b'\n', b'9', 0xff] {
                let mut changed = text.to_vec();
                changed[end] = byte;
                let _ = parse(&changed);
            }
        }
    }
}
