//! What all tests share: the programs, kapsel's data root with a template, and bundles.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kapsel_testkit::sandboxes::{self, DataRoot};
pub use kapsel_testkit::sandboxes::{PATIENCE, eventually};
use rustix::process::{Pid, Signal, WaitOptions};
use serde_json::{Value, json};

/// The programs and the data root.
pub struct World {
    /// Calls kapsel-runtime on the shared data root; engines clear the environment.
    pub runtime: PathBuf,
    kapsel: PathBuf,
    root: DataRoot,
    /// For what the tests of this run make.
    pub dir: PathBuf,
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
        let runtime = PathBuf::from(env!("CARGO_BIN_EXE_kapsel-runtime"));
        let beside = runtime.parent().unwrap_or(Path::new("/"));
        let programs = ["kapsel", "containerd-shim-kapsel-v2", "kapsel-fsd", "guest/kapsel-agent"];
        sandboxes::need(beside, &programs)?;
        let root = DataRoot::take()?;
        let dir = PathBuf::from("/tmp/kapsel-runtime-e2e");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        let script = format!(
            "#!/bin/sh\nKAPSEL_ROOT={} KAPSEL_CONFIG={} exec {} \"$@\"\n",
            root.path().display(),
            root.config().display(),
            runtime.display()
        );
        let wrapper = dir.join("kapsel-runtime");
        executable(&wrapper, &script);
        let world = World { runtime: wrapper, kapsel: beside.join("kapsel"), root, dir };
        let built = world.kapsel(&["template", "build"]);
        assert_eq!(built.code, 0, "no template: {}", built.stderr);
        // Stand-ins become this process's children when the command that made them ends, as they become an engine's.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|error| error.to_string())?;
        Ok(world)
    }

    /// Runs kapsel.
    pub fn kapsel(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(&self.kapsel);
        finish(
            command.args(args).env("KAPSEL_ROOT", self.root.path()).env("KAPSEL_CONFIG", self.root.config()),
        )
    }

    /// An engine with containers of its own.
    pub fn engine(&'static self) -> Engine {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let dir = self.dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir_all(&dir).expect("a directory");
        Engine { world: self, dir }
    }

    /// How many sandboxes there are on the host of an engine's container.
    pub fn sandboxes_of(&self, container: &str) -> usize {
        let entries = fs::read_dir(self.root.path().join("run/sandboxes")).expect("the sandboxes");
        let record =
            |entry: std::io::Result<fs::DirEntry>| fs::read(entry.ok()?.path().join("sandbox.json")).ok();
        let theirs = |json: &Vec<u8>| {
            let record: Value = serde_json::from_slice(json).unwrap_or_default();
            record["labels"]["engine.id"] == container
        };
        entries.filter_map(record).filter(theirs).count()
    }
}

/// Writes a script.
pub fn executable(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
}

/// A directory of an engine: its root, its log, its bundles.
pub struct Engine {
    pub world: &'static World,
    pub dir: PathBuf,
}

impl Engine {
    /// A bundle that runs `script`, changed by `change`.
    pub fn bundle(&self, script: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let rootfs = self.dir.join("rootfs");
        fs::create_dir_all(rootfs.join("bin")).expect("a root");
        for dir in ["dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(dir)).expect("a root");
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox");
        for tool in ["sh", "cat", "echo", "sleep", "id", "stty", "tty", "touch", "ps", "pwd", "true"] {
            let _ = std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(tool));
        }
        let mut made = self.command(&["spec", "--bundle", self.dir.to_str().expect("text")]);
        let path = self.dir.join("config.json");
        if !path.exists() {
            assert_eq!(finish(&mut made).code, 0);
        }
        let mut spec: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        spec["process"]["args"] = json!(["sh", "-c", script]);
        spec["process"]["terminal"] = json!(false);
        spec["root"]["readonly"] = json!(false);
        change(&mut spec);
        fs::write(&path, spec.to_string()).expect("a specification");
        self.dir.clone()
    }

    /// A call of kapsel-runtime as an engine makes it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.world.runtime);
        command.arg("--root").arg(self.dir.join("root")).arg("--log").arg(self.dir.join("log"));
        command.args(["--log-format", "json"]).args(args).stdin(Stdio::null()).env_clear();
        command
    }

    /// Calls kapsel-runtime to its end.
    pub fn run(&self, args: &[&str]) -> Ran {
        finish(&mut self.command(args))
    }

    /// Calls kapsel-runtime, which must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        ran.stdout
    }

    /// Creates a container and gives its stand-in's number. Its output goes to a file.
    pub fn create(&self, id: &str) -> u32 {
        let pid_file = self.dir.join("pid");
        let output = File::create(self.dir.join("output")).expect("a file");
        let bundle = self.dir.to_str().expect("text");
        let args = ["create", "--bundle", bundle, "--pid-file", pid_file.to_str().expect("text"), id];
        let mut command = self.command(&args);
        command.stdout(output.try_clone().expect("a file")).stderr(output);
        let status = command.status().expect("it starts");
        assert!(status.success(), "create: {}", self.output());
        self.pid()
    }

    /// Creates and starts a container.
    pub fn start(&self, id: &str, script: &str) -> u32 {
        self.bundle(script, |_| ());
        let pid = self.create(id);
        self.ok(&["start", id]);
        pid
    }

    /// What is in the pid file.
    pub fn pid(&self) -> u32 {
        fs::read_to_string(self.dir.join("pid")).expect("a pid file").parse().expect("a number")
    }

    /// What the container wrote.
    pub fn output(&self) -> String {
        fs::read_to_string(self.dir.join("output")).expect("an output")
    }

    /// One word of `state`.
    pub fn status(&self, id: &str) -> String {
        let state: Value = serde_json::from_str(&self.ok(&["state", id])).expect("JSON");
        state["status"].as_str().expect("a status").into()
    }

    /// The last error in the log.
    pub fn logged(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let mut errors = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let last = errors.rfind(|line| line["level"] == "error");
        last.map(|line| line["msg"].as_str().unwrap_or_default().to_owned()).unwrap_or_default()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for id in self.run(&["list", "-q"]).stdout.lines() {
            let _ = self.run(&["delete", "--force", id]);
        }
    }
}

/// A program that ended.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Waits for the end of a program; `timeout` kills one that hangs, which fails its test and does not hold up the run.
pub fn finish(command: &mut Command) -> Ran {
    let mut limited = Command::new("timeout");
    limited.args(["--signal=KILL", &PATIENCE.as_secs().to_string()]).arg(command.get_program());
    limited.args(command.get_args()).env_clear().stdin(Stdio::null());
    limited.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = limited.output().expect("it starts");
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Waits for the end of a stand-in as an engine does; its exit code.
pub fn reap(pid: u32) -> i32 {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    let until = Instant::now() + PATIENCE;
    loop {
        match rustix::process::waitpid(pid, WaitOptions::NOHANG).expect("a child of this process") {
            Some((_, status)) => {
                return status
                    .exit_status()
                    .or(status.terminating_signal().map(|signal| 128 + signal))
                    .expect("an end");
            }
            None => assert!(Instant::now() < until, "the stand-in does not end"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal to a process of this test.
pub fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("a process");
}
