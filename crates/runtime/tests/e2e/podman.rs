//! Debian's Podman, with storage of its own and one changed word: the runtime.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use serde_json::Value;

use crate::world::{Ran, World, eventually, finish, world};

/// Podman, where it is installed.
struct Podman {
    world: &'static World,
    dir: PathBuf,
}

fn podman(world: &'static World) -> Option<&'static Podman> {
    static PODMAN: OnceLock<Option<Podman>> = OnceLock::new();
    let podman = PODMAN.get_or_init(|| {
        Path::new("/usr/bin/podman").exists().then(|| {
            let podman = Podman { world, dir: world.dir.join("podman") };
            podman.import();
            podman
        })
    });
    if podman.is_none() {
        println!("skipped: needs podman");
    }
    podman.as_ref()
}

impl Podman {
    fn run(&self, args: &[&str]) -> Ran {
        self.run_by(Command::new("podman"), args)
    }

    /// `command` is Podman, or what calls it.
    fn run_by(&self, mut command: Command, args: &[&str]) -> Ran {
        // vfs: the machine may have no overlayfs to nest. Limits that the machine may not let anybody raise are kept.
        for (flag, value) in [
            ("--root", self.dir.join("storage")),
            ("--runroot", self.dir.join("run")),
            ("--tmpdir", self.dir.join("tmp")),
            ("--storage-driver", "vfs".into()),
            ("--cgroup-manager", "cgroupfs".into()),
            ("--events-backend", "file".into()),
            ("--network-config-dir", self.dir.join("networks")),
            ("--runtime", self.world.runtime.clone()),
        ] {
            command.arg(flag).arg(value);
        }
        finish(command.args(args))
    }

    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        ran.stdout
    }

    /// `podman run` of the image.
    fn image(&self, flags: &[&str], command: &[&str]) -> Ran {
        self.run(&[&["run", "--network", "none"], flags, &["busybox"], command].concat())
    }

    fn import(&self) {
        let engine = self.world.engine();
        engine.bundle("true", |_| ());
        let tar = self.world.dir.join("busybox.tar");
        let rootfs = engine.dir.join("rootfs");
        for tool in ["httpd", "wget", "ip", "ls"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(tool)).expect("a link");
        }
        fs::create_dir(rootfs.join("srv")).expect("a directory");
        fs::write(rootfs.join("srv/page"), "a page\n").expect("a file");
        let packed = Command::new("tar").arg("-C").arg(rootfs).arg("-cf").arg(&tar).arg(".").status();
        assert!(packed.expect("tar").success());
        self.ok(&["import", tar.to_str().expect("text"), "busybox"]);
    }
}

/// Removes a container with the test.
struct Named(&'static Podman, &'static str);

impl Drop for Named {
    fn drop(&mut self) {
        let _ = self.0.run(&["rm", "-f", "-t", "0", self.1]);
    }
}

#[test]
fn run() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let ran = podman.image(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "out\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("err\n"), "{}", ran.stderr);
    let missing = podman.image(&["--rm"], &["/none"]);
    assert_eq!(missing.code, 127, "{}", missing.stderr);
    let host = podman.run(&["run", "--rm", "--network", "host", "busybox", "true"]);
    assert!(host.code != 0 && host.stderr.contains("--network=host"), "{}", host.stderr);
    let volume = world.dir.join("volume");
    fs::create_dir_all(&volume).unwrap();
    let bind = format!("{}:/data", volume.display());
    let ran = podman
        .image(&["--rm", "-v", &bind, "--memory", "64m"], &["sh", "-c", "cat /etc/hostname > /data/name"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(fs::read_to_string(volume.join("name")).unwrap().trim().len(), 12);
}

#[test]
fn a_life_in_the_background() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let _named = Named(podman, "web");
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let ran = podman.image(&["-d", "--name", "web"], &["sh", "-c", script]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    eventually("it is up", || podman.run(&["logs", "web"]).stdout.contains("up"));
    let exec = podman.run(&["exec", "-e", "A=b", "web", "sh", "-c", "echo $A; exit 9"]);
    assert_eq!((exec.code, exec.stdout.as_str()), (9, "b\n"), "{}", exec.stderr);
    assert_eq!(podman.run(&["exec", "web", "/none"]).code, 127);
    podman.ok(&["pause", "web"]);
    assert!(podman.ok(&["inspect", "--format", "{{.State.Status}}", "web"]).contains("paused"));
    podman.ok(&["unpause", "web"]);
    podman.ok(&["stop", "-t", "20", "web"]);
    let state: Value = serde_json::from_str(&podman.ok(&["inspect", "web"])).unwrap();
    assert_eq!(state[0]["State"]["ExitCode"], 3, "{}", state[0]["State"]);
    // The same container again, in another sandbox.
    podman.ok(&["start", "web"]);
    podman.ok(&["kill", "web"]);
    eventually("it is killed", || podman.ok(&["ps", "-q"]).trim().is_empty());
    podman.ok(&["rm", "web"]);
}

#[test]
fn limits_volumes_and_what_is_below_a_tmpfs() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max /srv/page; \
                  echo changed > /srv/page; echo kept > /vol/file";
    let flags = ["--rm", "--memory", "128m", "--cpus", "0.5", "--pids-limit", "50", "--cpuset-cpus", "0"];
    // Podman asks for `tmpcopyup` by itself.
    let more = ["--tmpfs", "/srv", "--volume", "kapsel-e2e:/vol"];
    let ran = podman.image(&[&flags[..], &more].concat(), &["sh", "-c", script]);
    assert_eq!(ran.stdout, "134217728\n50000 100000\n50\na page\n", "{}", ran.stderr);
    let ran = podman.image(&["--rm", "--volume", "kapsel-e2e:/vol:ro"], &["cat", "/srv/page", "/vol/file"]);
    assert_eq!(ran.stdout, "a page\nkept\n", "{}", ran.stderr);
    podman.ok(&["volume", "rm", "kapsel-e2e"]);
}

#[test]
fn memory_that_runs_out_is_told() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let state = |name: &str| {
        podman
            .ok(&["inspect", "--format", "{{.State.OOMKilled}} {{.State.ExitCode}}", name])
            .trim()
            .to_owned()
    };
    let _named = (Named(podman, "greedy"), Named(podman, "modest"));
    let ran = podman.image(&["--name", "greedy", "--memory", "32m"], &["busybox", "tail", "/dev/zero"]);
    assert_eq!(ran.code, 137, "{}", ran.stderr);
    assert_eq!(state("greedy"), "true 137");
    let ran = podman.image(&["--name", "modest", "--memory", "32m"], &["sh", "-c", "exit 137"]);
    assert_eq!(state("modest"), "false 137", "{}", ran.stderr);
}

/// A network namespace in which Podman makes its bridge and its rules, so that nothing of the machine's is touched.
struct Network {
    podman: &'static Podman,
    namespace: String,
}

/// Podman's network of this test.
const NETWORK: &str = "kapsel-e2e";
const GATEWAY: &str = "10.97.41.1";
/// One that is connected later.
const LATER: &str = "kapsel-e2e-later";

impl Network {
    fn make(podman: &'static Podman) -> Self {
        let network = Self { podman, namespace: format!("kapsel-podman-{}", std::process::id()) };
        for args in [
            &["netns", "add", &network.namespace][..],
            &["-n", &network.namespace, "link", "set", "lo", "up"],
        ] {
            let made = finish(Command::new("ip").args(args));
            assert_eq!(made.code, 0, "{}", made.stderr);
        }
        let subnet = "10.97.41.0/24";
        let made = network.run(&["network", "create", "--subnet", subnet, "--disable-dns", NETWORK]);
        assert_eq!(made.code, 0, "{}", made.stderr);
        network
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg(program);
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.podman.run_by(self.command("podman"), args)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "-f", "-t", "0", "net"]);
        for name in [NETWORK, LATER] {
            let _ = self.run(&["network", "rm", "-f", name]);
            // Where the plug-in of addresses remembers them, whatever Podman is told.
            let _ = fs::remove_dir_all(Path::new("/var/lib/cni/networks").join(name));
        }
        let _ = finish(Command::new("ip").args(["netns", "delete", &self.namespace]));
    }
}

#[test]
fn its_own_network() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let network = Network::make(podman);
    let served = ["--name", "net", "--network", NETWORK, "-p", "18080:80"];
    let httpd = ["busybox", "httpd", "-f", "-h", "/srv"];
    let ran = network.run(&[&["run", "-d"], &served[..], &httpd].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let format = "{{(index .NetworkSettings.Networks \"kapsel-e2e\").IPAddress}}";
    let address = podman.ok(&["inspect", "--format", format, "net"]).trim().to_owned();
    let inside = podman.ok(&["exec", "net", "ip", "-4", "addr", "show", "eth0"]);
    assert!(inside.contains(&format!("inet {address}/24")), "{inside}");
    let published = format!("http://{GATEWAY}:18080/page");
    eventually("the published port answers", || {
        let ran = finish(network.command("/bin/busybox").args(["wget", "-qO-", &published]));
        ran.stdout == "a page\n"
    });
    let page = format!("http://{address}/page");
    let ran = network.run(&["run", "--rm", "--network", NETWORK, "busybox", "wget", "-qO-", &page]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "a page\n"), "{}", ran.stderr);
    // Another network comes and goes while it runs.
    let ran = network.run(&["network", "create", "--subnet", "10.97.42.0/24", "--disable-dns", LATER]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let has_it = || podman.ok(&["exec", "net", "ip", "-4", "addr"]).contains("inet 10.97.42.");
    for (verb, expected) in [("connect", true), ("disconnect", false)] {
        let ran = network.run(&["network", verb, LATER, "net"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        eventually(verb, || has_it() == expected);
    }
    // What the sandbox takes of the host, since its processes are in Podman's cgroup.
    let stats: Value =
        serde_json::from_str(&podman.ok(&["stats", "--no-stream", "--format", "json", "net"])).unwrap();
    let usage = stats[0]["mem_usage"].as_str().unwrap_or_default();
    assert!(usage.contains("MB /"), "{stats}");
    podman.ok(&["pause", "net"]);
    let paused = finish(network.command("/bin/busybox").args(["wget", "-T", "2", "-qO-", &published]));
    assert_ne!(paused.code, 0, "a frozen server has answered");
    podman.ok(&["unpause", "net"]);
    let ran = network.run(&["stop", "-t", "0", "net"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let gone = finish(network.command("/bin/busybox").args(["wget", "-T", "2", "-qO-", &published]));
    assert_ne!(gone.code, 0, "nobody is there any more");
}
