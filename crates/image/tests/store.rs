//! The store's life: import in every form, names, removal, collection, locks.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::process::Command;

use common::{Mounted, assert_same, import_rootfs, run, tree_of};
use kapsel_image::{Error, Image, ImportOptions, PruneOptions, Silent, Source, Store};
use kapsel_testkit::image::{BuiltImage, gzip};
use kapsel_testkit::tar::Header;
use kapsel_testkit::{ImageBuilder, Layer, TarBuilder};

fn bed() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    (dir, store)
}

fn import(store: &Store, data: &[u8], name: Option<&str>) -> Result<Vec<Image>, Error> {
    let options =
        ImportOptions { reference: name.map(|name| name.parse().unwrap()), ..ImportOptions::default() };
    store.import(Source::Reader(&mut &data[..]), &options, &Silent)
}

/// Three layers with whiteouts, an opaque directory, links across layers and replaced kinds. Debian's umoci and skopeo's
/// docker-archive do not know zstd, so the caller says how the middle layer is compressed.
fn layered(middle_layer: fn(Vec<u8>) -> Layer) -> BuiltImage {
    let lower = TarBuilder::new()
        .entry(Header::new(b'5', "./").mtime(77), "")
        .dir("kept")
        .file("kept/a", "lower a")
        .file("kept/b", "lower b")
        .dir("opaque")
        .file("opaque/hidden", "h")
        .dir("opaque/sub")
        .file("opaque/sub/hidden", "h")
        .file("file-then-dir", "f")
        .dir("dir-then-file")
        .file("dir-then-file/x", "x")
        .file("removed", "r")
        .file("shared", vec![9; 5000])
        .dir("target")
        .symlink("through", "target");
    let middle = TarBuilder::new()
        .entry(Header::new(b'5', "kept").mode(0o700), "")
        .file("kept/b", "middle b")
        .file(".wh.removed", "")
        .dir("opaque")
        .file("opaque/new", "n")
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.file-then-dir", "")
        .dir("file-then-dir")
        .file("file-then-dir/y", "y")
        .hard_link("shared-link", "shared");
    let upper = TarBuilder::new()
        .file(".wh.dir-then-file", "")
        .file("dir-then-file", "now a file")
        .file("through/landed", "in target")
        .file(".wh.shared", "");
    ImageBuilder::new()
        .layer(Layer::gzip(lower.build()))
        .layer(middle_layer(middle.build()))
        .layer(Layer::plain(upper.build()))
        .build()
}

#[test]
fn merges_layers_as_umoci_does() {
    let Some(()) = common::needs_root_and_erofs() else { return };
    let (dir, store) = bed();
    let built = layered(Layer::gzip);
    built.oci_dir(&dir.path().join("oci"), "latest");
    let options = ImportOptions { reference: Some("layered".parse().unwrap()), ..ImportOptions::default() };
    let image = store.import(Source::Path(&dir.path().join("oci")), &options, &Silent).unwrap().remove(0);
    let rootfs = store.rootfs(&image, &Silent).unwrap();
    let bundle = dir.path().join("bundle");
    let source = format!("{}:latest", dir.path().join("oci").display());
    run(Command::new("umoci").args(["raw", "unpack", "--image", &source]).arg(&bundle));
    let mounted = Mounted::new(&rootfs.path);
    let (mut expected, mut actual) = (tree_of(&bundle), tree_of(mounted.path()));
    for tree in [&mut expected, &mut actual] {
        for seen in tree.values_mut() {
            // umoci leaves to directories the times at which it filled them.
            seen.mtime = (0, 0);
        }
    }
    assert_same(&expected, &actual);
    assert_eq!(std::fs::read(mounted.path().join("target/landed")).unwrap(), b"in target");
    assert!(!mounted.path().join("shared").exists() && mounted.path().join("shared-link").exists());
    run(Command::new("fsck.erofs").arg(&rootfs.path));
}

#[test]
fn every_form_gives_the_same_root_file_system() {
    let (dir, store) = bed();
    let built = layered(Layer::zstd);
    let archive = built.oci_archive("oci:v1");
    let forms = [
        import(&store, &archive, Some("a")).unwrap(),
        import(&store, &gzip(&archive), Some("b")).unwrap(),
        import(&store, &built.docker_archive(&["tagged:v2", "also:v3"]), None).unwrap(),
        import(&store, &built.oci_archive("named:v4"), None).unwrap(),
    ];
    assert_eq!(forms[2].len(), 2);
    let paths: Vec<_> =
        forms.iter().flatten().map(|image| store.rootfs(image, &Silent).unwrap().path).collect();
    assert!(paths.iter().all(|path| *path == paths[0]), "one file for one chain of layers: {paths:?}");
    let names: Vec<String> =
        store.list().unwrap().iter().map(|image| image.reference.as_ref().unwrap().familiar()).collect();
    assert_eq!(
        names,
        ["also:v3", "a:latest", "b:latest", "named:v4", "tagged:v2"]
            .map(String::from)
            .into_iter()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );

    // What other tools write, too.
    let oci = dir.path().join("oci");
    layered(Layer::gzip).oci_dir(&oci, "latest");
    let docker = dir.path().join("docker.tar");
    run(Command::new("skopeo")
        .arg("copy")
        .arg(format!("oci:{}:latest", oci.display()))
        .arg(format!("docker-archive:{}:x/y:z", docker.display())));
    let image = store.import(Source::Path(&docker), &ImportOptions::default(), &Silent).unwrap().remove(0);
    assert_eq!(image.reference.clone().unwrap().familiar(), "x/y:z");
    assert_eq!(store.rootfs(&image, &Silent).unwrap().path, paths[0]);
}

#[test]
fn rootfs_files_are_the_same_to_the_byte() {
    let tar = layered(Layer::zstd).docker_archive(&["t:1"]);
    let bytes = |_| {
        let (_dir, store) = bed();
        let image = import(&store, &tar, None).unwrap().remove(0);
        let rootfs = store.rootfs(&image, &Silent).unwrap();
        let mut data = vec![0; rootfs.size as usize];
        use std::os::unix::fs::FileExt;
        std::fs::File::open(&rootfs.path).unwrap().read_exact_at(&mut data, 0).unwrap();
        assert_eq!(std::fs::metadata(&rootfs.path).unwrap().len(), kapsel_image::DISK_CAPACITY);
        assert!(rootfs.allocated < 1 << 20, "sparse");
        data
    };
    assert!(bytes(0) == bytes(1));
}

#[test]
fn a_rootfs_tar_becomes_an_image_with_a_configuration() {
    let (dir, store) = bed();
    let tar = TarBuilder::new().file("manifest.json", "not docker's").build();
    assert!(matches!(import(&store, &tar, None).unwrap_err(), Error::Unsupported { .. }), "it needs a name");
    let path = dir.path().join("rootfs.tar");
    std::fs::write(&path, &tar).unwrap();
    let options = ImportOptions {
        reference: Some("mine:v1".parse().unwrap()),
        cmd: vec!["sh".into()],
        entrypoint: vec!["/init".into()],
        env: vec!["A=b".into()],
        ..ImportOptions::default()
    };
    let image = store.import(Source::Path(&path), &options, &Silent).unwrap().remove(0);
    let config = store.config(&image).unwrap();
    let config = config.config().as_ref().unwrap();
    assert_eq!(config.cmd().as_ref().unwrap(), &["sh"]);
    assert_eq!(config.entrypoint().as_ref().unwrap(), &["/init"]);
    assert_eq!(config.env().as_ref().unwrap(), &["A=b"]);
    assert_eq!(store.import(Source::Path(&path), &options, &Silent).unwrap()[0].digest, image.digest);
    assert_eq!(store.list().unwrap().len(), 1);
    let inspected = store.inspect(&image).unwrap();
    assert!(inspected.size > tar.len() as u64 && inspected.rootfs.is_none());
    for name in ["mine:v1", &image.digest.to_string(), &image.digest.short(), &image.digest.hex()[..4]] {
        assert_eq!(store.find(name).unwrap().digest, image.digest, "{name}");
    }
    for name in ["mine", "other:v1", "abc", "sha256:", "ffff"] {
        assert!(matches!(store.find(name), Err(Error::NotFound { .. })), "{name}");
    }
}

#[test]
fn names_move_and_images_go() {
    let (_dir, store) = bed();
    let old = import_rootfs(&store, "name", &TarBuilder::new().file("old", vec![1; 9000]).build());
    let new = import_rootfs(&store, "name", &TarBuilder::new().file("new", vec![2; 9000]).build());
    assert_eq!(store.list().unwrap().len(), 2);
    let in_use = vec![old.path.clone()];
    assert!(store.prune(&PruneOptions { all: false, in_use: in_use.clone() }).unwrap().images.is_empty());
    assert!(old.path.exists(), "in use");
    let pruned = store.prune(&PruneOptions::default()).unwrap();
    assert_eq!((pruned.images.len(), old.path.exists(), new.path.exists()), (1, false, true));
    assert!(pruned.bytes > 18_000, "{pruned:?}");

    let in_use = vec![new.path.clone()];
    assert!(matches!(store.remove("name", &in_use, false), Err(Error::InUse { .. })));
    store.remove("name", &in_use, true).unwrap();
    assert!(store.list().unwrap().is_empty() && new.path.exists(), "a rootfs in use stays");
    store.prune(&PruneOptions { all: true, in_use: Vec::new() }).unwrap();
    assert!(!new.path.exists());
    let usage = store.usage().unwrap();
    assert_eq!((usage.images, usage.blobs, usage.rootfs, usage.partial), (0, 0, 0, 0), "{usage:?}");
}

#[test]
fn shared_layers_stay_while_an_image_needs_them() {
    let (_dir, store) = bed();
    let shared = || Layer::plain(TarBuilder::new().file("shared", vec![3; 5000]).build());
    let one = ImageBuilder::new().layer(shared()).build();
    let two =
        ImageBuilder::new().layer(shared()).layer(Layer::plain(TarBuilder::new().dir("d").build())).build();
    import(&store, &one.oci_archive("one:1"), None).unwrap();
    let image = import(&store, &two.oci_archive("two:1"), None).unwrap().remove(0);
    store.remove("one:1", &[], false).unwrap();
    store.rootfs(&image, &Silent).unwrap();
    assert_eq!(store.usage().unwrap().blobs_unreferenced, 0);
}

#[test]
fn a_rootfs_is_made_once() {
    let (dir, store) = bed();
    let tar = TarBuilder::new().file("big", vec![4; 8 << 20]).build();
    let image = import(&store, &tar, Some("big")).unwrap().remove(0);
    let made = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let store = Store::open(&dir.path().join("store")).unwrap();
                let image = image.clone();
                scope.spawn(move || {
                    use std::os::unix::fs::MetadataExt;
                    std::fs::metadata(store.rootfs(&image, &Silent).unwrap().path).unwrap().ino()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(made.iter().all(|inode| *inode == made[0]), "{made:?}");
}
