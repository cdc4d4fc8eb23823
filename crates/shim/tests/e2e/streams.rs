//! Streams: FIFOs of clients that come, go, read and do not read.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use crate::world::{PATIENCE, engine, eventually, finish};

#[test]
fn input_arrives_whole_and_ends() {
    let engine = engine!();
    let args = engine.args(&["--rm"], "c1", &["sh", "-c", "wc -c"]);
    let mut command = engine.command(&args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("ctr starts");
    let bytes = vec![b'x'; 3 << 20];
    child.stdin.take().expect("a pipe").write_all(&bytes).expect("a reader");
    let output = child.wait_with_output().expect("an end");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), bytes.len().to_string());
    engine.nothing_is_left();
}

#[test]
fn output_is_whole_however_much() {
    let engine = engine!();
    let ran = engine.run(&engine.args(&["--rm"], "c1", &["sh", "-c", "yes | head -n 500000"]));
    assert_eq!((ran.code, ran.stdout.len()), (0, 1_000_000), "{}", ran.stderr);
}

#[test]
fn a_terminal_is_one() {
    let engine = engine!();
    // ctr tells the size once the program runs.
    let script = "test -t 0 && until stty size; do sleep 0.1; done 2>/dev/null; exit 3";
    let command = engine.command(&engine.args(&["--rm", "-t"], "c1", &["sh", "-c", script]));
    let line: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().expect("text")))
        .collect();
    // util-linux's script gives ctr the terminal that it wants.
    let mut script = Command::new("script");
    let ran =
        finish(script.args(["-qec", &format!("stty rows 33 cols 77; {}", line.join(" ")), "/dev/null"]));
    assert!(ran.stdout.contains("33 77"), "{ran:?}");
    assert_eq!(ran.code, 3);
    engine.nothing_is_left();
}

#[test]
fn a_fifo_that_nobody_reads_holds_nobody_up() {
    let engine = engine!();
    let fifo = engine.dir.join("out");
    let made = Command::new("mkfifo").arg(&fifo).status().expect("mkfifo");
    assert!(made.success());
    let uri = format!("fifo://{}", fifo.display());
    engine.ok(&engine.args(&["-d", "--log-uri", &uri], "c1", &["sh", "-c", "yes | head -n 500000; exit 6"]));
    // More than a pipe holds is stuck on its way; the container is killed, and goes.
    std::thread::sleep(std::time::Duration::from_secs(1));
    engine.ok(&["task", "kill", "--signal", "KILL", "c1"]);
    engine.becomes("c1", "STOPPED");
    let begun = std::time::Instant::now();
    assert_eq!(engine.remove("c1"), 137);
    assert!(begun.elapsed() < PATIENCE / 4);
    engine.nothing_is_left();
}

#[test]
fn a_program_may_take_the_output() {
    let engine = engine!();
    let (logger, log) = (engine.dir.join("logger"), engine.dir.join("logged"));
    // Says what it was called with, then that it is ready, then what it reads.
    let script = "#!/bin/sh\nexec > \"$2\"\necho \"$# $1 $CONTAINER_NAMESPACE/$CONTAINER_ID\"\nexec 5>&-\n\
                  sed 's/^/out: /' <&3 &\nsed 's/^/err: /' <&4 &\nexec 3<&- 4<&-\nwait\necho the end\n";
    executable(&logger, script);
    let uri = format!("binary://{}?to={}", logger.display(), log.display());
    let lines = || std::fs::read_to_string(&log).unwrap_or_default();
    let command = ["sh", "-c", "echo one; echo two >&2; exit 5"];
    engine.ok(&engine.args(&["-d", "--log-uri", &uri], "c1", &command));
    engine.becomes("c1", "STOPPED");
    assert_eq!(engine.remove("c1"), 5, "{}", engine.log());
    eventually("it has read to the end", || lines().ends_with("the end\n"));
    let told = lines();
    assert!(told.starts_with("2 to default/c1\n"), "{told}");
    assert!(told.contains("out: one\n") && told.contains("err: two\n"), "{told}");
    engine.nothing_is_left();

    // One that is not there, and one that is not ready.
    executable(&logger, "#!/bin/sh\nexec sleep 1000\n");
    for (id, path, words) in
        [("c2", "/nowhere/logger", "/nowhere/logger"), ("c3", &*logger.display().to_string(), "not ready")]
    {
        let uri = format!("binary://{path}");
        let ran = engine.run(&engine.args(&["-d", "--log-uri", &uri], id, &["true"]));
        assert!(ran.code != 0 && ran.stderr.contains(words), "{}", ran.stderr);
        engine.nothing_is_left();
    }
}

fn executable(path: &std::path::Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text).expect("a script");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a mode");
}
