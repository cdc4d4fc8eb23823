//! A container's life by `ctr`.

use crate::world::{IMAGE, SNAPSHOTTER, engine, eventually};

/// Goes on until it is asked to end, and tells by its code that it was asked.
const SERVER: &str = "trap 'exit 4' TERM; while :; do sleep 0.1; done";

#[test]
fn run_gives_output_and_code_and_leaves_nothing() {
    let engine = engine!();
    let ran = engine.run(&engine.args(&["--rm"], "c1", &["sh", "-c", "uname -r; echo err >&2; exit 7"]));
    assert_eq!(ran.code, 7, "{}", ran.stderr);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    assert!(!ran.stdout.is_empty() && ran.stdout.trim() != host.trim(), "{}", ran.stdout);
    assert!(ran.stderr.contains("err"), "{}", ran.stderr);
    engine.nothing_is_left();
    let program = env!("CARGO_BIN_EXE_containerd-shim-kapsel-v2");
    let by_path = ["run", "--rm", "--runtime", program, "--snapshotter", SNAPSHOTTER, IMAGE, "c2", "true"];
    engine.ok(&by_path);
}

#[test]
fn a_program_that_is_not_there_is_told_at_create() {
    let engine = engine!();
    let ran = engine.run(&engine.args(&["--rm"], "c1", &["nosuch"]));
    assert!(ran.code != 0 && ran.stderr.contains("executable file not found in $PATH"), "{}", ran.stderr);
    engine.nothing_is_left();
}

#[test]
fn what_a_machine_cannot_give_is_refused_by_name() {
    let engine = engine!();
    let pod = "io.kubernetes.cri.container-type=container";
    for (flags, words) in [
        (&["--net-host"][..], "--network=host"),
        (&["--privileged"], "device"),
        (&["--with-ns", "network:/proc/self/ns/net"], "--network=host"),
        (&["--annotation", pod], "io.kubernetes.cri.sandbox-id"),
        (&["--annotation", "io.kapsel.colour=red"], "unknown annotation"),
        (&["--mount", "type=bind,src=/dev/null,dst=/x,options=bind"], "device of the host"),
    ] {
        let ran = engine.run(&engine.args(&[&["--rm"], flags].concat(), "c1", &["true"]));
        assert!(ran.code != 0 && ran.stderr.contains(words), "{flags:?}: {}", ran.stderr);
        engine.nothing_is_left();
    }
}

#[test]
fn a_server_is_looked_at_paused_and_stopped() {
    let engine = engine!();
    let (mut events, told) = engine.events();
    engine.detached("web", SERVER);
    let (pid, status) = engine.task("web").expect("a task");
    assert_eq!(status, "RUNNING");
    let monitor = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("a process of this host");
    assert!(monitor.contains("qemu") || monitor.contains("kapsel-vmm"), "{monitor}");

    let ran = engine.run(&["task", "exec", "--exec-id", "e1", "web", "sh", "-c", "echo inside; exit 5"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (5, "inside\n"), "{}", ran.stderr);
    assert!(engine.ok(&["task", "ps", "web"]).lines().count() >= 2);
    let metrics = engine.ok(&["task", "metrics", "--format", "json", "web"]);
    let metrics: serde_json::Value = serde_json::from_str(&metrics).expect("JSON");
    assert!(metrics["memory"]["usage"].as_u64().is_some_and(|bytes| bytes > 0), "{metrics}");

    engine.ok(&["task", "pause", "web"]);
    assert_eq!(engine.task("web").expect("a task").1, "PAUSED");
    engine.ok(&["task", "resume", "web"]);
    let seen = engine.world.kapsel(&["ps"]).stdout;
    assert!(seen.contains("trap"), "kapsel's own commands see it: {seen}");

    engine.ok(&["task", "kill", "web"]);
    engine.becomes("web", "STOPPED");
    let ran = engine.run(&["task", "exec", "--exec-id", "e2", "web", "true"]);
    assert!(ran.code != 0 && ran.stderr.contains("not running"), "{ran:?}");
    assert_eq!(engine.remove("web"), 4, "the container's own code");
    engine.nothing_is_left();

    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    eventually(&format!("all events: {:?}", told()), || told() == expected);
    events.kill().expect("a process");
    events.wait().expect("a child");
}

#[test]
fn a_running_one_is_not_deleted_but_by_force() {
    let engine = engine!();
    engine.detached("web", SERVER);
    let ran = engine.run(&["task", "rm", "web"]);
    assert_ne!(ran.code, 0);
    assert_eq!(engine.task("web").expect("a task").1, "RUNNING");
    engine.ok(&["task", "pause", "web"]);
    engine.ok(&["task", "kill", "--signal", "KILL", "web"]);
    engine.becomes("web", "STOPPED");
    assert_eq!(engine.remove("web"), 137);
    engine.nothing_is_left();
}

#[test]
fn memory_that_runs_out_is_told() {
    let engine = engine!();
    let (mut events, told) = engine.events();
    let limit = ["--memory-limit", "33554432"];
    let greedy = ["busybox", "tail", "/dev/zero"];
    let ran = engine.run(&engine.args(&[&["--rm"], &limit[..]].concat(), "c1", &greedy));
    assert_eq!(ran.code, 137, "{}", ran.stderr);
    let expected = ["create", "start", "oom", "exit", "delete"].map(|topic| format!("/tasks/{topic}"));
    eventually(&format!("the events, in order: {:?}", told()), || told() == expected);

    // One that a process of its own is killed in goes on.
    engine.ok(&engine.args(&[&["-d"], &limit[..]].concat(), "c2", &["sh", "-c", SERVER]));
    let ran = engine.run(&[&["task", "exec", "--exec-id", "e1", "c2"], &greedy[..]].concat());
    assert_eq!(ran.code, 137, "{}", ran.stderr);
    let after = || told().into_iter().skip(expected.len()).collect::<Vec<_>>();
    eventually("the event", || after().iter().any(|topic| topic == "/tasks/oom"));
    assert_eq!(engine.task("c2").expect("a task").1, "RUNNING");
    engine.ok(&["task", "kill", "c2"]);
    engine.becomes("c2", "STOPPED");
    assert_eq!(engine.remove("c2"), 4);
    eventually("the last event", || after().last().is_some_and(|topic| topic == "/tasks/delete"));
    assert_eq!(after().iter().filter(|topic| *topic == "/tasks/oom").count(), 1, "{:?}", after());
    events.kill().expect("a process");
    events.wait().expect("a child");
}

#[test]
fn limits_reach_the_guest_and_change_there() {
    let engine = engine!();
    engine.ok(&engine.args(&["-d", "--memory-limit", "67108864"], "c1", &["sh", "-c", SERVER]));
    let limit = || {
        let metrics = engine.ok(&["task", "metrics", "--format", "json", "c1"]);
        let metrics: serde_json::Value = serde_json::from_str(&metrics).expect("JSON");
        metrics["memory"]["usage_limit"].as_u64()
    };
    assert_eq!(limit(), Some(64 << 20));
    engine.ok(&["task", "rm", "--force", "c1"]);
}
