//! What the file server does when the other end misbehaves or goes away.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kapsel_jail::profiles::{self, Share};
use kapsel_jail::{Child, Exit};
use support::Scene;

/// A jailed server for a directory, and a connection to it.
fn connected(dir: &Path) -> (Child, UnixStream) {
    connected_to(Path::new(support::FSD), dir, dir)
}

fn connected_to(program: &Path, source: &Path, dir: &Path) -> (Child, UnixStream) {
    let path = dir.join("socket");
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let share = Share { sources: &[source.into()], read_only: false, follow: false, tag: Some("tag") };
    let log = fs::File::create(dir.join("log")).unwrap();
    let jail = profiles::fsd(program, share, listener.into(), "test").unwrap();
    let child = jail.stderr(log.into()).spawn().unwrap();
    (child, UnixStream::connect(&path).unwrap())
}

fn end(child: &mut Child) -> Exit {
    child.wait_timeout(Duration::from_secs(10)).unwrap().expect("the server has not ended")
}

#[test]
fn it_ends_with_the_connection() {
    if let Some(what) = support::missing() {
        println!("skipped: {what}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut child, stream) = connected(dir.path());
    assert_eq!(child.wait_timeout(Duration::from_millis(200)).unwrap(), None);
    drop(stream);
    assert_eq!(end(&mut child), Exit::Code(0), "{:?}", fs::read_to_string(dir.path().join("log")));
}

#[test]
fn garbage_from_the_monitor_ends_it_with_an_error() {
    if let Some(what) = support::missing() {
        println!("skipped: {what}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut state = 12345_u32;
    for round in 0..30_u32 {
        let (mut child, mut stream) = connected(dir.path());
        let mut message = vec![0; 4096];
        for byte in &mut message {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_le_bytes()[2];
        }
        // Every other time a header that looks right (request, version 1, a small size) before a body that does not.
        if round % 2 == 0 {
            message[..4].copy_from_slice(&(round % 45 + 1).to_le_bytes());
            message[4..8].copy_from_slice(&1_u32.to_le_bytes());
            message[8..12].copy_from_slice(&(round * 8).to_le_bytes());
        }
        // It may hang up in the middle.
        let _ = stream.write_all(&message);
        drop(stream);
        // By itself, with success or failure: no crash, and no call outside its filter.
        assert!(matches!(end(&mut child), Exit::Code(_)), "round {round}");
    }
}

#[test]
fn a_killed_monitor_leaves_no_server() {
    if let Some(what) = support::missing() {
        println!("skipped: {what}");
        return;
    }
    let mut scene = Scene::new();
    let share = scene.path("share");
    fs::create_dir(&share).unwrap();
    let server = scene.serve("rw", &share, false);
    let script = "mount -t virtiofs rw /mnt && touch /mnt/started; while true; do echo x > /mnt/file; cat /mnt/file; done";
    let mut guest = scene.boot(script);
    let started = (0..600).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        share.join("started").exists()
    });
    assert!(started, "{:?}", scene.logs());
    let memory = support::own_memory(server);
    println!("the server's own memory (PSS without the guest's): {} KiB", memory / 1024);
    assert!(memory < 8 << 20);
    guest.kill().unwrap();
    guest.wait().unwrap();
    assert_eq!(scene.exits(), [Some(Exit::Code(0))], "{:?}", scene.logs());
}

#[test]
fn it_serves_without_root() {
    if let Some(what) = support::missing() {
        println!("skipped: {what}");
        return;
    }
    // Nobody may not be able to read where the programs are.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (test, server, mine) =
        (dir.path().join("test"), dir.path().join("kapsel-fsd"), dir.path().join("mine"));
    fs::copy(std::env::current_exe().unwrap(), &test).unwrap();
    fs::copy(support::FSD, &server).unwrap();
    fs::create_dir(&mine).unwrap();
    std::os::unix::fs::chown(&mine, Some(65534), Some(65534)).unwrap();
    let done = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&test)
        .args(["--exact", "as_nobody", "--ignored", "--nocapture"])
        .env("KAPSEL_TEST_DIR", dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    println!("{text}");
    assert!(done.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "part of it_serves_without_root"]
fn as_nobody() {
    if std::fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|n| n.trim() == "0") {
        println!("skipped: no unprivileged user namespaces here");
        return;
    }
    let dir = std::env::var("KAPSEL_TEST_DIR").map(std::path::PathBuf::from).unwrap();
    let (server, mine) = (dir.join("kapsel-fsd"), dir.join("mine"));
    // The whole host too, with all that is mounted in it.
    for source in [mine.as_path(), Path::new("/")] {
        let (mut child, stream) = connected_to(&server, source, &mine);
        assert_eq!(child.wait_timeout(Duration::from_millis(200)).unwrap(), None);
        drop(stream);
        assert_eq!(end(&mut child), Exit::Code(0), "{:?}", fs::read_to_string(mine.join("log")));
    }
}
