//! Images that lie, overflow or attack.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};

use common::import_rootfs;
use kapsel_image::{Error, ImportOptions, Limits, PruneOptions, Rootfs, Silent, Source, Store};
use kapsel_testkit::image::{digest, gzip};
use kapsel_testkit::tar::Header;
use kapsel_testkit::{ImageBuilder, Layer, TarBuilder};

/// A directory with a store and, beside it, something that must not change.
struct Bed {
    dir: tempfile::TempDir,
    store: Store,
}

impl Bed {
    fn new(limits: Limits) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("outside"), "untouched").unwrap();
        let store = Store::open_with(&dir.path().join("store"), limits).unwrap();
        Bed { dir, store }
    }

    fn rootfs(&self, tar: &[u8]) -> Result<Rootfs, Error> {
        let options =
            ImportOptions { reference: Some("hostile".parse().unwrap()), ..ImportOptions::default() };
        let images = self.store.import(Source::Reader(&mut &tar[..]), &options, &Silent)?;
        self.store.rootfs(&images[0], &Silent)
    }

    /// Nothing is left of an attempt, and the store works.
    fn check(&self) {
        assert_eq!(std::fs::read(self.dir.path().join("outside")).unwrap(), b"untouched");
        for dir in ["rootfs", "partial", "tmp"] {
            let left: Vec<_> = list(&self.dir.path().join("store").join(dir));
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
        let good = import_rootfs(&self.store, "good", &TarBuilder::new().file("a", "b").build());
        assert!(good.size > 0);
    }
}

fn list(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The error of a tar, of which nothing may be left.
fn refusal(tar: &[u8], limits: Limits) -> Error {
    let bed = Bed::new(limits);
    let error = bed.rootfs(tar).unwrap_err();
    bed.check();
    error
}

#[test]
fn no_path_leaves_the_root() {
    for path in ["../outside", "a/../../outside", "/../outside", "a/..", ".."] {
        let error = refusal(&TarBuilder::new().file(path, "owned").build(), Limits::default());
        assert!(matches!(&error, Error::Layer { entry, .. } if entry == path), "{path}: {error}");
    }
    let error = refusal(&TarBuilder::new().hard_link("a", "../outside").build(), Limits::default());
    assert!(matches!(error, Error::Layer { .. }), "{error}");
    let error = refusal(&TarBuilder::new().file(".wh...", "").build(), Limits::default());
    assert!(matches!(error, Error::Layer { .. }), "{error}");
}

#[test]
fn links_lead_nowhere_but_into_the_root() {
    // A link to a directory of the host, or to its root, and a file "through" it.
    let bed = Bed::new(Limits::default());
    let outside = bed.dir.path().to_str().unwrap();
    let climb = "../".repeat(64) + outside.trim_start_matches('/');
    for target in [outside, &climb, "/", "store"] {
        let tar = TarBuilder::new()
            .symlink("way-out", target)
            .file("way-out/outside", "owned")
            .file(format!("way-out{outside}/outside"), "owned")
            .file("way-out/store/index.json", "owned")
            .symlink("way-out/link", "outside")
            .file("way-out/link", "a link is replaced, not followed");
        bed.rootfs(&tar.build()).unwrap();
        bed.store.remove("hostile", &[], false).unwrap();
        bed.check();
        bed.store.remove("good", &[], false).unwrap();
    }
    // A hard link's target is a path of the image, however it is written.
    let absolute = format!("{outside}/outside");
    for target in [&*absolute, "/etc/passwd", "way-out/outside"] {
        let tar = TarBuilder::new().symlink("way-out", outside).hard_link("stolen", target).build();
        let error = bed.rootfs(&tar).unwrap_err();
        assert!(matches!(&error, Error::Layer { entry, .. } if entry == "stolen"), "{target}: {error}");
        bed.store.remove("hostile", &[], false).unwrap();
    }
    bed.check();
}

#[test]
fn devices_are_made_in_the_image_only() {
    let bed = Bed::new(Limits::default());
    let disk = |major, minor| {
        TarBuilder::new().entry(Header::new(b'4', "disk").mode(0o666).device(major, minor), "").build()
    };
    bed.rootfs(&disk(8, 0)).unwrap();
    let mut pending = vec![bed.dir.path().to_owned()];
    while let Some(dir) = pending.pop() {
        for path in list(&dir) {
            let kind = std::fs::symlink_metadata(&path).unwrap().file_type();
            assert!(kind.is_dir() || kind.is_file(), "{}: {kind:?}", path.display());
            pending.extend(kind.is_dir().then_some(path));
        }
    }
    for (major, minor) in [(1 << 12, 0), (0, 1 << 20)] {
        let error = refusal(&disk(major, minor), Limits::default());
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}

#[test]
fn refuses_links_and_paths_that_make_no_sense() {
    let loops = TarBuilder::new().symlink("a", "b").symlink("b", "a").file("a/file", "");
    let through_file = TarBuilder::new().file("a", "").file("a/b", "");
    let to_directory = TarBuilder::new().dir("d").hard_link("l", "d");
    let to_nothing = TarBuilder::new().hard_link("l", "absent");
    let root_as_file = TarBuilder::new().entry(Header::new(b'6', "."), "");
    let unknown_type = TarBuilder::new().entry(Header::new(b'Z', "a"), "");
    let long_name = TarBuilder::new().file("n".repeat(256), "");
    let nul = TarBuilder::new().entry(Header::new(b'0', "x").pax("path", "a\0b"), "");
    for tar in [loops, through_file, to_directory, to_nothing, root_as_file, unknown_type, long_name, nul] {
        let error = refusal(&tar.build(), Limits::default());
        assert!(matches!(error, Error::Layer { .. } | Error::Malformed { .. }), "{error}");
    }
}

#[test]
fn refuses_a_hundred_thousand_levels() {
    let deep = "d/".repeat(100_000);
    let error = refusal(&TarBuilder::new().entry(Header::new(b'5', &deep), "").build(), Limits::default());
    assert!(matches!(error, Error::Limit { name: "path_length", .. }), "{error}");
    // Within the length of one path, and level upon level by links.
    let deep = "d/".repeat(1500);
    let error = refusal(&TarBuilder::new().entry(Header::new(b'5', &deep), "").build(), Limits::default());
    assert!(matches!(error, Error::Limit { name: "path_depth", .. }), "{error}");
    let mut tar = TarBuilder::new();
    for i in 0..30 {
        let path =
            format!("{}{}", if i == 0 { String::new() } else { format!("l{}/", i - 1) }, "d/".repeat(100));
        tar = tar.dir(&path).symlink(format!("l{i}"), &path);
    }
    let error = refusal(&tar.build(), Limits::default());
    assert!(matches!(error, Error::Limit { name: "path_depth", .. }), "{error}");
}

#[test]
fn refuses_a_terabyte() {
    let sparse = TarBuilder::new().entry(Header::new(b'0', "big").gnu_sparse(&[], 1 << 40), "");
    let pax = Header::new(b'0', "big")
        .pax("GNU.sparse.map", "0,0")
        .pax("GNU.sparse.size", (1u64 << 40).to_string());
    let claims = TarBuilder::new().entry(Header::new(b'0', "big").claim_size(1 << 40), "");
    for tar in [sparse, TarBuilder::new().entry(pax, ""), claims] {
        let error = refusal(&tar.build(), Limits::default());
        assert!(matches!(error, Error::Limit { .. }), "{error}");
    }
    // Many files, each allowed, that together do not fit on a disk.
    let mut tar = TarBuilder::new();
    for i in 0..5 {
        tar = tar.entry(Header::new(b'0', format!("big{i}")).gnu_sparse(&[], 20 << 30), "");
    }
    let error = refusal(&tar.build(), Limits::default());
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[test]
fn bounds_decompression_entries_and_attributes() {
    let zeros = gzip(&TarBuilder::new().file("zeros", vec![0; 8 << 20]).build());
    let tight = Limits { ratio: 50, ratio_floor: 1 << 20, ..Limits::default() };
    let layered =
        ImageBuilder::new().layer(Layer::gzip(TarBuilder::new().file("z", vec![0; 8 << 20]).build())).build();
    let bed = Bed::new(tight.clone());
    let error = bed.rootfs(&layered.oci_archive("bomb")).unwrap_err();
    assert!(matches!(error, Error::Limit { name: "ratio", .. }), "{error}");
    bed.check();
    let small = Limits { layer_size: 1 << 20, blob_size: 1 << 20, ..Limits::default() };
    assert!(matches!(refusal(&zeros, small), Error::Limit { .. }));

    // What zstd makes of zeros is smaller still.
    let zstd =
        ImageBuilder::new().layer(Layer::zstd(TarBuilder::new().file("z", vec![0; 8 << 20]).build())).build();
    let bed = Bed::new(tight);
    let error = bed.rootfs(&zstd.oci_archive("bomb")).unwrap_err();
    assert!(matches!(error, Error::Limit { name: "ratio", .. }), "{error}");
    bed.check();
    // A frame that wants a window of 2 GiB to be remembered (RFC 8878, section 3.1.1.1.2), for one byte.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x09, 0x00, 0x00, b'x'];
    let error = refusal(&window, Limits::default());
    assert!(error.to_string().contains("too much memory"), "{error}");
}

#[test]
fn bounds_entries_names_and_attributes() {
    let mut many = TarBuilder::new();
    for i in 0..101 {
        many = many.file(format!("{i}"), "");
    }
    let few = Limits { entries: 100, ..Limits::default() };
    assert!(matches!(refusal(&many.build(), few), Error::Limit { name: "entries", .. }));
    // The same file again and again is no way around it.
    let again = (0..101).fold(TarBuilder::new(), |tar, _| tar.file("a", ""));
    let few = Limits { entries: 100, ..Limits::default() };
    assert!(matches!(refusal(&again.build(), few), Error::Limit { name: "entries", .. }));

    let xattr = TarBuilder::new().entry(Header::new(b'0', "a").xattr("user.x", vec![0; 70_000]), "");
    assert!(matches!(refusal(&xattr.build(), Limits::default()), Error::Limit { name: "xattr_size", .. }));
    // One extended header after the other, each within the bounds of one, and no file in sight.
    let mut flood = TarBuilder::new();
    for i in 0..200 {
        let body =
            TarBuilder::new().entry(Header::new(b'0', "a").xattr(&format!("user.{i}"), vec![0; 60_000]), "");
        let body = body.build_open();
        flood = flood.raw(&body[..body.len() - 512]);
    }
    assert!(matches!(refusal(&flood.build(), Limits::default()), Error::Limit { name: "xattr_size", .. }));
    // Many files, each with as much as one may have.
    let mut files = TarBuilder::new();
    for i in 0..20 {
        files = files.entry(Header::new(b'0', format!("{i}")).xattr("user.x", vec![0; 60_000]), "");
    }
    let little = Limits { metadata_size: 1 << 20, ..Limits::default() };
    assert!(matches!(refusal(&files.build(), little.clone()), Error::Limit { name: "metadata_size", .. }));
    let names = (0..5000).fold(TarBuilder::new(), |tar, i| tar.file(format!("{i:0>250}"), ""));
    assert!(matches!(refusal(&names.build(), little), Error::Limit { name: "metadata_size", .. }));

    // Long names in each of the ways to write them.
    let long = "n".repeat(5000);
    for header in [
        Header::new(b'0', &long),
        Header::new(b'0', "a").pax("path", &long),
        Header::new(b'2', "a").target(&long),
    ] {
        let error = refusal(&TarBuilder::new().entry(header, "").build(), Limits::default());
        assert!(matches!(error, Error::Limit { name: "path_length", .. }), "{error}");
    }
    for kind in [b'L', b'K'] {
        let gnu = TarBuilder::new().entry(Header::new(kind, "././@LongLink"), &long).file("a", "");
        let error = refusal(&gnu.build(), Limits::default());
        assert!(matches!(error, Error::Limit { name: "path_length", .. }), "{error}");
    }
}

#[test]
fn bounds_layers_and_indexes_within_indexes() {
    let layers = (0..5).fold(ImageBuilder::new(), |image, i| {
        image.layer(Layer::plain(TarBuilder::new().file(format!("{i}"), "").build()))
    });
    let layers = layers.build();
    for archive in [layers.oci_archive("many"), layers.docker_archive(&["many:latest"])] {
        let error = refusal(&archive, Limits { layers: 4, ..Limits::default() });
        assert!(matches!(error, Error::Limit { name: "layers", .. }), "{error}");
    }
    let mut files = layers.oci_files("nested");
    for _ in 0..10 {
        let inner = std::mem::take(&mut files[1].1);
        let media_type = "application/vnd.oci.image.index.v1+json";
        let entry =
            serde_json::json!({ "mediaType": media_type, "digest": digest(&inner), "size": inner.len() });
        let outer = serde_json::json!({ "schemaVersion": 2, "manifests": [entry] });
        files.push((format!("blobs/sha256/{}", &digest(&inner)[7..]), inner));
        files[1].1 = serde_json::to_vec(&outer).unwrap();
    }
    let error = refusal(&kapsel_testkit::image::archive(&files), Limits::default());
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
}

#[test]
fn refuses_what_is_cut_off_or_no_archive() {
    let whole = TarBuilder::new().file("a", vec![1; 5000]).build();
    for cut in [100, 600, 3000] {
        assert!(matches!(refusal(&whole[..cut], Limits::default()), Error::Malformed { .. }), "{cut}");
    }
    assert!(matches!(refusal(&gzip(&whole)[..60], Limits::default()), Error::Malformed { .. }));
    let garbage: Vec<u8> = (0..4096u32).map(|i| (i * 31) as u8).collect();
    assert!(matches!(refusal(&garbage, Limits::default()), Error::Malformed { .. }));
}

#[test]
fn a_lie_about_the_content_of_a_layer_is_found() {
    let layer = || Layer::gzip(TarBuilder::new().file("a", "b").build());
    let lying = ImageBuilder::new().layer(layer()).diff_ids(vec![digest(b"another layer")]).build();
    let bed = Bed::new(Limits::default());
    let error = bed.rootfs(&lying.oci_archive("liar")).unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    bed.check();
    // Fewer ids than layers.
    let short = ImageBuilder::new().layer(layer()).diff_ids(Vec::new()).build();
    let bed = Bed::new(Limits::default());
    assert!(matches!(bed.rootfs(&short.oci_archive("short")).unwrap_err(), Error::Malformed { .. }));
}

#[test]
fn corrupt_blobs_of_an_archive_are_refused() {
    let image =
        ImageBuilder::new().layer(Layer::plain(TarBuilder::new().file("a", vec![7; 2000]).build())).build();
    for what in 2..5 {
        let mut files = image.oci_files("corrupt");
        let middle = files[what].1.len() / 2;
        files[what].1[middle] ^= 1;
        let bed = Bed::new(Limits::default());
        let error = bed.rootfs(&kapsel_testkit::image::archive(&files)).unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
        let mut files = image.oci_files("truncated");
        files[what].1.pop();
        let error = bed.rootfs(&kapsel_testkit::image::archive(&files)).unwrap_err();
        assert!(matches!(error, Error::SizeMismatch { .. }), "{error}");
        bed.check();
    }
}

#[test]
fn a_damaged_rootfs_is_made_again() {
    let bed = Bed::new(Limits::default());
    let tar = TarBuilder::new().file("a", "b").build();
    let rootfs = bed.rootfs(&tar).unwrap();
    std::fs::write(&rootfs.path, "damaged").unwrap();
    assert_eq!(bed.rootfs(&tar).unwrap().size, rootfs.size);
}

#[test]
fn a_newer_store_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    Store::open(&store).unwrap();
    std::fs::write(store.join("tmp/from-the-future"), "").unwrap();
    for (file, content) in
        [("kapsel.json", r#"{"version":2}"#), ("oci-layout", r#"{"imageLayoutVersion":"2.0.0"}"#)]
    {
        let old = std::fs::read(store.join(file)).unwrap();
        std::fs::write(store.join(file), content).unwrap();
        let error = Store::open(&store).unwrap_err();
        assert!(matches!(error, Error::StoreVersion { .. }), "{error}");
        assert!(store.join("tmp/from-the-future").exists());
        std::fs::write(store.join(file), old).unwrap();
    }
    Store::open(&store).unwrap();
    assert!(!store.join("tmp/from-the-future").exists(), "leftovers go when the store is opened");
}

#[test]
fn a_full_disk_is_a_clear_error_and_loses_nothing() {
    let Some(()) = common::needs_root_and_erofs() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = common::Tmpfs::new(dir.path(), "2m");
    let store = Store::open(&dir.path().join("store")).unwrap();
    import_rootfs(&store, "kept", &TarBuilder::new().file("a", "b").build());
    let options = ImportOptions { reference: Some("big".parse().unwrap()), ..ImportOptions::default() };
    let big = TarBuilder::new().file("big", vec![5; 4 << 20]).build();
    let error = store.import(Source::Reader(&mut &big[..]), &options, &Silent).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    // The blob fits, and the rootfs does not.
    let middle = TarBuilder::new().file("middle", vec![5; 1200 << 10]).build();
    let images = store.import(Source::Reader(&mut &middle[..]), &options, &Silent).unwrap();
    let error = store.rootfs(&images[0], &Silent).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    let store = Store::open(&dir.path().join("store")).unwrap();
    assert_eq!(store.list().unwrap().len(), 2);
    // Also when nothing at all can be written, images can be removed to make room.
    let filler = dir.path().join("filler");
    std::fs::write(&filler, vec![1; 2 << 20]).unwrap_err();
    store.remove("big", &[], false).unwrap();
    store.rootfs(&store.find("kept").unwrap(), &Silent).unwrap();
    std::fs::write(&filler, vec![1; 2 << 20]).unwrap_err();
    let pruned = store.prune(&PruneOptions { all: true, in_use: Vec::new() }).unwrap();
    assert_eq!(pruned.images, ["kept:latest"]);
    assert!(store.list().unwrap().is_empty());
    drop(disk);
}
