//! Credentials as `docker login` left them: `config.json` and credential helpers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::auth::Credentials;
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
pub(super) async fn find(reference: &Reference, auth: &Auth) -> Result<Credentials> {
    match auth {
        Auth::Anonymous => Ok(Credentials::Anonymous),
        Auth::Basic { username, password } => {
            Ok(Credentials::Basic { user: username.clone(), password: password.clone() })
        }
        Auth::Docker => match config_path() {
            Some(path) => from_config(reference, &path).await,
            None => Ok(Credentials::Anonymous),
        },
    }
}

fn config_path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")))?;
    Some(dir.join("config.json"))
}

async fn from_config(reference: &Reference, path: &Path) -> Result<Credentials> {
    let failed = |reason: String| Error::Credentials {
        registry: reference.registry().to_owned(),
        path: path.to_owned(),
        reason,
    };
    let Some(json) = crate::store::read_small(path, MAX_SIZE)? else { return Ok(Credentials::Anonymous) };
    // The library's own message would quote what it stumbled over, which may be a password.
    let malformed = |error: serde_json::Error| {
        failed(format!("it is no docker configuration (line {}, column {})", error.line(), error.column()))
    };
    let config: DockerConfig = serde_json::from_slice(&json).map_err(malformed)?;

    let hosts = [reference.registry(), reference.as_oci().resolve_registry()];
    let ours = |key: &str| hosts.contains(&host_of(key));
    let own_helper = config.cred_helpers.iter().find(|(key, _)| ours(key)).map(|(_, helper)| helper);
    if let Some(helper) = own_helper.or(config.creds_store.as_ref()).filter(|helper| !helper.is_empty()) {
        let found = ask_helper(helper, &server_name(reference)).await.map_err(&failed)?;
        if let Some(answer) = found {
            return Ok(login(answer.username, answer.secret));
        }
    }
    match config.auths.iter().find(|(key, _)| ours(key)) {
        Some((_, entry)) => from_entry(entry).map_err(failed),
        None => Ok(Credentials::Anonymous),
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

fn from_entry(entry: &AuthEntry) -> Result<Credentials, String> {
    if let Some(token) = entry.identitytoken.as_ref().filter(|token| !token.is_empty()) {
        return Ok(Credentials::IdentityToken(token.clone()));
    }
    if let Some(auth) = entry.auth.as_ref().filter(|auth| !auth.is_empty()) {
        let malformed = || "its \"auth\" is not the base64 of USER:PASSWORD".to_owned();
        let decoded = base64::engine::general_purpose::STANDARD.decode(auth).map_err(|_| malformed())?;
        let text = String::from_utf8(decoded).map_err(|_| malformed())?;
        let (user, password) = text.split_once(':').ok_or_else(malformed)?;
        return Ok(login(user.to_owned(), password.trim_end_matches('\0').to_owned()));
    }
    match (&entry.username, &entry.password) {
        (Some(user), Some(password)) => Ok(login(user.clone(), password.clone())),
        _ => Ok(Credentials::Anonymous),
    }
}

/// A user's name and secret, which Docker stores for identity tokens too.
fn login(user: String, secret: String) -> Credentials {
    match user.as_str() {
        TOKEN_USER => Credentials::IdentityToken(secret),
        _ => Credentials::Basic { user, password: secret },
    }
}

/// Runs `docker-credential-HELPER get`; `None` if it has no credentials for the server.
async fn ask_helper(helper: &str, server: &str) -> Result<Option<HelperAnswer>, String> {
    // It becomes a part of a program's name, and nothing else.
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(format!("{helper:?} is not the name of a credential helper"));
    }
    query(Path::new(&format!("docker-credential-{helper}")), server, HELPER_TIMEOUT).await
}

/// Asks a helper, which has to answer in time and not at length; it is told the server on its standard input, as its
/// protocol wants.
async fn query(program: &Path, server: &str, patience: Duration) -> Result<Option<HelperAnswer>, String> {
    let name = program.display();
    let (success, output) = tokio::time::timeout(patience, run_helper(program, server))
        .await
        .map_err(|_| format!("{name} has not answered for {} s", patience.as_secs()))?
        .map_err(|error| format!("cannot run {name}: {error}"))?;
    if output.len() as u64 > MAX_SIZE {
        return Err(format!("{name} does not stop talking"));
    }
    if !success {
        let text = String::from_utf8_lossy(&output);
        if text.contains(HELPER_NOT_FOUND) {
            return Ok(None);
        }
        return Err(format!("{name} failed: {}", super::session::cut(text.trim())));
    }
    // What the helper printed may be a secret: it is not shown.
    serde_json::from_slice(&output)
        .map(Some)
        .map_err(|_| format!("{name} gave an answer that is not its protocol's"))
}

/// Runs a helper; gives whether it succeeded, and what it printed, of which one byte more than is allowed is read.
async fn run_helper(program: &Path, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut command = tokio::process::Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(server.as_bytes()).await {
            // It may know its answer without having asked for which server.
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_SIZE + 1).read_to_end(&mut output).await?;
    }
    if output.len() as u64 > MAX_SIZE {
        child.kill().await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    /// Asks a helper that is this script.
    fn ask(script: &str, patience: Duration) -> Result<Option<HelperAnswer>, String> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("docker-credential-test");
        // Written by another process: one that is forked meanwhile by another test would keep the file open for
        // writing, and then it cannot be run.
        let install = format!("cat > {0} && chmod 700 {0}", program.display());
        let mut shell =
            std::process::Command::new("sh").args(["-c", &install]).stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(
            &mut shell.stdin.take().unwrap(),
            format!("#!/bin/sh\n{script}\n").as_bytes(),
        )
        .unwrap();
        assert!(shell.wait().unwrap().success());
        assert_eq!(std::fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o700);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(query(&program, "registry.test", patience))
    }

    #[test]
    fn helpers_are_asked_by_their_protocol() {
        let long = Duration::from_secs(60);
        // Nothing but `get` is on its command line, where everybody could see it.
        let script = r#"read -r server; echo "{\"ServerURL\":\"$server\",\"Username\":\"$* of $server\",\"Secret\":\"s\"}""#;
        let answer = ask(script, long).unwrap().unwrap();
        assert_eq!((answer.username.as_str(), answer.secret.as_str()), ("get of registry.test", "s"));
        let hasty = ask(r#"exec <&-; echo '{"Username":"u","Secret":"s"}'"#, long).unwrap().unwrap();
        assert_eq!(hasty.username, "u");
        assert!(ask("echo credentials not found in native keychain; exit 1", long).unwrap().is_none());
        let refused = ask("echo the key ring is locked; exit 1", long).err().unwrap();
        assert!(refused.contains("the key ring is locked"), "{refused}");
        let nonsense = ask("echo top-secret", long).err().unwrap();
        assert!(nonsense.contains("protocol") && !nonsense.contains("top-secret"), "{nonsense}");
    }

    #[test]
    fn helpers_have_to_come_to_an_end() {
        let start = Instant::now();
        let silent = ask("exec sleep 100", Duration::from_millis(200)).err().unwrap();
        assert!(silent.contains("has not answered"), "{silent}");
        let endless = ask("exec cat /dev/zero", Duration::from_secs(60)).err().unwrap();
        assert!(endless.contains("does not stop talking"), "{endless}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_helper_is_a_word_and_no_path() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for bad in ["../x", "a b", "a/b", "a;b"] {
            let error = runtime.block_on(ask_helper(bad, "registry.test")).err().unwrap();
            assert!(error.contains("not the name"), "{error}");
        }
    }

    #[test]
    fn entries_of_the_configuration() {
        let entry = |json: &str| from_entry(&serde_json::from_str(json).unwrap());
        let basic = |user: &str, password: &str| {
            Ok(Credentials::Basic { user: user.into(), password: password.into() })
        };
        // dXNlcjpwOnc= is user:p:w, PHRva2VuPjp0 is <token>:t.
        for (json, expected) in [
            ("{}", Ok(Credentials::Anonymous)),
            (r#"{"auth":""}"#, Ok(Credentials::Anonymous)),
            (r#"{"auth":"dXNlcjpwOnc="}"#, basic("user", "p:w")),
            (r#"{"username":"u","password":"p"}"#, basic("u", "p")),
            (r#"{"auth":"dXNlcjpwOnc=","identitytoken":"t"}"#, Ok(Credentials::IdentityToken("t".into()))),
            (r#"{"auth":"PHRva2VuPjp0"}"#, Ok(Credentials::IdentityToken("t".into()))),
        ] {
            assert!(entry(json) == expected, "{json}");
        }
        for bad in [r#"{"auth":"%"}"#, r#"{"auth":"dXNlcg=="}"#] {
            assert!(entry(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_hosts_with_or_without_a_url_around_them() {
        for key in ["registry.test:5000", "https://registry.test:5000", "https://registry.test:5000/v1/"] {
            assert_eq!(host_of(key), "registry.test:5000", "{key}");
        }
    }
}
