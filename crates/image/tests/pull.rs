//! Pulling from a registry, with and without faults.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;
use std::process::Command;

use kapsel_image::{
    Auth, Error, Image, Platform, PruneOptions, PullOptions, PullPolicy, Reference, Silent, Store,
};
use kapsel_testkit::image::{BuiltImage, digest};
use kapsel_testkit::{Fault, ImageBuilder, Layer, Registry, TarBuilder};

/// Bytes that do not compress well, so that blobs have a size.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let next = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*state >> 24) as u8
    };
    (0..length).map(|_| next(&mut state)).collect()
}

fn image() -> BuiltImage {
    ImageBuilder::new()
        .layer(Layer::gzip(TarBuilder::new().file("lower", noise(1, 300_000)).file("gone", "x").build()))
        .layer(Layer::zstd(TarBuilder::new().file("middle", noise(2, 300_000)).file(".wh.gone", "").build()))
        .layer(Layer::plain(TarBuilder::new().file("upper", noise(3, 300_000)).build()))
        .build()
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    (dir, store)
}

fn anonymous() -> PullOptions {
    let platform: Platform = "linux/amd64".parse().unwrap();
    PullOptions { auth: Auth::Anonymous, platform, ..PullOptions::default() }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn pull(store: &Store, registry: &Registry, name: &str, options: &PullOptions) -> Result<Image, Error> {
    let reference: Reference = registry.reference(name).parse().unwrap();
    runtime().block_on(store.pull(&reference, options, &Silent))
}

fn partial_files(store_dir: &Path) -> usize {
    std::fs::read_dir(store_dir.join("store/partial")).unwrap().count()
}

#[test]
fn pulls_verifies_and_unpacks() {
    let (dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("some/tool", "v1", &built);
    let image = pull(&store, &registry, "some/tool:v1", &anonymous()).unwrap();
    assert_eq!(image.digest.to_string(), built.digest());
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.find(&registry.reference("some/tool:v1")).unwrap().digest, image.digest);
    let rootfs = store.rootfs(&image, &Silent).unwrap();
    assert!(rootfs.size > 900_000 && rootfs.allocated < 2_000_000, "{rootfs:?}");
    assert_eq!(partial_files(dir.path()), 0);

    // Present now: by default nothing is asked, and if it is, no blob comes again.
    let before = registry.requests("").len();
    pull(&store, &registry, "some/tool:v1", &anonymous()).unwrap();
    assert_eq!(registry.requests("").len(), before);
    let always = PullOptions { policy: PullPolicy::Always, ..anonymous() };
    pull(&store, &registry, "some/tool:v1", &always).unwrap();
    assert_eq!(registry.requests("/blobs/").len(), 4);
}

#[test]
fn other_tools_read_the_store() {
    let (dir, store) = store();
    let registry = Registry::start();
    registry.push("tool", "v1", &image());
    pull(&store, &registry, "tool:v1", &anonymous()).unwrap();
    let layout = dir.path().join("store");
    let name = registry.reference("tool:v1");
    let inspected =
        common::run(Command::new("skopeo").arg("inspect").arg(format!("oci:{}:{name}", layout.display())));
    assert!(inspected.contains("\"Layers\""), "{inspected}");
    let listed = common::run(Command::new("umoci").arg("ls").arg("--layout").arg(&layout));
    assert!(listed.contains(&name), "{listed}");
}

#[test]
fn chooses_the_platform() {
    let (_dir, store) = store();
    let registry = Registry::start();
    let other = ImageBuilder::new().layer(Layer::plain(TarBuilder::new().file("arm", "").build())).build();
    registry.push_index("multi", "latest", &[("linux/arm64", &other), ("linux/amd64", &image())]);
    assert_eq!(pull(&store, &registry, "multi", &anonymous()).unwrap().digest.to_string(), image().digest());
    registry.push_index("arm-only", "latest", &[("linux/arm64", &other)]);
    let error = pull(&store, &registry, "arm-only", &anonymous()).unwrap_err();
    assert!(matches!(&error, Error::NoPlatform { available, .. } if available == "linux/arm64"), "{error}");
}

#[test]
fn pulls_by_digest_and_refuses_another() {
    let (_dir, store) = store();
    let registry = Registry::start();
    registry.push("tool", "v1", &image());
    let pinned = format!("tool@{}", image().digest());
    assert_eq!(pull(&store, &registry, &pinned, &anonymous()).unwrap().digest.to_string(), image().digest());
    // The registry has something else under that digest.
    let wrong = digest(b"something else");
    registry.push_manifest("tool", &wrong, "application/vnd.oci.image.manifest.v1+json", image().manifest);
    let error = pull(&store, &registry, &format!("tool@{wrong}"), &anonymous()).unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
}

#[test]
fn authenticates() {
    let registry = Registry::start();
    registry.push("private", "latest", &image());
    let known = PullOptions {
        auth: Auth::Basic { username: "user".into(), password: "secret".into() },
        ..anonymous()
    };
    registry.require_token("user", "secret");
    pull(&store().1, &registry, "private", &known).unwrap();
    let error = pull(&store().1, &registry, "private", &anonymous()).unwrap_err();
    assert!(error.to_string().contains("docker login"), "{error}");
    registry.require_basic("user", "secret");
    pull(&store().1, &registry, "private", &known).unwrap();
    let error = pull(&store().1, &registry, "private", &anonymous()).unwrap_err();
    assert!(error.to_string().contains("docker login"), "{error}");
    registry.require_token("", "");
    pull(&store().1, &registry, "private", &anonymous()).unwrap();
}

#[test]
fn a_token_that_has_expired_is_replaced_once() {
    let registry = Registry::start();
    let built = image();
    registry.push("private", "latest", &built);
    registry.require_token("user", "secret");
    let known = PullOptions {
        auth: Auth::Basic { username: "user".into(), password: "secret".into() },
        ..anonymous()
    };
    // While the first layer is awaited, and before the last one is asked for.
    registry.fault(&digest(&built.layers[0].blob), Fault::Slow(400));
    registry.fault(&digest(&built.layers[1].blob), Fault::Slow(400));
    registry.fault(&digest(&built.layers[2].blob), Fault::Slow(400));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while registry.requests("/token").is_empty() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
            registry.expire_tokens();
        });
        pull(&store().1, &registry, "private", &known).unwrap();
    });
    assert_eq!(registry.requests("/token").len(), 2);
}

#[test]
fn token_servers_are_not_believed() {
    let registry = Registry::start();
    registry.push("private", "latest", &image());
    registry.require_token("", "");
    for (reply, said) in [
        (vec![b' '; 4 << 20], "longer than"),
        (b"{}".to_vec(), "without a token"),
        (br#"{"token":"a\nb: c"}"#.to_vec(), "no header can carry"),
        (br#"{"token":"wrong"}"#.to_vec(), "docker login"),
    ] {
        registry.token_reply(reply);
        let error = pull(&store().1, &registry, "private", &anonymous()).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    assert!(registry.requests("/token").iter().all(|request| request.authorization.is_none()));
}

#[test]
fn another_server_is_not_shown_our_credentials() {
    let (registry, storage) = (Registry::start(), Registry::start());
    let known = PullOptions {
        auth: Auth::Basic { username: "user".into(), password: "secret".into() },
        ..anonymous()
    };
    for registry in [&registry, &storage] {
        registry.push("private", "latest", &image());
    }
    registry.require_basic("user", "secret");
    registry.redirect_blobs(&storage);
    pull(&store().1, &registry, "private", &known).unwrap();
    assert_eq!(storage.requests("/blobs/").len(), 4);
    // It asks for them.
    storage.require_basic("user", "secret");
    let error = pull(&store().1, &registry, "private", &known).unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error}");
    assert!(storage.requests("").iter().all(|request| request.authorization.is_none()));
}

#[test]
fn resumes_where_the_connection_broke() {
    let (_dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    let layer = digest(&built.layers[2].blob);
    registry.fault(&layer, Fault::Disconnect { after: 100_000, times: 2 });
    pull(&store, &registry, "tool", &anonymous()).unwrap();
    let starts: Vec<_> = registry.requests(&layer).iter().map(|r| r.range_start.unwrap_or(0)).collect();
    assert_eq!(starts.len(), 3);
    assert_eq!((starts[0], starts[1] > 0, starts[2] > starts[1]), (0, true, true), "{starts:?}");
}

#[test]
fn a_later_pull_resumes_too() {
    let (dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    let layer = digest(&built.layers[2].blob);
    // No attempt but the first brings anything.
    registry.fault(&layer, Fault::Disconnect { after: 100_000, times: 1 });
    let error = {
        let registry = &registry;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while registry.requests(&layer).is_empty() {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                registry.fault(&layer, Fault::Disconnect { after: 0, times: 100 });
            });
            pull(&store, registry, "tool", &anonymous()).unwrap_err()
        })
    };
    assert!(matches!(error, Error::Registry { .. }), "{error}");
    assert_eq!(partial_files(dir.path()), 1, "the bytes so far are kept");
    registry.heal(&layer);
    pull(&Store::open(&dir.path().join("store")).unwrap(), &registry, "tool", &anonymous()).unwrap();
    assert!(registry.requests(&layer).last().unwrap().range_start.unwrap() > 0);
    assert_eq!(partial_files(dir.path()), 0);
}

#[test]
fn a_bad_leftover_is_not_used() {
    let (dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    let layer = digest(&built.layers[2].blob);
    std::fs::write(dir.path().join("store/partial").join(&layer[7..]), noise(9, 1000)).unwrap();
    pull(&store, &registry, "tool", &anonymous()).unwrap();
}

#[test]
fn registries_without_ranges_work() {
    let (dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    let layer = digest(&built.layers[2].blob);
    registry.fault(&layer, Fault::NoRange);
    std::fs::write(dir.path().join("store/partial").join(&layer[7..]), &built.layers[2].blob[..5000])
        .unwrap();
    pull(&store, &registry, "tool", &anonymous()).unwrap();
}

#[test]
fn server_errors_are_tried_again() {
    let (_dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    registry.fault(&digest(&built.layers[0].blob), Fault::Status { code: 503, times: 2 });
    registry.fault("latest", Fault::Status { code: 503, times: 2 });
    pull(&store, &registry, "tool", &anonymous()).unwrap();
    assert_eq!(registry.requests("manifests/latest").len(), 3);
}

#[test]
fn a_registry_that_goes_on_failing_is_given_up() {
    let (_dir, store) = store();
    let registry = Registry::start();
    registry.push("tool", "latest", &image());
    for (code, times) in [(500, 4), (429, 1), (403, 1)] {
        let before = registry.requests("manifests/latest").len();
        registry.fault("latest", Fault::Status { code, times: 100 });
        let error = pull(&store, &registry, "tool", &anonymous()).unwrap_err().to_string();
        assert!(error.contains(&code.to_string()), "{error}");
        assert_eq!(registry.requests("manifests/latest").len() - before, times, "{code}");
    }
}

#[test]
fn refuses_corrupt_and_truncated_blobs() {
    for (fault, is_expected) in [
        (Fault::Corrupt, (|e| matches!(e, Error::DigestMismatch { .. })) as fn(&Error) -> bool),
        (Fault::Truncated(1000), |e| matches!(e, Error::SizeMismatch { .. })),
        (Fault::Status { code: 404, times: 100 }, |e| matches!(e, Error::Registry { .. })),
    ] {
        let (dir, store) = store();
        let registry = Registry::start();
        let built = image();
        registry.push("tool", "latest", &built);
        let layer = digest(&built.layers[1].blob);
        registry.fault(&layer, fault);
        let error = pull(&store, &registry, "tool", &anonymous()).unwrap_err();
        assert!(is_expected(&error), "{fault:?}: {error}");
        assert!(store.list().unwrap().is_empty(), "{fault:?}: no image");
        assert!(!dir.path().join("store/blobs/sha256").join(&layer[7..]).exists(), "{fault:?}: no blob");
        // Nothing stays broken.
        registry.heal(&layer);
        pull(&store, &registry, "tool", &anonymous()).unwrap();
    }
}

#[test]
fn a_manifest_without_end_is_refused() {
    let (_dir, store) = store();
    let registry = Registry::start();
    registry.push_manifest(
        "big",
        "latest",
        "application/vnd.oci.image.manifest.v1+json",
        vec![b' '; 8 << 20],
    );
    let error = pull(&store, &registry, "big", &anonymous()).unwrap_err();
    assert!(matches!(error, Error::Limit { name: "document_size", .. }), "{error}");
}

#[test]
fn an_absent_image_and_an_absent_registry_are_told_apart() {
    let (_dir, store) = store();
    let registry = Registry::start();
    let error = pull(&store, &registry, "nothing", &anonymous()).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("no such image"), "{error}");
    let host = registry.host();
    drop(registry);
    let reference: Reference = format!("{host}/nothing").parse().unwrap();
    let error = runtime().block_on(store.pull(&reference, &anonymous(), &Silent)).unwrap_err().to_string();
    assert!(error.contains("cannot be reached"), "{error}");
    let never = PullOptions { policy: PullPolicy::Never, ..anonymous() };
    let error = runtime().block_on(store.pull(&reference, &never, &Silent)).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[test]
fn simultaneous_pulls_download_once() {
    let (dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    for layer in &built.layers {
        registry.fault(&digest(&layer.blob), Fault::Slow(300));
    }
    let reference: Reference = registry.reference("tool").parse().unwrap();
    // A store of its own each, as two processes have: locks are between open files, not processes.
    let other = Store::open(&dir.path().join("store")).unwrap();
    let runtime = runtime();
    let pulls = [store, other].map(|store| {
        let reference = reference.clone();
        runtime.spawn(async move { store.pull(&reference, &anonymous(), &Silent).await })
    });
    for pull in pulls {
        runtime.block_on(pull).unwrap().unwrap();
    }
    for layer in &built.layers {
        assert_eq!(registry.requests(&digest(&layer.blob)).len(), 1, "downloaded once");
    }
}

#[test]
fn an_interrupted_pull_leaves_a_store_that_opens() {
    let (dir, store) = store();
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    registry.fault(&digest(&built.layers[0].blob), Fault::Slow(10_000));
    let reference: Reference = registry.reference("tool").parse().unwrap();
    let runtime = runtime();
    let cut = async {
        let options = anonymous();
        let pull = store.pull(&reference, &options, &Silent);
        tokio::time::timeout(std::time::Duration::from_millis(500), pull).await
    };
    assert!(runtime.block_on(cut).is_err(), "cancelled");
    drop(runtime);
    registry.heal(&digest(&built.layers[0].blob));
    let store = Store::open(&dir.path().join("store")).unwrap();
    assert!(store.list().unwrap().is_empty());
    store.prune(&PruneOptions::default()).unwrap();
    assert_eq!(partial_files(dir.path()), 0);
    pull(&store, &registry, "tool", &anonymous()).unwrap();
}

#[test]
fn wherever_the_disk_fills_up_nothing_half_written_is_believed() {
    let Some(()) = common::needs_root_and_erofs() else { return };
    let registry = Registry::start();
    let built = image();
    registry.push("tool", "latest", &built);
    let (mut failed, mut succeeded) = (0, 0);
    // The image takes 0.9 MB, its rootfs as much again.
    for kib in (8..2400).step_by(92) {
        let dir = tempfile::tempdir().unwrap();
        let disk = common::Tmpfs::new(dir.path(), &format!("{kib}k"));
        let path = dir.path().join("store");
        let attempt = || -> Result<(), Error> {
            let store = Store::open(&path)?;
            let image = pull(&store, &registry, "tool", &anonymous())?;
            store.rootfs(&image, &Silent).map(drop)
        };
        match attempt() {
            Ok(()) => succeeded += 1,
            Err(error) => {
                assert!(matches!(error, Error::DiskFull { .. }), "{kib} KiB: {error}");
                failed += 1;
            }
        }
        for blob in std::fs::read_dir(path.join("blobs/sha256")).into_iter().flatten() {
            let blob = blob.unwrap();
            let expected = format!("sha256:{}", blob.file_name().to_str().unwrap());
            assert_eq!(digest(&std::fs::read(blob.path()).unwrap()), expected, "{kib} KiB");
        }
        // An image that is listed is whole, also while the disk is still full.
        for image in Store::open(&path).and_then(|store| store.list()).into_iter().flatten() {
            Store::open(&path).unwrap().inspect(&image).unwrap();
        }
        disk.resize("16m");
        attempt().unwrap_or_else(|error| panic!("{kib} KiB, then enough: {error}"));
        drop(disk);
    }
    assert!(failed > 10 && succeeded > 0, "{failed} {succeeded}");
}
