//! Random access to the members of a tar file, or to the files of a directory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};
use crate::layer::tar_error;
use crate::store::read_bounded;
use crate::tar::{Kind, Reader};
use crate::{Error, Limits};

/// Members that an archive of images may have. A tar with more is a rootfs.
const MAX_MEMBERS: usize = 1 << 16;
/// Symbolic links that lead to one member: old archives of `docker save` have them between equal layers.
const MAX_LINKS: usize = 8;

/// An archive of images, in either form.
pub(super) enum Archive {
    Tar { file: File, what: String, members: HashMap<String, Member> },
    Directory { path: PathBuf },
}

pub(super) enum Member {
    Data { offset: u64, size: u64 },
    Link { target: String },
}

/// A member that is open for reading.
pub(super) struct Open {
    pub reader: Box<dyn Read>,
    pub size: u64,
}

impl Archive {
    pub(super) fn directory(path: &Path) -> Result<Archive> {
        Ok(Archive::Directory { path: path.to_owned() })
    }

    /// Reads the headers of a tar file. `what` names it in errors.
    pub(super) fn tar(file: File, what: &str, limits: &Limits) -> Result<Archive> {
        let mut members = HashMap::new();
        let mut input = BufReader::with_capacity(16 << 10, &file);
        let failed = |error: std::io::Error| Error::malformed(what, error);
        let mut position = input.seek(SeekFrom::Start(0)).map_err(failed)?;
        loop {
            // A reader of its own for each entry, so that its data can be skipped without being read.
            let mut reader = Reader::new(&mut input, limits);
            let Some(entry) =
                reader.next_entry().map_err(|error| archive_error(what, tar_error(what, error)))?
            else {
                break;
            };
            let (offset, size) = (position + reader.position(), reader.remaining());
            let skipped = size.next_multiple_of(512);
            position = offset + skipped;
            // Bounded by the limit on an entry's size, far below `i64::MAX` unless that is set so.
            input.seek_relative(skipped.try_into().unwrap_or(i64::MAX)).map_err(failed)?;
            let member = match entry.kind {
                Kind::File => Member::Data { offset, size },
                Kind::Symlink { target } => {
                    Member::Link { target: String::from_utf8_lossy(&target).into_owned() }
                }
                _ => continue,
            };
            if members.len() < MAX_MEMBERS {
                members.insert(normalise("", &String::from_utf8_lossy(&entry.path)), member);
            }
        }
        drop(input);
        let length = file.metadata().context("inspect", Path::new(what))?.len();
        if position > length {
            return Err(Error::malformed(what, "it is cut off in its last entry"));
        }
        Ok(Archive::Tar { file, what: what.to_owned(), members })
    }

    /// Names the archive in errors.
    pub(super) fn what(&self) -> String {
        match self {
            Archive::Tar { what, .. } => what.clone(),
            Archive::Directory { path } => path.display().to_string(),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Archive::Tar { .. } => self.locate(name).is_some(),
            Archive::Directory { path } => path.join(name).is_file(),
        }
    }

    /// Opens a member; an absent one is an error.
    pub(super) fn open(&self, name: &str) -> Result<Open> {
        let absent = || Error::malformed(self.what(), format!("it has no {name:?}"));
        match self {
            Archive::Tar { file, what, .. } => {
                let (offset, size) = self.locate(name).ok_or_else(absent)?;
                let file = file.try_clone().context("read", Path::new(what))?;
                Ok(Open { reader: Box::new(Window { file, offset, end: offset + size }), size })
            }
            Archive::Directory { path } => {
                // Names come from the archive: nothing outside of it may be read.
                let path = path.join(normalise("", name));
                let file = File::open(&path).context("open", &path)?;
                let metadata = file.metadata().context("inspect", &path)?;
                if !metadata.is_file() {
                    return Err(absent());
                }
                Ok(Open { reader: Box::new(file), size: metadata.len() })
            }
        }
    }

    /// Reads a small member whole.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let what = self.what();
        let open = self.open(name)?;
        read_bounded(open.reader, &format!("{name} in {what}"), limit, Path::new(&what))
    }

    /// Where a member of a tar is.
    fn locate(&self, name: &str) -> Option<(u64, u64)> {
        let Archive::Tar { members, .. } = self else { return None };
        let mut name = normalise("", name);
        for _ in 0..MAX_LINKS {
            match members.get(&name)? {
                Member::Data { offset, size } => return Some((*offset, *size)),
                Member::Link { target } => {
                    let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                    name = normalise(parent, target);
                }
            }
        }
        None
    }
}

/// Joins `name` to `parent` and resolves `.` and `..`, which stops at the archive's root.
fn normalise(parent: &str, name: &str) -> String {
    let mut components: Vec<&str> = Vec::new();
    for component in parent.split('/').chain(name.split('/')) {
        match component {
            "" | "." => {}
            ".." => drop(components.pop()),
            _ => components.push(component),
        }
    }
    components.join("/")
}

/// An archive is not a layer, whatever the tar reader calls it.
fn archive_error(what: &str, error: Error) -> Error {
    match error {
        Error::Layer { entry, reason, .. } => {
            Error::malformed(what, format!("{reason} (at or after entry {entry:?}); is it a tar archive?"))
        }
        other => other,
    }
}

/// A part of a file. Reads at positions of its own, since several may share one open file.
struct Window {
    file: File,
    offset: u64,
    end: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..length], self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside() {
        assert_eq!(normalise("", "./blobs//sha256/x"), "blobs/sha256/x");
        assert_eq!(normalise("a/b", "../c/layer.tar"), "a/c/layer.tar");
        assert_eq!(normalise("", "../../etc/shadow"), "etc/shadow");
    }
}
