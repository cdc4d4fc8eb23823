//! Telling conmon's engine that memory ran out.
//!
//! conmon, by which Podman and CRI-O start a runtime, watches the container's cgroup on the host for that, where a kernel kills nothing
//! when a guest's own kernel has. What it makes of it is an empty file `oom` (`write_oom_files` in its `src/cgroup.c`), which the engine
//! looks for once there is an exit code: in the directory of `--persist-dir`, or, as Podman 4, in that of `--bundle`. For a container in
//! a guest the stand-in makes it, before it ends.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use anyhow::Context;

/// The file.
const FILE: &str = "oom";
/// The options that name its directory.
const DIRS: [&str; 3] = ["--persist-dir", "--bundle", "-b"];

/// Makes the file where the engine of this process's parent looks for it. Who has another parent than conmon wants none.
///
/// # Errors
/// When it cannot be made.
pub fn tell() -> anyhow::Result<()> {
    let Some(parent) = rustix::process::getppid() else { return Ok(()) };
    let of_parent = |file: &str| fs::read(format!("/proc/{parent}/{file}")).unwrap_or_default();
    if of_parent("comm") != b"conmon\n" {
        return Ok(());
    }
    for dir in dirs(&of_parent("cmdline")).iter().filter(|dir| dir.is_absolute()) {
        let path = dir.join(FILE);
        fs::write(&path, "").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The directories on a command line of words that NUL bytes end.
fn dirs(line: &[u8]) -> Vec<PathBuf> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let values = (0..words.len()).filter_map(|n| value(words[n], words.get(n + 1).copied()));
    values.map(|value| Path::new(OsStr::from_bytes(value)).to_owned()).collect()
}

/// The value of the option that a word is, in the word itself or in the next.
fn value<'a>(word: &'a [u8], next: Option<&'a [u8]>) -> Option<&'a [u8]> {
    DIRS.iter().find_map(|name| match word.strip_prefix(name.as_bytes())? {
        [] => next,
        rest => rest.strip_prefix(b"=").filter(|_| name.starts_with("--")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_found_as_engines_write_them() {
        let of = |line: &str| dirs(line.replace(' ', "\0").as_bytes());
        let both = [PathBuf::from("/b"), "/p".into()];
        assert_eq!(of("conmon --api-version 1 -c x -b /b --persist-dir /p -p y "), both);
        assert_eq!(of("conmon --bundle=/b --persist-dir=/p "), both);
        for none in ["conmon -c x", "conmon --persist-dir", "conmon --bundles=/b", ""] {
            assert_eq!(of(none), [""; 0].map(PathBuf::from), "{none}");
        }
    }
}
