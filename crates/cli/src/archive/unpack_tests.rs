use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;

fn entry(
    builder: &mut tar::Builder<Vec<u8>>,
    kind: EntryType,
    name: &str,
    link: &str,
    data: &[u8],
    mode: u32,
) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    // The library refuses to write hostile names: put the bytes there by hand.
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_mode(mode);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_000_000_000);
    header.set_size(data.len() as u64);
    header.set_cksum();
    builder.append(&header, data).unwrap();
}

fn archive(entries: &[(EntryType, &str, &str, &[u8], u32)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, link, data, mode) in entries {
        entry(&mut builder, *kind, name, link, data, *mode);
    }
    builder.into_inner().unwrap()
}

fn keep() -> Options {
    Options { top: Top::Keep, keep_owner: false }
}

const DIR: EntryType = EntryType::Directory;
const FILE: EntryType = EntryType::Regular;
const SYMLINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

#[test]
fn files_directories_and_links_with_modes_and_times() {
    let dir = tempfile::tempdir().unwrap();
    let stream = archive(&[
        (DIR, "d/", "", b"", 0o555),
        (FILE, "d/f", "", b"content", 0o4751),
        (SYMLINK, "d/s", "/etc/shadow", b"", 0o777),
        (HARD, "d/h", "d/f", b"", 0o644),
        (FILE, "no/entry/for/parents", "", b"x", 0o600),
    ]);
    let done = unpack(&stream[..], dir.path(), &keep()).unwrap();
    assert_eq!(done, Unpacked { entries: 5, skipped: 0 });
    let d = dir.path().join("d");
    assert_eq!(fs::read(d.join("f")).unwrap(), b"content");
    assert_eq!(fs::metadata(d.join("f")).unwrap().permissions().mode() & 0o7777, 0o751, "no set-user-ID");
    assert_eq!(fs::metadata(d.join("f")).unwrap().mtime(), 1_000_000_000);
    assert_eq!(fs::metadata(&d).unwrap().permissions().mode() & 0o7777, 0o555);
    assert_eq!(fs::metadata(&d).unwrap().mtime(), 1_000_000_000);
    assert_eq!(fs::read_link(d.join("s")).unwrap(), Path::new("/etc/shadow"));
    assert_eq!(fs::metadata(d.join("h")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(d.join("f")).unwrap().uid(), rustix::process::geteuid().as_raw());
}

#[test]
fn owners_only_when_asked_for() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: giving files away needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let stream = archive(&[(FILE, "f", "", b"", 0o600)]);
    unpack(&stream[..], dir.path(), &Options { top: Top::Rename("g".into()), keep_owner: true }).unwrap();
    let meta = fs::metadata(dir.path().join("g")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (7, 8));
}

#[test]
fn what_is_there_is_replaced_but_no_link_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("victim"), "safe").unwrap();
    symlink(outside.path().join("victim"), dir.path().join("f")).unwrap();
    let stream = archive(&[(FILE, "f", "", b"evil", 0o644)]);
    unpack(&stream[..], dir.path(), &keep()).unwrap();
    assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"safe");
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"evil");
}

#[test]
fn no_way_out() {
    let outside = tempfile::tempdir().unwrap();
    let away = outside.path().to_str().unwrap();
    fs::write(outside.path().join("victim"), "safe").unwrap();
    let victim = format!("{away}/victim");
    for (what, entries) in [
        ("dots", vec![(FILE, "../victim", "", &b"evil"[..], 0o644)]),
        (
            "a link, then a file through it",
            vec![(SYMLINK, "l", away, b"", 0o777), (FILE, "l/victim", "", b"evil", 0o644)],
        ),
        (
            "a link, then a directory there",
            vec![(SYMLINK, "l", away, b"", 0o777), (DIR, "l", "", b"", 0o755)],
        ),
        (
            "a link, then a directory in it",
            vec![(SYMLINK, "l", away, b"", 0o777), (DIR, "l/d", "", b"", 0o755)],
        ),
        ("a hard link to the outside", vec![(HARD, "h", "../victim", b"", 0o644)]),
        (
            "a hard link through a link",
            vec![(SYMLINK, "l", away, b"", 0o777), (HARD, "h", "l/victim", b"", 0o644)],
        ),
        (
            "an open directory becomes a link",
            vec![(DIR, "d", "", b"", 0o755), (FILE, "d/x", "", b"", 0o644), (SYMLINK, "d", away, b"", 0o777)],
        ),
        ("a hard link to an absolute name", vec![(HARD, "h", victim.as_str(), b"", 0o644)]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let result = unpack(&archive(&entries)[..], dir.path(), &keep());
        assert!(result.is_err(), "{what}");
        assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"safe", "{what}");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "{what}");
    }
}

#[test]
fn devices_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let stream =
        archive(&[(EntryType::Char, "null", "", b"", 0o666), (EntryType::Fifo, "p", "", b"", 0o666)]);
    assert_eq!(unpack(&stream[..], dir.path(), &keep()).unwrap(), Unpacked { entries: 0, skipped: 2 });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn long_names_of_both_kinds() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "a".repeat(150), "b".repeat(150));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o644);
    builder.append_data(&mut header, &long, &b"gnu"[..]).unwrap();
    builder.append_pax_extensions([("path", b"from/pax".as_slice())]).unwrap();
    entry(&mut builder, FILE, "short", "", b"pax", 0o644);
    unpack(&builder.into_inner().unwrap()[..], dir.path(), &keep()).unwrap();
    assert_eq!(fs::read(dir.path().join(long)).unwrap(), b"gnu");
    assert_eq!(fs::read(dir.path().join("from/pax")).unwrap(), b"pax");
}

#[test]
fn endless_headers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let stream = header.as_bytes().chain(io::repeat(b'a'));
    let error = unpack(stream, dir.path(), &keep()).unwrap_err().to_string();
    assert!(error.contains("too large"), "{error}");
}

#[test]
fn a_truncated_stream_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let stream = archive(&[(FILE, "f", "", &[1; 5000], 0o644)]);
    assert!(unpack(&stream[..3000], dir.path(), &keep()).is_err());
}
