//! Certificates for private registries, where Docker and Podman have them (`containers-certs.d(5)`).
//!
//! A directory is named after its registry, `HOST[:PORT]`. It holds authorities (`*.crt`), which are believed beside those of
//! the system, and at most one pair by which we identify ourselves (`NAME.cert` and `NAME.key`). Only that registry is spoken
//! to with them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use reqwest::{Certificate, ClientBuilder, Identity};

use crate::error::{IoContext, Result};
use crate::store::read_small;
use crate::{Error, Reference};

/// Bytes of a file.
const MAX_SIZE: u64 = 1 << 20;
/// Files of a directory.
const MAX_FILES: usize = 100;

/// Has the client believe and show what the directories hold for the reference's registry.
pub(super) fn apply(
    mut client: ClientBuilder,
    directories: &[PathBuf],
    reference: &Reference,
) -> Result<ClientBuilder> {
    let bad = |path: &Path, reason: String| Error::Credentials {
        registry: reference.registry().to_owned(),
        path: path.to_owned(),
        reason,
    };
    let mut ours: Option<PathBuf> = None;
    for path in directories.iter().map(|directory| directory.join(reference.registry())) {
        let files = files(&path)?;
        if files.len() > MAX_FILES {
            return Err(bad(&path, format!("it has more than {MAX_FILES} files")));
        }
        for file in files {
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => {
                    let authorities =
                        Certificate::from_pem_bundle(&read(&file)?).map_err(|e| bad(&file, e.to_string()))?;
                    if authorities.is_empty() {
                        return Err(bad(&file, "it has no certificate in PEM form".into()));
                    }
                    client = client.tls_certs_merge(authorities);
                }
                // Whether its other half is there, which is read below.
                Some("key") => drop(read(&file.with_extension("cert"))?),
                Some("cert") => {
                    if let Some(other) = &ours {
                        return Err(bad(&file, format!("{} identifies us already", other.display())));
                    }
                    client = client.identity(identity(&file).map_err(|reason| bad(&file, reason))?);
                    ours = Some(file);
                }
                _ => {}
            }
        }
    }
    Ok(client)
}

/// The certificate in the file and the key beside it.
fn identity(file: &Path) -> Result<Identity, String> {
    let key = file.with_extension("key");
    let mut pem = read(file).map_err(|error| error.to_string())?;
    pem.push(b'\n');
    pem.extend(read(&key).map_err(|error| error.to_string())?);
    // The library's own message may quote what it stumbled over, which may be the key.
    Identity::from_pem(&pem).map_err(|_| format!("it and {} are no pair in PEM form", key.display()))
}

/// The directory's files in the order of their names, or a few more than it may have; none if there is no such directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        entries => entries.context("list", directory)?,
    };
    let mut files = Vec::new();
    for entry in entries.take(MAX_FILES + 1) {
        files.push(entry.context("list", directory)?.path());
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let missing = || std::io::Error::from(ErrorKind::NotFound);
    read_small(path, MAX_SIZE)?.ok_or_else(missing).context("open", path)
}
