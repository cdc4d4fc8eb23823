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
    for path in directories.iter().map(|directory| directory.join(reference.registry())) {
        let bad = |path: &Path, reason: String| Error::Credentials {
            registry: reference.registry().to_owned(),
            path: path.to_owned(),
            reason,
        };
        for file in files(&path)? {
            let extension = file.extension().and_then(|extension| extension.to_str());
            match extension {
                Some("crt") => {
                    let pem = read(&file)?;
                    let authorities =
                        Certificate::from_pem_bundle(&pem).map_err(|e| bad(&file, e.to_string()))?;
                    if authorities.is_empty() {
                        return Err(bad(&file, "it has no certificate in PEM form".into()));
                    }
                    client = client.tls_certs_merge(authorities);
                }
                Some("cert") => {
                    let key = file.with_extension("key");
                    let mut pem = read(&file)?;
                    pem.push(b'\n');
                    pem.extend(read(&key)?);
                    // The library's own message may quote what it stumbled over, which may be the key.
                    let identity = Identity::from_pem(&pem).map_err(|_| {
                        bad(&file, format!("it and {} are no pair in PEM form", key.display()))
                    })?;
                    client = client.identity(identity);
                }
                _ => {}
            }
        }
    }
    Ok(client)
}

/// The directory's files in the order of their names; none if there is no such directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        entries => entries.context("list", directory)?,
    };
    let mut files = Vec::new();
    for entry in entries.take(MAX_FILES) {
        files.push(entry.context("list", directory)?.path());
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let missing = || std::io::Error::from(ErrorKind::NotFound);
    read_small(path, MAX_SIZE)?.ok_or_else(missing).context("open", path)
}
