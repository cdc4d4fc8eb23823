//! What processes of a container read when they start, read once before its template is saved: each clone finds it in memory.
//!
//! Under QEMU's translator a clone's first read of its disk costs more than the copy of what is read, as all of the way there is
//! translated: overlay, EROFS, block layer and driver.
//!
//! The files are the image's, so hostile: they are opened with its root as the root, and only so much of each is read.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use kapsel_protocol::limits;
use rustix::fs::{FileType, OFlags};

use crate::container::root::Root;

/// Bytes of each file that are read.
const FILE_MAX: u64 = 8 << 20;

/// Reads the files of users of the container at `rootfs`, the first of `programs` that is a file, and what interprets it.
pub fn start(rootfs: &CStr, programs: &[String]) {
    // What cannot be read now, the clone will read, or say why it cannot.
    let Ok(root) = Root::open(rootfs) else { return };
    // The first process has read them by now; those that are added read them as well.
    for file in [c"/etc/passwd", c"/etc/group"] {
        open(&root, file).iter().for_each(read);
    }
    let program =
        programs.iter().take(limits::PROGRAMS_MAX).find_map(|path| open(&root, &CString::new(&**path).ok()?));
    let Some(program) = program else { return };
    read(&program);
    if let Some(interpreter) = interpreter(&program) {
        open(&root, &interpreter).iter().for_each(read);
    }
}

fn open(root: &Root, path: &CStr) -> Option<File> {
    // Non-blocking: the image may have put a FIFO there.
    let file = root.get(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then(|| file.into())
}

fn read(file: &File) {
    let _ = io::copy(&mut file.take(FILE_MAX), &mut io::sink());
}

/// Who runs a file: the dynamic linker of an ELF executable (System V ABI, PT_INTERP), or the program that a script's first line
/// names.
fn interpreter(program: &File) -> Option<CString> {
    const SCRIPT_LINE: usize = 256;
    let mut head = [0; SCRIPT_LINE];
    let len = program.read_at(&mut head, 0).ok()?;
    let head = head.get(..len)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let path = line.split(|byte| *byte == b'\n').next()?.trim_ascii_start();
        return CString::new(path.split(u8::is_ascii_whitespace).next()?).ok();
    }
    dynamic_linker(program, head)
}

fn dynamic_linker(program: &File, head: &[u8]) -> Option<CString> {
    const PT_INTERP: u32 = 3;
    /// Bytes of an ELF64 program header.
    const HEADER: usize = 56;
    const HEADERS_MAX: usize = 64;
    const PATH_MAX: u64 = 4096;
    let elf64 = head.starts_with(b"\x7fELF\x02\x01");
    let word = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let half = |bytes: &[u8], at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    if !elf64 || usize::from(half(head, 54)?) != HEADER {
        return None;
    }
    let mut headers = vec![0; HEADER * usize::from(half(head, 56)?).min(HEADERS_MAX)];
    program.read_exact_at(&mut headers, word(head, 32)?).ok()?;
    let header = headers.chunks(HEADER).find(|header| header.starts_with(&PT_INTERP.to_le_bytes()))?;
    let mut path = vec![0; word(header, 32).filter(|len| *len <= PATH_MAX)? as usize];
    program.read_exact_at(&mut path, word(header, 8)?).ok()?;
    CStr::from_bytes_until_nul(&path).ok().map(CStr::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(content: &[u8]) -> File {
        let file =
            File::from(rustix::fs::memfd_create(c"x", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd"));
        file.write_all_at(content, 0).expect("write");
        file
    }

    #[test]
    fn interpreters_are_found() {
        let own = File::open("/proc/self/exe").expect("open");
        let linker = interpreter(&own).expect("this test is linked dynamically");
        assert!(linker.to_str().expect("UTF-8").contains("/ld-linux"), "{linker:?}");
        assert_eq!(interpreter(&file(b"#! /bin/sh -e\n")).as_deref(), Some(c"/bin/sh"));
        assert_eq!(interpreter(&file(b"#!/bin/sh")).as_deref(), Some(c"/bin/sh"));
        for none in [&b"#"[..], b"", b"text", b"\x7fELF\x02\x01"] {
            assert_eq!(interpreter(&file(none)), None, "{none:?}");
        }
    }

    #[test]
    fn only_files_of_the_root_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), FileType::Fifo, 0o600.into(), 0)
            .expect("mknod");
        std::os::unix::fs::symlink("/proc/self/exe", dir.path().join("out")).expect("link");
        std::fs::write(dir.path().join("in"), "x").expect("write");
        let path = CString::new(dir.path().to_str().expect("UTF-8")).expect("no NUL");
        let root = Root::open(&path).expect("open");
        assert!(open(&root, c"/fifo").is_none());
        assert!(open(&root, c"/out").is_none());
        assert!(open(&root, c"/").is_none());
        assert!(open(&root, c"/in").is_some());
        start(&path, &["/none".into(), "/fifo".into(), "/in".into()]);
    }

    proptest! {
        #[test]
        fn hostile_programs_never_panic(
            head in proptest::collection::vec(any::<u8>(), 0..200),
            offset in any::<u64>(),
            headers in any::<u16>(),
        ) {
            let mut content = b"\x7fELF\x02\x01".to_vec();
            content.extend(head);
            content.resize(content.len().max(64), 0);
            content[32..40].copy_from_slice(&offset.to_le_bytes());
            content[54..56].copy_from_slice(&56u16.to_le_bytes());
            content[56..58].copy_from_slice(&headers.to_le_bytes());
            interpreter(&file(&content));
        }
    }
}
