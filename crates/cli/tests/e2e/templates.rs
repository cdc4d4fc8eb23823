//! Clones of a template: alike but for what must differ; and templates that are not what they were.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::world::{World, world};

#[test]
fn clones_share_no_randomness_and_no_name() {
    let world = world!();
    let script = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | md5sum; hostname";
    let of_a_clone = || world.ok(["run", "--rm", "busybox", "sh", "-c", script]);
    let (first, second) = (of_a_clone(), of_a_clone());
    assert_eq!(first.lines().count(), 3, "{first}");
    for (a, b) in first.lines().zip(second.lines()) {
        assert_ne!(a, b);
    }
}

#[test]
fn clones_know_what_time_it_is() {
    let world = world!();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let before = now();
    let told = world.ok(["run", "--rm", "busybox", "date", "+%s"]);
    let guest = Duration::from_secs(told.trim().parse().expect("seconds"));
    // Asked between two readings of this machine's clock; a second is what date rounds down by.
    assert!((before - Duration::from_secs(1)..=now()).contains(&guest), "{before:?} {guest:?}");
}

/// Makes a template of a shape that no other test uses, spoils it, and starts a container of that shape: it must start
/// cold, and nobody uses the template again.
fn spoilt(world: &World, memory: &str, spoil: impl Fn(&std::path::Path)) {
    let key = world.ok(["template", "build", "-m", memory]);
    let dir = world.root().join("templates").join(key.trim());
    let run = |name: &str| {
        let _ = world.run(["rm", "-f", name]);
        let out = world.ok(["run", "--name", name, "-m", memory, "busybox", "echo", "fine"]);
        assert_eq!(out, "fine\n");
        let cloned = world.inspect(name)["isolation"]["template"].clone();
        world.ok(["rm", name]);
        cloned
    };
    assert_eq!(run(&format!("e2e-whole-{memory}")), true);
    spoil(&dir);
    assert_eq!(run(&format!("e2e-spoilt-{memory}")), false);
    assert!(!world.ok(["template", "ls", "--json"]).contains(key.trim()), "it is not tried again");
    let bad = dir.with_extension("bad");
    assert!(bad.exists(), "nor built again at once");
    fs::remove_file(bad).expect("removed");
}

#[test]
fn a_template_that_cannot_be_restored_is_put_aside() {
    spoilt(world!(), "72m", |dir| {
        let memory = File::options().write(true).open(dir.join("memory")).expect("the memory");
        memory.set_len(4096).expect("cut");
    });
}

#[test]
fn a_template_whose_state_was_changed_is_not_believed() {
    spoilt(world!(), "80m", |dir| {
        let state = File::options().append(true).open(dir.join("state"));
        state.and_then(|mut state| state.write_all(b"x")).expect("changed");
    });
}

#[test]
fn nobody_else_may_read_a_template() {
    let world = world!();
    for template in fs::read_dir(world.root().join("templates")).expect("templates").flatten() {
        if template.path().is_dir() {
            let mode = template.metadata().expect("metadata").mode();
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", template.path().display());
            let memory = fs::metadata(template.path().join("memory")).expect("memory").mode();
            assert_eq!(memory & 0o077, 0, "{}: {memory:o}", template.path().display());
        }
    }
}
