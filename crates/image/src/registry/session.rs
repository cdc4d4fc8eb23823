//! A conversation with one registry about one repository (OCI distribution spec).
//!
//! Written upon an HTTP client rather than a registry client, because a registry is not to be trusted: everything that
//! is read whole has a bound and a deadline, only the registry itself is shown our credentials, and one on this machine
//! is never reached by way of a proxy.

use std::time::Duration;

use futures::StreamExt;
use oci_spec::image::MediaType;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::auth::{self, Challenge, Credentials, TokenRequest};
use super::{MANIFEST_TYPES, certificates, credentials, known_type};
use crate::error::Result;
use crate::options::PullOptions;
use crate::store::{is_index, verify};
use crate::{Digest, Error, Reference};

/// How long a registry may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a registry may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a manifest or token may take, however steadily it trickles in.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(120);
/// Attempts in a row that bring next to nothing before the registry is given up.
pub(super) const ATTEMPTS: u32 = 4;
/// The pause before the second attempt; it doubles each time.
pub(super) const PAUSE: Duration = Duration::from_millis(250);
/// Bytes of a token server's reply. Tokens are headers later, so they are far smaller.
const MAX_TOKEN_REPLY: u64 = 256 << 10;

/// A registry, and what identifies us to it.
pub(super) struct Session {
    http: reqwest::Client,
    /// `https://HOST/v2/`, or by plain HTTP.
    base: Url,
    reference: Reference,
    credentials: Credentials,
    /// The `Authorization` that the registry wants, once it has asked for one.
    authorization: Mutex<Option<HeaderValue>>,
    document_size: u64,
}

/// A manifest or index as the registry has it.
pub(super) struct Document {
    pub json: Vec<u8>,
    pub digest: oci_spec::image::Digest,
    pub media_type: MediaType,
    pub is_index: bool,
}

/// Why a request brought nothing.
pub(super) enum Refusal {
    /// There is no talking to the registry.
    Connection(reqwest::Error),
    /// It answers with this status.
    Status(StatusCode),
    /// What it says makes no sense.
    Nonsense(String),
    /// Its answer has more than this many bytes.
    TooLong(u64),
}

/// The fields by which the kinds of documents can be told.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: u32,
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
}

impl Session {
    /// Finds the credentials for the repository. Nothing is sent yet.
    pub(super) async fn open(
        reference: &Reference,
        options: &PullOptions,
        document_size: u64,
    ) -> Result<Session> {
        let registry = reference.as_oci().resolve_registry();
        let local = is_local(registry);
        let scheme = if local { "http" } else { "https" };
        let url = format!("{scheme}://{registry}/v2/");
        let base =
            url.parse().map_err(|error| failure(reference, "pull", format!("{url} is no URL: {error}")))?;
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(concat!("kapsel/", env!("CARGO_PKG_VERSION")))
            .https_only(!local);
        // A proxy is elsewhere, where our loopback addresses mean something else. (Go, and so Docker, has it alike.)
        let http = if local {
            http.no_proxy()
        } else {
            certificates::apply(http, &options.certificates, reference)?
        };
        Ok(Session {
            http: http.build().map_err(|error| failure(reference, "pull", describe(&error)))?,
            base,
            reference: reference.clone(),
            credentials: credentials::find(reference, &options.auth).await?,
            authorization: Mutex::new(None),
            document_size,
        })
    }

    pub(super) fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Gets the manifest or index that the reference names, or the one with the digest. It is verified where its
    /// digest is known beforehand.
    pub(super) async fn manifest(&self, digest: Option<Digest>) -> Result<Document> {
        let wanted = digest.or(self.reference.digest());
        let tag = self.reference.tag().unwrap_or("latest");
        let name = wanted.map_or_else(|| tag.to_owned(), |digest| digest.to_string());
        let fetched = tokio::time::timeout(DOCUMENT_TIMEOUT, self.fetch_patiently(&name)).await;
        let (json, content_type) =
            fetched.unwrap_or_else(|_| Err(slow())).map_err(|refusal| match refusal {
                Refusal::TooLong(limit) => {
                    let what = format!("the manifest of {}", self.reference.familiar());
                    Error::limit(what, "document_size", limit)
                }
                other => self.error(&format!("get the manifest of {}", self.reference.familiar()), &other),
            })?;
        self.document(json, wanted, content_type)
    }

    /// Tries again what may succeed later.
    async fn fetch_patiently(&self, name: &str) -> Result<(Vec<u8>, Option<MediaType>), Refusal> {
        for attempt in 0..ATTEMPTS - 1 {
            match self.fetch_manifest(name).await {
                Err(refusal) if refusal.is_momentary() => {
                    tracing::debug!(reason = refusal.reason(), "the registry is asked again");
                    tokio::time::sleep(PAUSE * 2u32.pow(attempt)).await;
                }
                fetched => return fetched,
            }
        }
        self.fetch_manifest(name).await
    }

    async fn fetch_manifest(&self, name: &str) -> Result<(Vec<u8>, Option<MediaType>), Refusal> {
        let accept = HeaderValue::from_str(&MANIFEST_TYPES.join(", "));
        let accept = accept.map_err(|error| Refusal::Nonsense(error.to_string()))?;
        let response =
            self.get(&format!("manifests/{name}"), HeaderMap::from_iter([(ACCEPT, accept)])).await?;
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.and_then(known_type);
        Ok((read_whole(response, self.document_size).await?, content_type))
    }

    /// Begins to get a blob from the byte `offset` on. Also returns where the answer really begins: not every registry
    /// can continue.
    pub(super) async fn blob(&self, digest: &Digest, offset: u64) -> Result<(Response, u64), Refusal> {
        let mut headers = HeaderMap::new();
        if offset > 0 {
            let range = HeaderValue::from_str(&format!("bytes={offset}-"));
            headers.insert(RANGE, range.map_err(|error| Refusal::Nonsense(error.to_string()))?);
        }
        let response = self.get(&format!("blobs/{digest}"), headers).await?;
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => range_start(response.headers())
                .ok_or_else(|| Refusal::Nonsense("it answers with a part and does not say which".into()))?,
            _ => 0,
        };
        Ok((response, start))
    }

    /// Asks for something of the repository. Logs in when the registry asks for it, and anew when a token has expired.
    async fn get(&self, path: &str, headers: HeaderMap) -> Result<Response, Refusal> {
        let path = format!("{}/{path}", self.reference.repository());
        let url = self.base.join(&path).map_err(|error| Refusal::Nonsense(error.to_string()))?;
        let mut authorization = self.authorization.lock().await.clone();
        let mut refused = false;
        loop {
            let mut request = self.http.get(url.clone()).headers(headers.clone());
            if let Some(authorization) = &authorization {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let response = request.send().await.map_err(Refusal::Connection)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            // Another server, to which the registry has sent us, is not shown our credentials.
            let ours = response.url().origin() == self.base.origin();
            match Challenge::find(response.headers()).filter(|_| ours && status == StatusCode::UNAUTHORIZED) {
                Some(challenge) if !refused => {
                    refused = true;
                    authorization = Some(self.log_in(challenge, authorization.as_ref()).await?);
                }
                _ => return Err(Refusal::Status(status)),
            }
        }
    }

    /// Answers a challenge; `refused` is what the registry did not accept. Of requests that are refused at once, one
    /// logs in.
    async fn log_in(
        &self,
        challenge: Challenge,
        refused: Option<&HeaderValue>,
    ) -> Result<HeaderValue, Refusal> {
        let mut current = self.authorization.lock().await;
        if let Some(newer) = current.as_ref().filter(|current| Some(*current) != refused) {
            return Ok(newer.clone());
        }
        let header = match (challenge, &self.credentials) {
            (Challenge::Bearer { realm, service }, _) => self.token(&realm, service.as_deref()).await?,
            (Challenge::Basic, Credentials::Basic { user, password }) => {
                let request = self.http.get(self.base.clone()).basic_auth(user, Some(password));
                let headers = request.build().map_err(Refusal::Connection)?;
                let header = headers.headers().get(AUTHORIZATION).cloned();
                header.ok_or(Refusal::Status(StatusCode::UNAUTHORIZED))?
            }
            (Challenge::Basic, _) => return Err(Refusal::Status(StatusCode::UNAUTHORIZED)),
        };
        Ok(current.insert(header).clone())
    }

    /// Gets a token from the registry's token server.
    async fn token(&self, realm: &str, service: Option<&str>) -> Result<HeaderValue, Refusal> {
        let in_the_clear = self.base.scheme() == "http";
        let repository = self.reference.repository();
        let request = TokenRequest::new(realm, service, repository, &self.credentials, in_the_clear);
        let request = match (request.map_err(|reason| Refusal::Nonsense(cut(&reason)))?, &self.credentials) {
            (TokenRequest::Get(url), Credentials::Basic { user, password }) => {
                self.http.get(url).basic_auth(user, Some(password))
            }
            (TokenRequest::Get(url), _) => self.http.get(url),
            (TokenRequest::Post(url, form), _) => {
                self.http.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
        };
        let response = request.timeout(DOCUMENT_TIMEOUT).send().await.map_err(Refusal::Connection)?;
        match response.status() {
            status if !status.is_success() => return Err(Refusal::Status(status)),
            _ => {}
        }
        let reply = read_whole(response, MAX_TOKEN_REPLY).await.map_err(|refusal| match refusal {
            Refusal::TooLong(limit) => {
                Refusal::Nonsense(format!("its token server's reply is longer than {limit} bytes"))
            }
            other => other,
        })?;
        auth::bearer(&reply).map_err(Refusal::Nonsense)
    }

    fn document(
        &self,
        json: Vec<u8>,
        wanted: Option<Digest>,
        content_type: Option<MediaType>,
    ) -> Result<Document> {
        let what = format!("the manifest of {}", self.reference.familiar());
        let digest = Digest::of(&json);
        if let Some(wanted) = wanted {
            verify(&what, &wanted, &digest)?;
        }
        let probe: Probe =
            serde_json::from_slice(&json).map_err(|error| Error::malformed(what.clone(), error))?;
        if probe.schema_version != 2 {
            return Err(Error::Unsupported {
                what: format!("a manifest of schema version {}", probe.schema_version),
                advice: "the image is older than 2016; push it again with a current tool",
            });
        }
        // The document's own word counts more than the transport's.
        let own = probe.media_type.as_deref();
        let media_type = match own {
            Some(own) => known_type(own),
            None => content_type,
        };
        let shape = if probe.manifests.is_some() { MediaType::ImageIndex } else { MediaType::ImageManifest };
        let media_type = match (media_type, own) {
            (Some(media_type), _) => media_type,
            (None, None) => shape.clone(),
            (None, Some(own)) => {
                let what =
                    format!("{what}, which is of type {:?},", own.chars().take(80).collect::<String>());
                return Err(Error::Unsupported { what, advice: "it is not a container image" });
            }
        };
        if is_index(&media_type) != is_index(&shape) {
            return Err(Error::malformed(what, format!("it says that it is {media_type}, and is not")));
        }
        let digest: oci_spec::image::Digest =
            digest.to_string().parse().map_err(|error| Error::malformed(what, error))?;
        Ok(Document { json, digest, is_index: is_index(&media_type), media_type })
    }

    /// The error of a request.
    pub(super) fn error(&self, action: &str, refusal: &Refusal) -> Error {
        failure(&self.reference, action, refusal.reason())
    }
}

impl Refusal {
    /// Whether the same request may succeed later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Refusal::Connection(error) => !error.is_builder() && !error.is_redirect(),
            Refusal::Status(status) => {
                matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
                    || status.is_server_error()
            }
            Refusal::Nonsense(_) | Refusal::TooLong(_) => false,
        }
    }

    /// Whether it is worth asking again at once, where nothing has come of it yet. Who cannot be reached, or wants fewer
    /// requests, is not.
    fn is_momentary(&self) -> bool {
        match self {
            Refusal::Connection(error) => self.is_transient() && !error.is_connect() && !error.is_timeout(),
            Refusal::Status(status) => self.is_transient() && *status != StatusCode::TOO_MANY_REQUESTS,
            Refusal::Nonsense(_) | Refusal::TooLong(_) => false,
        }
    }

    /// What is wrong, and where known what to do.
    pub(super) fn reason(&self) -> String {
        match self {
            Refusal::Connection(error) => describe(error),
            Refusal::Status(status) => status_reason(*status),
            Refusal::Nonsense(reason) => reason.clone(),
            Refusal::TooLong(limit) => format!("its answer is longer than {limit} bytes"),
        }
    }
}

fn slow() -> Refusal {
    Refusal::Nonsense(format!("it has not answered for {} s; try again later", DOCUMENT_TIMEOUT.as_secs()))
}

/// Reads an answer of at most `limit` bytes.
async fn read_whole(response: Response, limit: u64) -> Result<Vec<u8>, Refusal> {
    let mut data = Vec::new();
    let mut body = response.bytes_stream();
    while let Some(piece) = body.next().await {
        data.extend_from_slice(&piece.map_err(Refusal::Connection)?);
        if data.len() as u64 > limit {
            return Err(Refusal::TooLong(limit));
        }
    }
    Ok(data)
}

/// The first byte's place in `Content-Range: bytes 7-9/10`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// The error of a registry.
pub(super) fn failure(reference: &Reference, action: &str, reason: String) -> Error {
    Error::Registry { action: action.to_owned(), registry: reference.registry().to_owned(), reason }
}

fn status_reason(status: StatusCode) -> String {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!(
                "{status}: the image does not exist or is private; check the name, or log in with `docker login`"
            )
        }
        StatusCode::NOT_FOUND => format!("{status}: there is no such image or tag; check the name"),
        StatusCode::TOO_MANY_REQUESTS => {
            format!("{status}: too many pulls; wait, or log in with `docker login`")
        }
        status if status.is_server_error() => format!("{status}: the registry has a fault; try again later"),
        status => status.to_string(),
    }
}

/// An error of the HTTP client with its causes, which its own message leaves out.
fn describe(error: &reqwest::Error) -> String {
    let mut text = if error.is_connect() {
        "it cannot be reached; check the registry's name and the network".to_owned()
    } else if error.is_timeout() {
        "it does not answer; try again later".to_owned()
    } else if error.is_redirect() {
        "it redirects to where kapsel does not follow; ask whoever runs it".to_owned()
    } else {
        "the connection failed; try again".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    cut(&text)
}

/// Keeps what a registry says from filling the screen.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(512).collect()
}

/// Whether the registry is on this machine, where plain HTTP is safe (as Docker has it).
fn is_local(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_spoken_to_in_the_clear() {
        for local in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3"] {
            assert!(is_local(local), "{local}");
        }
        for remote in
            ["example.test", "localhost.example.test:5000", "127.0.0.1.example.test", "10.0.0.1:5000"]
        {
            assert!(!is_local(remote), "{remote}");
        }
    }
}
