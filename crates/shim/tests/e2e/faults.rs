//! What happens when one of the processes dies, and when many come at once.

use rustix::process::{Pid, Signal, kill_process};

use crate::world::{engine, eventually};

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    kill_process(pid, Signal::KILL).expect("a process");
}

#[test]
fn a_killed_shim_is_an_end_that_containerd_sees() {
    let engine = engine!();
    engine.detached("c1", "sleep 1000");
    let (monitor, _) = engine.task("c1").expect("a task");
    let shims = engine.shims();
    assert_eq!(shims.len(), 1);
    kill(shims[0]);
    eventually("containerd forgets the task", || engine.task("c1").is_none());
    eventually("the machine is gone", || !std::path::Path::new(&format!("/proc/{monitor}")).exists());
    engine.nothing_is_left();
    engine.ok(&["container", "rm", "c1"]);
}

#[test]
fn a_killed_monitor_ends_its_container() {
    let engine = engine!();
    engine.detached("c1", "sleep 1000");
    let (monitor, _) = engine.task("c1").expect("a task");
    kill(monitor);
    engine.becomes("c1", "STOPPED");
    assert_eq!(engine.remove("c1"), 255);
    engine.nothing_is_left();
}

#[test]
fn containers_outlive_containerd_and_are_found_again() {
    let mut engine = engine!();
    engine.detached("c1", "sleep 1000");
    engine.detached("c2", "sleep 3; exit 9");
    let before = engine.task("c1");
    engine.kill();
    // The second ends while nobody looks.
    std::thread::sleep(std::time::Duration::from_secs(4));
    engine.start();
    assert_eq!(engine.task("c1"), before);
    let ran = engine.run(&["task", "exec", "--exec-id", "e", "c1", "echo", "back"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "back\n"), "{}", ran.stderr);
    engine.becomes("c2", "STOPPED");
    assert_eq!(engine.remove("c2"), 9);
    engine.ok(&["task", "kill", "--signal", "KILL", "c1"]);
    engine.becomes("c1", "STOPPED");
    assert_eq!(engine.remove("c1"), 137);
    engine.nothing_is_left();
}

#[test]
fn twenty_processes_at_once() {
    let engine = engine!();
    engine.detached("c1", "sleep 1000");
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..20)
            .map(|n| {
                let engine = &engine;
                scope.spawn(move || {
                    let id = format!("e{n}");
                    let script = format!("echo {n}; exit {n}");
                    let args = ["task", "exec", "--exec-id", &id, "c1", "sh", "-c", &script];
                    (n, engine.run(&args))
                })
            })
            .collect();
        for one in all {
            let (n, ran) = one.join().expect("a thread");
            assert_eq!((ran.code, ran.stdout), (n, format!("{n}\n")), "{}", ran.stderr);
        }
    });
    engine.ok(&["task", "rm", "--force", "c1"]);
    engine.nothing_is_left();
}
