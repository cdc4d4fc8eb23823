//! Writes a tar stream that a guest sent. The guest is hostile: whatever the stream says, nothing outside of the
//! directory is touched, no link of the stream or of the directory is followed, no device is made, no program becomes
//! set-user-ID, and memory stays bounded.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use tar::EntryType;

use super::name::{Top, place};

/// The most bytes that the extension headers of one entry may take.
const EXTENSIONS_MAX: u64 = 64 << 10;

/// Where and how an archive is unpacked.
#[derive(Debug)]
pub struct Options {
    /// What becomes of the first component of each name.
    pub top: Top,
    /// Give files the owners that the archive names, instead of this process's.
    pub keep_owner: bool,
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files, directories and links.
    pub entries: u64,
    /// Devices, pipes and sockets, which are left out.
    pub skipped: u64,
}

/// Unpacks all of `stream` into `directory`, which exists.
///
/// # Errors
/// When the stream is malformed or tries what it must not, or when something cannot be written. What was written before
/// stays.
pub fn unpack(stream: impl Read, directory: &Path, options: &Options) -> io::Result<Unpacked> {
    let root =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut unpacker = Unpacker { root, options, open: Vec::new(), done: Unpacked::default() };
    let mut archive = tar::Archive::new(stream);
    let mut extensions = Extensions::default();
    // Raw: the library would read extension headers of any size into memory.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        if extensions.take(&mut entry)? {
            continue;
        }
        let extensions = std::mem::take(&mut extensions);
        let name = extensions.name.unwrap_or_else(|| entry.path_bytes().into_owned());
        let link = extensions.link.or_else(|| entry.link_name_bytes().map(|link| link.into_owned()));
        let about = |error: io::Error| {
            let shown: String = String::from_utf8_lossy(&name).chars().take(200).collect();
            io::Error::new(error.kind(), format!("{shown:?}: {error}"))
        };
        unpacker.entry(&mut entry, &name, link.as_deref()).map_err(about)?;
    }
    unpacker.close_down_to(Path::new(""))?;
    Ok(unpacker.done)
}

/// What extension headers say about the entry after them.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    bytes: u64,
}

impl Extensions {
    /// Reads an extension header; false when the entry is none.
    fn take(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> io::Result<bool> {
        let kind = entry.header().entry_type();
        let known = kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions();
        if !known && !kind.is_pax_global_extensions() {
            return Ok(false);
        }
        self.bytes = self.bytes.saturating_add(entry.size());
        if self.bytes > EXTENSIONS_MAX {
            return Err(io::Error::other("an entry's extended headers are too large"));
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        let text = |content: Vec<u8>| content.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        if kind.is_gnu_longname() {
            self.name = Some(text(content));
        } else if kind.is_gnu_longlink() {
            self.link = Some(text(content));
        } else if kind.is_pax_local_extensions() {
            self.take_pax(&content)?;
        }
        Ok(true)
    }

    fn take_pax(&mut self, content: &[u8]) -> io::Result<()> {
        for record in tar::PaxExtensions::new(content) {
            let record = record?;
            match record.key_bytes() {
                b"path" => self.name = Some(record.value_bytes().to_vec()),
                b"linkpath" => self.link = Some(record.value_bytes().to_vec()),
                // The size in the entry's own header would then be wrong, and all that follows with it.
                b"size" => return Err(io::Error::other("sizes in extended headers are not supported")),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A directory that still gets entries: it gets its final mode and time when the archive is through with it.
struct Open {
    path: PathBuf,
    mode: Mode,
    mtime: u64,
}

struct Unpacker<'a> {
    root: OwnedFd,
    options: &'a Options,
    /// From the root down; each is in the one before.
    open: Vec<Open>,
    done: Unpacked,
}

impl Unpacker<'_> {
    fn entry(
        &mut self,
        entry: &mut tar::Entry<'_, impl Read>,
        name: &[u8],
        link: Option<&[u8]>,
    ) -> io::Result<()> {
        let path = self.place(name)?;
        self.close_down_to(&path)?;
        let header = entry.header();
        let (kind, mtime) = (header.entry_type(), header.mtime().unwrap_or(0));
        // Set-user-ID and its kin would hand the guest this user's rights.
        let mode = Mode::from_raw_mode(header.mode()? & 0o777);
        let owner = (header.uid(), header.gid());
        let Some(leaf) = path.file_name().map(OsStr::to_owned) else {
            // The destination itself: it has its mode already.
            return Ok(());
        };
        let parent = self.parent(&path)?;
        match kind {
            EntryType::Directory => self.directory(&parent, &leaf, path, mode, mtime)?,
            EntryType::Regular | EntryType::Continuous => {
                make_way(&parent, &leaf)?;
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, &leaf, flags, Mode::RUSR | Mode::WUSR)?;
                let mut file = File::from(file);
                let size = entry.size();
                let copied = io::copy(entry, &mut file)?;
                if copied != size {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the stream ended in its middle",
                    ));
                }
                rustix::fs::fchmod(&file, mode)?;
                rustix::fs::futimens(&file, &times(mtime))?;
            }
            EntryType::Symlink => {
                make_way(&parent, &leaf)?;
                rustix::fs::symlinkat(target(link)?, &parent, &leaf)?;
                rustix::fs::utimensat(&parent, &leaf, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            EntryType::Link => {
                let to = self.place(target(link)?.as_bytes())?;
                let Some(to_leaf) = to.file_name() else {
                    return Err(io::Error::other("it links to a directory"));
                };
                let to_parent = self.parent(&to)?;
                make_way(&parent, &leaf)?;
                // Without AT_SYMLINK_FOLLOW the link itself is linked: none is followed.
                rustix::fs::linkat(&to_parent, to_leaf, &parent, &leaf, AtFlags::empty())?;
            }
            _ => {
                self.done.skipped += 1;
                return Ok(());
            }
        }
        self.done.entries += 1;
        if self.options.keep_owner && kind != EntryType::Link {
            give_away(&parent, &leaf, owner.0?, owner.1?)?;
        }
        Ok(())
    }

    fn place(&self, name: &[u8]) -> io::Result<PathBuf> {
        place(name, &self.options.top).map_err(io::Error::other)
    }

    fn directory(
        &mut self,
        parent: &OwnedFd,
        leaf: &OsStr,
        path: PathBuf,
        mode: Mode,
        mtime: u64,
    ) -> io::Result<()> {
        match rustix::fs::mkdirat(parent, leaf, Mode::RWXU) {
            Err(Errno::EXIST) => {
                // Must be a directory, not a link to one.
                beneath(parent, Path::new(leaf))?;
            }
            result => result?,
        }
        self.open.push(Open { path, mode, mtime });
        Ok(())
    }

    /// The directory that a path is in; made where the archive has no entry for it.
    fn parent(&self, path: &Path) -> io::Result<OwnedFd> {
        let parent = path.parent().unwrap_or(Path::new(""));
        match beneath(&self.root, parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let mut directory = beneath(&self.root, Path::new(""))?;
        for component in parent {
            match rustix::fs::mkdirat(&directory, component, Mode::RWXU | Mode::from_raw_mode(0o055)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            directory = beneath(&directory, Path::new(component))?;
        }
        Ok(directory)
    }

    /// Finishes the open directories that `path` is not in.
    fn close_down_to(&mut self, path: &Path) -> io::Result<()> {
        while let Some(last) =
            self.open.pop_if(|open| path.as_os_str().is_empty() || !path.starts_with(&open.path))
        {
            let directory = beneath(&self.root, &last.path)?;
            // Through /proc/self/fd, because fchmod(2) takes no O_PATH descriptor; the descriptor is no link.
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&directory));
            rustix::fs::chmod(&link, last.mode)?;
            rustix::fs::utimensat(rustix::fs::CWD, &link, &times(last.mtime), AtFlags::empty())?;
        }
        Ok(())
    }
}

/// Opens a directory beneath another; any symbolic link on the way is an error.
fn beneath(root: &impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), resolve).map_err(|error| match error {
        Errno::LOOP | Errno::XDEV => io::Error::other("a symbolic link is in its way"),
        Errno::NOTDIR => io::Error::other("something that is no directory is in its way"),
        error => error.into(),
    })
}

/// Removes what has the name already, unless it is a directory.
fn make_way(parent: &OwnedFd, leaf: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, leaf, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => Err(io::Error::other("a directory has that name")),
        Err(error) => Err(error.into()),
    }
}

fn target(link: Option<&[u8]>) -> io::Result<OsString> {
    match link {
        Some(link) if !link.is_empty() && !link.contains(&0) => Ok(OsString::from_vec(link.to_vec())),
        _ => Err(io::Error::other("a link without a target")),
    }
}

fn give_away(parent: &OwnedFd, leaf: &OsStr, uid: u64, gid: u64) -> io::Result<()> {
    let id = |number: u64| u32::try_from(number).ok().filter(|n| *n != u32::MAX);
    let (Some(uid), Some(gid)) = (id(uid), id(gid)) else {
        return Err(io::Error::other("an owner that cannot be"));
    };
    let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
    Ok(rustix::fs::chownat(parent, leaf, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn times(mtime: u64) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: i64::try_from(mtime).unwrap_or(0), tv_nsec: 0 },
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
