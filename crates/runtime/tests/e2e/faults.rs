//! What is killed, and what is deleted while it runs.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::world::{eventually, finish, kill, reap, world};

#[test]
fn a_running_one_is_deleted_only_by_force() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("force", "sleep 1000");
    let ran = engine.run(&["delete", "force"]);
    assert!(ran.code != 0 && ran.stderr.contains("not stopped"), "{}", ran.stderr);
    assert_eq!(engine.status("force"), "running");
    engine.ok(&["delete", "--force", "force"]);
    assert_eq!(reap(pid), 137);
    assert_eq!(world.sandboxes_of("force"), 0);
}

#[test]
fn the_engine_sees_the_end_of_a_killed_shim() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("shim", "sleep 1000");
    let state: Value = serde_json::from_str(&engine.ok(&["list", "--format", "json"])).unwrap();
    assert_eq!(state[0]["status"], "running");
    kill(shim(world, "shim"), Signal::KILL);
    assert_eq!(reap(pid), 137);
    assert_eq!(engine.status("shim"), "stopped");
    engine.ok(&["delete", "shim"]);
    assert_eq!(world.sandboxes_of("shim"), 0);
}

#[test]
fn a_killed_stand_in_takes_its_sandbox_along() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("stand-in", "sleep 1000");
    let shim = shim(world, "stand-in");
    kill(pid, Signal::KILL);
    assert_eq!(reap(pid), 137);
    eventually("the shim ends", || {
        let stat = std::fs::read_to_string(format!("/proc/{shim}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z")
    });
    engine.ok(&["delete", "stand-in"]);
    assert_eq!(world.sandboxes_of("stand-in"), 0);
}

#[test]
fn one_that_was_never_started_is_deleted() {
    let world = world!();
    let engine = world.engine();
    engine.bundle("true", |_| ());
    let pid = engine.create("created");
    engine.ok(&["delete", "created"]);
    assert_eq!(reap(pid), 137);
    assert!(!Path::new(&engine.dir).join("root/created").exists());
}

/// The process id of a container's shim.
fn shim(world: &crate::world::World, container: &str) -> u32 {
    let list = world.kapsel(&["ps", "-q"]).stdout;
    for id in list.lines() {
        let found: Value = serde_json::from_str(&world.kapsel(&["inspect", id]).stdout).expect("JSON");
        if found[0]["labels"]["engine.id"] == container {
            return found[0]["pids"]["shim"]
                .as_u64()
                .and_then(|pid| u32::try_from(pid).ok())
                .expect("a shim");
        }
    }
    panic!("no sandbox of {container}");
}

#[test]
fn engines_may_call_their_containers_alike() {
    let world = world!();
    let (one, other) = (world.engine(), world.engine());
    let id = "0123456789abcdef".repeat(4);
    one.start(&id, "sleep 999");
    other.start(&id, "sleep 999");
    other.ok(&["delete", "--force", &id]);
    assert_eq!(one.status(&id), "running");
    one.ok(&["delete", "--force", &id]);
}

/// A file system of a few pages, unmounted with the test.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path) -> Self {
        fs::create_dir_all(at).expect("a directory");
        let mounted = finish(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(at));
        assert_eq!(mounted.code, 0, "{}", mounted.stderr);
        Self(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        finish(Command::new("umount").arg("--lazy").arg(self.0));
    }
}

#[test]
fn a_full_state_directory_is_told_and_leaves_nothing() {
    let world = world!();
    let engine = world.engine();
    engine.bundle("sleep 1000", |_| ());
    let root = engine.dir.join("small");
    let small = Small::mount(&root);
    let filler = root.join("filler");
    // As much as goes in.
    let _ = fs::write(&filler, vec![b'x'; 1 << 20]);
    let call = |args: &[&str]| {
        let mut command = Command::new(&world.runtime);
        finish(command.arg("--root").arg(&root).args(args).env_clear())
    };
    let bundle = engine.dir.to_str().unwrap();
    let ran = call(&["create", "--bundle", bundle, "full"]);
    assert!(ran.code != 0 && ran.stderr.contains("No space left"), "{}", ran.stderr);
    assert_eq!(world.sandboxes_of("full"), 0);
    assert_eq!(call(&["list", "-q"]).stdout, "");
    // With room again the same name is free.
    fs::remove_file(&filler).unwrap();
    let mut command = Command::new(&world.runtime);
    command.arg("--root").arg(&root).args(["create", "--bundle", bundle, "--pid-file"]);
    command.arg(engine.dir.join("pid")).arg("full").env_clear();
    let output = File::create(engine.dir.join("output")).unwrap();
    command.stdin(std::process::Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    assert!(command.status().unwrap().success(), "{}", engine.output());
    // It can be removed however full it is.
    let _ = fs::write(&filler, vec![b'x'; 1 << 20]);
    let ran = call(&["delete", "--force", "full"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(reap(engine.pid()), 137);
    assert_eq!(world.sandboxes_of("full"), 0);
    drop(small);
}

#[test]
fn output_that_nobody_reads_keeps_nobody_from_killing_and_deleting() {
    let world = world!();
    let engine = world.engine();
    engine.bundle("while :; do echo a line that is long enough to fill a pipe before long; done", |_| ());
    let fifo = engine.dir.join("fifo");
    let made = finish(Command::new("mkfifo").arg(&fifo));
    assert_eq!(made.code, 0, "{}", made.stderr);
    // Both ends are open, and nothing is ever read.
    let both = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let pid_file = engine.dir.join("pid");
    let bundle = engine.dir.to_str().unwrap();
    let mut command =
        engine.command(&["create", "--bundle", bundle, "--pid-file", pid_file.to_str().unwrap(), "deaf"]);
    command.stdout(both.try_clone().unwrap()).stderr(both.try_clone().unwrap());
    assert!(command.status().unwrap().success(), "{}", engine.logged());
    engine.ok(&["start", "deaf"]);
    let ran = engine.run(&["exec", "deaf", "sh", "-c", "exit 3"]);
    assert_eq!(ran.code, 3, "{}", ran.stderr);
    engine.ok(&["kill", "deaf", "KILL"]);
    engine.ok(&["delete", "--force", "deaf"]);
    assert_eq!(reap(engine.pid()), 137);
    assert_eq!(world.sandboxes_of("deaf"), 0);
}

#[test]
fn a_bundle_may_disappear_once_the_container_is_created() {
    let world = world!();
    let engine = world.engine();
    engine.bundle("sleep 1000", |_| ());
    let pid = engine.create("vanished");
    fs::remove_file(engine.dir.join("config.json")).unwrap();
    fs::remove_dir_all(engine.dir.join("rootfs")).unwrap();
    // Its program is gone: the start says so, and nothing hangs.
    let ran = engine.run(&["start", "vanished"]);
    assert_ne!(ran.code, 0, "there is nothing to start");
    assert!(!engine.logged().is_empty());
    engine.ok(&["delete", "--force", "vanished"]);
    assert_ne!(reap(pid), 0);
    assert_eq!(world.sandboxes_of("vanished"), 0);
}

#[test]
fn what_has_stopped_takes_nothing_more() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("stopped", "exit 0");
    assert_eq!(reap(pid), 0);
    for args in [
        &["exec", "stopped", "true"][..],
        &["exec", "--detach", "--pid-file", "/tmp/kapsel-none", "stopped", "true"],
        &["pause", "stopped"],
        &["resume", "stopped"],
        &["ps", "stopped"],
        &["events", "--stats", "stopped"],
        &["update", "--pids-limit", "9", "stopped"],
    ] {
        let ran = engine.run(args);
        assert!(ran.code != 0 && ran.stderr.contains("stopped"), "{args:?}: {}", ran.stderr);
    }
    assert!(!Path::new("/tmp/kapsel-none").exists());
    engine.ok(&["kill", "--all", "stopped", "KILL"]);
    engine.ok(&["delete", "stopped"]);
}

#[test]
fn annotations_are_kept_or_refused_by_name() {
    let world = world!();
    let engine = world.engine();
    let bundle = engine.dir.to_str().unwrap().to_owned();
    for (key, word) in [("io.kapsel.colour", "io.kapsel.colour"), ("io.kapsel.memory", "engine_annotations")]
    {
        engine.bundle("true", |spec| spec["annotations"] = json!({ key: "512M" }));
        let ran = engine.run(&["create", "--bundle", &bundle, "annotated"]);
        assert!(ran.code != 0 && ran.stderr.contains(word), "{key}: {}", ran.stderr);
    }
    engine.bundle("true", |spec| spec["annotations"] = json!({ "org.example.unknown": "kept" }));
    let pid = engine.create("annotated");
    let state: Value = serde_json::from_str(&engine.ok(&["state", "annotated"])).unwrap();
    assert_eq!(state["annotations"]["org.example.unknown"], "kept");
    engine.ok(&["delete", "annotated"]);
    assert_eq!(reap(pid), 137);
}

#[test]
fn the_hosts_processes_and_network_are_refused_by_their_flags() {
    let world = world!();
    let engine = world.engine();
    let bundle = engine.dir.to_str().unwrap().to_owned();
    for (typ, flag) in
        [("pid", "--pid=host"), ("network", "--network=host"), ("ipc", "--ipc=host"), ("uts", "--uts=host")]
    {
        let config = engine.dir.join("config.json");
        let _ = fs::remove_file(config);
        engine.bundle("true", |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != typ);
        });
        let ran = engine.run(&["create", "--bundle", &bundle, "hosts"]);
        assert!(ran.code != 0 && ran.stderr.contains(flag), "{typ}: {}", ran.stderr);
        assert!(ran.stderr.contains("leave that out"), "it says what to do: {}", ran.stderr);
    }
    assert_eq!((engine.ok(&["list", "-q"]).as_str(), world.sandboxes_of("hosts")), ("", 0));
}
