//! A person at a terminal.

use std::io::{BufRead, BufReader};

use rustix::process::Signal;

use crate::pty::Terminal;
use crate::world::{Watchdog, eventually, kill, world};

#[test]
fn a_shell_on_a_terminal() {
    let world = world!();
    let mut terminal = Terminal::start(world.command(["run", "-it", "--rm", "busybox", "sh"]));
    terminal.shows("# ");
    terminal.types("tty; stty size; echo $TERM\r");
    terminal.shows("/dev/pts/");
    terminal.shows("24 80");
    terminal.resize(111, 33);
    eventually("the size arrives", || {
        terminal.types("stty size\r");
        std::thread::sleep(std::time::Duration::from_millis(200));
        terminal.shown().contains("33 111")
    });
    // ctrl-C is for what runs in the shell, not for kapsel and not for the shell.
    terminal.types("sleep 999\r");
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.types("\x03");
    terminal.types("echo al''ive; exit 12\r");
    terminal.shows("alive");
    assert_eq!(terminal.end(), (Some(12), true), "the exit code, and the terminal as it was");
}

#[test]
fn a_command_that_was_not_made_to_be_the_first_process_ends_by_signals() {
    let world = world!();
    let script = "echo up; exec sleep 999";
    for first in [&["do"][..], &["run", "-it", "--rm", "--init", "busybox"]] {
        let mut terminal = Terminal::start(world.command([first, &["sh", "-c", script]].concat()));
        terminal.shows("up");
        terminal.types("\x03");
        assert_eq!(terminal.end(), (Some(130), true), "{first:?}");
    }
    // Without a terminal, and what nobody else would reap is reaped.
    let script = "(sleep 0.1 &); sleep 1; cat /proc/[0-9]*/stat | grep -c ') Z'; echo up; exec sleep 999";
    let mut command = world.command(["run", "--rm", "--init", "busybox", "sh", "-c", script]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().expect("kapsel starts");
    let watchdog = Watchdog::of(&child);
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    assert_eq!((lines.next().as_deref(), lines.next().as_deref()), (Some("0"), Some("up")));
    kill(child.id(), Signal::TERM);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    drop(watchdog);
    for (program, code) in [("sh", 0), ("no-such-program", 127), ("/etc/notes", 126)] {
        let ran = world.run(["run", "--rm", "--init", "busybox", program]);
        assert_eq!(ran.code, code, "{}", ran.stderr);
        assert!(code == 0 || ran.stderr.contains(program), "{}", ran.stderr);
    }
}

#[test]
fn letting_go_and_coming_back() {
    let world = world!();
    let name = "e2e-detach";
    let _ = world.run(["rm", "-f", name]);
    let mut terminal = Terminal::start(world.command(["run", "-it", "--name", name, "busybox", "sh"]));
    terminal.shows("# ");
    terminal.types("x=kept\r");
    terminal.types("\x10\x11");
    assert_eq!(terminal.end(), (Some(0), true));
    assert_eq!(world.inspect(name)["status"], "running");
    let mut terminal = Terminal::start(world.command(["attach", name]));
    terminal.types("echo x is $x; exit 3\r");
    terminal.shows("x is kept");
    assert_eq!(terminal.end(), (Some(3), true));
    world.ok(["rm", "-f", name]);
}

#[test]
fn the_terminal_is_restored_when_kapsel_is_told_to_end() {
    let world = world!();
    let mut terminal =
        Terminal::start(world.command(["run", "-it", "--rm", "busybox", "sh", "-c", "echo up; sleep 999"]));
    terminal.shows("up");
    // Process 1 ignores SIGTERM: after the third kapsel does not wait any more. Two that come together count as one.
    while terminal.signal(Signal::TERM) {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_eq!(terminal.end(), (Some(143), true));
}

#[test]
fn exec_on_a_terminal() {
    let world = world!();
    let container = world.container("e2e-exec-tty", &[], &["sleep", "999"]);
    let mut terminal = Terminal::start(world.command(["exec", "-it", container.name, "sh"]));
    terminal.shows("# ");
    terminal.types("stty size; exit 5\r");
    terminal.shows("24 80");
    assert_eq!(terminal.end(), (Some(5), true));
    let ran = world.run_with(["exec", "-it", container.name, "true"], b"");
    assert!(ran.code == 125 && ran.stderr.contains("leave -t out"), "{}", ran.stderr);
}
