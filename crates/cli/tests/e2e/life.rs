//! From start to removal: ps, exec, logs, attach, wait, stop, kill, pause, stats, inspect, rm.

use std::process::Stdio;
use std::time::Duration;

use crate::world::{eventually, finish, world};

#[test]
fn a_container_in_the_background_from_start_to_removal() {
    let world = world!();
    let container =
        world.container("e2e-life", &["-l", "who=me"], &["sh", "-c", "echo one; echo two >&2; sleep 999"]);
    let listed: serde_json::Value = serde_json::from_str(&world.ok(["ps", "--json"])).expect("JSON");
    let listed =
        listed.as_array().expect("an array").iter().find(|c| c["name"] == container.name).expect("listed");
    assert_eq!((listed["status"].as_str(), listed["labels"]["who"].as_str()), (Some("running"), Some("me")));

    let told = world.inspect(container.name);
    for pid in ["shim", "monitor"] {
        assert!(told["pids"][pid].as_u64().is_some_and(|pid| pid > 1), "{told}");
    }
    assert!(
        ["kvm", "tcg"].contains(&told["isolation"]["accelerator"].as_str().unwrap_or_default()),
        "{told}"
    );

    eventually("both lines are in the log", || {
        let ran = world.run(["logs", container.name]);
        ran.text() == "one\n" && ran.stderr == "two\n"
    });
    let ran = world.run([
        "exec",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "-u",
        "joe",
        container.name,
        "sh",
        "-c",
        "echo $A; pwd; id -un; exit 7",
    ]);
    assert_eq!((ran.code, ran.text().as_str()), (7, "b\n/tmp\njoe\n"), "{}", ran.stderr);
    assert_eq!(world.run(["exec", container.name, "no-such-program"]).code, 127);
    assert_eq!(world.run(["exec", container.name, "/etc/notes"]).code, 126);

    let stats: serde_json::Value =
        serde_json::from_str(&world.ok(["stats", "--no-stream", "--json", container.name])).expect("JSON");
    assert!(
        stats[0]["memory"].as_u64().is_some_and(|bytes| bytes > 0)
            && stats[0]["pids"].as_u64().is_some_and(|pids| pids > 0)
            && stats[0]["cpu_percent"].is_number(),
        "{stats}"
    );

    let ran = world.run(["rm", container.name]);
    assert!(ran.code == 125 && ran.stderr.contains("hint: "), "one that runs is not removed: {}", ran.stderr);
    world.ok(["stop", "-t", "1", container.name]);
    assert_eq!(world.inspect(container.name)["exit"]["code"], 137, "process 1 ignores SIGTERM");
    assert!(world.ok(["logs", container.name]).contains("one"), "the log stays");
    assert!(!world.ok(["ps"]).contains(container.name) && world.ok(["ps", "-a"]).contains(container.name));
    world.ok(["rm", container.name]);
    assert!(!world.ok(["ps", "-a"]).contains(container.name));
}

#[test]
fn stop_asks_first() {
    let world = world!();
    let container = world.listener("e2e-stop", &[], "trap 'echo bye; exit 5' TERM");
    world.ok(["stop", container.name]);
    assert_eq!(world.inspect(container.name)["exit"]["code"], 5, "it did not have to be killed");
    assert_eq!(world.ok(["logs", container.name]), "ready\nbye\n");
}

#[test]
fn the_stop_signal_can_be_another() {
    let world = world!();
    let container = world.listener("e2e-stop-signal", &["--stop-signal", "USR1"], "trap 'exit 6' USR1");
    world.ok(["stop", container.name]);
    assert_eq!(world.ok(["wait", container.name]), "6\n");
}

#[test]
fn wait_gives_the_exit_code_and_kill_sends_any_signal() {
    let world = world!();
    let container = world.listener("e2e-wait", &[], "trap 'exit 9' HUP");
    let waiting =
        world.command(["wait", container.name]).stdout(Stdio::piped()).spawn().expect("kapsel starts");
    world.ok(["kill", "-s", "HUP", container.name]);
    assert_eq!(finish(waiting).text(), "9\n");
    assert_eq!(world.ok(["wait", container.name]), "9\n", "also afterwards");
    assert_eq!(world.run(["kill", container.name]).code, 125, "one that has ended takes no signal");
}

#[test]
fn pause_halts_and_resume_goes_on() {
    let world = world!();
    let container =
        world.container("e2e-pause", &[], &["sh", "-c", "while :; do echo tick; sleep 0.05; done"]);
    let lines = || world.ok(["logs", container.name]).lines().count();
    eventually("it ticks", || lines() > 2);
    world.ok(["pause", container.name]);
    assert!(world.ok(["ps"]).contains("(paused)"));
    // What it had printed before may still be on its way.
    let mut halted = lines();
    eventually("it does not tick while it is paused", || {
        std::thread::sleep(Duration::from_millis(500));
        std::mem::replace(&mut halted, lines()) == halted
    });
    world.ok(["resume", container.name]);
    eventually("it ticks again", || lines() > halted + 3);
}

#[test]
fn logs_follow_to_the_end_and_tail() {
    let world = world!();
    let container =
        world.container("e2e-logs", &[], &["sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done"]);
    assert_eq!(world.ok(["logs", "-f", container.name]), "1\n2\n3\n4\n5\n");
    assert_eq!(world.ok(["logs", "-n", "2", container.name]), "4\n5\n");
}

#[test]
fn attach_gives_what_comes_and_the_exit_code() {
    let world = world!();
    let container =
        world.container("e2e-attach", &["-i"], &["sh", "-c", "read line; echo got $line; exit 4"]);
    let ran = world.run_with(["attach", container.name], b"hello\n");
    assert_eq!((ran.code, ran.text().as_str()), (4, "got hello\n"), "{}", ran.stderr);
}

#[test]
fn signals_for_kapsel_are_for_the_container() {
    let world = world!();
    let script =
        "trap 'echo usr1' USR1; trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut command = world.command(["run", "--rm", "--name", "e2e-signals", "busybox", "sh", "-c", script]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kapsel starts");
    let id = child.id();
    eventually("it is ready", || world.run(["logs", "e2e-signals"]).text().contains("ready"));
    crate::world::kill(id, rustix::process::Signal::USR1);
    eventually("it got the first", || world.run(["logs", "e2e-signals"]).text().contains("usr1"));
    crate::world::kill(id, rustix::process::Signal::TERM);
    let ran = finish(child);
    assert_eq!((ran.code, ran.text().as_str()), (3, "ready\nusr1\nterm\n"), "{}", ran.stderr);
}

#[test]
fn a_signal_that_ends_it_is_in_the_exit_code() {
    let world = world!();
    let name = "e2e-killed";
    let mut command = world.command(["run", "--rm", "--name", name, "busybox", "sleep", "999"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kapsel starts");
    eventually("it runs", || world.run(["exec", name, "true"]).code == 0);
    for (signal, code) in [("KILL", 137), ("TERM", 143)] {
        let ran = world.run(["exec", name, "sh", "-c", &format!("kill -{signal} $$; sleep 9")]);
        assert_eq!(ran.code, code, "{}", ran.stderr);
    }
    world.ok(["kill", "-s", "KILL", name]);
    let ran = finish(child);
    assert_eq!(ran.code, 137, "{}", ran.stderr);
}

#[test]
fn many_at_once_all_answer_and_none_is_left() {
    let world = world!();
    let names: Vec<String> = (0..20).map(|n| format!("e2e-many-{n}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(move || world.ok(["run", "-d", "--name", name, "busybox", "sleep", "999"]));
        }
    });
    let answers: Vec<String> = std::thread::scope(|scope| {
        let asked: Vec<_> =
            names.iter().map(|name| scope.spawn(move || world.ok(["exec", name, "echo", name]))).collect();
        asked.into_iter().map(|answer| answer.join().expect("an answer")).collect()
    });
    for (name, answer) in names.iter().zip(answers) {
        assert_eq!(answer.trim(), name);
    }
    let args: Vec<&str> = ["rm", "-f"].into_iter().chain(names.iter().map(String::as_str)).collect();
    world.ok(args);
    assert!(!world.ok(["ps", "-a"]).contains("e2e-many-"));
}

#[test]
fn a_name_is_free_as_soon_as_run_rm_returns() {
    let world = world!();
    for _ in 0..3 {
        world.ok(["run", "--rm", "--name", "e2e-again", "busybox", "true"]);
    }
}
