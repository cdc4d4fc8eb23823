//! The cgroup that an engine names: who is in it, what it limits, and that it goes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use serde_json::{Value, json};

use crate::world::{Engine, World, eventually, reap, world};

/// A cgroup of this test, in all hierarchies; what is left of it goes with the test.
struct Named(String);

impl Named {
    fn new(test: &str) -> Self {
        Self(format!("kapsel-e2e-{}/{test}", std::process::id()))
    }

    /// Its directories.
    fn dirs(&self) -> Vec<PathBuf> {
        hierarchies().iter().map(|base| base.join(&self.0)).filter(|dir| dir.is_dir()).collect()
    }

    /// What is in a file of it, by its name in one version or the other.
    fn read(&self, names: &[&str]) -> String {
        let files = self.dirs().into_iter().flat_map(|dir| names.iter().map(move |name| dir.join(name)));
        let text = files.filter_map(|file| fs::read_to_string(file).ok()).next();
        text.unwrap_or_else(|| panic!("there is none of {names:?}")).trim().to_owned()
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        for base in hierarchies() {
            // Another test may still be in the directory above; the last one removes it.
            for dir in base.join(&self.0).ancestors().take_while(|dir| *dir != base) {
                let _ = fs::remove_dir(dir);
            }
        }
    }
}

/// Where cgroups are mounted.
fn hierarchies() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let mounts = table.lines().filter(|line| line.contains(" - cgroup"));
    mounts.filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect()
}

/// A bundle that sleeps, in this cgroup, with these resources.
fn bundle(engine: &Engine, path: &str, resources: &Value) {
    engine.bundle("sleep 1000", |spec| {
        spec["linux"]["cgroupsPath"] = json!(path);
        spec["linux"]["resources"] = resources.clone();
    });
}

/// The processes on the host of an engine's container, its stand-in apart.
fn processes(world: &World, container: &str) -> Vec<u64> {
    for id in world.kapsel(&["ps", "-q"]).stdout.lines() {
        let found: Value = serde_json::from_str(&world.kapsel(&["inspect", id]).stdout).expect("JSON");
        if found[0]["labels"]["engine.id"] == container {
            let pids = found[0]["pids"].as_object().expect("processes").values();
            let each = pids.flat_map(|pid| pid.as_array().cloned().unwrap_or_else(|| vec![pid.clone()]));
            return each.filter_map(|pid| pid.as_u64()).collect();
        }
    }
    panic!("no sandbox of {container}");
}

#[test]
fn all_of_a_sandbox_is_in_it_and_bounded() {
    let world = world!();
    let (engine, cgroup) = (world.engine(), Named::new("life"));
    let resources = json!({
        "memory": { "limit": 64 << 20 },
        "cpu": { "quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0" },
        "pids": { "limit": 20 },
    });
    bundle(&engine, &format!("/{}", cgroup.0), &resources);
    let pid = engine.create("cgroup");
    engine.ok(&["start", "cgroup"]);
    let mut all = processes(world, "cgroup");
    assert!(all.len() >= 3, "shim, monitor and a file server at least: {all:?}");
    all.push(pid.into());
    let places = cgroup.dirs().len();
    assert!(places > 0, "it is in no hierarchy");
    for pid in all {
        let inside = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("a process");
        let inside = inside.lines().filter(|line| line.ends_with(&format!(":/{}", cgroup.0))).count();
        assert_eq!(inside, places, "process {pid}");
    }
    // With an allowance: the guest's own cgroup is exact.
    let memory: u64 = cgroup.read(&["memory.limit_in_bytes", "memory.max"]).parse().expect("a limit");
    assert!((256 << 20..2 << 30).contains(&memory), "{memory}");
    assert_eq!(cgroup.read(&["pids.max"]), (512 + 8 * 20).to_string());
    assert_eq!(cgroup.read(&["cpuset.cpus"]), "0");
    let quota = cgroup.read(&["cpu.cfs_quota_us", "cpu.max"]);
    assert!(quota.starts_with("75000"), "{quota}");
    let shares = cgroup.read(&["cpu.shares", "cpu.weight"]);
    assert!(["512", "20"].contains(&shares.as_str()), "{shares}");
    let stats: Value = serde_json::from_str(&engine.ok(&["events", "--stats", "cgroup"])).unwrap();
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], 64 << 20);

    engine.ok(&["update", "--cpu-quota", "100000", "--cpu-period", "100000", "--pids-limit", "40", "cgroup"]);
    let quota = cgroup.read(&["cpu.cfs_quota_us", "cpu.max"]);
    assert!(quota.starts_with("125000"), "{quota}");
    assert_eq!(cgroup.read(&["pids.max"]), (512 + 8 * 40).to_string());

    // Memory changes inside: outside is what the machine may have at all. Beyond that nothing is promised, and nothing changed.
    let limit = || {
        let stats: Value = serde_json::from_str(&engine.ok(&["events", "--stats", "cgroup"])).unwrap();
        stats["data"]["memory"]["usage"]["limit"].clone()
    };
    for mib in [100, 48, 64] {
        engine.ok(&["update", "--memory", &(mib << 20).to_string(), "cgroup"]);
        assert_eq!(limit(), mib << 20);
    }
    let beyond = [["--memory", "1099511627776"], ["--cpu-quota", "6500000"]];
    for [flag, value] in beyond {
        let ran = engine.run(&["update", flag, value, "--pids-limit", "41", "cgroup"]);
        assert!(ran.code != 0 && ran.stderr.contains("does not grow"), "{flag}: {}", ran.stderr);
    }
    assert_eq!(limit(), 64 << 20);
    assert!(cgroup.read(&["cpu.cfs_quota_us", "cpu.max"]).starts_with("125000"));
    assert_eq!(cgroup.read(&["pids.max"]), (512 + 8 * 40).to_string());

    // What is added is in it too, on this side as well.
    let mut exec = engine.command(&["exec", "--pid-file", "exec-pid", "cgroup", "sleep", "1000"]);
    let mut exec = exec.current_dir(&engine.dir).spawn().expect("it starts");
    let added = engine.dir.join("exec-pid");
    eventually("a process is added", || added.exists());
    let added = fs::read_to_string(added).unwrap();
    assert!(fs::read_to_string(format!("/proc/{added}/cgroup")).unwrap().contains(&cgroup.0));

    engine.ok(&["delete", "--force", "cgroup"]);
    assert_eq!(reap(pid), 137);
    exec.wait().expect("it ends");
    assert_eq!(cgroup.dirs(), [] as [PathBuf; 0]);
}

#[test]
fn the_guest_may_use_up_its_memory_and_the_monitor_lives() {
    let world = world!();
    let (engine, cgroup) = (world.engine(), Named::new("memory"));
    // More than all the memory that the machine would have without the limit, again and again.
    let hog = "for n in 1 2; do busybox dd if=/dev/zero of=/dev/null bs=280M count=1 2> /dev/null || exit 1; done; echo alive";
    engine.bundle(hog, |spec| {
        spec["linux"]["cgroupsPath"] = json!(cgroup.0);
        spec["linux"]["resources"] = json!({ "memory": { "limit": 320 << 20 } });
    });
    let ran = engine.run(&["run", "--bundle", engine.dir.to_str().unwrap(), "memory"]);
    assert_eq!((ran.code, ran.stdout.trim()), (0, "alive"), "{}", ran.stderr);
    assert_eq!(cgroup.dirs(), [] as [PathBuf; 0]);
}

/// A process of the host in a cgroup.
struct Stranger(Child);

impl Stranger {
    fn within(dir: &Path) -> Self {
        let child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).expect("it enters");
        Self(child)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_leftover_is_taken_and_a_strangers_is_not() {
    let world = world!();
    let (engine, cgroup) = (world.engine(), Named::new("left"));
    // Any hierarchy in which processes can be without further ado.
    let base = hierarchies().into_iter().find(|base| !base.join("cpuset.cpus").exists());
    let dir = base.expect("a cgroup file system").join(&cgroup.0);
    fs::create_dir_all(dir.join("below")).unwrap();
    let bundle_dir = engine.dir.to_str().unwrap().to_owned();
    bundle(&engine, &cgroup.0, &json!({}));
    {
        let mut stranger = Stranger::within(&dir);
        let ran = engine.run(&["create", "--bundle", &bundle_dir, "left"]);
        assert!(ran.code != 0 && ran.stderr.contains("processes are in it"), "{}", ran.stderr);
        assert!(stranger.0.try_wait().unwrap().is_none(), "nobody has killed it");
    }
    assert_eq!((engine.ok(&["list", "-q"]).as_str(), world.sandboxes_of("left")), ("", 0));
    let pid = engine.create("left");
    assert!(!dir.join("below").exists());
    engine.ok(&["delete", "--force", "left"]);
    assert_eq!(reap(pid), 137);
    assert_eq!(cgroup.dirs(), [] as [PathBuf; 0]);
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let world = world!();
    let engine = world.engine();
    let dir = engine.dir.to_str().unwrap().to_owned();
    let long = "x".repeat(256);
    let refused = |flags: &[&str], path: &str, word: &str| {
        bundle(&engine, path, &json!({}));
        let ran = engine.run(&[flags, &["create", "--bundle", &dir, "hostile"]].concat());
        assert!(ran.code != 0 && ran.stderr.contains(word), "{path:?}: {}", ran.stderr);
        assert!(engine.logged().contains("cgroup"), "{}", engine.logged());
    };
    for path in ["/", "/../../etc", "a/../..", "/a//b", "/a/\0b", "/a\nb", &long, "x:y:z"] {
        refused(&[], path, "cgroup");
    }
    refused(&["--systemd-cgroup"], "/docker/c", "SLICE:PREFIX:NAME");
    if !Path::new("/run/systemd/system").exists() {
        refused(&["--systemd-cgroup"], "machine.slice:libpod:c", "systemd does not run");
    }
    bundle(&engine, "", &json!({ "cpu": { "cpus": "0" } }));
    let ran = engine.run(&["create", "--bundle", &dir, "hostile"]);
    assert!(ran.code != 0 && ran.stderr.contains("cgroupsPath"), "{}", ran.stderr);
    assert_eq!((engine.ok(&["list", "-q"]).as_str(), world.sandboxes_of("hostile")), ("", 0));
}
