//! What the tests share.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kapsel_image::{ImportOptions, Rootfs, Silent, Source, Store};

/// Runs a command, which must succeed, and returns its output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// Says why a test is skipped where it cannot run.
pub fn needs_root_and_erofs() -> Option<()> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: mounting needs root");
        return None;
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap();
    let erofs = filesystems.contains("erofs")
        || Command::new("modprobe").arg("erofs").status().is_ok_and(|s| s.success());
    if !erofs || !Path::new("/dev/loop-control").exists() {
        println!("skipped: the kernel has no EROFS or no loop devices");
        return None;
    }
    Some(())
}

/// Imports a rootfs tar and makes its rootfs.
pub fn import_rootfs(store: &Store, name: &str, tar: &[u8]) -> Rootfs {
    let options = ImportOptions { reference: Some(name.parse().unwrap()), ..ImportOptions::default() };
    let images = store.import(Source::Reader(&mut &tar[..]), &options, &Silent).unwrap();
    store.rootfs(&images[0], &Silent).unwrap()
}

/// An EROFS file, mounted until dropped.
pub struct Mounted(tempfile::TempDir);

impl Mounted {
    pub fn new(image: &Path) -> Mounted {
        let dir = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(dir.path()));
        Mounted(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.0.path()));
    }
}

/// A small file system of its own at a directory, until dropped.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn new(dir: &Path, size: &str) -> Tmpfs {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(dir));
        Tmpfs(dir.to_owned())
    }
}

impl Tmpfs {
    /// Changes its size.
    pub fn resize(&self, size: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

/// Everything that can be seen of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
    pub device: u64,
    pub size: u64,
    pub links: u64,
    pub data: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in order, with the same inode.
    pub same_as: PathBuf,
}

/// Everything that can be seen in a directory, by path.
pub fn tree_of(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut paths = vec![PathBuf::new()];
    let mut pending = vec![PathBuf::new()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                pending.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    let mut inodes = BTreeMap::new();
    let mut tree = BTreeMap::new();
    for path in paths {
        let full = root.join(&path);
        let metadata = std::fs::symlink_metadata(&full).unwrap();
        let kind = metadata.file_type();
        let data = if kind.is_file() {
            std::fs::read(&full).unwrap()
        } else if kind.is_symlink() {
            std::fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let seen = Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            // A directory's time may have been set before its children came.
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            device: metadata.rdev(),
            // A directory's size and links are its file system's affair.
            size: if kind.is_dir() { 0 } else { metadata.size() },
            links: if kind.is_dir() { 0 } else { metadata.nlink() },
            data,
            xattrs: xattrs(&full),
            same_as: inodes.entry(metadata.ino()).or_insert_with(|| path.clone()).clone(),
        };
        tree.insert(path, seen);
    }
    tree
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let c_path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut list = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(&c_path, &mut list[..]).unwrap();
    let names = list[..length].split(|&b| b == 0).filter(|name| !name.is_empty());
    let read = |name: &[u8]| {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(&c_path, CString::new(name).unwrap(), &mut value[..]).unwrap();
        value.truncate(length);
        (name.to_vec(), value)
    };
    names.map(read).collect()
}

/// Compares two trees and names the first differences.
pub fn assert_same(expected: &BTreeMap<PathBuf, Seen>, actual: &BTreeMap<PathBuf, Seen>) {
    let missing: Vec<_> = expected.keys().filter(|path| !actual.contains_key(*path)).take(5).collect();
    let extra: Vec<_> = actual.keys().filter(|path| !expected.contains_key(*path)).take(5).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:?}, extra: {extra:?}");
    for (path, expected) in expected {
        let brief =
            |seen: &Seen| Seen { data: seen.data[..seen.data.len().min(32)].to_vec(), ..seen.clone() };
        let actual = &actual[path];
        assert!(
            expected == actual,
            "{}:\nexpected {:?}\nactual   {:?}",
            path.display(),
            brief(expected),
            brief(actual)
        );
    }
}
