//! What all tests share: the programs, one data root with one image and one template, and how kapsel is called.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::thread::JoinHandle;

use kapsel_testkit::TarBuilder;
use kapsel_testkit::sandboxes::{self, DataRoot};
pub use kapsel_testkit::sandboxes::{PATIENCE, eventually};

/// The programs and the data root.
pub struct World {
    kapsel: PathBuf,
    root: DataRoot,
}

/// The world, or `None` after saying why there is none.
pub fn shared() -> Option<&'static World> {
    static WORLD: OnceLock<Result<World, String>> = OnceLock::new();
    sandboxes::made_once(&WORLD, World::make)
}

/// Gives the world to a test, or leaves the test.
macro_rules! world {
    () => {
        match crate::world::shared() {
            Some(world) => world,
            None => return,
        }
    };
}
pub(crate) use world;

impl World {
    fn make() -> Result<Self, String> {
        let kapsel = match std::env::var_os("KAPSEL_BIN_DIR") {
            Some(dir) => PathBuf::from(dir).join("kapsel"),
            None => PathBuf::from(env!("CARGO_BIN_EXE_kapsel")),
        };
        let beside = kapsel.parent().unwrap_or(Path::new("/"));
        sandboxes::need(
            beside,
            &["containerd-shim-kapsel-v2", "kapsel-fsd", "kapsel-forward", "guest/kapsel-agent"],
        )?;
        let world = World { kapsel, root: DataRoot::take()? };
        world.prepare();
        Ok(world)
    }

    /// Clears away what an earlier, killed run left, imports the image, and makes the template.
    fn prepare(&self) {
        let left = self.ok(["ps", "-aq"]);
        let left: Vec<&str> = ["rm", "-f"].into_iter().chain(left.lines()).collect();
        if left.len() > 2 {
            self.ok(left);
        }
        let tar = self.archive();
        fs::write(&tar, rootfs()).expect("an archive");
        self.ok([OsStr::new("import"), "busybox".as_ref(), tar.as_os_str(), "--cmd".as_ref(), "sh".as_ref()]);
        let built = self.command(["template", "build"]).output().expect("kapsel starts");
        assert!(built.status.success(), "no template: {}", String::from_utf8_lossy(&built.stderr));
    }

    /// kapsel with arguments, on the shared root, without a terminal and without input.
    pub fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(&self.kapsel);
        command.args(args).env("KAPSEL_ROOT", self.root()).env("KAPSEL_CONFIG", self.root.config());
        command.stdin(Stdio::null());
        command
    }

    /// Runs kapsel to its end.
    pub fn run(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
        finish(
            self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kapsel starts"),
        )
    }

    /// Runs kapsel to its end with this on standard input.
    pub fn run_with(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>, input: &[u8]) -> Ran {
        let mut command = self.command(args);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kapsel starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        std::thread::scope(|scope| {
            // A command that does not read all of it is no failure of the test.
            scope.spawn(move || drop(stdin.write_all(input)));
            finish(child)
        })
    }

    /// Runs kapsel, which must succeed, and gives what it printed.
    pub fn ok(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.text()
    }

    /// A container that runs `command` in the background under a name of the test's own; it goes with the value.
    pub fn container(&'static self, name: &'static str, flags: &[&str], command: &[&str]) -> Container {
        let _ = self.run(["rm", "-f", name]);
        let args = [&["run", "-d", "--name", name][..], flags, &["busybox"], command].concat();
        self.ok(args);
        Container { world: self, name }
    }

    /// A container of a shell that waits for signals, once it is ready for them: process 1 ignores those that it has set
    /// no trap for.
    pub fn listener(&'static self, name: &'static str, flags: &[&str], traps: &str) -> Container {
        let script = format!("{traps}; echo ready; while :; do sleep 0.1; done");
        let container = self.container(name, flags, &["sh", "-c", &script]);
        eventually("it is ready", || self.run(["logs", name]).text().contains("ready"));
        container
    }

    /// What `inspect` says of a container.
    pub fn inspect(&self, name: &str) -> serde_json::Value {
        let found: serde_json::Value = serde_json::from_str(&self.ok(["inspect", name])).expect("JSON");
        found[0].clone()
    }

    /// The data root.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// One of the programs beside kapsel.
    pub fn helper(&self, name: &str) -> PathBuf {
        self.kapsel.with_file_name(name)
    }

    /// The image as an archive.
    pub fn archive(&self) -> PathBuf {
        self.root().join("busybox.tar")
    }

    /// Where sandboxes' directories are.
    pub fn sandboxes(&self) -> PathBuf {
        self.root().join("run/sandboxes")
    }
}

/// A container in the background.
pub struct Container {
    world: &'static World,
    pub name: &'static str,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.world.run(["rm", "-f", self.name]);
    }
}

/// A kapsel that ended.
pub struct Ran {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Waits for the end of a kapsel.
pub fn finish(child: Child) -> Ran {
    let _watchdog = Watchdog::of(&child);
    let Output { status, stdout, stderr } = child.wait_with_output().expect("kapsel ends");
    let code = status.code().unwrap_or(-1);
    Ran { code, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() }
}

/// Kills a kapsel that hangs: that fails its test, and does not hold up the whole run.
pub struct Watchdog(Option<(Sender<()>, JoinHandle<()>)>);

impl Watchdog {
    /// Watches a process.
    pub fn of(child: &Child) -> Self {
        let id = child.id();
        let (done, waited) = std::sync::mpsc::channel();
        let watching = std::thread::spawn(move || {
            if waited.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                kill(id, rustix::process::Signal::KILL);
            }
        });
        Watchdog(Some((done, watching)))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some((done, watching)) = self.0.take() {
            drop(done);
            watching.join().expect("the watchdog ends");
        }
    }
}

/// Sends a signal to a process of this test.
pub fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
    let _ = rustix::process::kill_process(pid, signal);
}

/// Whether a process is there and no zombie.
pub fn lives(pid: u64) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

/// Debian's busybox with the tools that the tests use, and a user beside root.
fn rootfs() -> Vec<u8> {
    const TOOLS: &str = "sh ls cat echo true false sleep id uname env stty dd wc md5sum hostname yes head tail kill \
                         touch mkdir rm mount grep sed nproc free seq ps tty stat pwd printf ln date ip ping nc netstat \
                         wget httpd";
    let busybox = fs::read("/bin/busybox").expect("busybox-static");
    let mut tar = TarBuilder::new();
    for dir in ["bin", "dev", "etc", "home", "home/joe", "proc", "root", "run", "sys", "tmp", "usr", "var"] {
        tar = tar.dir(dir);
    }
    tar = tar.executable("bin/busybox", busybox).file("etc/notes", "not a program\n");
    for tool in TOOLS.split_whitespace() {
        tar = tar.symlink(format!("bin/{tool}"), "busybox");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\njoe:x:1000:1000:Joe:/home/joe:/bin/sh\n";
    let group = "root:x:0:\njoe:x:1000:\nusers:x:100:joe\n";
    tar.file("etc/passwd", passwd).file("etc/group", group).build()
}
