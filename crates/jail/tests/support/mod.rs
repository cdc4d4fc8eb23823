//! What the jail's tests share.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

use kapsel_jail::{Child, Exit, Jail};

/// Debian's static busybox: a whole world in one file, which needs nothing else inside.
pub const BUSYBOX: &str = "/bin/busybox";

/// Says why the test does nothing, if it cannot run here.
pub fn skip() -> bool {
    let what = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !std::path::Path::new(BUSYBOX).exists() {
        "no busybox-static"
    } else {
        return false;
    };
    println!("skipped: {what}");
    true
}

/// A jail that runs one of busybox's programs.
pub fn applet(words: &[&str]) -> Jail {
    Jail::new("busybox").program(BUSYBOX).bind_exec(BUSYBOX, BUSYBOX).args(words.iter().copied())
}

/// A jail that runs a shell script.
pub fn script(text: &str) -> Jail {
    applet(&["sh", "-c", text])
}

/// Runs it to its end: how it ended, and all that it wrote.
pub fn output(jail: Jail) -> (Exit, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut child = jail.stdout(writer.try_clone().unwrap().into()).stderr(writer.into()).spawn().unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (child.wait().unwrap(), text)
}

/// A field of /proc/<pid>/status.
pub fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {field}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether the process exists, as a zombie too.
pub fn exists(pid: u32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap()
}

/// Waits until it is true, for at most five seconds.
pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is() {
        assert!(Instant::now() < deadline, "not within 5 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A child that does nothing for long.
pub fn sleeper(jail: impl FnOnce(Jail) -> Jail) -> Child {
    jail(applet(&["sleep", "1000"])).spawn().unwrap()
}
