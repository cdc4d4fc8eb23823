//! How jailed children live and end: with their parent, with their namespace, in their cgroup, and without a trace.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use kapsel_jail::cgroup::{self, Limits, Named};
use kapsel_jail::{Cgroup, Exit, Identity, Jail};
use support::{BUSYBOX, applet, eventually, exists, output, script, skip, sleeper, status};

/// This test program again, to run one of the ignored tests below in a process of its own.
fn again(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).stdout(Stdio::piped());
    command
}

#[test]
fn it_dies_with_its_parent() {
    if skip() {
        return;
    }
    let mut parent = again("a_parent").spawn().unwrap();
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let pids: Vec<u32> =
        lines.map_while(Result::ok).filter_map(|l| l.strip_prefix("child ")?.parse().ok()).take(3).collect();
    assert_eq!(pids.len(), 3);
    assert!(pids.iter().all(|pid| exists(*pid)));
    // SIGKILL, upon which nothing in the parent runs any more.
    parent.kill().unwrap();
    parent.wait().unwrap();
    for pid in pids {
        eventually("the child is gone", || !exists(pid));
    }
}

/// Starts one child of each kind and is killed: by the test above.
#[test]
#[ignore = "part of it_dies_with_its_parent"]
fn a_parent() {
    let caps = kapsel_jail::CapSet::of(&[kapsel_jail::Cap::DacReadSearch]);
    let children = [
        sleeper(|jail| jail.identity(Identity::of_sandbox("p"))),
        sleeper(|jail| jail.identity(Identity::of_sandbox("p")).capabilities(caps)),
        sleeper(|jail| jail.identity(Identity::Ids { uid: 0, gid: 0 }).capabilities(caps)),
    ];
    for child in &children {
        println!("child {}", child.pid());
    }
    std::thread::sleep(Duration::from_secs(100));
}

#[test]
fn it_outlives_the_thread_that_asked_for_it() {
    if skip() {
        return;
    }
    let mut child = std::thread::spawn(|| sleeper(|jail| jail)).join().unwrap();
    assert_eq!(child.wait_timeout(Duration::from_millis(300)).unwrap(), None);
}

#[test]
fn dropping_it_kills_and_reaps() {
    if skip() {
        return;
    }
    let child = sleeper(|jail| jail);
    let pid = child.pid();
    drop(child);
    assert!(!exists(pid), "not even a zombie");
}

#[test]
fn its_end_is_reported() {
    if skip() {
        return;
    }
    assert_eq!(output(script("exit 7")).0, Exit::Code(7));
    let mut child = sleeper(|jail| jail);
    assert_eq!(child.try_wait().unwrap(), None);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    // Asked again it says the same, and signalling what is gone is no error.
    assert_eq!(child.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    child.kill().unwrap();
}

#[test]
fn many_at_once_from_many_threads() {
    if skip() {
        return;
    }
    let threads: Vec<_> = (0..8)
        .map(|n| {
            std::thread::spawn(move || {
                for _ in 0..5 {
                    assert_eq!(output(script(&format!("exit {n}"))).0, Exit::Code(n));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

/// A cgroup that is removed at the end of its test, also of a failing one.
struct Temporary(Cgroup);

impl Temporary {
    fn new(name: &str, limits: &Limits) -> Option<Temporary> {
        let id = format!("test-{name}-{}", std::process::id());
        let cgroup = Cgroup::create(&id, limits).unwrap();
        if cgroup.is_none() {
            println!("skipped: {:?}", cgroup::obstacles());
        }
        cgroup.map(Temporary)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = self.0.remove(Duration::from_secs(5));
    }
}

#[test]
fn it_runs_inside_its_cgroup() {
    if skip() {
        return;
    }
    let limits = Limits { memory: Some(64 << 20), cpu: Some(0.5), pids: Some(10), ..Limits::default() };
    let Some(Temporary(cgroup)) = &Temporary::new("inside", &limits) else { return };
    assert_eq!(cgroup.unenforced(), [] as [&str; 0]);
    let id = format!("test-inside-{}", std::process::id());
    assert!(cgroup::list().contains(&id));
    assert!(Cgroup::create(&id, &limits).is_err(), "it exists");
    // A second process in it, to see that both go.
    let mut child = script("/bin/busybox sleep 1000 & /bin/busybox sleep 1000")
        .device("/dev/null")
        .cgroup(cgroup)
        .spawn()
        .unwrap();
    eventually("both are inside", || cgroup.processes().len() >= 2);
    assert!(cgroup.processes().contains(&child.pid()));
    let of_child = fs::read_to_string(format!("/proc/{}/cgroup", child.pid())).unwrap();
    assert!(of_child.contains(&format!("/kapsel/{id}")), "{of_child}");
    // The first process's end is the end of all in its pid namespace.
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("all are gone", || cgroup.processes().is_empty());
    cgroup.remove(Duration::from_secs(5)).unwrap();
    assert!(!cgroup::list().contains(&id));
    assert!(Cgroup::open(&id).unwrap().is_none());
    cgroup.remove(Duration::ZERO).unwrap();
}

#[test]
fn what_a_dead_owner_left_can_be_cleaned_up() {
    if skip() {
        return;
    }
    let Some(temporary) = Temporary::new("left", &Limits::default()) else { return };
    let id = format!("test-left-{}", std::process::id());
    let mut child = sleeper(|jail| jail.cgroup(&temporary.0));
    let found = Cgroup::open(&id).unwrap().unwrap();
    found.remove(Duration::from_secs(5)).unwrap();
    assert_eq!(child.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    assert!(!cgroup::list().contains(&id));
}

#[test]
fn a_named_one_is_entered_limited_and_removed() {
    if skip() {
        return;
    }
    let name = format!("/kapsel-test-{}/a/b", std::process::id());
    let named: Named = name.parse().unwrap();
    let program = std::env::current_exe().unwrap();
    let mut inside = Command::new(program);
    inside
        .args(["--exact", "within_a_named_one", "--ignored", "--nocapture"])
        .env("KAPSEL_TEST_CGROUP", &name);
    let done = inside.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    named.remove(Duration::from_secs(5)).unwrap();
    assert!(named.open().is_none());
    for parent in ["a", ""] {
        let parent: Named =
            format!("kapsel-test-{}/{parent}", std::process::id()).trim_end_matches('/').parse().unwrap();
        parent.remove(Duration::ZERO).unwrap();
    }
    assert!(done.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "part of a_named_one_is_entered_limited_and_removed"]
fn within_a_named_one() {
    let name = std::env::var("KAPSEL_TEST_CGROUP").unwrap();
    let named: Named = name.parse().unwrap();
    named.enter_new().unwrap();
    // On version 1 it is the thread that moves; `kapsel-runtime` has one.
    let inside = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
    let places = inside.lines().filter(|line| line.ends_with(&name)).count();
    assert!(places > 0, "{inside}");
    let limits = Limits {
        memory: Some(256 << 20),
        cpu: Some(0.5),
        shares: Some(512),
        cpus: Some("0".into()),
        pids: Some(100),
        ..Limits::default()
    };
    let cgroup = named.limited(&limits).unwrap().unwrap();
    assert_eq!(cgroup.unenforced(), [] as [&str; 0]);
    assert!(!cgroup.remove_empty(Duration::ZERO), "this process is in it");
    // What is started is in it too, and another container is not let in.
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let again = named.enter_new().unwrap_err().to_string();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(again.contains("processes are in it"), "{again}");
}

#[test]
fn the_memory_limit_holds() {
    if skip() {
        return;
    }
    let limits = Limits { memory: Some(24 << 20), ..Limits::default() };
    let Some(temporary) = Temporary::new("memory", &limits) else { return };
    if !temporary.0.unenforced().is_empty() {
        println!("skipped: no memory controller");
        return;
    }
    // `tail` keeps its input until it has seen a line's end, and there is none.
    let mut child = applet(&["tail", "/dev/zero"]).device("/dev/zero").cgroup(&temporary.0).spawn().unwrap();
    let exit = child.wait_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(exit, Some(Exit::Signal(libc::SIGKILL)));
    assert!(temporary.0.oom_kills() > 0);
}

#[test]
fn the_process_limit_holds() {
    if skip() {
        return;
    }
    let limits = Limits { pids: Some(5), ..Limits::default() };
    let Some(temporary) = Temporary::new("pids", &limits) else { return };
    // The subshell ends when it cannot fork any more, and the first process stays.
    let bomb = "(i=0; while [ $i -lt 50 ]; do /bin/busybox sleep 1000 & i=$((i+1)); done); exec /bin/busybox sleep 1000";
    let mut child = script(bomb).device("/dev/null").cgroup(&temporary.0).spawn().unwrap();
    eventually("the limit is near", || temporary.0.processes().len() >= 4);
    std::thread::sleep(Duration::from_millis(200));
    assert!((4..=5).contains(&temporary.0.processes().len()), "{:?}", temporary.0.processes());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn it_works_without_root() {
    if skip() {
        return;
    }
    // Nobody may not be able to read where this program is.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    let mine = dir.path().join("mine");
    fs::create_dir(&mine).unwrap();
    std::os::unix::fs::chown(&mine, Some(65534), Some(65534)).unwrap();
    let done = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&copy)
        .args(["--exact", "as_nobody", "--ignored", "--nocapture"])
        .env("KAPSEL_TEST_DIR", &mine)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    if text.contains("skipped:") {
        println!("{text}");
        return;
    }
    assert!(done.status.success() && text.contains("1 passed"), "{text}");
    assert_eq!(fs::read_to_string(mine.join("file")).unwrap(), "mine\n");
}

#[test]
#[ignore = "part of it_works_without_root"]
fn as_nobody() {
    let dir = std::env::var("KAPSEL_TEST_DIR").unwrap();
    let jail = |jail: Jail| {
        jail.bind_rw(&dir, "/mine").tmpfs("/tmp", 1 << 20).device("/dev/null").own_descriptors("/fd")
    };
    let text = "/bin/busybox id -u; echo mine > /mine/file && echo t > /tmp/t && echo n > /dev/null && \
                [ -e /fd/1 ] && /bin/busybox hostname x || echo denied";
    let spawned = jail(script(text)).spawn();
    if let Err(kapsel_jail::Error::Clone { source, .. }) = &spawned {
        println!("skipped: no unprivileged user namespaces here: {source}");
        return;
    }
    drop(spawned);
    let (exit, text) = output(jail(script(text)));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        (exit, lines.first(), lines.last()),
        (Exit::Code(0), Some(&"65534"), Some(&"denied")),
        "{text}"
    );
    let child = sleeper(|j| jail(j).bind_exec(BUSYBOX, "/again"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(child.pid(), set), "0000000000000000", "{set}");
    }
    let namespace = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    // Looking into the child's takes a right over it that its user namespace denies; being denied is proof enough.
    for kind in ["user", "net", "pid", "mnt"] {
        let child = namespace(&child.pid().to_string(), kind);
        assert!(child.is_err() || child.unwrap() != namespace("self", kind).unwrap(), "{kind}");
    }
    // Without root and a delegated subtree there is no cgroup, and a reason.
    match Cgroup::create("nobody", &Limits::default()).unwrap() {
        None => assert!(!cgroup::obstacles().is_empty()),
        Some(cgroup) => cgroup.remove(Duration::from_secs(1)).unwrap(),
    }
    let other = applet(&["true"]).identity(Identity::Ids { uid: 1, gid: 1 }).spawn().unwrap_err();
    assert!(other.to_string().contains("only root"), "{other}");
}
