//! Streams: FIFOs of clients that come, go, read and do not read.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use crate::world::{PATIENCE, engine, finish};

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
