//! A newc cpio archive, as the kernel unpacks it for its first root.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path};

use kapsel_guest::cpio::Writer;

/// Permissions of the directories.
const DIRECTORY_MODE: u32 = 0o755;

/// Writes an archive entry by entry; the directories on the way to a file are made as they are needed.
pub struct Archive<W: Write> {
    writer: Writer<W>,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Archive { writer: Writer::new(out), directories: BTreeSet::new() }
    }

    /// Adds a file. `mode` is its permission bits.
    ///
    /// # Errors
    /// When the archive cannot be written, or `inside` is not a plain path, or the file is larger than 4 GiB.
    pub fn file(&mut self, inside: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
        let name = relative(inside)?;
        self.parents(&name)?;
        self.writer.file(&name, mode, content)
    }

    /// Adds a file of the host with its permission bits.
    ///
    /// # Errors
    /// When it cannot be read, and as [`Archive::file`].
    pub fn host_file(&mut self, host: &Path, inside: &Path) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", host.display()));
        let content = std::fs::read(host).map_err(named)?;
        let mode = std::fs::metadata(host).map_err(named)?.permissions().mode() & 0o777;
        self.file(inside, mode, &content)
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> io::Result<W> {
        let mut out = self.writer.finish()?;
        out.flush()?;
        Ok(out)
    }

    fn parents(&mut self, name: &str) -> io::Result<()> {
        for (slash, _) in name.match_indices('/') {
            let directory = &name[..slash];
            if self.directories.insert(directory.to_owned()) {
                self.writer.directory(directory, DIRECTORY_MODE)?;
            }
        }
        Ok(())
    }
}

/// The path without its leading slash; only plain components are allowed.
fn relative(path: &Path) -> io::Result<String> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(part) => parts.push(part.to_str().ok_or_else(|| invalid(path))?),
            _ => return Err(invalid(path)),
        }
    }
    if parts.is_empty() { Err(invalid(path)) } else { Ok(parts.join("/")) }
}

fn invalid(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{} cannot be the name of a file in the box", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_first_and_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file(Path::new("/a/b/one"), 0o755, b"12345").unwrap();
        archive.file(Path::new("a/b/two"), 0o644, b"").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);

        let mut names = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let from = at + 6 + n * 8;
                usize::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16).unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            let name = std::str::from_utf8(&bytes[at + 110..at + 110 + name_size - 1]).unwrap();
            names.push((name.to_owned(), field(1)));
            let content = (at + 110 + name_size).next_multiple_of(4);
            if name == "a/b/one" {
                assert_eq!(&bytes[content..content + size], b"12345");
            }
            if name == "TRAILER!!!" {
                break;
            }
            at = (content + size).next_multiple_of(4);
        }
        let expected = [
            ("a", 0o040_755),
            ("a/b", 0o040_755),
            ("a/b/one", 0o100_755),
            ("a/b/two", 0o100_644),
            ("TRAILER!!!", 0),
        ];
        assert_eq!(names, expected.map(|(name, mode)| (name.to_owned(), mode)));
    }

    #[test]
    fn names_that_leave_the_root_are_refused() {
        let mut archive = Archive::new(Vec::new());
        assert!(archive.file(Path::new("../etc/passwd"), 0o644, b"").is_err());
        assert!(archive.file(Path::new("/"), 0o644, b"").is_err());
    }
}
