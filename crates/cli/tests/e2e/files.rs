//! Volumes and copies.

use std::fs;
use std::os::unix::fs::symlink;

use crate::world::world;

#[test]
fn volumes_are_shared_both_ways_or_only_to_read() {
    let world = world!();
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("in"), "from here\n").expect("a file");
    let volume = |mode: &str| format!("{}:/data{mode}", dir.path().display());
    let out = world.ok([
        "run",
        "--rm",
        "-v",
        &volume(""),
        "busybox",
        "sh",
        "-c",
        "cat /data/in; echo there > /data/out",
    ]);
    assert_eq!(out, "from here\n");
    assert_eq!(fs::read_to_string(dir.path().join("out")).expect("written"), "there\n");
    let ran = world.run([
        "run",
        "--rm",
        "-v",
        &volume(":ro"),
        "busybox",
        "sh",
        "-c",
        "cat /data/in; echo x > /data/no",
    ]);
    assert!(
        ran.code != 0 && ran.text() == "from here\n" && ran.stderr.contains("Read-only"),
        "{}",
        ran.stderr
    );
    assert!(!dir.path().join("no").exists());
    let file = format!("{}:/etc/one:ro", dir.path().join("in").display());
    assert_eq!(
        world.ok(["run", "--rm", "-v", &file, "busybox", "cat", "/etc/one"]),
        "from here\n",
        "a single file"
    );
    let ran = world.run(["run", "--rm", "-v", "/no/such/dir:/data", "busybox", "true"]);
    assert!(ran.code == 125 && ran.stderr.contains("/no/such/dir"), "{}", ran.stderr);
}

#[test]
fn copies_in_and_out_follow_dockers_rules() {
    let world = world!();
    let container = world.container("e2e-cp", &[], &["sleep", "999"]);
    let inside = |path: &str| format!("{}:{path}", container.name);
    let here = tempfile::tempdir().expect("a directory");
    let path = |name: &str| here.path().join(name).to_str().expect("UTF-8").to_owned();
    fs::create_dir_all(here.path().join("tree/sub")).expect("directories");
    fs::write(here.path().join("tree/sub/file"), vec![7; 300_000]).expect("a file");
    symlink("sub/file", here.path().join("tree/link")).expect("a link");

    world.ok(["cp", &path("tree"), &inside("/tmp")]);
    world.ok(["cp", &path("tree"), &inside("/tmp/new")]);
    world.ok(["exec", container.name, "mkdir", "/tmp/there"]);
    world.ok(["cp", &path("tree/."), &inside("/tmp/there")]);
    let listed =
        world.ok(["exec", container.name, "ls", "-d", "/tmp/tree/sub", "/tmp/new/sub", "/tmp/there/sub"]);
    assert_eq!(listed.lines().count(), 3, "{listed}");
    assert_eq!(world.ok(["exec", container.name, "stat", "-c", "%s %u", "/tmp/tree/sub/file"]), "300000 0\n");

    world.ok(["cp", &inside("/tmp/tree"), &path("back")]);
    assert_eq!(fs::read(here.path().join("back/sub/file")).expect("there"), vec![7; 300_000]);
    assert_eq!(fs::read_link(here.path().join("back/link")).expect("a link").to_str(), Some("sub/file"));
    world.ok(["cp", &inside("/etc/notes"), &path("back")]);
    assert!(here.path().join("back/notes").is_file());

    let ran = world.run(["cp", &inside("/no/such"), &path("x")]);
    assert!(ran.code == 125 && ran.stderr.contains("/no/such"), "{}", ran.stderr);
    let ran = world.run(["cp", &path("tree"), &inside("/etc/notes")]);
    assert!(ran.code == 125 && ran.stderr.contains("is a file"), "{}", ran.stderr);
    assert_eq!(world.run(["cp", &inside("/etc/notes"), &path("no-such-dir/")]).code, 125);

    let stream = world.run(["cp", &inside("/tmp/tree"), "-"]);
    let again = world.run_with(["cp", "-", &inside("/home")], &stream.stdout);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert_eq!(world.ok(["exec", container.name, "stat", "-c", "%s", "/home/tree/sub/file"]), "300000\n");
}

#[test]
fn images_in_use_stay() {
    let world = world!();
    let _container = world.container("e2e-in-use", &[], &["sleep", "999"]);
    let ran = world.run(["rmi", "busybox"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("in use") && ran.stderr.contains("hint: "),
        "{}",
        ran.stderr
    );
    world.ok(["prune", "--force"]);
    assert!(world.ok(["images"]).contains("busybox:latest"));
}
