//! Processes that are killed: whichever it is, the sandbox ends and nothing of it stays.

use std::process::Stdio;

use rustix::process::Signal;

use crate::world::{World, eventually, kill, lives, world};

fn pids(world: &World, name: &str) -> Vec<u64> {
    let told = world.inspect(name);
    let fsd = told["pids"]["fsd"].as_array().cloned().unwrap_or_default();
    let all = [told["pids"]["shim"].clone(), told["pids"]["monitor"].clone()].into_iter().chain(fsd);
    all.filter_map(|pid| pid.as_u64()).collect()
}

/// Nothing of a sandbox may be there: no process, no directory, no mount, no cgroup.
fn nothing_left(world: &World, id: &str, pids: &[u64]) {
    eventually("its processes are gone", || !pids.iter().any(|pid| lives(*pid)));
    // Any command clears away what a killed shim could not.
    world.ok(["ps"]);
    let short = &id[..12];
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(short), "{mounts}");
    let cgroups =
        std::process::Command::new("find").args(["/sys/fs/cgroup", "-name", &format!("*{short}*")]).output();
    assert_eq!(String::from_utf8_lossy(&cgroups.expect("find").stdout), "");
}

fn victim(
    world: &'static World,
    name: &'static str,
) -> (crate::world::Container, String, Vec<u64>, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let volume = format!("{}:/data", dir.path().display());
    let container = world.container(name, &["-v", &volume], &["sleep", "999"]);
    let id = world.inspect(name)["id"].as_str().expect("an id").to_owned();
    let pids = pids(world, name);
    assert_eq!(pids.len(), 3, "shim, monitor and fsd");
    (container, id, pids, dir)
}

#[test]
fn killing_any_process_ends_the_sandbox() {
    let world = world!();
    for (index, name) in ["e2e-kill-shim", "e2e-kill-monitor", "e2e-kill-fsd"].into_iter().enumerate() {
        let (container, id, pids, _dir) = victim(world, name);
        kill(u32::try_from(pids[index]).expect("a pid"), Signal::KILL);
        nothing_left(world, &id, &pids);
        let told = world.inspect(name);
        assert_eq!(told["status"], "exited", "{told}");
        assert!(told["exit"]["reason"].is_string(), "it says why: {told}");
        let ran = world.run(["exec", name, "true"]);
        assert_eq!(ran.code, 125, "{}", ran.stderr);
        world.ok(["rm", name]);
        assert!(!world.sandboxes().join(&id[..12]).exists());
        drop(container);
    }
}

#[test]
fn killing_kapsel_in_the_foreground_ends_the_sandbox() {
    let world = world!();
    let name = "e2e-kill-cli";
    let mut command = world.command(["run", "--rm", "--name", name, "busybox", "sleep", "999"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("kapsel starts");
    eventually("it runs", || world.run(["exec", name, "true"]).code == 0);
    let id = world.inspect(name)["id"].as_str().expect("an id").to_owned();
    let pids = pids(world, name);
    child.kill().expect("killed");
    child.wait().expect("it ends");
    nothing_left(world, &id, &pids);
    eventually("its directory is gone", || !world.sandboxes().join(&id[..12]).exists());
}

#[test]
fn a_stuck_shim_holds_nobody_up_and_can_be_removed() {
    let world = world!();
    let container = world.container("e2e-stuck", &[], &["sleep", "999"]);
    let shim = pids(world, container.name)[0];
    kill(u32::try_from(shim).expect("a pid"), Signal::STOP);
    let begun = std::time::Instant::now();
    let listed = world.ok(["ps"]);
    assert!(begun.elapsed() < std::time::Duration::from_secs(4), "ps took {:?}", begun.elapsed());
    assert!(listed.contains("does not answer"), "{listed}");
    world.ok(["rm", "-f", container.name]);
    assert!(!lives(shim));
}
