//! The file server as a guest sees it. One boot for all that can be seen in one, as it takes seconds.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use kapsel_jail::Exit;
use support::Scene;

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
    scene.serve("rw", &rw, false);
    scene.serve("ro", &ro, true);
    scene.serve("one", &secret, true);

    let script = include_str!("support/script.sh");
    let output = scene.run(script);
    println!("{output}");

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
