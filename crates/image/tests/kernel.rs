//! The rootfs as the kernel and `fsck.erofs` see it, against what other tools make of the same layers.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use common::{Mounted, import_rootfs, run, tree_of};
use kapsel_image::Store;
use kapsel_testkit::TarBuilder;
use kapsel_testkit::tar::Header;

/// One tar with every kind of file.
fn everything() -> Vec<u8> {
    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    let mut tar = TarBuilder::new()
        .entry(Header::new(b'5', "./").mode(0o755).mtime(1_600_000_000), b"")
        .entry(Header::new(b'0', "empty").mtime(5), b"")
        .file("small", "hello\n")
        .file("inline-limit", vec![b'x'; 2048])
        .file("over-inline", vec![b'y'; 2049])
        .file("one-block", vec![b'z'; 4096])
        .file("block-and-tail", vec![b'a'; 4096 + 17])
        .file("block-and-long-tail", vec![b'b'; 2 * 4096 + 4000])
        .file("big", &big)
        .entry(Header::new(b'0', "setuid").mode(0o4755).owner(1000, 100), b"#!")
        .entry(Header::new(b'0', "big-ids").owner(70_000, 4_000_000_000), b"i")
        .entry(Header::new(b'0', "old").mtime(-86_400), b"before the epoch")
        .entry(Header::new(b'0', "far").pax("mtime", "15000000000.5"), b"after 2038")
        .entry(Header::new(b'0', "nanoseconds").pax("mtime", "1350244992.023960108"), b"n")
        .dir("dev")
        .entry(Header::new(b'3', "dev/null").mode(0o666).device(1, 3), b"")
        .entry(Header::new(b'4', "dev/disk").mode(0o660).device(259, 70_000), b"")
        .entry(Header::new(b'6', "dev/pipe").mode(0o600), b"")
        .hard_link("dev/hard-device", "dev/null")
        .entry(Header::new(b'5', "sticky").mode(0o1777), b"")
        .symlink("link", "small")
        .symlink("absolute", "/etc/passwd")
        .symlink("long-link", "t".repeat(4000))
        .hard_link("hard", "small")
        .entry(
            Header::new(b'0', "capable")
                .mode(0o755)
                .xattr("security.capability", [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
                .xattr("user.comment", "an attribute"),
            b"capable",
        )
        .entry(Header::new(b'5', "xattr-dir").xattr("user.on", "a directory"), b"")
        .entry(Header::new(b'0', "xattr-big").xattr("user.big", vec![b'v'; 3900]), vec![b'q'; 300])
        .entry(
            Header::new(b'0', "sparse").gnu_sparse(&[(0, 512), (1 << 20, 10), (5 << 20, 0)], 5 << 20),
            vec![b's'; 522],
        )
        .dir("n".repeat(200))
        .dir(format!("{0}/{0}", "n".repeat(200)))
        .file(format!("{0}/{0}/{0}", "n".repeat(200)), "a long name")
        .file("!sorts-before-dots", "")
        .file(".-between-dots", "");
    tar = tar.dir("many");
    for i in 0..3000 {
        tar = tar.file(format!("many/file-{i}-{}", "x".repeat(i % 50)), format!("{i}"));
    }
    tar = tar.dir("dirs");
    for i in 0..300 {
        tar = tar.dir(format!("dirs/{i}"));
    }
    tar.build()
}

#[test]
fn kernel_sees_what_tar_unpacks() {
    let Some(()) = common::needs_root_and_erofs() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tar = everything();
    let rootfs = import_rootfs(&Store::open(&dir.path().join("store")).unwrap(), "everything", &tar);
    std::fs::write(dir.path().join("layer.tar"), &tar).unwrap();
    let expected = dir.path().join("expected");
    std::fs::create_dir(&expected).unwrap();
    run(Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
        .arg(dir.path().join("layer.tar"))
        .arg("-C")
        .arg(&expected));
    let mounted = Mounted::new(&rootfs.path);
    let (expected, actual) = (tree_of(&expected), tree_of(mounted.path()));
    common::assert_same(&expected, &actual);
    assert_eq!(std::fs::metadata(mounted.path()).unwrap().mtime(), 1_600_000_000);
    fsck(&rootfs.path);
}

fn fsck(path: &Path) {
    run(Command::new("fsck.erofs").arg(path));
}

#[test]
fn of_several_entries_for_one_path_the_last_one_wins() {
    let Some(()) = common::needs_root_and_erofs() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tar = TarBuilder::new()
        .file("file", "first")
        .file("other", "kept by its second name")
        .hard_link("second", "other")
        .file("./file", "second")
        .file("other", "replaced")
        .symlink("link", "file")
        .file("link", "a file now")
        .dir("dir")
        .file("dir/gone", "")
        .file("dir", "a file now")
        .file("file", "last")
        .entry(Header::new(b'5', "mode").mode(0o700), "")
        .file("mode/kept", "")
        .entry(Header::new(b'5', "mode/").mode(0o755), "");
    let store = Store::open(&dir.path().join("store")).unwrap();
    let rootfs = import_rootfs(&store, "duplicates", &tar.build());
    let mounted = Mounted::new(&rootfs.path);
    let read = |name: &str| std::fs::read_to_string(mounted.path().join(name)).unwrap();
    for (name, content) in [
        ("file", "last"),
        ("other", "replaced"),
        ("second", "kept by its second name"),
        ("link", "a file now"),
        ("dir", "a file now"),
        ("mode/kept", ""),
    ] {
        assert_eq!(read(name), content, "{name}");
    }
    assert!(std::fs::symlink_metadata(mounted.path().join("link")).unwrap().is_file());
    assert_eq!(std::fs::metadata(mounted.path().join("mode")).unwrap().mode() & 0o777, 0o755);
    fsck(&rootfs.path);
}
