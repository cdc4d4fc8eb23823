//! What a jailed child sees and may do: by its own report, and by the kernel's from outside.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kapsel_jail::{
    BpfProgram, Cap, CapSet, Error, Exit, Identity, Jail, Namespaces, Resource, Step, denied_call, filters,
    landlock_version, profiles,
};
use support::{BUSYBOX, applet, output, script, skip, sleeper, status};

#[test]
fn it_sees_only_what_is_named() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let list =
        "/bin/busybox find / | /bin/busybox sort; /bin/busybox env; /bin/busybox id; /bin/busybox pwd; umask";
    let jail = script(list)
        .landlock(false)
        .identity(Identity::of_sandbox("it"))
        .bind_ro(dir.path(), "/data")
        .tmpfs("/tmp", 1 << 20)
        .directory("/empty")
        .device("/dev/null")
        .env("ONLY", "this");
    let (exit, text) = output(jail);
    let uid = Identity::of_sandbox("it").ids().0;
    let expected = format!(
        "/\n/bin\n/bin/busybox\n/data\n/data/file\n/dev\n/dev/null\n/empty\n/tmp\nONLY=this\nPWD=/\nSHLVL=1\nuid={uid} gid={uid}\n/\n0077\n"
    );
    let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    // The shell adds PWD, PATH, SHLVL and the like by itself.
    let shells_own =
        |line: &String| ["PWD=", "PATH=", "SHLVL=", "OLDPWD=", "_="].iter().any(|p| line.starts_with(p));
    let without = |set: BTreeSet<String>| set.into_iter().filter(|l| !shells_own(l)).collect::<BTreeSet<_>>();
    assert_eq!(without(sorted(&text)), without(sorted(&expected)), "{text}");
    assert_eq!(exit, Exit::Code(0));
}

#[test]
fn it_can_write_only_where_it_is_told() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (ro, rw) = (dir.path().join("ro"), dir.path().join("rw"));
    for d in [&ro, &rw] {
        fs::create_dir(d).unwrap();
    }
    let uid = Identity::of_sandbox("w").ids().0;
    std::os::unix::fs::chown(&rw, Some(uid), Some(uid)).unwrap();
    let text = "for f in /x /ro/x /bin/x /rw/x /tmp/x; do (echo data > $f) 2>/dev/null && echo $f; done; \
                /bin/busybox cp /bin/busybox /rw/b; /rw/b true || echo noexec; \
                (/bin/busybox dd if=/dev/zero of=/tmp/big bs=1M count=4) 2>/dev/null || echo bounded";
    for landlock in [false, true] {
        let jail = script(text)
            .landlock(landlock)
            .identity(Identity::of_sandbox("w"))
            .bind_ro(&ro, "/ro")
            .bind_rw(&rw, "/rw")
            .tmpfs("/tmp", 1 << 20)
            .device("/dev/zero")
            .device("/dev/null");
        let (_, text) = output(jail);
        let lines: Vec<&str> = text.lines().filter(|l| !l.contains("ermission")).collect();
        assert_eq!(lines, ["/rw/x", "/tmp/x", "noexec", "bounded"], "{text}");
    }
    assert_eq!(fs::metadata(rw.join("x")).unwrap().uid(), uid);
}

#[test]
fn landlock_forbids_what_is_not_bound() {
    if skip() || landlock_version() == 0 {
        println!("skipped: no Landlock in this kernel");
        return;
    }
    let (with, text) = output(applet(&["ls", "/"]));
    assert!(with != Exit::Code(0) && text.contains("ermission"), "{text}");
    let (without, text) = output(applet(&["ls", "/"]).landlock(false));
    assert_eq!((without, text.as_str()), (Exit::Code(0), "bin\n"));
}

#[test]
fn the_kernel_agrees() {
    if skip() {
        return;
    }
    let child = sleeper(|jail| jail.identity(Identity::of_sandbox("k")).rlimit(Resource::OpenFiles, 77));
    let pid = child.pid();
    let uid = Identity::of_sandbox("k").ids().0.to_string();
    assert_eq!(status(pid, "Uid"), [uid.as_str(); 4].join(" "));
    assert_eq!(status(pid, "Gid"), [uid.as_str(); 4].join(" "));
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    // Process 1 of its namespace, leader of a session and a group.
    assert_eq!(status(pid, "NSpid"), format!("{pid} 1"));
    assert_eq!(status(pid, "NSsid"), format!("{pid} 1"));
    assert_eq!(status(pid, "NSpgid"), format!("{pid} 1"));
    assert_eq!((status(pid, "SigBlk"), status(pid, "SigIgn")), ("0".repeat(16), "0".repeat(16)));
    let namespace = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace("self", kind), namespace(&pid.to_string(), kind), "{kind}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|l| l.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        (limit("Max open files"), limit("Max core file size")),
        ("77 77".to_owned(), "0 0".to_owned())
    );
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let field = |line: &str, n: usize| line.split(' ').nth(n).unwrap().to_owned();
    let options: BTreeMap<String, String> = mounts.lines().map(|l| (field(l, 4), field(l, 5))).collect();
    assert_eq!(options.keys().collect::<Vec<_>>(), ["/", BUSYBOX], "{mounts}");
    assert!(options["/"].starts_with("ro,nosuid,nodev,noexec"), "{mounts}");
    assert!(
        options[BUSYBOX].starts_with("ro,nosuid,nodev") && !options[BUSYBOX].contains("noexec"),
        "{mounts}"
    );
    let net = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert_eq!(net.lines().count(), 3, "only loopback: {net}");
}

#[test]
fn descriptors_are_those_that_were_passed() {
    if skip() {
        return;
    }
    // One that is not close-on-exec, as a careless library might leave.
    let leaky = rustix::io::dup(std::io::stderr()).unwrap();
    rustix::io::fcntl_setfd(&leaky, rustix::io::FdFlags::empty()).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let child = sleeper(|jail| jail.fd(writer.into(), 9).fd(reader.into(), 3));
    let dir = format!("/proc/{}/fd", child.pid());
    let open: BTreeSet<String> =
        fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(open, BTreeSet::from(["0", "1", "2", "3", "9"].map(str::to_owned)));
    let target = |n: &str| fs::read_link(format!("{dir}/{n}")).unwrap();
    assert_eq!(target("0"), Path::new("/dev/null"));
    assert_eq!(target("3"), target("9"), "two ends of one pipe");
}

#[test]
fn passed_descriptors_may_swap_numbers() {
    if skip() {
        return;
    }
    // Whatever numbers these have here, one of the targets is likely to be taken by another.
    let (reader, writer) = std::io::pipe().unwrap();
    let (exit, text) = output(
        script("echo through >&3; read line <&4; echo $line").fd(writer.into(), 3).fd(reader.into(), 4),
    );
    assert_eq!((exit, text.as_str()), (Exit::Code(0), "through\n"));
}

#[test]
fn kept_capabilities_are_kept_in_all_sets() {
    if skip() {
        return;
    }
    let caps = CapSet::of(&[Cap::DacReadSearch]);
    for identity in [Identity::of_sandbox("c"), Identity::Ids { uid: 0, gid: 0 }] {
        let child = sleeper(|jail| jail.identity(identity).capabilities(caps));
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(child.pid(), set), "0000000000000004", "{set}");
        }
    }
}

#[test]
fn namespaces_can_be_shared() {
    if skip() {
        return;
    }
    let child = sleeper(|jail| jail.namespaces(Namespaces { net: false, ..Namespaces::default() }));
    let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(net("self"), net(&child.pid().to_string()));
}

#[test]
fn failures_name_the_step() {
    if skip() {
        return;
    }
    let error = applet(&["true"]).program("/bin/nothing").spawn().unwrap_err();
    assert!(
        matches!(&error, Error::Confine { step: Step::Exec, source, .. } if source.raw_os_error() == Some(libc::ENOENT)),
        "{error}"
    );
    assert!(error.to_string().contains("/bin/nothing"), "{error}");
    let error = applet(&["true"]).bind_ro("/nowhere/at/all", "/x").spawn().unwrap_err();
    assert!(
        matches!(error, Error::Prepare { .. }) && error.to_string().contains("/nowhere/at/all"),
        "{error}"
    );
    // Not executable, by the mount.
    let error = Jail::new("b").program("/b").bind_ro(BUSYBOX, "/b").spawn().unwrap_err();
    assert!(matches!(&error, Error::Confine { step: Step::Exec, .. }), "{error}");
    for jail in [
        applet(&["true"]).bind_ro("/etc", "/a/../b"),
        applet(&["true"]).bind_ro("/etc", "relative"),
        applet(&["true"]).bind_ro("/etc", "/"),
        applet(&["true"]).bind_ro("/etc", "/a").bind_ro("/etc", "/a/b"),
        applet(&["true"]).bind_ro("/etc/hostname", "/a").bind_ro("/etc/hostname", "/a"),
        applet(&["true"]).device("/etc/hostname"),
        applet(&["nul\0"]),
    ] {
        let error = jail.spawn().unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    // An instruction that no kernel accepts.
    let broken: BpfProgram = vec![seccompiler::sock_filter { code: 0xffff, jt: 0, jf: 0, k: 0 }];
    let error = applet(&["true"]).seccomp(broken).spawn().unwrap_err();
    assert!(matches!(&error, Error::Confine { step: Step::Seccomp, .. }), "{error}");
}

#[test]
fn a_call_outside_the_filter_kills_and_is_named() {
    if skip() {
        return;
    }
    for (words, call) in [
        (["mkdir", "/x"].as_slice(), libc::SYS_mkdir),
        // The gate in front of the filter was for one path at one address.
        (&["env", BUSYBOX, "true"], libc::SYS_execve),
        (&["nc", "-l", "-p", "1"], libc::SYS_socket),
        (&["chroot", "/"], libc::SYS_chroot),
    ] {
        let mut child = applet(words).seccomp(filters::qemu().unwrap()).spawn().unwrap();
        let (pid, exit) = (child.pid(), child.wait().unwrap());
        assert_eq!(exit, Exit::Signal(libc::SIGSYS), "{words:?}");
        // The kernel limits how many it logs in a second, and may not log at all.
        match denied_call(pid) {
            Some(denied) => assert_eq!(i64::from(denied), call, "{words:?}"),
            None => println!("skipped: the kernel logged no call for {words:?}"),
        }
    }
    let (exit, text) = output(applet(&["echo", "fine"]).seccomp(filters::qemu().unwrap()));
    assert_eq!((exit, text.as_str()), (Exit::Code(0), "fine\n"));
}

#[test]
fn qemu_starts_with_only_its_own_libraries() {
    if skip() {
        return;
    }
    for program in ["/usr/bin/qemu-system-x86_64-microvm", "/usr/bin/qemu-system-x86_64"] {
        if !Path::new(program).exists() {
            println!("skipped: no {program}");
            continue;
        }
        let jail = profiles::qemu(Path::new(program)).unwrap();
        let (exit, text) = output(jail.identity(Identity::of_sandbox("x")).arg("--version"));
        assert_eq!(exit, Exit::Code(0), "{text}");
    }
}
