//! Tar archives of a container's files, and into them. Runs in a helper whose root is the container's; see [`crate::files`].

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use kapsel_protocol::api::{CopyResponse, StatResponse};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use tar::{Archive, Builder, EntryType, Header};

/// Hard links that are remembered; a tree with more of them has copies instead.
const LINKS_MAX: usize = 100_000;

fn context(doing: &str, path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{doing} {}: {error}", path.display()))
}

/// Looks at one path.
///
/// # Errors
/// Those of stat(2) and readlink(2).
pub fn stat(path: &str, follow: bool) -> io::Result<StatResponse> {
    let path = Path::new(path);
    let meta = look(path, follow).map_err(|e| context("looking at", path, e))?;
    let link_target = match meta.is_symlink() {
        true => fs::read_link(path)?.to_string_lossy().into_owned(),
        false => String::new(),
    };
    Ok(StatResponse {
        mode: meta.mode(),
        size: meta.len(),
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_s: meta.mtime(),
        link_target,
        ..Default::default()
    })
}

fn look(path: &Path, follow: bool) -> io::Result<Metadata> {
    if follow { fs::metadata(path) } else { fs::symlink_metadata(path) }
}

/// Packs `path` and all below into the archive that is written to `pipe`.
///
/// # Errors
/// When something cannot be read or the other side stops reading.
pub fn pack(path: &str, follow: bool, pipe: OwnedFd) -> io::Result<CopyResponse> {
    let path = Path::new(path);
    let name = PathBuf::from(path.file_name().unwrap_or(".".as_ref()));
    let top = look(path, follow).map_err(|e| context("looking at", path, e))?;
    let path = if follow { fs::canonicalize(path)? } else { path.to_owned() };
    let mut packer = Packer {
        tar: Builder::new(BufWriter::with_capacity(64 * 1024, File::from(pipe))),
        links: HashMap::new(),
        done: CopyResponse::default(),
    };
    let mut stack = vec![(path, name, top)];
    while let Some((path, name, meta)) = stack.pop() {
        packer.add(&path, &name, &meta).map_err(|e| context("packing", &path, e))?;
        if !meta.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&path).map_err(|e| context("reading", &path, e))? {
            let entry = entry?;
            match entry.metadata() {
                Ok(meta) => stack.push((entry.path(), name.join(entry.file_name()), meta)),
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(context("looking at", &entry.path(), error)),
            }
        }
    }
    packer.tar.into_inner()?.flush()?;
    Ok(packer.done)
}

struct Packer {
    tar: Builder<BufWriter<File>>,
    /// Where the first name of a file with several is.
    links: HashMap<(u64, u64), PathBuf>,
    done: CopyResponse,
}

impl Packer {
    fn add(&mut self, path: &Path, name: &Path, meta: &Metadata) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata(meta);
        header.set_size(0);
        let kind = meta.file_type();
        if kind.is_file() {
            return self.add_file(path, name, meta, header);
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            self.tar.append_link(&mut header, name, fs::read_link(path)?)?;
        } else if kind.is_socket() {
            // Means nothing without the process behind it.
            return Ok(());
        } else {
            if kind.is_char_device() || kind.is_block_device() {
                header.set_device_major(rustix::fs::major(meta.rdev()))?;
                header.set_device_minor(rustix::fs::minor(meta.rdev()))?;
            }
            self.tar.append_data(&mut header, name, io::empty())?;
        }
        self.done.entries += 1;
        Ok(())
    }

    fn add_file(&mut self, path: &Path, name: &Path, meta: &Metadata, mut header: Header) -> io::Result<()> {
        if meta.nlink() > 1 {
            if let Some(first) = self.links.get(&(meta.dev(), meta.ino())) {
                header.set_entry_type(EntryType::Link);
                self.tar.append_link(&mut header, name, first)?;
                self.done.entries += 1;
                return Ok(());
            }
            if self.links.len() < LINKS_MAX {
                self.links.insert((meta.dev(), meta.ino()), name.to_owned());
            }
        }
        // What was a file a moment ago may be a FIFO or a link by now.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY;
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP) => return Ok(()),
            other => other?,
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
            return Ok(());
        }
        // The header promises a size; a file that grows or shrinks meanwhile is cut or filled up to it.
        header.set_size(meta.len());
        let content = File::from(fd).chain(io::repeat(0)).take(meta.len());
        self.tar.append_data(&mut header, name, content)?;
        self.done.entries += 1;
        self.done.bytes += meta.len();
        Ok(())
    }
}

/// Unpacks the archive that is read from `pipe` into the directory `path`.
///
/// # Errors
/// When the directory does not exist, the archive is broken, or something cannot be written.
pub fn unpack(path: &str, keep_owner: bool, pipe: OwnedFd) -> io::Result<CopyResponse> {
    let dir = Path::new(path);
    // Names and hard links in the archive are relative to it.
    std::env::set_current_dir(dir).map_err(|e| context("entering", dir, e))?;
    rustix::process::umask(Mode::empty());
    let mut archive = Archive::new(BufReader::with_capacity(64 * 1024, File::from(pipe)));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(keep_owner);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(true);
    let mut done = CopyResponse::default();
    // Directories last, deepest first: their modes may forbid writing, and what is put in changes their times.
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let Some(name) = relative(&entry.path()?) else { continue };
        done.entries += 1;
        if entry.header().entry_type().is_dir() {
            fs::create_dir_all(&name).map_err(|e| context("making", &name, e))?;
            directories.push((name, entry));
            continue;
        }
        done.bytes +=
            unpack_entry(&name, keep_owner, &mut entry).map_err(|e| context("unpacking", &name, e))?;
    }
    directories.sort_by(|a, b| b.0.cmp(&a.0));
    for (name, mut directory) in directories {
        directory.unpack(&name).map_err(|e| context("finishing", &name, e))?;
    }
    // What follows the archive's end is read too, so that the other side never waits for a reader.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(done)
}

fn unpack_entry<R: Read>(name: &Path, keep_owner: bool, entry: &mut tar::Entry<'_, R>) -> io::Result<u64> {
    if let Some(parent) = name.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    let kind = match entry.header().entry_type() {
        EntryType::Char => FileType::CharacterDevice,
        EntryType::Block => FileType::BlockDevice,
        EntryType::Fifo => FileType::Fifo,
        _ => {
            entry.unpack(name)?;
            return Ok(entry.size());
        }
    };
    let header = entry.header();
    let device = |number: Option<u32>| number.unwrap_or(0);
    let number = rustix::fs::makedev(device(header.device_major()?), device(header.device_minor()?));
    match fs::remove_file(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    rustix::fs::mknodat(CWD, name, kind, Mode::from_raw_mode(header.mode()? & 0o7777), number)?;
    if keep_owner {
        let (uid, gid) = (header.uid()? as u32, header.gid()? as u32);
        std::os::unix::fs::lchown(name, Some(uid), Some(gid))?;
    }
    Ok(0)
}

/// A name in an archive as a path below the directory; `None` for the directory itself and for what leads out of it.
fn relative(path: &Path) -> Option<PathBuf> {
    let mut name = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => name.push(part),
            Component::ParentDir => return None,
            _ => {}
        }
    }
    (!name.as_os_str().is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below() {
        assert_eq!(relative(Path::new("/a/./b")), Some("a/b".into()));
        assert_eq!(relative(Path::new("a/../b")), None);
        assert_eq!(relative(Path::new("../b")), None);
        assert_eq!(relative(Path::new("./")), None);
    }
}
