//! Where kapsel's own helper programs are.

use std::path::{Path, PathBuf};

use crate::config::Config;

/// Owns one sandbox.
pub const SHIM: &str = "containerd-shim-kapsel-v2";
/// Serves one shared directory.
pub const FSD: &str = "kapsel-fsd";
/// Carries connections to published ports.
pub const FORWARD: &str = "kapsel-forward";
/// Process 1 of a guest; linked statically, hence not beside the others, which are built for the host.
pub const AGENT: &str = "kapsel-agent";
/// Runs one machine; linked statically as well.
pub const MONITOR: &str = "kapsel-vmm";

/// The directory of a program that is linked statically, beside that of the others.
fn apart(name: &str) -> Option<&'static str> {
    match name {
        AGENT => Some("guest"),
        MONITOR => Some("static"),
        _ => None,
    }
}

/// A program that is missing.
#[derive(Debug, thiserror::Error)]
#[error("cannot find {name}, looked at {}; set libexec in the configuration to the directory that holds it", list(.looked))]
pub struct Error {
    name: &'static str,
    looked: Vec<PathBuf>,
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Finds a helper: in the configured directory, beside this program, or where packages install it.
///
/// # Errors
/// Names all places that were looked at.
pub fn find(name: &'static str, config: &Config) -> Result<PathBuf, Error> {
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.parent().unwrap_or(Path::new("/"));
    // Tests run from `deps/` below the directory of the programs.
    let beside = if beside.ends_with("deps") { beside.parent().unwrap_or(beside) } else { beside };
    let mut looked = Vec::new();
    match config.libexec() {
        Some(dir) => {
            looked.extend(apart(name).map(|apart| dir.join(apart).join(name)));
            looked.push(dir.join(name));
        }
        None => {
            looked.push(apart(name).map_or(beside.to_owned(), |apart| beside.join(apart)).join(name));
            looked.push(beside.join("../libexec/kapsel").join(name));
        }
    }
    match looked.iter().position(|path| path.is_file()) {
        Some(at) => Ok(looked.swap_remove(at)),
        None => Err(Error { name, looked }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Key, Origin};

    #[test]
    fn a_missing_program_names_the_places() {
        let mut config = Config::default();
        config.set(Key::Libexec, "/nowhere".into(), Origin::Flag).unwrap();
        let error = find(FSD, &config).unwrap_err().to_string();
        assert!(error.contains("/nowhere/kapsel-fsd") && error.contains("libexec"), "{error}");
    }
}
