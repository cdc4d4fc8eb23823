//! What all tests share: the programs, kapsel's data root with a template, and a containerd each.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

pub use kapsel_testkit::sandboxes::{PATIENCE, eventually};
use kapsel_testkit::{
    ImageBuilder, Layer,
    image::busybox_rootfs,
    sandboxes::{self, DataRoot},
};
use serde_json::json;

/// The image that the tests run.
pub const IMAGE: &str = "docker.io/library/tiny:latest";

/// The programs and the data root.
pub struct World {
    shim: PathBuf,
    kapsel: PathBuf,
    root: DataRoot,
    dir: PathBuf,
    archive: PathBuf,
}

/// The world, or `None` after saying why there is none.
pub fn shared() -> Option<&'static World> {
    static WORLD: OnceLock<Result<World, String>> = OnceLock::new();
    sandboxes::made_once(&WORLD, World::make)
}

/// Gives a containerd of its own to a test, or leaves the test.
macro_rules! engine {
    () => {
        match crate::world::shared() {
            Some(world) => world.engine(),
            None => return,
        }
    };
}
pub(crate) use engine;

impl World {
    fn make() -> Result<Self, String> {
        let shim = PathBuf::from(env!("CARGO_BIN_EXE_containerd-shim-kapsel-v2"));
        let beside = shim.parent().unwrap_or(Path::new("/"));
        sandboxes::need(beside, &["kapsel", "kapsel-fsd", "guest/kapsel-agent"])?;
        for program in ["/usr/bin/containerd", "/usr/bin/ctr", "/usr/sbin/runc"] {
            if !Path::new(program).exists() {
                return Err(format!("needs {program} (containerd)"));
            }
        }
        let root = DataRoot::take()?;
        let dir = PathBuf::from("/tmp/kapsel-shim-e2e");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        let layer = busybox_rootfs().ok_or("needs busybox (busybox-static)")?;
        let config = json!({ "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"] });
        let image = ImageBuilder::new().layer(Layer::plain(layer)).config(config).build();
        let archive = dir.join("image.tar");
        fs::write(&archive, image.docker_archive(&[IMAGE])).map_err(|error| error.to_string())?;
        let world = World { kapsel: beside.join("kapsel"), shim, root, dir, archive };
        let built = world.kapsel(&["template", "build"]);
        assert_eq!(built.code, 0, "no template: {}", built.stderr);
        Ok(world)
    }

    /// Where kapsel keeps things.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Runs kapsel.
    pub fn kapsel(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(&self.kapsel);
        finish(
            command.args(args).env("KAPSEL_ROOT", self.root.path()).env("KAPSEL_CONFIG", self.root.config()),
        )
    }

    /// A containerd with the image, and without containers.
    pub fn engine(&'static self) -> Engine {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let dir = self.dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir_all(&dir).expect("a directory");
        let config = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri']\n\
             [grpc]\naddress = '{0}/c.sock'\n[ttrpc]\naddress = '{0}/c.sock.ttrpc'\n\
             [plugins.'io.containerd.internal.v1.opt']\npath = '{0}/opt'\n",
            dir.display()
        );
        fs::write(dir.join("config.toml"), config).expect("a file");
        let mut engine = Engine { world: self, dir, containerd: None };
        engine.start();
        engine.ok(&["image", "import", "--snapshotter", SNAPSHOTTER, self.archive.to_str().expect("text")]);
        engine
    }
}

/// Copies layers, and so works where the machine has no overlayfs to nest.
pub const SNAPSHOTTER: &str = "native";

/// containerd with directories of its own.
pub struct Engine {
    pub world: &'static World,
    pub dir: PathBuf,
    containerd: Option<Child>,
}

impl Engine {
    /// Starts containerd on what it left.
    pub fn start(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).expect("a log");
        let programs = self.world.shim.parent().expect("a directory").display();
        let child = Command::new("/usr/bin/containerd")
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env_clear()
            .env("PATH", format!("{programs}:/usr/sbin:/usr/bin:/sbin:/bin"))
            .env("KAPSEL_ROOT", self.world.root.path())
            .env("KAPSEL_CONFIG", self.world.root.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("containerd starts");
        self.containerd = Some(child);
        eventually("containerd answers", || self.run(&["version"]).code == 0);
    }

    /// Kills containerd; its shims stay.
    pub fn kill(&mut self) {
        if let Some(mut containerd) = self.containerd.take() {
            containerd.kill().expect("a process");
            containerd.wait().expect("a child");
        }
    }

    /// A call of ctr.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/ctr");
        command.arg("--address").arg(self.dir.join("c.sock")).args(args).stdin(Stdio::null());
        command
    }

    /// Calls ctr to its end.
    pub fn run(&self, args: &[&str]) -> Ran {
        finish(&mut self.command(args))
    }

    /// Calls ctr, which must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}\n{}", ran.stderr, self.log());
        ran.stdout
    }

    /// `ctr run` with kapsel.
    pub fn args<'a>(&self, flags: &[&'a str], id: &'a str, command: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["run", "--runtime", "io.containerd.kapsel.v2", "--snapshotter", SNAPSHOTTER];
        args.extend_from_slice(flags);
        args.extend([IMAGE, id]);
        args.extend_from_slice(command);
        args
    }

    /// A container in the background.
    pub fn detached(&self, id: &str, script: &str) {
        self.ok(&self.args(&["-d"], id, &["sh", "-c", script]));
    }

    /// What `ctr task ls` says of a container: its process and its status.
    pub fn task(&self, id: &str) -> Option<(u32, String)> {
        let list = self.ok(&["task", "ls"]);
        let line = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let found = line.into_iter().find(|line| line.first() == Some(&id))?;
        Some((found[1].parse().expect("a number"), found[2].to_owned()))
    }

    /// Waits until a container has a status.
    pub fn becomes(&self, id: &str, status: &str) {
        eventually(status, || self.task(id).is_some_and(|(_, is)| is == status));
    }

    /// Removes a container that does not run; its exit code, which ctr tells in words.
    pub fn remove(&self, id: &str) -> u32 {
        let ran = self.run(&["task", "rm", id]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        self.ok(&["container", "rm", id]);
        let code =
            ran.stderr.split_once("exit code ").map(|(_, rest)| rest.trim_matches(['\n', '"']).parse());
        code.map_or(0, |code| code.expect("a number"))
    }

    /// The processes of shims for a container of this engine.
    pub fn shims(&self) -> Vec<u32> {
        let ours = self.dir.join("c.sock").display().to_string();
        let processes = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_ours = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            let words: Vec<&str> = line.split('\0').collect();
            words.contains(&"daemon") && words.contains(&ours.as_str())
        };
        pids.filter(is_ours).collect()
    }

    /// Nothing of this engine's containers is left: no mount, no shim, no sandbox.
    pub fn nothing_is_left(&self) {
        let left = || {
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
            let ours = self.dir.join("state").display().to_string();
            let mounts = mounts.lines().filter(|line| line.contains(&ours)).count();
            let state = self.world.root.path().join("run");
            let of = |dir: &str| fs::read_dir(state.join(dir)).map_or(0, Iterator::count);
            (mounts, self.shims().len(), self.sandboxes(), of("engines"))
        };
        eventually(&format!("nothing is left, but there is {:?}", left()), || left() == (0, 0, 0, 0));
    }

    /// How many sandboxes there are for this engine's containers.
    pub fn sandboxes(&self) -> usize {
        let entries = fs::read_dir(self.world.root.path().join("run/sandboxes")).expect("the sandboxes");
        let record = |entry: std::io::Result<fs::DirEntry>| {
            fs::read_to_string(entry.ok()?.path().join("sandbox.json")).ok()
        };
        let ours = self.dir.join("state").display().to_string();
        entries.filter_map(record).filter(|record| record.contains(&ours)).count()
    }

    /// containerd's log, for messages.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for id in self.run(&["task", "ls", "-q"]).stdout.lines() {
            let _ = self.run(&["task", "rm", "--force", id]);
        }
        self.kill();
    }
}

/// A program that ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Waits for the end of a program; `timeout` kills one that hangs, which fails its test and does not hold up the run.
pub fn finish(command: &mut Command) -> Ran {
    let mut limited = Command::new("timeout");
    limited.args(["--signal=KILL", &PATIENCE.as_secs().to_string()]).arg(command.get_program());
    limited.args(command.get_args()).stdin(Stdio::null());
    limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = limited.output().expect("it starts");
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
