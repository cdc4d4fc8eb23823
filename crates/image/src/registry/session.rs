//! A conversation with one registry about one repository.

use std::time::Duration;

use futures::StreamExt;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::{Client, Reference as OciReference, RegistryOperation, secrets::RegistryAuth};
use oci_spec::image::MediaType;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde::Deserialize;

use super::{MANIFEST_TYPES, credentials, known_type};
use crate::error::Result;
use crate::options::Auth;
use crate::store::{is_index, verify};
use crate::{Digest, Error, Reference};

/// How long a registry may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a registry may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A registry, and what identifies us to it.
pub(super) struct Session {
    client: Client,
    /// For manifests, which `oci-client` would read without a bound on their size.
    http: reqwest::Client,
    reference: Reference,
    auth: RegistryAuth,
    token: Option<String>,
    document_size: u64,
}

/// A manifest or index as the registry has it.
pub(super) struct Document {
    pub json: Vec<u8>,
    pub digest: oci_spec::image::Digest,
    pub media_type: MediaType,
    pub is_index: bool,
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
    /// Finds the credentials for the repository and, where the registry wants one, gets a token for them.
    pub(super) async fn open(reference: &Reference, auth: &Auth, document_size: u64) -> Result<Session> {
        let registry = reference.as_oci().resolve_registry().to_owned();
        let protocol = if is_local(&registry) {
            ClientProtocol::HttpsExcept(vec![registry])
        } else {
            ClientProtocol::Https
        };
        let config = ClientConfig {
            protocol,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("kapsel/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(config.user_agent)
            .build();
        let auth = credentials::find(reference, auth).await?;
        let mut session = Session {
            http: http.map_err(|error| failure(reference, "pull", describe(&error)))?,
            client: Client::new(config),
            reference: reference.clone(),
            auth,
            token: None,
            document_size,
        };
        let token = session.client.auth(reference.as_oci(), &session.auth, RegistryOperation::Pull).await;
        session.token = token.map_err(|error| session.error("log in to pull", error))?;
        Ok(session)
    }

    pub(super) fn reference(&self) -> &Reference {
        &self.reference
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn oci_reference(&self) -> &OciReference {
        self.reference.as_oci()
    }

    /// Gets the manifest or index that the reference names, or the one with the digest. It is verified where its
    /// digest is known beforehand.
    pub(super) async fn manifest(&self, digest: Option<Digest>) -> Result<Document> {
        let wanted = digest.or(self.reference.digest());
        let tag = self.reference.tag().unwrap_or("latest");
        let name = wanted.map_or_else(|| tag.to_owned(), |digest| digest.to_string());
        let registry = self.reference.as_oci().resolve_registry();
        let scheme = if is_local(registry) { "http" } else { "https" };
        let url = format!("{scheme}://{registry}/v2/{}/manifests/{name}", self.reference.repository());
        let mut request = self.http.get(url).header(ACCEPT, MANIFEST_TYPES.join(", "));
        request = match (&self.token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        };
        let action = format!("get the manifest of {}", self.reference.familiar());
        let failed = |reason| failure(&self.reference, &action, reason);
        let response = request.send().await.map_err(|error| failed(describe(&error)))?;
        if !response.status().is_success() {
            return Err(failed(status_reason(response.status())));
        }
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.and_then(known_type);
        let mut json = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(piece) = body.next().await {
            json.extend_from_slice(&piece.map_err(|error| failed(describe(&error)))?);
            if json.len() as u64 > self.document_size {
                let what = format!("the manifest of {}", self.reference.familiar());
                return Err(Error::limit(what, "document_size", self.document_size));
            }
        }
        self.document(json, wanted, content_type)
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

    /// Translates an error of the client.
    pub(super) fn error(&self, action: &str, error: OciDistributionError) -> Error {
        let reason = match error {
            OciDistributionError::RequestError(error) => describe(&error),
            OciDistributionError::ServerError { code, .. } => StatusCode::from_u16(code)
                .map_or_else(|_| format!("it answers with code {code}"), status_reason),
            OciDistributionError::UnauthorizedError { .. } => status_reason(StatusCode::UNAUTHORIZED),
            OciDistributionError::AuthenticationFailure(_) => status_reason(StatusCode::UNAUTHORIZED),
            other => cut(&other.to_string()),
        };
        failure(&self.reference, action, reason)
    }
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
