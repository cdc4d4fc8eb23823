//! A registry on a port of its own at 127.0.0.1 (OCI distribution spec, the pulling half), with faults to order.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::image::{BuiltImage, digest};

/// A running registry. It ends when dropped.
pub struct Registry {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// What is wrong with a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection breaks after this many bytes of an answer, this many times.
    Disconnect {
        /// Bytes of the answer's body that are sent.
        after: usize,
        /// How many answers are so treated.
        times: usize,
    },
    /// After this many bytes of an answer nothing more comes, until it is healed.
    Stall(usize),
    /// The blob ends early, and the registry says so in Content-Length.
    Truncated(usize),
    /// One byte is wrong.
    Corrupt,
    /// The answer is this status, this many times.
    Status {
        /// The HTTP status.
        code: u16,
        /// How many answers are so treated.
        times: usize,
    },
    /// Range requests are answered with the whole blob.
    NoRange,
    /// Each answer takes this long, in milliseconds.
    Slow(u64),
}

#[derive(Default)]
struct State {
    /// Manifests by repository and by tag or digest, with their media type.
    manifests: HashMap<(String, String), (String, Vec<u8>)>,
    blobs: HashMap<String, Vec<u8>>,
    faults: HashMap<String, Fault>,
    auth: Auth,
    /// How often tokens have been changed.
    token_epoch: u32,
    /// What the token server says instead of giving a token.
    token_reply: Option<Vec<u8>>,
    /// Another registry, which has the blobs.
    blobs_at: Option<SocketAddr>,
    requests: Vec<Request>,
    stopped: bool,
}

#[derive(Clone, Default)]
enum Auth {
    #[default]
    Open,
    Basic(String, String),
    Token(String, String),
    Identity(String),
}

/// A request that the registry has seen.
#[derive(Clone, Debug)]
pub struct Request {
    /// The path with its query.
    pub path: String,
    /// The first byte asked for, in a range request.
    pub range_start: Option<usize>,
    /// Bytes of the answer's body that were sent.
    pub sent: usize,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    body: String,
}

impl Registry {
    /// Starts an empty registry that everybody may use.
    pub fn start() -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if lock(&shared).stopped {
                    return;
                }
                let shared = shared.clone();
                std::thread::spawn(move || {
                    // A client that goes away is its own affair.
                    let _ = serve(&connection?, address, &shared);
                    Ok::<_, std::io::Error>(())
                });
            }
        });
        Registry { address, state }
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The complete name of an image here.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Wants this user's name and password with every request.
    pub fn require_basic(&self, user: &str, password: &str) {
        lock(&self.state).auth = Auth::Basic(user.into(), password.into());
    }

    /// Wants a token, which it gives for this user's name and password; for none of them if the name is empty.
    pub fn require_token(&self, user: &str, password: &str) {
        lock(&self.state).auth = Auth::Token(user.into(), password.into());
    }

    /// Wants a token, which it gives for this identity token.
    pub fn require_identity(&self, identity_token: &str) {
        lock(&self.state).auth = Auth::Identity(identity_token.into());
    }

    /// No longer accepts the tokens that it has given so far.
    pub fn expire_tokens(&self) {
        lock(&self.state).token_epoch += 1;
    }

    /// Answers requests for a token with this body.
    pub fn token_reply(&self, body: impl Into<Vec<u8>>) {
        lock(&self.state).token_reply = Some(body.into());
    }

    /// Sends clients that want a blob to another registry.
    pub fn redirect_blobs(&self, to: &Registry) {
        lock(&self.state).blobs_at = Some(to.address);
    }

    /// Adds an image under a repository and tag.
    pub fn push(&self, repository: &str, tag: &str, image: &BuiltImage) {
        self.push_blobs(image);
        self.push_manifest(
            repository,
            tag,
            "application/vnd.oci.image.manifest.v1+json",
            image.manifest.clone(),
        );
    }

    /// Adds an index over images for platforms (`os/architecture` or `os/architecture/variant`).
    pub fn push_index(&self, repository: &str, tag: &str, images: &[(&str, &BuiltImage)]) {
        let entries = images.iter().map(|(platform, image)| {
            self.push(repository, &image.digest(), image);
            let mut parts = platform.split('/');
            let mut entry = image.descriptor();
            entry["platform"] = serde_json::json!({ "os": parts.next(), "architecture": parts.next() });
            if let Some(variant) = parts.next() {
                entry["platform"]["variant"] = variant.into();
            }
            entry
        });
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": entries.collect::<Vec<_>>(),
        });
        let index = serde_json::to_vec(&index).unwrap();
        self.push_manifest(repository, tag, "application/vnd.oci.image.index.v1+json", index);
    }

    /// Adds any document as a manifest.
    pub fn push_manifest(&self, repository: &str, tag: &str, media_type: &str, json: Vec<u8>) {
        let mut state = lock(&self.state);
        for name in [tag.to_owned(), digest(&json)] {
            state.manifests.insert((repository.to_owned(), name), (media_type.to_owned(), json.clone()));
        }
    }

    fn push_blobs(&self, image: &BuiltImage) {
        let mut state = lock(&self.state);
        for blob in image.blobs() {
            state.blobs.insert(digest(&blob), blob);
        }
    }

    /// Makes a blob (by digest) or a manifest (by tag or digest) faulty.
    pub fn fault(&self, name: &str, fault: Fault) {
        lock(&self.state).faults.insert(name.to_owned(), fault);
    }

    /// Makes a blob or manifest sound again.
    pub fn heal(&self, name: &str) {
        lock(&self.state).faults.remove(name);
    }

    /// The requests so far whose path contains `text`.
    pub fn requests(&self, text: &str) -> Vec<Request> {
        lock(&self.state).requests.iter().filter(|request| request.path.contains(text)).cloned().collect()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        lock(&self.state).stopped = true;
        // Wakes the listener, so that it sees the end.
        let _ = TcpStream::connect(self.address);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap()
}

/// Serves one request and closes the connection.
fn serve(stream: &TcpStream, address: SocketAddr, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut input = BufReader::new(stream);
    let Some(mut request) = read_request(&mut input)? else { return Ok(()) };
    let answer = answer(&request, address, state);
    if answer.delay > Duration::ZERO {
        std::thread::sleep(answer.delay);
    }
    request.sent = answer.body.len().min(answer.cut);
    lock(state).requests.push(request.clone());
    let mut head = format!(
        "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
        answer.code,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut output = stream;
    output.write_all(head.as_bytes())?;
    output.write_all(b"\r\n")?;
    output.write_all(&answer.body[..request.sent])?;
    output.flush()?;
    if answer.stalls {
        wait_for_healing(&request.path, state);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // Until the client has closed, so that a reset does not destroy what it has not read yet.
    let _ = std::io::copy(&mut (&mut input).take(1 << 16), &mut std::io::sink());
    Ok(())
}

fn read_request(input: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    input.take(1 << 16).read_line(&mut line)?;
    let Some(path) = line.split(' ').nth(1) else { return Ok(None) };
    let path = path.to_owned();
    let mut request = Request { path, range_start: None, sent: 0, authorization: None, body: String::new() };
    let mut length = 0;
    loop {
        let mut line = String::new();
        input.take(1 << 16).read_line(&mut line)?;
        let line = line.trim();
        let Some((name, value)) = line.split_once(':') else {
            input.take(length).read_to_string(&mut request.body)?;
            return Ok(Some(request));
        };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.trim().to_owned()),
            "content-length" => length = value.trim().parse().unwrap_or(0),
            "range" => {
                let start = value.trim().trim_start_matches("bytes=").split('-').next();
                request.range_start = start.and_then(|start| start.parse().ok());
            }
            _ => {}
        }
    }
}

struct Answer {
    code: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection is closed.
    cut: usize,
    /// Whether it is held open before that.
    stalls: bool,
    delay: Duration,
}

impl Answer {
    fn new(code: u16, body: Vec<u8>) -> Answer {
        Answer { code, headers: Vec::new(), body, cut: usize::MAX, stalls: false, delay: Duration::ZERO }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }
}

fn answer(request: &Request, address: SocketAddr, state: &Mutex<State>) -> Answer {
    let mut state = lock(state);
    if request.path.starts_with("/token") {
        return token(request, &state);
    }
    if let Some(refusal) = check_auth(request, address, &state) {
        return refusal;
    }
    let parts: Vec<&str> = request.path.trim_start_matches("/v2/").split('/').collect();
    match &parts[..] {
        [""] => Answer::new(200, b"{}".to_vec()),
        [repository @ .., "manifests", name] => {
            let key = (repository.join("/"), (*name).to_owned());
            match state.manifests.get(&key).cloned() {
                Some((media_type, json)) => {
                    let answer = Answer::new(200, json).with("Content-Type", media_type);
                    with_fault(answer, request, name, &mut state)
                }
                None => Answer::new(404, br#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#.to_vec()),
            }
        }
        [.., "blobs", _] if let Some(other) = state.blobs_at => {
            Answer::new(307, Vec::new()).with("Location", format!("http://{other}{}", request.path))
        }
        [.., "blobs", name] => match state.blobs.get(*name).cloned() {
            Some(blob) => with_fault(Answer::new(200, blob), request, name, &mut state),
            None => Answer::new(404, br#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#.to_vec()),
        },
        _ => Answer::new(404, Vec::new()),
    }
}

fn token(request: &Request, state: &State) -> Answer {
    if let Some(reply) = &state.token_reply {
        return Answer::new(200, reply.clone());
    }
    let granted = match &state.auth {
        Auth::Token(user, _) if user.is_empty() && request.authorization.is_none() => true,
        Auth::Token(user, password) => request.authorization.as_deref() == Some(&basic(user, password)),
        Auth::Identity(token) => {
            let form: Vec<&str> = request.body.split('&').collect();
            form.contains(&"grant_type=refresh_token") && form.contains(&&*format!("refresh_token={token}"))
        }
        Auth::Open | Auth::Basic(..) => return Answer::new(404, Vec::new()),
    };
    if !granted {
        return Answer::new(401, b"{}".to_vec());
    }
    let name = if matches!(state.auth, Auth::Identity(_)) { "access_token" } else { "token" };
    Answer::new(200, format!(r#"{{"{name}":"{}"}}"#, state.token()).into_bytes())
}

impl State {
    fn token(&self) -> String {
        format!("a-token-of-the-test-registry-{}", self.token_epoch)
    }
}

fn check_auth(request: &Request, address: SocketAddr, state: &State) -> Option<Answer> {
    let (expected, challenge) = match &state.auth {
        Auth::Open => return None,
        Auth::Basic(user, password) => (basic(user, password), "Basic realm=\"test\"".to_owned()),
        Auth::Token(..) | Auth::Identity(_) => {
            let challenge = format!("Bearer realm=\"http://{address}/token\",service=\"test\"");
            (format!("Bearer {}", state.token()), challenge)
        }
    };
    let denied = br#"{"errors":[{"code":"UNAUTHORIZED"}]}"#.to_vec();
    (request.authorization.as_ref() != Some(&expected))
        .then(|| Answer::new(401, denied).with("WWW-Authenticate", challenge))
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))
}

/// Base64 with padding (RFC 4648).
pub fn base64(data: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in data.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, &b| bits << 8 | u32::from(b)) << (8 * (3 - group.len()));
        for i in 0..4 {
            let sextet = bits >> (18 - 6 * i) & 63;
            text.push(if i <= group.len() { char::from(ALPHABET[sextet as usize]) } else { '=' });
        }
    }
    text
}

/// Waits until what the path names stalls no longer, or the registry has ended.
fn wait_for_healing(path: &str, state: &Mutex<State>) {
    let name = path.rsplit('/').next().unwrap_or_default();
    let stalls = |state: &State| !state.stopped && matches!(state.faults.get(name), Some(Fault::Stall(_)));
    while stalls(&lock(state)) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Applies the blob's fault, then the request's range.
fn with_fault(mut answer: Answer, request: &Request, name: &str, state: &mut State) -> Answer {
    let mut ranges = true;
    let mut spent = false;
    match state.faults.get_mut(name) {
        None => {}
        Some(Fault::Disconnect { after, times }) => {
            answer.cut = *after;
            *times -= 1;
            spent = *times == 0;
        }
        Some(Fault::Status { code, times }) => {
            answer = Answer::new(*code, Vec::new());
            ranges = false;
            *times -= 1;
            spent = *times == 0;
        }
        Some(Fault::Stall(after)) => (answer.cut, answer.stalls) = (*after, true),
        Some(Fault::Truncated(length)) => answer.body.truncate(*length),
        Some(Fault::Corrupt) => {
            let middle = answer.body.len() / 2;
            answer.body[middle] ^= 0x40;
        }
        Some(Fault::NoRange) => ranges = false,
        Some(Fault::Slow(milliseconds)) => answer.delay = Duration::from_millis(*milliseconds),
    }
    if spent {
        state.faults.remove(name);
    }
    match request.range_start.filter(|_| ranges) {
        Some(start) if start >= answer.body.len() => Answer::new(416, Vec::new()),
        Some(start) => {
            let total = answer.body.len();
            answer.body.drain(..start);
            answer.code = 206;
            answer.with("Content-Range", format!("bytes {start}-{}/{total}", total - 1))
        }
        None => answer,
    }
}
