//! Guests that break, at their start or later: the command fails with exit code 125 and says why, nothing is left.

use std::fs;
use std::process::Stdio;

use rustix::process::Signal;

use crate::place::Place;
use crate::world::{eventually, finish, kill, world};

#[test]
fn a_guest_that_panics_at_its_start() {
    let world = world!();
    // exit(0), which process 1 must not do.
    let place = Place::with_agent(world, b"\xb8\x3c\0\0\0\x31\xff\x0f\x05", 60);
    place.fails(&["run", "--rm", "busybox", "true"], &["panic", "Attempted to kill init"]);
}

#[test]
fn a_guest_that_hangs_at_its_start() {
    let world = world!();
    // pause(), again and again.
    let place = Place::with_agent(world, b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7", 8);
    place.fails(&["run", "--rm", "busybox", "true"], &["8 s", "start_timeout"]);
}

#[test]
fn a_guest_that_floods_its_console() {
    let world = world!();
    // write(1, line, 64), again and again.
    let mut code =
        b"\xb8\x01\0\0\0\xbf\x01\0\0\0\x48\x8d\x35\x09\0\0\0\xba\x40\0\0\0\x0f\x05\xeb\xe6".to_vec();
    code.extend(b"\x1b[31m");
    code.extend([b'x'; 58]);
    code.push(b'\n');
    let place = Place::with_agent(world, &code, 30);
    let mut largest = 0;
    let child = place.command(&["run", "--rm", "busybox", "true"]).spawn().expect("kapsel starts");
    let id = u64::from(child.id());
    let ran = std::thread::scope(|scope| {
        let ran = scope.spawn(|| finish(child));
        while crate::world::lives(id) {
            for sandbox in fs::read_dir(place.sandboxes()).into_iter().flatten().flatten() {
                let log = fs::metadata(sandbox.path().join("console.log"));
                largest = largest.max(log.map_or(0, |meta| meta.len()));
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        ran.join().expect("kapsel ends")
    });
    place.failed(&ran, &["xxxx", "start_timeout"]);
    assert!(!ran.stderr.contains('\x1b') && ran.stderr.len() < 8192, "{}", ran.stderr);
    assert!((1..2 << 20).contains(&largest), "the log of the console had {largest} bytes");
}

#[test]
fn a_guest_that_panics_while_its_container_runs() {
    let world = world!();
    // A kernel that panics where another ends a process that uses too much memory.
    let place = Place::new(world, "kernel_args = \"sysctl.vm.panic_on_oom=2\"");
    let eat =
        ["-m", "32m", "--tmpfs", "/big:size=100m", "busybox", "sh", "-c", "sleep 1; cat /dev/zero > /big/x"];
    let ran = place.run(&[&["run", "--rm"], &eat[..]].concat());
    place.failed(&ran, &["panic"]);

    let ran = place.run(&[&["run", "-d", "--name", "victim"], &eat[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    eventually("it is recorded", || place.run(&["ps", "-a"]).text().contains("Exited (255)"));
    assert!(place.run(&["inspect", "victim"]).text().contains("panic"));
    assert_eq!(place.run(&["rm", "victim"]).code, 0);
    place.nothing_left();
}

#[test]
fn a_guest_that_hangs_while_its_container_runs() {
    let world = world!();
    let container = world.container("e2e-frozen", &[], &["sleep", "999"]);
    let told = world.inspect(container.name);
    let monitor = told["pids"]["monitor"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a pid");
    kill(monitor, Signal::STOP);
    let ran = world.run(["exec", container.name, "true"]);
    assert!(ran.code == 125 && ran.stderr.contains("did not answer"), "{}", ran.stderr);
    assert!(ran.stderr.contains("rm -f"), "{}", ran.stderr);
    // The shim is well, so lists are.
    assert!(world.ok(["ps"]).contains(container.name));
    world.ok(["rm", "-f", container.name]);
    assert!(!crate::world::lives(u64::from(monitor)));
}

#[test]
fn a_monitor_or_shim_that_is_killed_is_told_in_the_foreground() {
    let world = world!();
    for (victim, said) in [("monitor", "killed by signal 9"), ("shim", "shim")] {
        let name = format!("e2e-foreground-{victim}");
        let mut command = world.command(["run", "--rm", "--name", &name, "busybox", "sleep", "999"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kapsel starts");
        eventually("it runs", || world.run(["exec", &name, "true"]).code == 0);
        let pid = world.inspect(&name)["pids"][victim].as_u64().expect("a pid");
        kill(u32::try_from(pid).expect("a pid"), Signal::KILL);
        let ran = finish(child);
        assert!(ran.code == 125 && ran.stderr.contains(said), "{victim}: {} {}", ran.code, ran.stderr);
        assert!(ran.stderr.contains("hint: "), "{victim}: {}", ran.stderr);
        eventually("it is gone", || !world.ok(["ps", "-a"]).contains(&name));
    }
}
