//! The file server as a guest sees it. One boot for all that can be seen in one, as it takes seconds.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kapsel_jail::Exit;
use support::Scene;

/// Bytes of a file that the guest reads several times.
const KEPT: usize = 1 << 20;

/// A point that the guest waits at.
struct Step {
    reached: PathBuf,
    passed: PathBuf,
}

impl Step {
    fn of(share: &Path, name: &str) -> Self {
        let at = |prefix: &str| share.join(format!("{prefix}-{name}"));
        Self { reached: at("at"), passed: at("on") }
    }

    fn wait(&self) {
        let until = Instant::now() + support::PATIENCE;
        while !self.reached.exists() {
            assert!(Instant::now() < until, "the guest did not come to {}", self.reached.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn go_on(&self) {
        fs::write(&self.passed, "").unwrap();
    }
}

/// What a process has read by system calls (`rchar` of proc(5)).
fn bytes_read(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn a_guest_uses_its_shares() {
    if let Some(what) = support::missing() {
        println!("skipped: {what}");
        return;
    }
    let mut scene = Scene::new();
    let (rw, ro, secret) = (scene.path("rw"), scene.path("ro"), scene.path("secret"));
    for dir in [&rw, &ro, &rw.join("locked")] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(&secret, "of the host\n").unwrap();
    fs::write(ro.join("file"), "read me\n").unwrap();
    symlink(&secret, rw.join("absolute")).unwrap();
    symlink("../secret", rw.join("relative")).unwrap();
    fs::write(rw.join("locked/file"), "for root\n").unwrap();
    fs::set_permissions(rw.join("locked"), fs::Permissions::from_mode(0o000)).unwrap();
    for n in 0..5000 {
        let dir = rw.join("tree").join((n % 10).to_string());
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(n.to_string()), format!("{n}\n")).unwrap();
    }
    let kept = rw.join("kept");
    fs::write(&kept, "a".repeat(KEPT)).unwrap();
    let fsd = scene.serve("rw", &rw, false);
    scene.serve("ro", &ro, true);
    scene.serve("one", &secret, true);

    let script = include_str!("support/script.sh");
    let (begin, end) = (Step::of(&rw, "settled"), [Step::of(&rw, "once"), Step::of(&rw, "again")]);
    let host = std::thread::spawn(move || {
        begin.wait();
        // A file that has changed just now is not kept.
        let age = || fs::metadata(&kept).unwrap().modified().unwrap().elapsed().unwrap();
        while age() < Duration::from_secs(4) {
            std::thread::sleep(Duration::from_millis(100));
        }
        begin.go_on();
        let [once, again] = end;
        once.wait();
        let before = bytes_read(fsd);
        once.go_on();
        again.wait();
        let read = bytes_read(fsd) - before;
        // As by a program that restores the time of modification.
        let time = fs::metadata(&kept).unwrap().modified().unwrap();
        let mut file = fs::File::options().write(true).open(&kept).unwrap();
        std::io::Write::write_all(&mut file, "b".repeat(KEPT).as_bytes()).unwrap();
        file.set_modified(time).unwrap();
        again.go_on();
        read
    });
    let output = scene.run(script);
    println!("{output}");
    let read = host.join().unwrap();
    assert!(read < KEPT as u64, "{read} bytes were read once more");

    let failed: Vec<&str> = output.lines().filter(|line| line.starts_with("FAILED")).collect();
    assert!(failed.is_empty() && output.contains("all checked"), "{failed:?}\n{output}\n{:?}", scene.logs());
    assert_eq!(scene.exits(), vec![Some(Exit::Code(0)); 3], "{:?}", scene.logs());
    // What the guest did is on the host, as what it did it as.
    let made = fs::metadata(rw.join("made")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (1000, 1001, 0o640));
    assert_eq!(fs::read_to_string(rw.join("made")).unwrap(), "hello\n");
    assert_eq!(fs::metadata(rw.join("by-user")).unwrap().uid(), 1000);
    assert_eq!(fs::read_dir(rw.join("many")).unwrap().count(), 200);
    assert_eq!(fs::read_to_string(&secret).unwrap(), "of the host\n");
    assert!(!rw.join("null").exists());
}
