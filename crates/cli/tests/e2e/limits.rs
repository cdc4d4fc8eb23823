//! Limits: of memory, processes and CPUs.

use crate::world::world;

#[test]
fn too_much_memory_ends_with_137_and_is_told() {
    let world = world!();
    let name = "e2e-oom";
    let _ = world.run(["rm", "-f", name]);
    let eat = ["-m", "48m", "--tmpfs", "/big:size=100m", "busybox", "sh", "-c", "cat /dev/zero > /big/x"];
    let ran = world.run([&["run", "--name", name][..], &eat].concat());
    assert_eq!(ran.code, 137, "{}", ran.stderr);
    let told = world.inspect(name);
    assert_eq!(told["exit"]["oom"], true, "{told}");
    assert!(ran.stderr.contains("out of memory") && ran.stderr.contains("--memory"), "{}", ran.stderr);
    assert!(world.ok(["ps", "-a"]).contains("out of memory"));
    world.ok(["rm", name]);
}

#[test]
fn an_added_process_that_uses_too_much_memory_is_told_of() {
    let world = world!();
    let container = world.container("e2e-oom-exec", &["-m", "32m"], &["sleep", "1000"]);
    let ran = world.run(["exec", container.name, "tail", "/dev/zero"]);
    assert_eq!(ran.code, 137, "{}", ran.stderr);
    assert!(ran.stderr.contains("out of memory") && ran.stderr.contains("--memory"), "{}", ran.stderr);
    let killed = world.run(["exec", container.name, "sh", "-c", "exit 137"]);
    assert_eq!((killed.code, killed.stderr.as_str()), (137, ""), "that one was not");
    assert_eq!(world.ok(["exec", container.name, "echo", "fine"]), "fine\n");
}

#[test]
fn forks_without_end_hit_the_limit_and_nobody_else() {
    let world = world!();
    // The shell ends when it cannot fork; what it left stays, and so does process 1.
    let bomb = "(while :; do sleep 999 & done); exec sleep 999";
    let container = world.container("e2e-forks", &["--pids-limit", "32"], &["sh", "-c", bomb]);
    let stats = || -> serde_json::Value {
        serde_json::from_str(&world.ok(["stats", "--no-stream", "--json", container.name])).expect("JSON")
    };
    crate::world::eventually("the limit is reached", || {
        stats()[0]["pids"].as_u64().is_some_and(|pids| pids >= 31)
    });
    assert!(stats()[0]["pids"].as_u64().is_some_and(|pids| pids <= 32));
    assert_eq!(world.ok(["run", "--rm", "busybox", "echo", "another"]), "another\n");
    world.ok(["rm", "-f", container.name]);
}

#[test]
fn cpus_and_ulimits() {
    let world = world!();
    let ran = world.run([
        "run",
        "--rm",
        "--cpus",
        "2",
        "--ulimit",
        "nofile=77:88",
        "busybox",
        "sh",
        "-c",
        "nproc; ulimit -n; ulimit -Hn",
    ]);
    assert_eq!(ran.text(), "2\n77\n88\n", "{}", ran.stderr);
}
