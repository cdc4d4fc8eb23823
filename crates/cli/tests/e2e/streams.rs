//! Standard streams: binary, large, closed early, not touched.

use std::io::{Read, Write};
use std::process::Stdio;

use crate::run::md5sum;
use crate::world::{Watchdog, world};

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

#[test]
fn binary_both_ways() {
    let world = world!();
    let bytes = noise(3_000_001);
    let ran = world.run_with(["run", "--rm", "-i", "busybox", "cat"], &bytes);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout == bytes, "{} of {} bytes came back", ran.stdout.len(), bytes.len());
}

#[test]
fn a_large_stream_without_loss_or_memory() {
    const SIZE: usize = 256 << 20;
    let world = world!();
    let mut command = world.command(["run", "--rm", "busybox", "dd", "if=/dev/zero", "bs=1M", "count=256"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("kapsel starts");
    let _watchdog = Watchdog::of(&child);
    let mut stdout = child.stdout.take().expect("a pipe");
    let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
    loop {
        match stdout.read(&mut buffer).expect("readable") {
            0 => break,
            count => {
                assert!(buffer[..count].iter().all(|byte| *byte == 0));
                total += count;
            }
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")).map(|line| line.trim().to_owned());
        let kibibytes = peak.and_then(|text| text.split(' ').next().and_then(|n| n.parse::<usize>().ok()));
        assert!(kibibytes.is_none_or(|size| size < 64 << 10), "kapsel grew to {kibibytes:?} KiB");
    }
    assert_eq!(total, SIZE);
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn output_and_errors_stay_apart() {
    let world = world!();
    let ran = world.run(["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("out\n", "err\n"));
}

#[test]
fn the_end_of_input_arrives_and_without_i_none_is_taken() {
    let world = world!();
    let ran = world.run_with(["run", "--rm", "-i", "busybox", "wc", "-c"], b"12345");
    assert_eq!(ran.text().trim(), "5", "{}", ran.stderr);
    // What follows kapsel in a script keeps its input.
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(b"for the next one").expect("written");
    drop(writer);
    let mut kept = reader.try_clone().expect("a copy");
    let status =
        world.command(["run", "--rm", "busybox", "cat"]).stdin(reader).status().expect("kapsel starts");
    assert!(status.success());
    let mut rest = String::new();
    kept.read_to_string(&mut rest).expect("readable");
    assert_eq!(rest, "for the next one");
}

#[test]
fn a_reader_that_goes_away_ends_all() {
    let world = world!();
    let mut command = world.command(["run", "--rm", "--name", "e2e-yes", "busybox", "yes"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("kapsel starts");
    let _watchdog = Watchdog::of(&child);
    let mut some = [0; 1024];
    child.stdout.take().expect("a pipe").read_exact(&mut some).expect("readable");
    assert_eq!(child.wait().expect("it ends").code(), Some(141));
    crate::world::eventually("the sandbox is gone", || !world.ok(["ps", "-a"]).contains("e2e-yes"));
}

#[test]
fn exec_streams_are_as_good() {
    let world = world!();
    let container = world.container("e2e-exec-io", &[], &["sleep", "999"]);
    let bytes = noise(1_000_003);
    let ran = world.run_with(["exec", "-i", container.name, "md5sum"], &bytes);
    assert_eq!(ran.text(), format!("{}  -\n", md5sum(&bytes)), "{}", ran.stderr);
    let ran = world.run(["exec", container.name, "sh", "-c", "sleep 60 & echo done"]);
    assert_eq!((ran.code, ran.text().as_str()), (0, "done\n"), "a process left behind holds nobody up");
}
