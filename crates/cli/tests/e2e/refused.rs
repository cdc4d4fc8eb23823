//! What cannot be run: each is refused with exit code 125, the reason and what to do, and leaves nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::place::Place;
use crate::world::{finish, world};

#[test]
fn what_is_missing_on_this_machine_is_named() {
    let world = world!();
    let run = ["run", "--rm", "busybox", "true"];
    Place::new(world, "qemu = \"/nowhere/qemu\"").fails(&run, &["/nowhere/qemu", "install the package"]);
    Place::new(world, "kernel = \"/nowhere/vmlinux\"").fails(&run, &["/nowhere/vmlinux"]);
    Place::new(world, "kernel = \"/etc/passwd\"").fails(&run, &["/etc/passwd", "kernel"]);
    Place::new(world, "libexec = \"/nowhere\"").fails(&run, &["/nowhere/containerd-shim-kapsel-v2"]);
}

#[test]
fn resources_that_no_machine_can_have() {
    let world = world!();
    let place = Place::new(world, "");
    place.fails(&["run", "-m", "1m", "busybox", "true"], &["too little"]);
    place.fails(&["run", "-m", "100000g", "busybox", "true"], &["more than this host has", "--memory"]);
    place.fails(&["run", "--storage", "1k", "busybox", "true"], &["storage"]);
    place.fails(&["run", "--storage", "100000g", "busybox", "true"], &["storage"]);
}

#[test]
fn an_image_that_is_damaged_in_the_store() {
    let world = world!();
    let place = Place::new(world, "");
    // A store of its own to spoil.
    fs::remove_file(place.path().join("images")).expect("removed");
    let archive = world.archive();
    let archive = archive.to_str().expect("UTF-8");
    for spoil in [(|blob: &mut Vec<u8>| blob.truncate(blob.len() / 2)) as fn(&mut Vec<u8>), |blob| {
        *blob.last_mut().expect("bytes") ^= 1
    }] {
        let imported = place.run(&["import", "spoilt", archive, "--cmd", "true"]);
        assert_eq!(imported.code, 0, "{}", imported.stderr);
        let blobs = fs::read_dir(place.path().join("images/blobs/sha256")).expect("blobs");
        let layer = blobs
            .map(|blob| blob.expect("a blob").path())
            .max_by_key(|path| fs::metadata(path).map_or(0, |meta| meta.len()));
        let layer = layer.expect("a layer");
        let mut bytes = fs::read(&layer).expect("readable");
        spoil(&mut bytes);
        fs::write(&layer, bytes).expect("spoilt");
        let digest = layer.file_name().expect("a name").to_string_lossy().into_owned();
        place.fails(&["run", "--rm", "spoilt"], &[&digest]);
        assert_eq!(place.run(&["rmi", "spoilt"]).code, 0, "it can be removed, to be fetched again");
    }
}

#[test]
fn more_environment_than_goes_to_a_guest() {
    let world = world!();
    let place = Place::new(world, "");
    let file = place.path().join("environment");
    let flag = ["--env-file", file.to_str().expect("UTF-8")];
    let write = |variables: usize| {
        let lines = (0..variables).map(|n| format!("A{n}={}\n", "x".repeat(100_000)));
        fs::write(&file, lines.collect::<String>()).expect("a file");
    };
    write(38);
    place.fails(&[&["run"], &flag[..], &["busybox", "true"]].concat(), &["environment", "go to a guest"]);
    write(100);
    place.fails(&[&["run"], &flag[..], &["busybox", "true"]].concat(), &["too large"]);
}

#[test]
fn kvm_that_is_there_but_cannot_be_used() {
    let world = world!();
    let place = Place::new(world, "");
    // Whatever this machine has, in a mount namespace of its own /dev/kvm opens and can do nothing.
    let hide = match Path::new("/dev/kvm").exists() {
        true => "mount --bind /dev/null /dev/kvm && ",
        false => "",
    };
    let here = |args: &[&str]| {
        let kapsel = place.command(args);
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &format!("{hide}exec \"$@\""), "sh"]);
        command.arg(kapsel.get_program()).args(kapsel.get_args());
        place.dress(&mut command);
        finish(command.spawn().expect("unshare starts"))
    };
    place.failed(&here(&["run", "--isolation", "kvm", "busybox", "true"]), &["KVM", "--isolation tcg"]);
    let ran = here(&["run", "--rm", "busybox", "echo", "emulated"]);
    assert_eq!((ran.code, ran.text().as_str()), (0, "emulated\n"), "{}", ran.stderr);
    place.nothing_left();
}
