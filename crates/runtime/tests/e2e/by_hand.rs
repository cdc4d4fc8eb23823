//! The verbs, one after the other, as an engine would call them.

use std::fs;

use serde_json::{Value, json};

use crate::world::{eventually, reap, world};

#[test]
fn a_life() {
    let world = world!();
    let engine = world.engine();
    engine.bundle("echo out; echo err >&2; exit 7", |_| ());
    let pid = engine.create("life");
    let state: Value = serde_json::from_str(&engine.ok(&["state", "life"])).unwrap();
    assert_eq!((state["status"].as_str(), state["pid"].as_u64()), (Some("created"), Some(pid.into())));
    assert_eq!(state["bundle"].as_str(), engine.dir.to_str());
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(network(&pid.to_string()), network("self"), "it has a network namespace of its own");
    let again = engine.run(&["create", "--bundle", engine.dir.to_str().unwrap(), "life"]);
    assert!(again.code != 0 && again.stderr.contains("already exists"), "{}", again.stderr);

    engine.ok(&["start", "life"]);
    assert_eq!(reap(pid), 7);
    let output = engine.output();
    assert!(output.contains("out\n") && output.contains("err\n"), "{output}");
    assert_eq!(engine.status("life"), "stopped");
    for (verb, word) in [("kill", "not running"), ("start", "stopped"), ("pause", "stopped")] {
        let ran = engine.run(&[verb, "life"]);
        assert!(ran.code != 0 && ran.stderr.contains(word), "{verb}: {}", ran.stderr);
        assert!(engine.logged().contains(word), "the log has it too");
    }
    let ran = engine.run(&["exec", "life", "true"]);
    assert!(ran.code != 0 && ran.stderr.contains("stopped"), "{}", ran.stderr);
    engine.ok(&["delete", "life"]);
    assert_eq!(world.sandboxes_of("life"), 0);
    let gone = engine.run(&["state", "life"]);
    assert!(gone.code != 0 && gone.stderr.contains("does not exist"), "{}", gone.stderr);
    engine.ok(&["delete", "--force", "life"]);
}

#[test]
fn run_has_the_exit_code_and_leaves_nothing() {
    let world = world!();
    let engine = world.engine();
    let bundle = engine.bundle("echo out; exit 5", |_| ());
    let ran = engine.run(&["run", "--bundle", bundle.to_str().unwrap(), "run"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (5, "out\n"), "{}", ran.stderr);
    assert_eq!(engine.ok(&["list", "-q"]), "");
    assert_eq!(world.sandboxes_of("run"), 0);
}

#[test]
fn processes_are_added() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("added", "sleep 1000");
    let exec = |args: &[&str]| engine.run(&[&["exec"], args].concat());
    let ran = exec(&[
        "-e",
        "A=b",
        "--cwd",
        "/tmp",
        "-u",
        "1000:100",
        "added",
        "sh",
        "-c",
        "echo $A; pwd; id -u; exit 9",
    ]);
    assert_eq!((ran.code, ran.stdout.as_str()), (9, "b\n/tmp\n1000\n"), "{}", ran.stderr);
    assert_eq!(exec(&["added", "sh", "-c", "kill -9 $$"]).code, 137);
    let missing = exec(&["added", "/none"]);
    assert!(missing.code != 0 && engine.logged().contains("executable file not found"), "{}", missing.stderr);

    // As engines do it: a file with the process, a pid file, and the stand-in for them to wait for.
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", "exit 4"], "cwd": "/", "env": ["PATH=/bin"] });
    let (file, pid_file) = (engine.dir.join("process.json"), engine.dir.join("exec-pid"));
    fs::write(&file, process.to_string()).unwrap();
    let (file, pid_file) = (file.to_str().unwrap(), pid_file.to_str().unwrap());
    let ran = exec(&["--process", file, "--pid-file", pid_file, "--detach", "added"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(reap(fs::read_to_string(pid_file).unwrap().parse().unwrap()), 4);

    let pids: Vec<u32> = serde_json::from_str(&engine.ok(&["ps", "--format", "json", "added"])).unwrap();
    assert_eq!(pids, [pid], "engines look for it on the host");
    let table = engine.ok(&["ps", "added"]);
    assert!(table.lines().skip(1).any(|number| number.parse::<u32>().is_ok()), "{table}");
    let stats: Value = serde_json::from_str(&engine.ok(&["events", "--stats", "added"])).unwrap();
    assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0, "{stats}");
    engine.ok(&["update", "--pids-limit", "17", "added"]);
    let stats: Value = serde_json::from_str(&engine.ok(&["events", "--stats", "added"])).unwrap();
    assert_eq!(stats["data"]["pids"]["limit"], 17);
    engine.ok(&["kill", "--all", "added", "KILL"]);
    assert_eq!(reap(pid), 137);
}

#[test]
fn events_tell_when_memory_runs_out() {
    let engine = world!().engine();
    engine.bundle("sleep 1000", |spec| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 32 << 20 });
    });
    engine.create("greedy");
    engine.ok(&["start", "greedy"]);
    let told = engine.dir.join("told");
    let mut events = engine.command(&["events", "--interval", "1h", "greedy"]);
    let mut events = events.stdout(std::fs::File::create(&told).unwrap()).spawn().unwrap();
    let lines = || -> Vec<Value> {
        let text = std::fs::read_to_string(&told).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let oom = json!({ "type": "oom", "id": "greedy" });
    // What was killed before it looked for the first time is no news: until it has, processes are killed.
    eventually("it tells of an added process", || {
        assert_eq!(engine.run(&["exec", "greedy", "busybox", "tail", "/dev/zero"]).code, 137);
        lines().contains(&oom)
    });
    engine.ok(&["delete", "--force", "greedy"]);
    assert!(events.wait().unwrap().success());
}

#[test]
fn signals_reach_it_by_kill_and_by_its_stand_in() {
    let world = world!();
    let engine = world.engine();
    let script = "trap 'echo usr' USR1; trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let pid = engine.start("signals", script);
    eventually("it is ready", || engine.output().contains("ready"));
    engine.ok(&["kill", "signals", "USR1"]);
    eventually("the signal is there", || engine.output().contains("usr"));
    engine.ok(&["pause", "signals"]);
    assert_eq!(engine.status("signals"), "paused");
    engine.ok(&["resume", "signals"]);
    assert_eq!(engine.status("signals"), "running");
    crate::world::kill(pid, rustix::process::Signal::TERM);
    assert_eq!(reap(pid), 3);
}

#[test]
fn a_paused_one_can_be_killed() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("paused", "sleep 1000");
    engine.ok(&["pause", "paused"]);
    engine.ok(&["kill", "paused", "9"]);
    assert_eq!(reap(pid), 137);
}

#[test]
fn files_of_the_host_are_shared() {
    let world = world!();
    let engine = world.engine();
    fs::create_dir(engine.dir.join("volume")).unwrap();
    for file in ["hosts", "one", "two"] {
        fs::write(engine.dir.join(file), format!("{file} of the host\n")).unwrap();
    }
    let script = "cat /etc/hosts /one /two; echo new > /vol/file; echo new > /two; touch /made; \
                  echo x > /etc/hosts || echo held";
    let bundle = engine.bundle(script, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (at, source, access) in [
            ("/vol", "volume", "rw"),
            ("/etc/hosts", "hosts", "ro"),
            ("/one", "one", "rw"),
            ("/two", "two", "rw"),
        ] {
            let options = ["rbind", "rprivate", access];
            mounts.push(json!({ "destination": at, "type": "bind", "source": source, "options": options }));
        }
    });
    let ran = engine.run(&["run", "--bundle", bundle.to_str().unwrap(), "files"]);
    assert_eq!(ran.stdout, "hosts of the host\none of the host\ntwo of the host\nheld\n", "{}", ran.stderr);
    for new in ["volume/file", "two"] {
        assert_eq!(fs::read_to_string(engine.dir.join(new)).unwrap(), "new\n", "{new}");
    }
    assert!(engine.dir.join("rootfs/made").exists());
}

#[test]
fn many_processes_at_once() {
    let world = world!();
    let engine = world.engine();
    let pid = engine.start("many", "sleep 1000");
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..50)
            .map(|n| {
                let engine = &engine;
                scope.spawn(move || engine.run(&["exec", "many", "sh", "-c", &format!("echo {n}; exit {n}")]))
            })
            .collect();
        for (n, ran) in running.into_iter().enumerate() {
            let ran = ran.join().unwrap();
            assert_eq!(
                (ran.code, ran.stdout),
                (i32::try_from(n).unwrap(), format!("{n}\n")),
                "{}",
                ran.stderr
            );
        }
    });
    engine.ok(&["kill", "many", "KILL"]);
    assert_eq!(reap(pid), 137);
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let world = world!();
    let engine = world.engine();
    let bundle = engine.bundle("true", |spec| {
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .retain(|namespace| namespace["type"] != "network");
    });
    let bundle = bundle.to_str().unwrap();
    let ran = engine.run(&["create", "--bundle", bundle, "refused"]);
    assert!(ran.code != 0 && ran.stderr.contains("--network=host"), "{}", ran.stderr);
    assert!(engine.logged().contains("--network=host"));
    for (args, word) in [
        (&["create", "--bundle", "/nowhere", "refused"][..], "/nowhere"),
        (&["create", "--bundle", bundle, "--preserve-fds", "2", "refused"], "--preserve-fds"),
        (&["create", "--bundle", bundle, "a/b"], "container id"),
        (&["checkpoint", "refused"], "cannot be checkpointed"),
        (&["kill", "refused", "NOSUCH"], "no signal"),
        (&["state", "refused"], "does not exist"),
    ] {
        let ran = engine.run(args);
        assert!(ran.code != 0 && ran.stderr.contains(word), "{args:?}: {}", ran.stderr);
    }
    assert_eq!(engine.ok(&["list", "-q"]), "");
}

#[test]
fn what_fails_last_leaves_nothing_either() {
    let world = world!();
    let engine = world.engine();
    let bundle = engine.bundle("true", |_| ());
    let ran =
        engine.run(&["create", "--bundle", bundle.to_str().unwrap(), "--pid-file", "/nowhere/pid", "late"]);
    assert!(ran.code != 0 && ran.stderr.contains("/nowhere/pid"), "{}", ran.stderr);
    assert_eq!((engine.ok(&["list", "-q"]).as_str(), world.sandboxes_of("late")), ("", 0));
}
