//! Credentials as `docker login` left them: `config.json` and credential helpers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::Result;
use crate::options::Auth;
use crate::{Error, Reference};

/// Bytes of `config.json`, and of a helper's answer.
const MAX_SIZE: u64 = 1 << 20;
/// How long a helper may take: it may ask a person to unlock a key ring.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// The user name by which a helper says that the secret is an identity token.
const TOKEN_USER: &str = "<token>";
/// What a helper prints when it has nothing (docker-credential-helpers, `credentials/error.go`).
const HELPER_NOT_FOUND: &str = "credentials not found";

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: HashMap<String, AuthEntry>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The credentials for the reference's registry.
pub(super) async fn find(reference: &Reference, auth: &Auth) -> Result<RegistryAuth> {
    match auth {
        Auth::Anonymous => Ok(RegistryAuth::Anonymous),
        Auth::Basic { username, password } => Ok(RegistryAuth::Basic(username.clone(), password.clone())),
        Auth::Docker => match config_path() {
            Some(path) => from_config(reference, &path).await,
            None => Ok(RegistryAuth::Anonymous),
        },
    }
}

fn config_path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")))?;
    Some(dir.join("config.json"))
}

async fn from_config(reference: &Reference, path: &Path) -> Result<RegistryAuth> {
    let failed = |reason: String| Error::Credentials {
        registry: reference.registry().to_owned(),
        path: path.to_owned(),
        reason,
    };
    let Some(json) = crate::store::read_small(path, MAX_SIZE)? else { return Ok(RegistryAuth::Anonymous) };
    let config: DockerConfig = serde_json::from_slice(&json).map_err(|error| failed(error.to_string()))?;

    let hosts = [reference.registry(), reference.as_oci().resolve_registry()];
    let ours = |key: &str| hosts.contains(&host_of(key));
    let own_helper = config.cred_helpers.iter().find(|(key, _)| ours(key)).map(|(_, helper)| helper);
    if let Some(helper) = own_helper.or(config.creds_store.as_ref()).filter(|helper| !helper.is_empty()) {
        let found = ask_helper(helper, &server_name(reference)).await.map_err(&failed)?;
        if let Some(answer) = found {
            return basic(answer.username, answer.secret).map_err(failed);
        }
    }
    match config.auths.iter().find(|(key, _)| ours(key)) {
        Some((_, entry)) => from_entry(entry).map_err(failed),
        None => Ok(RegistryAuth::Anonymous),
    }
}

/// The host in a key of `auths`, which may be a URL.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// What Docker calls the registry towards helpers: its host, but for the default registry the URL of its old API.
fn server_name(reference: &Reference) -> String {
    let (registry, resolved) = (reference.registry(), reference.as_oci().resolve_registry());
    if registry == resolved { registry.to_owned() } else { format!("https://{resolved}/v1/") }
}

fn from_entry(entry: &AuthEntry) -> Result<RegistryAuth, String> {
    if entry.identitytoken.as_ref().is_some_and(|token| !token.is_empty()) {
        return basic(TOKEN_USER.into(), String::new());
    }
    if let Some(auth) = entry.auth.as_ref().filter(|auth| !auth.is_empty()) {
        let malformed = || "its \"auth\" is not the base64 of USER:PASSWORD".to_owned();
        let decoded = base64::engine::general_purpose::STANDARD.decode(auth).map_err(|_| malformed())?;
        let text = String::from_utf8(decoded).map_err(|_| malformed())?;
        let (user, password) = text.split_once(':').ok_or_else(malformed)?;
        return basic(user.to_owned(), password.trim_end_matches('\0').to_owned());
    }
    match (&entry.username, &entry.password) {
        (Some(user), Some(password)) => basic(user.clone(), password.clone()),
        _ => Ok(RegistryAuth::Anonymous),
    }
}

fn basic(user: String, password: String) -> Result<RegistryAuth, String> {
    if user == TOKEN_USER {
        return Err(
            "it is an identity token, which is not supported; log in with a user name and a password".into(),
        );
    }
    Ok(RegistryAuth::Basic(user, password))
}

/// Runs `docker-credential-HELPER get`; `None` if it has no credentials for the server.
async fn ask_helper(helper: &str, server: &str) -> Result<Option<HelperAnswer>, String> {
    // It becomes a part of a program's name, and nothing else.
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(format!("{helper:?} is not the name of a credential helper"));
    }
    let program = format!("docker-credential-{helper}");
    let answer = tokio::time::timeout(HELPER_TIMEOUT, run_helper(&program, server)).await;
    let (success, output) = answer
        .map_err(|_| format!("{program} has not answered for {} s", HELPER_TIMEOUT.as_secs()))?
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if !success {
        let text = String::from_utf8_lossy(&output);
        if text.contains(HELPER_NOT_FOUND) {
            return Ok(None);
        }
        return Err(format!("{program} failed: {}", super::session::cut(text.trim())));
    }
    // What the helper printed may be a secret: it is not shown.
    serde_json::from_slice(&output)
        .map(Some)
        .map_err(|_| format!("{program} gave an answer that is not its protocol's"))
}

async fn run_helper(program: &str, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut command = tokio::process::Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(server.as_bytes()).await?;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_SIZE).read_to_end(&mut output).await?;
    }
    Ok((child.wait().await?.success(), output))
}
