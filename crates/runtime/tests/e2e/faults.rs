//! What is killed, and what is deleted while it runs.

use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;

use crate::world::{eventually, kill, reap, world};

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
