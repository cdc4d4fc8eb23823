//! Containers with directories and files of the host: in machines that boot, and in clones.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::containers::{json, md5sum, pattern};
use crate::host::{logs, ok, run};

/// The longest that the end of a sandbox may take to be seen.
const PATIENCE: Duration = Duration::from_secs(300);
/// More than all caches of a guest with little memory would hold back.
const LONG: u32 = 8 << 20;

/// Cold and warm; to write and only to read; a directory and a file.
pub fn all() {
    let dir = std::env::temp_dir().join("shared");
    fs::create_dir(&dir).expect("a directory");
    let file = std::env::temp_dir().join("file");
    fs::write(&file, "alone\n").expect("a file");
    for how in ["--cold", "--rm"] {
        fs::write(dir.join("in"), pattern(LONG)).expect("a file");
        let volumes = [
            format!("-v={}:/rw", dir.display()),
            format!("-v={}:/ro:ro", dir.display()),
            format!("-v={}:/etc/file", file.display()),
        ];
        let volumes = volumes.each_ref().map(String::as_str);
        ok(&[&["run", "-d", "--name", "shared", how][..], &volumes, &["busybox", "sleep", "1000"]].concat());
        let told = &json(&["inspect", "shared"])[0];
        println!("{}", told["timings"]);
        let isolation = &told["isolation"];
        let warm = (how != "--cold").into();
        assert_eq!((&isolation["kind"], &isolation["template"]), (&"kapsel-vmm".into(), &warm));
        let sum = md5sum(&pattern(LONG));
        let read = ok(&["exec", "shared", "md5sum", "/rw/in", "/ro/in"]);
        assert_eq!(read.matches(&sum).count(), 2, "{read}");
        ok(&["exec", "shared", "sh", "-c", "cat /rw/in > /rw/out; echo more >> /etc/file"]);
        assert!(fs::read(dir.join("out")).expect("a file") == pattern(LONG), "what was written is here");
        let refused = run(&["exec", "shared", "sh", "-c", "echo no > /ro/no"]);
        assert!(refused.code != Some(0) && refused.stderr.contains("Read-only"), "{}", refused.stderr);
        assert!(!dir.join("no").exists());
        ok(&["rm", "-f", "shared"]);
        until("servers go with their sandbox", || servers().is_empty());
        fs::remove_file(dir.join("out")).expect("removed");
    }
    assert_eq!(fs::read_to_string(&file).expect("a file"), "alone\nmore\nmore\n");
    server_dies(&dir);
}

/// A sandbox whose file server is killed ends, also while the guest waits for an answer.
fn server_dies(dir: &Path) {
    ok(&[
        "run",
        "-d",
        "--name",
        "shared",
        "-v",
        &format!("{}:/rw", dir.display()),
        "busybox",
        "sleep",
        "1000",
    ]);
    // With it goes what its jail has beside it.
    let kill = |server: i32| {
        let pid = rustix::process::Pid::from_raw(server).expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
    };
    assert!(servers().into_iter().filter(|server| kill(*server)).count() > 0, "there is a server");
    until("the sandbox ends", || json(&["inspect", "shared"])[0]["status"] != "running");
    ok(&["rm", "-f", "shared"]);
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not yet: {what}; servers: {:?}\n{}", servers(), logs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Processes that serve files, but for the helpers that wait for them.
fn servers() -> Vec<i32> {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let served = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|words| words.windows(9).any(|w| w == b"socket-fd"))
    };
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(served).collect()
}
