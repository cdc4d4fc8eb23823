//! Machines that stand by. Other tests remove images and templates, and such machines with them: what is asserted of one that was
//! taken is tried until one was.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use rustix::process::Signal;

use crate::templates::LOOK_AROUND;
use crate::world::{Ran, Watchdog, World, eventually, finish, kill, lives, world};

/// The kinds of one test shall not push out another's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// kapsel with machines that stand by.
struct Standing {
    world: &'static World,
    settings: Vec<(&'static str, String)>,
    _turn: MutexGuard<'static, ()>,
}

impl Standing {
    fn new(world: &'static World, most: usize) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self { world, settings: vec![("KAPSEL_STANDBY", most.to_string())], _turn: turn }
    }

    fn run(&self, args: &[&str]) -> Ran {
        let mut command = self.world.command(args);
        command.envs(self.settings.iter().map(|(key, value)| (key, value)));
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        finish(command.spawn().expect("kapsel starts"))
    }

    /// Runs a container of a name of its own, until it had a machine that stood by; what the last one printed. It is there still.
    fn run_on_one(&self, name: &str, flags: &[&str], command: &[&str]) -> String {
        let mut printed = String::new();
        eventually("a machine that stood by was taken", || {
            let _ = self.world.run(["rm", "-f", name]);
            self.wait_for_one();
            let ran = self.run(&[&["run", "--name", name], flags, &["busybox"], command].concat());
            assert_eq!(ran.code, 0, "{}", ran.stderr);
            printed = ran.text();
            took_one(self.world, name)
        });
        printed
    }

    /// The bundle of the one that is made after a run.
    fn bundle(&self) -> PathBuf {
        let mut found = None;
        eventually("one stands by", || {
            found = standing(self.world).pop();
            found.is_some()
        });
        found.expect("just found")
    }

    /// Gives the one that is made after a run, if one is, the time for it.
    fn wait_for_one(&self) {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while standing(self.world).is_empty() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = self.world.run(["template", "rm", "--standby"]);
    }
}

/// Whether a container's machine had stood by.
fn took_one(world: &World, name: &str) -> bool {
    let timings = world.inspect(name)["timings"].to_string();
    timings.contains("standby") && !timings.contains("restore") && !timings.contains("boot")
}

fn running(world: &World, name: &str) -> bool {
    let told = serde_json::from_slice::<serde_json::Value>(&world.run(["inspect", name]).stdout);
    told.is_ok_and(|told| told[0]["status"] == "running")
}

/// The bundles of the machines that stand by.
fn standing(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.root().join("run/standby")).expect("a directory").flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let ids = names.filter_map(|name| Some(name.split_once('.')?.1.to_owned()).filter(|id| id.len() == 64));
    ids.map(|id| world.sandboxes().join(&id[..12])).collect()
}

#[test]
fn a_machine_that_stood_by_is_like_any_other() {
    let world = world!();
    let standing_by = Standing::new(world, 1);
    let shape = ["-m", "92m", "--pids-limit", "98"];
    let cold =
        [&["run", "--rm", "--cold", "--hostname", "same"], &shape[..], &["busybox", "sh", "-c"]].concat();
    let cold = world.ok([&cold[..], &[LOOK_AROUND]].concat());
    let named = [&["--hostname", "same"], &shape[..]].concat();
    assert_eq!(standing_by.run_on_one("e2e-stood", &named, &["sh", "-c", LOOK_AROUND]), cold);
    assert_eq!(world.ok(["logs", "e2e-stood"]), cold);

    // Nothing is known twice, or of another sandbox.
    let script = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | md5sum; hostname";
    let first = standing_by.run_on_one("e2e-stood", &shape, &["sh", "-c", script]);
    let id = world.inspect("e2e-stood")["id"].as_str().expect("an id").to_owned();
    assert_eq!(first.lines().nth(2), Some(&id[..12]), "{first}");
    let second = standing_by.run_on_one("e2e-stood", &shape, &["sh", "-c", script]);
    for (a, b) in first.lines().zip(second.lines()) {
        assert_ne!(a, b);
    }
    world.ok(["rm", "e2e-stood"]);
}

#[test]
fn what_stands_by_is_no_sandbox_yet() {
    let world = world!();
    let standing_by = Standing::new(world, 1);
    standing_by.run_on_one("e2e-waited", &[], &["true"]);
    let bundle = standing_by.bundle();
    let short = bundle.file_name().expect("a name").to_str().expect("an id").to_owned();
    assert!(!world.ok(["ps", "-aq"]).contains(&short));
    let found = world.run(["inspect", &short]);
    assert_ne!(found.code, 0, "{}", found.text());
    // A name that is in use costs nothing.
    let refused = standing_by.run(&["run", "--name", "e2e-waited", "busybox", "true"]);
    assert_eq!(refused.code, 125);
    assert!(refused.stderr.contains("in use"), "{}", refused.stderr);
    assert!(!bundle.join("sandbox.json").exists());
    world.ok(["rm", "e2e-waited"]);
}

#[test]
fn a_container_on_one_lives_and_dies_as_any_other() {
    let world = world!();
    let standing_by = Standing::new(world, 1);
    standing_by.run_on_one("e2e-brief", &[], &["true"]);
    world.ok(["rm", "e2e-brief"]);
    eventually("a machine that stood by was taken", || {
        let _ = world.run(["rm", "-f", "e2e-lasting"]);
        standing_by.wait_for_one();
        let ran = standing_by.run(&["run", "-d", "--name", "e2e-lasting", "busybox", "sleep", "1000"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        took_one(world, "e2e-lasting")
    });
    assert_eq!(world.ok(["exec", "e2e-lasting", "echo", "fine"]), "fine\n");
    let told = world.inspect("e2e-lasting");
    let shim = told["pids"]["shim"].as_u64().expect("a pid");
    world.ok(["rm", "-f", "e2e-lasting"]);
    eventually("its shim has ended", || !lives(shim));
    let ran = standing_by.run(&["run", "--rm", "busybox", "sh", "-c", "exit 7"]);
    assert_eq!(ran.code, 7, "{}", ran.stderr);

    // It goes with the command that took it.
    let mut shim = 0;
    eventually("a machine that stood by was taken", || {
        let _ = world.run(["rm", "-f", "e2e-leashed"]);
        standing_by.wait_for_one();
        let mut command = world.command(["run", "--name", "e2e-leashed", "busybox", "sleep", "1000"]);
        let mut foreground = command.env("KAPSEL_STANDBY", "1").spawn().expect("kapsel starts");
        let watchdog = Watchdog::of(&foreground);
        eventually("it runs", || running(world, "e2e-leashed"));
        shim = world.inspect("e2e-leashed")["pids"]["shim"].as_u64().expect("a pid");
        let taken = took_one(world, "e2e-leashed");
        foreground.kill().expect("killed");
        foreground.wait().expect("it ended");
        drop(watchdog);
        taken
    });
    eventually("its shim has ended", || !lives(shim));
    world.ok(["rm", "-f", "e2e-leashed"]);
}

#[test]
fn one_is_given_its_network_when_it_is_taken() {
    let world = world!();
    let standing_by = Standing::new(world, 1);
    let _peer = world.container("e2e-peer", &["--network", "bridge"], &["httpd", "-f", "-h", "/etc"]);
    let fetch = "until wget -qO- http://e2e-peer/notes; do sleep 0.1; done";
    let fetched = standing_by.run_on_one("e2e-plugged", &["--network", "bridge"], &["sh", "-c", fetch]);
    assert_eq!(fetched, "not a program\n");
    world.ok(["rm", "e2e-plugged"]);
}

#[test]
fn one_that_was_killed_is_not_taken() {
    let world = world!();
    let standing_by = Standing::new(world, 1);
    standing_by.run_on_one("e2e-before", &[], &["true"]);
    world.ok(["rm", "e2e-before"]);
    let mut bundle = PathBuf::new();
    eventually("one that stands by is killed", || {
        bundle = standing_by.bundle();
        // Another test may have ended it meanwhile.
        let shim = fs::read_to_string(bundle.join("shim.pid")).ok().and_then(|pid| pid.trim().parse().ok());
        shim.inspect(|pid| kill(*pid, Signal::KILL)).is_some()
    });
    let ran = standing_by.run(&["run", "--rm", "busybox", "echo", "fine"]);
    assert_eq!((ran.code, ran.text().as_str()), (0, "fine\n"), "{}", ran.stderr);
    eventually("the next command clears it away", || {
        world.ok(["ps"]);
        !bundle.exists()
    });
}

#[test]
fn there_are_no_more_than_were_asked_for() {
    let world = world!();
    let standing_by = Standing::new(world, 1);
    for memory in ["90m", "94m"] {
        standing_by.run_on_one("e2e-many", &["-m", memory], &["true"]);
        world.ok(["rm", "e2e-many"]);
    }
    // The second kind's pushes out the first's.
    eventually("one stands by", || standing(world).len() == 1);
    let first = standing(world);
    world.ok(["template", "rm", "--standby"]);
    assert!(standing(world).is_empty());
    assert!(first.iter().all(|bundle| !bundle.exists()), "{first:?}");
}

#[test]
fn one_that_is_not_what_would_be_made_now_is_not_used() {
    let world = world!();
    let mut standing_by = Standing::new(world, 1);
    let libexec = world.root().join("libexec-of-a-test");
    fs::create_dir_all(libexec.join("guest")).expect("a directory");
    for program in ["containerd-shim-kapsel-v2", "kapsel-fsd", "kapsel-forward", "guest/kapsel-agent"] {
        fs::copy(world.helper(program), libexec.join(program)).expect("a copy");
    }
    standing_by.settings.push(("KAPSEL_LIBEXEC", libexec.to_str().expect("UTF-8").to_owned()));
    standing_by.run_on_one("e2e-stale", &["-m", "96m"], &["true"]);
    eventually("it is found stale", || {
        world.ok(["rm", "-f", "e2e-stale"]);
        standing_by.wait_for_one();
        // As an upgrade does.
        let mut agent =
            fs::File::options().append(true).open(libexec.join("guest/kapsel-agent")).expect("the agent");
        agent.write_all(&[0]).expect("written");
        let ran = standing_by.run(&["run", "--name", "e2e-stale", "-m", "96m", "busybox", "echo", "fine"]);
        assert_eq!((ran.code, ran.text().as_str()), (0, "fine\n"), "{}", ran.stderr);
        let timings = world.inspect("e2e-stale")["timings"].to_string();
        timings.contains("standby") && timings.contains("boot")
    });
    world.ok(["rm", "e2e-stale"]);
    fs::remove_dir_all(libexec).expect("removed");
}
