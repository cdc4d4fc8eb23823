//! The client of kapsel-vmm's API: one HTTP request a connection.
//!
//! kapsel-vmm is confined because its guest may take it over, so its sockets are not trusted: the directory that they are in is the
//! monitor's to write, so a link there is not followed, and what it says is bounded in length and in time like a guest's words.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 64 * 1024;

/// Why a request was not done.
#[derive(Debug)]
pub(super) enum ApiError {
    /// kapsel-vmm refused it, in these words.
    Refused(String),
    /// There is no connection, or it does not keep to the protocol.
    Broken(io::Error),
}

impl From<io::Error> for ApiError {
    fn from(error: io::Error) -> Self {
        ApiError::Broken(error)
    }
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Request {
    method: &'static str,
    path: &'static str,
    body: Option<Value>,
}

impl Request {
    pub(super) fn get(path: &'static str) -> Request {
        Request { method: "GET", path, body: None }
    }

    pub(super) fn put(path: &'static str, body: Value) -> Request {
        Request { method: "PUT", path, body: Some(body) }
    }

    pub(super) fn patch(path: &'static str, body: Value) -> Request {
        Request { method: "PATCH", path, body: Some(body) }
    }

    fn encode(&self) -> String {
        let body = self.body.as_ref().map(Value::to_string).unwrap_or_default();
        let (method, path, length) = (self.method, self.path, body.len());
        format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
    }
}

/// Where the API is.
#[derive(Debug, Clone)]
pub(super) struct Api(Socket);

impl Api {
    pub(super) fn at(socket: Socket) -> Api {
        Api(socket)
    }

    /// Waits until there is somebody to ask.
    pub(super) async fn appears(&self) -> io::Result<()> {
        loop {
            match self.0.connect().await {
                Err(error)
                    if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]
                        .contains(&error.kind()) =>
                {
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                connected => return connected.map(drop),
            }
        }
    }

    /// Has a request done. What is not bounded here is the time.
    pub(super) async fn ask(&self, request: &Request) -> Result<Value, ApiError> {
        let mut stream = self.0.connect().await?;
        stream.write_all(request.encode().as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
        parse(&answer)
    }
}

fn parse(answer: &[u8]) -> Result<Value, ApiError> {
    let broken = |what: &str| ApiError::Broken(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    let text = std::str::from_utf8(answer).map_err(|_| broken("its answer is not text"))?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| broken("its answer was cut"))?;
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse::<u16>().ok());
    let body = match body {
        "" => Value::Null,
        body => serde_json::from_str(body).map_err(|_| broken("its answer is not JSON"))?,
    };
    match status {
        Some(200..=299) => Ok(body),
        Some(_) => {
            let words = body["fault_message"].as_str().unwrap_or("no reason given");
            Err(ApiError::Refused(words.to_owned()))
        }
        None => Err(broken("its answer is not HTTP")),
    }
}

/// A socket of the monitor in a directory that the monitor may write to.
#[derive(Debug, Clone)]
pub(super) struct Socket(pub(super) PathBuf);

impl Socket {
    /// Connects to what is a socket by itself, and not by a link to another program's.
    pub(super) async fn connect(&self) -> io::Result<UnixStream> {
        let socket = open(&self.0)?;
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) {
        FileType::Socket => Ok(socket),
        _ => Err(io::Error::other(format!("{} is not a socket", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    fn refused(answer: &str) -> String {
        match parse(answer.as_bytes()).unwrap_err() {
            ApiError::Refused(words) => words,
            ApiError::Broken(error) => format!("broken: {error}"),
        }
    }

    #[test]
    fn answers_are_told_apart() {
        assert_eq!(parse(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n").unwrap(), Value::Null);
        assert_eq!(parse(b"HTTP/1.1 200 \r\n\r\n{\"state\":\"Running\"}").unwrap()["state"], "Running");
        assert_eq!(refused("HTTP/1.1 400 \r\n\r\n{\"fault_message\":\"no\"}"), "no");
        assert_eq!(refused("HTTP/1.1 400 \r\n\r\n"), "no reason given");
        for nonsense in
            ["", "HTTP/1.1 204", "HTTP/1.1 \u{e9}\r\n\r\n", "SSH-2.0\r\n\r\n", "HTTP/1.1 200 \r\n\r\n{"]
        {
            assert!(refused(nonsense).starts_with("broken"), "{nonsense:?}");
        }
    }

    #[tokio::test]
    async fn a_request_is_asked_once_there_is_somebody() {
        let dir = tempfile::tempdir().unwrap();
        let api = Api::at(Socket(dir.path().join("api")));
        let waiting = tokio::spawn({
            let api = api.clone();
            async move { api.appears().await }
        });
        tokio::task::yield_now().await;
        let listener = UnixListener::bind(dir.path().join("api")).unwrap();
        waiting.await.unwrap().unwrap();
        drop(listener.accept().await.unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 256];
            let n = stream.read(&mut asked).await.unwrap();
            stream.write_all(b"HTTP/1.1 204 \r\n\r\n").await.unwrap();
            String::from_utf8_lossy(&asked[..n]).into_owned()
        });
        let request = Request::patch("/vm", serde_json::json!({"state": "Paused"}));
        api.ask(&request).await.unwrap();
        let asked = server.await.unwrap();
        assert!(
            asked.starts_with("PATCH /vm HTTP/1.1\r\n") && asked.ends_with("\r\n\r\n{\"state\":\"Paused\"}")
        );
        assert!(asked.contains("Content-Length: 18\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn a_link_to_another_programs_socket_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (other, link) = (dir.path().join("other"), dir.path().join("vsock"));
        let _other = UnixListener::bind(&other).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert!(Socket(other).connect().await.is_ok());
        assert!(Socket(link).connect().await.unwrap_err().to_string().contains("is not a socket"));
    }
}
