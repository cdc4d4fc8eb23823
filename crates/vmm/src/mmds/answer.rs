//! HTTP between the guest and the document. Everything that comes is the guest's.

use kapsel_devices::net::metadata::Answer;

use super::{Error, Format, Store, Version};

/// Where tokens are made.
const TOKEN: &str = "/latest/api/token";
const TOKEN_HEADERS: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL_HEADERS: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: [&str; 1] = ["X-Forwarded-For"];
const HEADERS_MAX: usize = 32;

/// An answer before it is bytes.
struct Response {
    status: &'static str,
    /// Lines, each with its end.
    headers: String,
    json: bool,
    body: String,
}

impl Response {
    fn text(status: &'static str, body: impl ToString) -> Self {
        Response { status, headers: String::new(), json: false, body: body.to_string() }
    }
}

/// A request's head, in which the service believes as little as it can.
struct Request<'a> {
    method: &'a str,
    /// As it was asked for.
    target: &'a str,
    headers: &'a [httparse::Header<'a>],
}

impl Request<'_> {
    /// The first header of one of these names: which one, and its value if that is text.
    fn header<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &str)> {
        self.headers.iter().find_map(|header| {
            let name = names.iter().find(|name| header.name.eq_ignore_ascii_case(name))?;
            Some((*name, std::str::from_utf8(header.value).unwrap_or_default().trim()))
        })
    }

    /// The path in the document: no host before it, no empty parts.
    fn path(&self) -> String {
        let path = match self.target.strip_prefix("http://") {
            Some(rest) => rest.find('/').map_or("", |slash| &rest[slash..]),
            None => self.target,
        };
        let mut clean = String::with_capacity(path.len());
        for c in path.chars().filter(|_| path.starts_with('/')) {
            if c != '/' || !clean.ends_with('/') {
                clean.push(c);
            }
        }
        clean
    }

    /// Bytes after the head, which no request here needs.
    fn body(&self) -> Option<usize> {
        self.header(&["Content-Length"]).map_or(Some(0), |(_, length)| length.parse().ok())
    }
}

/// Answers the request at the beginning of `received`, once it is complete.
pub(super) fn answer(store: &mut Store, received: &[u8]) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(received) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return None,
        // Where the next request would begin is not known.
        Err(_) => return Some(refuse(received.len())),
    };
    let request = Request {
        method: request.method.unwrap_or_default(),
        target: request.path.unwrap_or_default(),
        headers: request.headers,
    };
    let Some(used) = request.body().and_then(|body| head.checked_add(body)) else {
        return Some(refuse(received.len()));
    };
    if used > received.len() {
        return None;
    }
    let last = request.header(&["Connection"]).is_some_and(|(_, value)| value.eq_ignore_ascii_case("close"));
    Some(Answer { used, bytes: encode(&respond(store, &request), last), last })
}

fn refuse(used: usize) -> Answer {
    Answer { used, bytes: encode(&Response::text("400", "Invalid request."), true), last: true }
}

fn encode(response: &Response, last: bool) -> Vec<u8> {
    let Response { status, headers, json, body } = response;
    let connection = if last { "close" } else { "keep-alive" };
    let kind = if *json { "application/json" } else { "text/plain" };
    let length = body.len();
    format!(
        "HTTP/1.1 {status} \r\nServer: kapsel-vmm\r\nConnection: {connection}\r\n{headers}\
         Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn respond(store: &mut Store, request: &Request<'_>) -> Response {
    match request.method {
        "GET" => guard(store, request).unwrap_or_else(|| get(store, request)),
        "PUT" => put(store, request),
        _ => Response {
            headers: "Allow: GET, PUT\r\n".into(),
            ..Response::text("405", "Not allowed HTTP method.")
        },
    }
}

/// What keeps somebody from reading.
fn guard(store: &mut Store, request: &Request<'_>) -> Option<Response> {
    let refusal = match request.header(&TOKEN_HEADERS) {
        Some((_, token)) if store.tokens.knows(token) => return None,
        Some(_) => {
            store.refusals.invalid_token += 1;
            "MMDS token not valid."
        }
        None => {
            store.refusals.no_token += 1;
            "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token."
        }
    };
    (store.version == Version::V2).then(|| Response::text("401", refusal))
}

fn get(store: &Store, request: &Request<'_>) -> Response {
    let json = request.header(&["Accept"]).is_some_and(|(_, accepted)| accepted == "application/json");
    let path = request.path();
    if path.is_empty() {
        return Response::text("400", "Invalid URI.");
    }
    match store.value(&path, if json { Format::Json } else { Format::Imds }) {
        Ok(body) => Response { json, ..Response::text("200", body) },
        Err(Error::NotFound) => missing(request),
        Err(error) => Response::text("501", error),
    }
}

fn missing(request: &Request<'_>) -> Response {
    Response::text("404", format!("Resource not found: {}.", request.target))
}

/// Makes a token, for those who ask by themselves.
fn put(store: &Store, request: &Request<'_>) -> Response {
    if request.header(&FORWARDED).is_some() {
        return Response::text(
            "400",
            "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
        );
    }
    if request.path() != TOKEN {
        return missing(request);
    }
    let Some((name, value)) = request.header(&TTL_HEADERS) else {
        return Response::text(
            "400",
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Ok(seconds) = value.parse() else {
        let reason = format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}");
        return Response::text("400", reason);
    };
    match store.tokens.issue(seconds) {
        Ok(token) => Response { headers: format!("{name}: {seconds}\r\n"), ..Response::text("200", token) },
        Err(error) => Response::text("400", error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::store;
    use super::*;

    /// Status, body and whether the connection ends.
    fn ask(store: &mut Store, request: &str) -> (String, String, bool) {
        for end in 0..request.len() {
            assert_eq!(answer(store, &request.as_bytes()[..end]), None, "{request:?} is cut at {end}");
        }
        let answer = answer(store, format!("{request}GET").as_bytes()).unwrap();
        assert_eq!(answer.used, request.len());
        let text = String::from_utf8(answer.bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        (head["HTTP/1.1 ".len()..][..3].to_owned(), body.to_owned(), answer.last)
    }

    #[test]
    fn everybody_reads_the_first_version() {
        let mut store = store();
        let mut get = |rest: &str| ask(&mut store, &format!("GET {rest}\r\n\r\n"));
        assert_eq!(get("/name/first HTTP/1.1"), ("200".into(), "John".into(), false));
        assert_eq!(get("http://169.254.169.254//name///first HTTP/1.0\r\nConnection: close").1, "John");
        assert_eq!(get("/name HTTP/1.1\r\naccept: application/json").1, r#"{"first":"John"}"#);
        assert_eq!(get("/age HTTP/1.1").0, "501");
        assert_eq!(get("/x//y HTTP/1.1"), ("404".into(), "Resource not found: /x//y.".into(), false));
        assert_eq!(get("http://x HTTP/1.1").0, "400");
        assert_eq!(get("* HTTP/1.1").0, "400");
        assert_eq!(ask(&mut store, "PATCH / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}").0, "405");
        assert_eq!(store.counters()[0], ("rx_no_token", 7));
    }

    #[test]
    fn the_second_version_needs_a_token_that_only_the_guest_itself_gets() {
        let mut store = store();
        store.version = Version::V2;
        assert_eq!(ask(&mut store, "GET /age HTTP/1.1\r\n\r\n").0, "401");
        let bad = "GET /age HTTP/1.1\r\nX-Metadata-Token: bad\r\n\r\n";
        assert_eq!(ask(&mut store, bad), ("401".into(), "MMDS token not valid.".into(), false));
        let mut token = |rest: &str| ask(&mut store, &format!("PUT {rest}\r\n\r\n"));
        assert_eq!(token("/latest/api/token HTTP/1.1").0, "400");
        assert_eq!(token("/latest/token HTTP/1.1").0, "404");
        let ttl = "/latest/api/token HTTP/1.1\r\nx-metadata-token-ttl-seconds: ";
        assert_eq!(token(&format!("{ttl}0")).0, "400");
        assert_eq!(token(&format!("{ttl}soon")).0, "400");
        assert_eq!(token(&format!("{ttl}60\r\nX-Forwarded-For: x")).0, "400");
        let (status, token, _) = token(&format!("{ttl}60"));
        assert_eq!(status, "200");
        let good = format!("GET /name/first HTTP/1.1\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n");
        assert_eq!(ask(&mut store, &good).1, "John");
        assert_eq!(store.counters(), [("rx_no_token", 1), ("rx_invalid_token", 1)]);
    }

    #[test]
    fn nonsense_ends_the_connection() {
        for nonsense in
            ["\u{1}\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"]
        {
            let answer = answer(&mut store(), nonsense.as_bytes()).unwrap();
            assert!(answer.last && answer.bytes.starts_with(b"HTTP/1.1 400 "), "{nonsense:?}");
        }
        let huge = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", usize::MAX);
        assert!(answer(&mut store(), huge.as_bytes()).unwrap().last);
    }
}
