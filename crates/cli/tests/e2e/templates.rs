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

/// What a process can see of its container that must not depend on how the container came to be.
pub const LOOK_AROUND: &str = "grep -E 'Cap|Secc|NoNew|Uid|Gid|Groups' /proc/self/status; cat /proc/mounts /proc/self/cgroup; \
    ls -l /dev | awk '{print $1, $3, $4, $5, $6, $NF}'; ls /proc/self/fd; cat /sys/fs/cgroup/pids.max; ulimit -a; env; pwd";

#[test]
fn a_container_that_was_made_before_is_like_any_other() {
    let world = world!();
    let shape = ["-m", "88m", "--pids-limit", "99"];
    let run = |flags: &[&str], command: &[&str]| {
        world.ok([&["run", "--rm"][..], &shape, flags, &["busybox"], command].concat())
    };
    let cold = run(&["--cold", "--hostname", "same"], &["sh", "-c", LOOK_AROUND]);
    let held = [
        &["run", "--name", "e2e-held", "--hostname", "same"][..],
        &shape,
        &["busybox", "sh", "-c", LOOK_AROUND],
    ];
    // The first of its shape makes its container, and has the template built; some time later it is found made.
    let begun = std::time::Instant::now();
    loop {
        let _ = world.run(["rm", "-f", "e2e-held"]);
        assert_eq!(world.ok(held.concat()), cold);
        let timings = world.inspect("e2e-held")["timings"].to_string();
        assert!(timings.contains("guest: start"), "{timings}");
        if !timings.contains("guest: create") {
            break;
        }
        assert!(begun.elapsed() < crate::world::PATIENCE, "no template with a container was built");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(world.ok(["logs", "e2e-held"]), cold);
    world.ok(["rm", "e2e-held"]);

    // The program of the first was read when the template was made: not so much as its beginning is read again.
    let read = run(&[], &["grep", "^read_bytes", "/proc/self/io"]);
    let bytes: u64 = read.trim_start_matches("read_bytes:").trim().parse().expect("a number");
    assert!(bytes < 64 << 10, "{read}");

    let script = "echo $A; id -u; id -g; pwd; cat; exit 7";
    let own = ["run", "--rm", "-i", "-u", "65534:7", "-e", "A=b", "-w", "/tmp/new"];
    let ran = world.run_with([&own[..], &shape, &["busybox", "sh", "-c", script]].concat(), b"typed");
    assert_eq!((ran.code, ran.text().as_str()), (7, "b\n65534\n7\n/tmp/new\ntyped"), "{}", ran.stderr);
    for (program, code) in [("/nowhere", 127), ("/etc/passwd", 126)] {
        let ran = world.run([&["run", "--rm"][..], &shape, &["busybox", program]].concat());
        assert_eq!(ran.code, code, "{}", ran.stderr);
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
        // Of a container with a read-only root no template is made, so that there is only this one.
        let out = world.ok(["run", "--name", name, "-m", memory, "--read-only", "busybox", "echo", "fine"]);
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
    // The directory keeps others out of all that is in it. Another test's template may go away meanwhile.
    let templates = fs::read_dir(world.root().join("templates")).expect("templates");
    for template in templates.flatten().filter(|template| template.path().is_dir()) {
        if let Ok(metadata) = template.metadata() {
            let mode = metadata.mode();
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", template.path().display());
        }
    }
}
