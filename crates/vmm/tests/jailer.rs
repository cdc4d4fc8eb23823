//! The jailer, as root, with a monitor that only says what it sees and waits.

#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const JAILER: &str = env!("CARGO_BIN_EXE_kapsel-jailer");
const BUSYBOX: &str = "/bin/busybox";
const UID: u32 = 54321;
const GID: u32 = 54322;
/// Its shell has to be in the jail, as a monitor's kernel and disks have to.
const MONITOR: &str = "#!/busybox sh
echo \"arguments: $*\"
echo \"secret: [$SECRET]\"
echo \"root: $(/busybox ls /)\"
echo mine >/written && echo ready
echo end
exec /busybox sleep 60
";

/// Jails in a directory that goes with the test.
struct Jails {
    directory: tempfile::TempDir,
    monitor: PathBuf,
}

/// A jailer or a monitor that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Jails {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The jail's user has to get there.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let monitor = directory.path().join("kapsel-vmm");
        fs::write(&monitor, MONITOR).unwrap();
        fs::set_permissions(&monitor, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(directory.path().join("base")).unwrap();
        Jails { directory, monitor }
    }

    fn jail(&self, id: &str) -> PathBuf {
        self.directory.path().join("base/kapsel-vmm").join(id)
    }

    /// The jail's root, which its caller may prepare.
    fn prepare(&self, id: &str) -> PathBuf {
        let root = self.jail(id).join("root");
        fs::create_dir_all(&root).unwrap();
        fs::copy(BUSYBOX, root.join("busybox")).unwrap();
        root
    }

    fn command(&self, id: &str, options: &[&str]) -> Command {
        let mut command = Command::new(JAILER);
        command.args(["--id", id, "--uid", &UID.to_string(), "--gid", &GID.to_string(), "--exec-file"]);
        command.arg(&self.monitor).arg("--chroot-base-dir").arg(self.directory.path().join("base"));
        command.args(options).stdin(Stdio::null()).env("SECRET", "1");
        command
    }

    /// What the monitor says until it is ready.
    fn start(&self, id: &str, options: &[&str]) -> (Running, Vec<String>) {
        let mut child = self.command(id, options).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let running = Running(child);
        let mut lines: Vec<_> = output.lines().map(Result::unwrap).take_while(|line| line != "end").collect();
        assert_eq!(lines.pop().as_deref(), Some("ready"), "{lines:?}");
        (running, lines)
    }

    fn refused(&self, id: &str, options: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command(id, options).output().unwrap();
        assert!(!status.success(), "{id:?} {options:?} was accepted");
        String::from_utf8(stderr).unwrap()
    }
}

fn status(pid: u32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: the jailer needs root");
    }
    root
}

#[test]
fn a_monitor_has_its_root_its_user_its_devices_and_its_arguments() {
    if !is_root() {
        return;
    }
    let jails = Jails::new();
    let root = jails.prepare("one");
    let (running, lines) = jails.start("one", &["--", "--config-file", "/x y"]);
    let pid = running.0.id();
    let arguments = lines[0].strip_prefix("arguments: ").unwrap();
    assert!(arguments.starts_with("--id one --start-time-us="), "{arguments}");
    assert!(arguments.contains(" --start-time-cpu-us=") && arguments.ends_with(" --config-file /x y"));
    assert!(!arguments.contains("parent"), "{arguments}");
    assert_eq!(lines[1], "secret: []");
    assert_eq!(lines[2..], ["root: busybox", "dev", "kapsel-vmm", "kapsel-vmm.pid", "run"]);
    assert_eq!(fs::read_to_string(root.join("kapsel-vmm.pid")).unwrap(), pid.to_string());
    assert_eq!(status(pid, "Uid:"), vec![UID.to_string(); 4].join(" "));
    assert_eq!(status(pid, "Gid:"), vec![GID.to_string(); 4].join(" "));
    assert_eq!((status(pid, "Groups:").as_str(), status(pid, "NoNewPrivs:").as_str()), ("", "1"));
    assert_eq!(status(pid, "CapEff:"), "0000000000000000");
    assert_eq!(status(pid, "CapPrm:"), "0000000000000000");
    assert_ne!(
        fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap(),
        fs::read_link("/proc/self/ns/mnt").unwrap()
    );
    for (path, number) in [("kvm", (10, 232)), ("net/tun", (10, 200)), ("urandom", (1, 9))] {
        let found = root.join("dev").join(path).metadata().unwrap();
        assert!(found.file_type().is_char_device(), "{path}");
        let found_number = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
        assert_eq!((found_number, found.uid(), found.gid()), (number, UID, GID), "{path}");
    }
    let faults = Path::new("/dev/userfaultfd").metadata();
    let inside = root.join("dev/userfaultfd").metadata();
    assert_eq!(faults.map(|found| found.rdev()).ok(), inside.map(|found| found.rdev()).ok());
    // Mounts of the host are not in the jail's table.
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap().lines().count(), 1);
}

#[test]
fn limits_are_set() {
    if !is_root() {
        return;
    }
    let jails = Jails::new();
    jails.prepare("default");
    jails.prepare("asked");
    let limits = |running: &Running, name: &str| {
        let text = fs::read_to_string(format!("/proc/{}/limits", running.0.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    let (running, _) = jails.start("default", &[]);
    assert_eq!(limits(&running, "Max open files"), ["2048", "2048"]);
    let (running, _) =
        jails.start("asked", &["--resource-limit", "no-file=64", "--resource-limit", "fsize=4096"]);
    assert_eq!(limits(&running, "Max open files"), ["64", "64"]);
    assert_eq!(limits(&running, "Max file size"), ["4096", "4096"]);
}

#[test]
fn a_monitor_is_the_first_of_its_processes_and_in_a_session_of_its_own() {
    if !is_root() {
        return;
    }
    let jails = Jails::new();
    let root = jails.prepare("first");
    let mut jailer = jails.command("first", &["--new-pid-ns", "--daemonize"]).spawn().unwrap();
    assert!(jailer.wait().unwrap().success());
    let pid: u32 = fs::read_to_string(root.join("kapsel-vmm.pid")).unwrap().parse().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !root.join("written").exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (inside, session) = (status(pid, "NSpid:"), status(pid, "NSsid:"));
    let streams: Vec<_> =
        (0..3).map(|stream| fs::read_link(format!("/proc/{pid}/fd/{stream}")).unwrap()).collect();
    let process = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    assert_eq!(inside, format!("{pid} 1"));
    assert!(session.starts_with(&jailer.id().to_string()), "{session}");
    assert!(streams.iter().all(|stream| stream.ends_with("null")), "{streams:?}");
    assert_eq!(fs::read_to_string(root.join("written")).unwrap(), "mine\n");
}

#[test]
fn a_monitor_joins_a_network_namespace() {
    if !is_root() {
        return;
    }
    let jails = Jails::new();
    jails.prepare("net");
    let other = Running(Command::new("unshare").args(["-n", "sleep", "60"]).spawn().unwrap());
    let namespace = format!("/proc/{}/ns/net", other.0.id());
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::read_link(&namespace).unwrap() == own && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (running, _) = jails.start("net", &["--netns", &namespace]);
    let joined = fs::read_link(format!("/proc/{}/ns/net", running.0.id())).unwrap();
    assert!(joined == fs::read_link(&namespace).unwrap() && joined != own);
    let missing = jails.refused("net", &["--netns", "/nonexistent"]);
    assert!(missing.contains("cannot open /nonexistent"), "{missing}");
}

#[test]
fn a_monitor_is_in_cgroups_with_its_settings() {
    if !is_root() {
        return;
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let pids = mounts.lines().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        (words[2] == "cgroup" && words[3].split(',').any(|option| option == "pids"))
            .then(|| words[1].to_owned())
    });
    let v2 =
        || mounts.lines().find(|line| line.contains(" cgroup2 ")).map(|line| line.split(' ').nth(1).unwrap());
    let (version, mount) = match (pids, v2()) {
        (Some(mount), _) => ("1", mount),
        (None, Some(mount)) => ("2", mount.to_owned()),
        (None, None) => return println!("skipped: no cgroups are mounted"),
    };
    let jails = Jails::new();
    jails.prepare("grouped");
    let parent = format!("kapsel-jailer-{}", std::process::id());
    let options = ["--cgroup-version", version, "--cgroup", "pids.max=7", "--parent-cgroup"];
    let (running, _) = jails.start("grouped", &[&options[..], &[&format!("{parent}/deep")]].concat());
    let group = Path::new(&mount).join(&parent).join("deep/grouped");
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let max = fs::read_to_string(group.join("pids.max")).unwrap();
    let pid = running.0.id();
    drop(running);
    let missing = jails.refused("grouped", &["--cgroup-version", version, "--cgroup", "nothing.max=7"]);
    let file = jails.refused(
        "grouped",
        &["--cgroup-version", version, "--cgroup", "pids.nothing=7", "--parent-cgroup", &parent],
    );
    for directory in ["deep/grouped", "deep", "grouped", ""] {
        fs::remove_dir(Path::new(&mount).join(&parent).join(directory)).unwrap();
    }
    assert_eq!((processes.trim(), max.trim()), (pid.to_string().as_str(), "7"));
    assert!(missing.contains("controller nothing"), "{missing}");
    assert!(file.contains("pids.nothing"), "{file}");
}

#[test]
fn what_a_former_monitor_left_leads_nowhere() {
    if !is_root() {
        return;
    }
    let jails = Jails::new();
    let outside = jails.directory.path().join("outside");
    fs::write(&outside, "precious").unwrap();
    // Files of the jail's that are links are replaced, and directories that are links are refused.
    let root = jails.prepare("again");
    symlink(&outside, root.join("kapsel-vmm")).unwrap();
    symlink(&outside, root.join("kapsel-vmm.pid")).unwrap();
    let (running, _) = jails.start("again", &[]);
    drop(running);
    assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
    assert!(root.join("kapsel-vmm").symlink_metadata().unwrap().is_file());
    // Once more, onto all that is there.
    let (running, _) = jails.start("again", &[]);
    drop(running);
    let (target, link) = (jails.directory.path().join("target"), jails.jail("linked"));
    fs::create_dir(&target).unwrap();
    symlink(&target, &link).unwrap();
    let fault = jails.refused("linked", &[]);
    assert!(fault.contains("cannot make the jail's directory"), "{fault}");
    fs::create_dir(jails.jail("inner")).unwrap();
    symlink(&target, jails.jail("inner").join("root")).unwrap();
    assert!(jails.refused("inner", &[]).contains("something else there"));
    fs::remove_dir_all(root.join("dev")).unwrap();
    symlink("/run", root.join("dev")).unwrap();
    assert!(jails.refused("again", &[]).contains("cannot make the directory dev"));
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

#[test]
fn nonsense_is_refused_by_name() {
    if !is_root() {
        return;
    }
    let jails = Jails::new();
    for id in ["", "..", "../one", "a/b", "a_b", &"x".repeat(65)] {
        assert!(jails.refused(id, &[]).contains("1 to 64 letters"), "{id:?}");
    }
    for (options, reason) in [
        (&["--cgroup", "../../x.y=1"][..], "not a file of a cgroup's controller"),
        (&["--parent-cgroup", "../x"], "without . and .."),
        (&["--cgroup-version", "3"], "versions 1 and 2"),
        (&["--resource-limit", "stack=1"], "only fsize and no-file"),
        (&["--frobnicate"], "unexpected argument"),
    ] {
        let fault = jails.refused("one", options);
        assert!(fault.contains(reason), "{options:?}: {fault}");
    }
    let with = |exec: &Path, base: &Path| {
        let mut command = Command::new(JAILER);
        command.args(["--id", "one", "--uid", "1", "--gid", "1", "--exec-file"]).arg(exec);
        let output = command.arg("--chroot-base-dir").arg(base).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let here = jails.directory.path();
    assert!(with(Path::new("/nonexistent"), here).contains("cannot use /nonexistent as the monitor"));
    assert!(with(here, here).contains("is not a file that can be run"));
    assert!(with(&jails.monitor, Path::new("/nonexistent")).contains("cannot use /nonexistent for jails"));
    assert!(with(&jails.monitor, &jails.monitor).contains("is not a directory for jails"));
    assert_eq!(fs::read_dir(here.join("base")).unwrap().count(), 0, "nothing was made");
}
