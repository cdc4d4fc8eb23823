//! Debian's Docker 20.10: a daemon of the test's own, with storage, socket and network namespace of its own.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::Signal;

use crate::world::{Ran, World, eventually, executable, finish, kill, world};

/// Debian's programs, whatever else the machine has.
const DAEMON: &str = "/usr/sbin/dockerd";
const CLIENT: &str = "/usr/bin/docker";
/// Where its bridge is, so that nothing of the machine's is touched.
const NAMESPACE: &str = "kapsel-docker-e2e";

/// A daemon, ended with the test.
struct Docker {
    dir: PathBuf,
    daemon: Child,
}

impl Docker {
    fn start(world: &World) -> Option<Self> {
        if !Path::new(DAEMON).exists() || !Path::new(CLIENT).exists() {
            println!("skipped: needs docker.io");
            return None;
        }
        let dir = world.dir.join("docker");
        fs::create_dir_all(&dir).expect("a directory");
        remove_namespace();
        let made = finish(Command::new("ip").args(["netns", "add", NAMESPACE]));
        assert_eq!(made.code, 0, "{}", made.stderr);
        let config = format!(r#"{{"runtimes": {{"kapsel": {{"path": "{}"}}}}}}"#, world.runtime.display());
        fs::write(dir.join("daemon.json"), config).expect("a file");
        let log = File::create(dir.join("log")).expect("a file");
        let mut daemon = Command::new("nsenter");
        // Mounts of its own too: it leaves some when it ends.
        daemon.arg(format!("--net=/run/netns/{NAMESPACE}")).args(["unshare", "--mount", DAEMON]).env_clear();
        daemon.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        for (flag, value) in [
            ("--config-file", dir.join("daemon.json")),
            ("--data-root", dir.join("data")),
            ("--exec-root", dir.join("exec")),
            ("--pidfile", dir.join("pid")),
            ("--default-runtime", "kapsel".into()),
            // vfs: the machine may have no overlayfs to nest.
            ("--storage-driver", "vfs".into()),
        ] {
            daemon.arg(flag).arg(value);
        }
        daemon.arg("--host").arg(format!("unix://{}", dir.join("sock").display()));
        daemon.args(["--iptables=false", "--ip-masq=false"]);
        daemon.stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        let docker = Docker { daemon: daemon.spawn().expect("nsenter"), dir };
        eventually("the daemon answers", || docker.run(&["version"]).code == 0);
        Some(docker)
    }

    fn run(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(CLIENT);
        command.arg("--host").arg(format!("unix://{}", self.dir.join("sock").display()));
        finish(command.args(args).env("HOME", &self.dir))
    }

    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        ran.stdout
    }

    /// What a script in a new container prints.
    fn says(&self, flags: &[&str], script: &str) -> String {
        self.ok(&[&["run", "--rm"], flags, &["busybox", "sh", "-c", script]].concat())
    }

    fn import(&self, world: &'static World) {
        let engine = world.engine();
        engine.bundle("true", |_| ());
        let rootfs = engine.dir.join("rootfs");
        for tool in ["ls", "ip", "head", "httpd", "wget", "grep"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(tool)).expect("a link");
        }
        let tar = self.dir.join("busybox.tar");
        let packed = Command::new("tar").arg("-C").arg(rootfs).arg("-cf").arg(&tar).arg(".").status();
        assert!(packed.expect("tar").success());
        self.ok(&["import", tar.to_str().expect("text"), "busybox"]);
    }
}

impl Drop for Docker {
    /// The daemon ends its containers, and its containerd.
    fn drop(&mut self) {
        for id in self.run(&["ps", "-aq"]).stdout.lines() {
            let _ = self.run(&["rm", "-f", id]);
        }
        kill(self.daemon.id(), Signal::TERM);
        let _ = self.daemon.wait();
        remove_namespace();
    }
}

/// Also what a killed run has left.
fn remove_namespace() {
    let _ = finish(Command::new("ip").args(["netns", "delete", NAMESPACE]));
}

/// One test, since a daemon takes longer to start than what is done with it.
#[test]
fn docker() {
    let world = world!();
    let Some(docker) = Docker::start(world) else { return };
    docker.import(world);
    exit_codes(&docker);
    what_containers_get(&docker);
    a_life_in_the_background(&docker);
    containers_reach_each_other(&docker);
    an_image_is_built(&docker);
    a_terminal(&docker);
}

fn exit_codes(docker: &Docker) {
    let ran = docker.run(&["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "out\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("err\n"), "{}", ran.stderr);
    assert_eq!(docker.run(&["run", "--rm", "busybox", "/none"]).code, 127);
    assert_eq!(docker.run(&["run", "--rm", "busybox", "/etc"]).code, 126);
    for (flags, words) in [(["--network", "host"], "--network=host"), (["--pid", "host"], "--pid=host")] {
        let ran = docker.run(&[&["run", "--rm"], &flags[..], &["busybox", "true"]].concat());
        assert!(ran.code == 125 && ran.stderr.contains(words), "{flags:?}: {} {}", ran.code, ran.stderr);
    }
}

fn what_containers_get(docker: &Docker) {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    assert_ne!(docker.says(&[], "cat /proc/sys/kernel/osrelease"), host, "a kernel of its own");
    let volume = docker.dir.join("volume");
    fs::create_dir_all(&volume).expect("a directory");
    let bind = format!("{}:/data", volume.display());
    docker.says(&["-v", &bind], "cat /etc/hostname > /data/name");
    assert_eq!(fs::read_to_string(volume.join("name")).expect("a file").trim().len(), 12);
    let flags = ["--read-only", "--tmpfs", "/scratch:size=1m"];
    let script = "touch /held 2>/dev/null || echo held; touch /scratch/x; ls /scratch";
    assert_eq!(docker.says(&flags, script), "held\nx\n");
    let flags = ["--memory", "64m", "--cpus", "0.5", "--pids-limit", "50"];
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    assert_eq!(docker.says(&flags, script), "67108864\n50000 100000\n50\n");
    let first = "head -c 17 /proc/1/cmdline | grep -c docker-init";
    assert_eq!(docker.says(&["--init"], first).trim(), "1");
    assert_eq!(
        docker.says(&["-e", "A=b", "-u", "7:8", "-w", "/tmp"], "echo $A; id -u; id -g; pwd"),
        "b\n7\n8\n/tmp\n"
    );
}

fn a_life_in_the_background(docker: &Docker) {
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    docker.ok(&["run", "-d", "--name", "web", "busybox", "sh", "-c", script]);
    eventually("it is up", || docker.run(&["logs", "web"]).stdout.contains("up"));
    let exec = docker.run(&["exec", "-e", "A=b", "web", "sh", "-c", "echo $A; exit 9"]);
    assert_eq!((exec.code, exec.stdout.as_str()), (9, "b\n"), "{}", exec.stderr);
    let missing = docker.run(&["exec", "web", "/none"]);
    // The client prints the daemon's answer as if it were output.
    assert!(missing.code == 126 && missing.stdout.contains("/none"), "{} {}", missing.stdout, missing.stderr);
    docker.ok(&["pause", "web"]);
    assert!(docker.ok(&["ps"]).contains("(Paused)"));
    docker.ok(&["unpause", "web"]);
    let file = docker.dir.join("copied");
    fs::write(&file, "copied\n").expect("a file");
    docker.ok(&["cp", file.to_str().expect("text"), "web:/copied"]);
    assert_eq!(docker.ok(&["exec", "web", "cat", "/copied"]), "copied\n");
    docker.ok(&["update", "--pids-limit", "77", "web"]);
    assert_eq!(docker.ok(&["exec", "web", "cat", "/sys/fs/cgroup/pids.max"]), "77\n");
    assert!(docker.ok(&["top", "web"]).contains("stand-in"), "the process that is waited for");
    docker.ok(&["stop", "-t", "20", "web"]);
    assert_eq!(docker.ok(&["inspect", "-f", "{{.State.ExitCode}}", "web"]), "3\n");
    // The same container again, in another sandbox.
    docker.ok(&["start", "web"]);
    docker.ok(&["kill", "web"]);
    eventually("it is killed", || docker.ok(&["ps", "-q"]).trim().is_empty());
    assert_eq!(docker.ok(&["inspect", "-f", "{{.State.ExitCode}}", "web"]), "137\n");
    docker.ok(&["rm", "web"]);
}

/// By the daemon's bridge, and from where the daemon is by a published port.
fn containers_reach_each_other(docker: &Docker) {
    let script = "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp";
    docker.ok(&["run", "-d", "--name", "server", "-p", "127.0.0.1:8080:80", "busybox", "sh", "-c", script]);
    let address = docker.ok(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "server"]);
    let script = format!(
        "for n in 1 2 3 4 5 6 7 8 9; do wget -q -O - http://{}/ && exit; sleep 1; done",
        address.trim()
    );
    assert_eq!(docker.says(&[], &script), "hello\n");
    let mut client = Command::new("nsenter");
    client.arg(format!("--net=/run/netns/{NAMESPACE}"));
    client.args(["/bin/busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"]);
    assert_eq!(finish(&mut client).stdout, "hello\n");
    docker.ok(&["rm", "-f", "server"]);
}

fn an_image_is_built(docker: &Docker) {
    let context = docker.dir.join("context");
    fs::create_dir_all(&context).expect("a directory");
    let text = "FROM busybox\nRUN echo made > /made\nCMD [\"cat\", \"/made\"]\n";
    fs::write(context.join("Dockerfile"), text).expect("a file");
    docker.ok(&["build", "-t", "built", context.to_str().expect("text")]);
    assert_eq!(docker.ok(&["run", "--rm", "built"]), "made\n");
}

/// `script` gives the client the terminal that `-it` wants.
fn a_terminal(docker: &Docker) {
    let program = docker.dir.join("terminal");
    let socket = docker.dir.join("sock");
    let line = format!("{CLIENT} -H unix://{} run --rm -it busybox sh -c 'tty; exit 6'", socket.display());
    executable(&program, &format!("#!/bin/sh\n{line}\n"));
    let ran =
        finish(Command::new("script").args(["-qec"]).arg(&program).arg("/dev/null").env("HOME", &docker.dir));
    assert_eq!(ran.code, 6, "{} {}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("/dev/pts/"), "{}", ran.stdout);
}
