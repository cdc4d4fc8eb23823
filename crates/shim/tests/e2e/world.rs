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

use crate::cri::{Client, Nothing, StatusResponse};

/// The image that the tests run.
pub const IMAGE: &str = "docker.io/library/tiny:latest";

/// What a pod's first container runs.
pub const PAUSE: &str = "docker.io/library/pause:latest";
/// containerd's namespace for pods.
pub const PODS: &str = "k8s.io";

/// The programs and the data root.
pub struct World {
    shim: PathBuf,
    kapsel: PathBuf,
    root: DataRoot,
    dir: PathBuf,
    archive: PathBuf,
    pause: PathBuf,
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

/// Gives a containerd with the CRI plug-in, and a network of its own, to a test, or leaves the test.
macro_rules! pods {
    () => {
        match crate::world::shared() {
            Some(world) => world.engine_for_pods(),
            None => return,
        }
    };
}
pub(crate) use pods;

impl World {
    fn make() -> Result<Self, String> {
        let shim = PathBuf::from(env!("CARGO_BIN_EXE_containerd-shim-kapsel-v2"));
        let beside = shim.parent().unwrap_or(Path::new("/"));
        sandboxes::need(beside, &["kapsel", "kapsel-fsd", "guest/kapsel-agent"])?;
        for (program, package) in [
            ("/usr/bin/containerd", "containerd"),
            ("/usr/bin/ctr", "containerd"),
            ("/usr/sbin/runc", "containerd"),
            ("/usr/lib/cni/bridge", "containernetworking-plugins"),
        ] {
            if !Path::new(program).exists() {
                return Err(format!("needs {program} ({package})"));
            }
        }
        let root = DataRoot::take()?;
        let dir = PathBuf::from("/tmp/kapsel-shim-e2e");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        let layer = busybox_rootfs().ok_or("needs busybox (busybox-static)")?;
        let write = |file: &str, name: &str, config: serde_json::Value| {
            let image = ImageBuilder::new().layer(Layer::plain(layer.clone())).config(config).build();
            let archive = dir.join(file);
            fs::write(&archive, image.docker_archive(&[name])).map_err(|error| error.to_string())?;
            Ok::<_, String>(archive)
        };
        let archive = write("image.tar", IMAGE, json!({ "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"] }))?;
        let pause = json!({ "Env": ["PATH=/bin"], "Entrypoint": ["/bin/sleep", "infinity"] });
        let pause = write("pause.tar", PAUSE, pause)?;
        let world = World { kapsel: beside.join("kapsel"), shim, root, dir, archive, pause };
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
        let mut engine = self.configured("disabled_plugins = ['io.containerd.grpc.v1.cri']", "");
        engine.start();
        engine.ok(&["image", "import", "--snapshotter", SNAPSHOTTER, self.archive.to_str().expect("text")]);
        engine
    }

    /// A containerd that makes pods, in a network namespace of its own: its bridge goes with that.
    pub fn engine_for_pods(&'static self) -> Engine {
        let mut engine = self.configured("", include_str!("cri.toml"));
        let cni = engine.dir.join("cni");
        fs::create_dir(&cni).expect("a directory");
        let network = include_str!("cni.json").replace("DIR", engine.dir.to_str().expect("text"));
        fs::write(cni.join("10-test.conflist"), network).expect("a file");
        let mut holder = Command::new("unshare");
        holder.args(["--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]);
        let mut holder = holder.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("unshare starts");
        let mut up = [0; 3];
        std::io::Read::read_exact(&mut holder.stdout.take().expect("a pipe"), &mut up).expect("a network");
        engine.network = Some(holder);
        engine.start();
        for archive in [&self.archive, &self.pause] {
            let archive = archive.to_str().expect("text");
            engine.ok(&["-n", PODS, "image", "import", "--snapshotter", SNAPSHOTTER, archive]);
        }
        engine
    }

    fn configured(&'static self, top: &str, plugins: &str) -> Engine {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let dir = self.dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir_all(&dir).expect("a directory");
        let config = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\n{top}\n\
             [grpc]\naddress = '{0}/c.sock'\n[ttrpc]\naddress = '{0}/c.sock.ttrpc'\n\
             [plugins.'io.containerd.internal.v1.opt']\npath = '{0}/opt'\n{1}",
            dir.display(),
            plugins.replace("DIR", dir.to_str().expect("text")),
        );
        fs::write(dir.join("config.toml"), config).expect("a file");
        Engine { world: self, dir, containerd: None, network: None }
    }
}

/// Copies layers, and so works where the machine has no overlayfs to nest.
pub const SNAPSHOTTER: &str = "native";

/// containerd with directories of its own.
pub struct Engine {
    pub world: &'static World,
    pub dir: PathBuf,
    containerd: Option<Child>,
    /// Holds a network namespace.
    network: Option<Child>,
}

impl Engine {
    /// Starts containerd on what it left.
    pub fn start(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).expect("a log");
        let programs = self.world.shim.parent().expect("a directory").display();
        let mut command = match &self.network {
            None => Command::new("/usr/bin/containerd"),
            Some(holder) => {
                let mut command = Command::new("/usr/bin/nsenter");
                command.arg(format!("--net=/proc/{}/ns/net", holder.id())).arg("/usr/bin/containerd");
                command
            }
        };
        let child = command
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
        if self.network.is_some() {
            let ready = || {
                let status = self.cri().call::<StatusResponse>("Status", Nothing {}).ok()?.status?;
                status.conditions.iter().all(|condition| condition.met).then_some(())
            };
            eventually("the CRI plug-in is ready", || ready().is_some());
        }
    }

    /// Kills containerd; its shims stay.
    pub fn kill(&mut self) {
        if let Some(mut containerd) = self.containerd.take() {
            containerd.kill().expect("a process");
            containerd.wait().expect("a child");
        }
    }

    /// The kubelet's view.
    pub fn cri(&self) -> Client {
        Client::new(&self.dir.join("c.sock"))
    }

    /// A directory of the host's for a pod.
    pub fn volume(&self, name: &str) -> PathBuf {
        let dir = self.dir.join("volumes").join(name);
        fs::create_dir_all(&dir).expect("a directory");
        dir
    }

    /// What a script says in the network that pods are connected to.
    pub fn in_network(&self, script: &str) -> String {
        let holder = self.network.as_ref().expect("a network");
        let mut command = Command::new("/usr/bin/nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", holder.id())).args(["busybox", "sh", "-c", script]);
        let ran = finish(&mut command);
        assert_eq!(ran.code, 0, "{script}: {}", ran.stderr);
        ran.stdout.trim().to_owned()
    }

    /// The process that containerd takes for that of a pod's container.
    pub fn monitor(&self, id: &str) -> u32 {
        let list = self.ok(&["-n", PODS, "task", "ls"]);
        let line = list.lines().find(|line| line.starts_with(id)).expect("a task");
        line.split_whitespace().nth(1).expect("a process").parse().expect("a number")
    }

    /// The records of this engine's sandboxes.
    fn records(&self) -> Vec<serde_json::Value> {
        let entries = fs::read_dir(self.world.root.path().join("run/sandboxes")).expect("the sandboxes");
        let record = |entry: std::io::Result<fs::DirEntry>| {
            fs::read_to_string(entry.ok()?.path().join("sandbox.json")).ok()
        };
        let ours = self.dir.join("state").display().to_string();
        let records = entries.filter_map(record).filter(|record| record.contains(&ours));
        records.filter_map(|record| serde_json::from_str(&record).ok()).collect()
    }

    /// How many files the file servers hold open that are on no mount of theirs any more.
    pub fn held_open(&self) -> usize {
        let records = self.records();
        let servers = records.iter().filter_map(|record| record["machine"]["fsd"].as_array()).flatten();
        servers.map(|pid| held_by(&format!("/proc/{pid}"))).sum()
    }

    /// What a pod takes of the host's memory, in words: the proportional set size of its processes.
    pub fn memory(&self, pods: usize) -> String {
        let pss = |pid: &serde_json::Value| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            let kib: u64 =
                line.and_then(|kib| kib.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0);
            kib
        };
        let records = self.records();
        let mean = |of: &dyn Fn(&serde_json::Value) -> u64| {
            let all: u64 = records.iter().map(|record| of(&record["machine"])).sum();
            all as f64 / 1024.0 / pods as f64
        };
        let shim = mean(&|machine| pss(&machine["shim"]));
        let monitor = mean(&|machine| pss(&machine["monitor"]));
        let fsd = mean(&|machine| machine["fsd"].as_array().into_iter().flatten().map(pss).sum());
        format!("{:.1} MiB a pod (monitor {monitor:.1}, shim {shim:.1}, fsd {fsd:.1})", shim + monitor + fsd)
    }

    /// Milliseconds of a processor that a pod takes in a second in which nothing happens.
    pub fn idle(&self, pods: usize) -> f64 {
        const TICK_MS: f64 = 10.0;
        let taken = || -> u64 {
            let ticks = |pid: &serde_json::Value| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
                fields.split(' ').skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum::<u64>()
            };
            let of = |record: &serde_json::Value| {
                let machine = &record["machine"];
                let servers: u64 = machine["fsd"].as_array().into_iter().flatten().map(ticks).sum();
                ticks(&machine["monitor"]) + ticks(&machine["shim"]) + servers
            };
            self.records().iter().map(of).sum()
        };
        let (before, begun) = (taken(), std::time::Instant::now());
        std::thread::sleep(std::time::Duration::from_secs(20));
        (taken() - before) as f64 * TICK_MS / begun.elapsed().as_secs_f64() / pods as f64
    }

    /// A call of ctr.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/ctr");
        command.arg("--address").arg(self.dir.join("c.sock")).args(args).stdin(Stdio::null());
        command
    }

    /// `ctr events`, and the topics that it has told of so far.
    pub fn events(&self) -> (Child, impl Fn() -> Vec<String> + use<>) {
        let output = self.dir.join("events");
        let file = fs::File::create(&output).expect("a file");
        let events = self.command(&["events"]).stdout(file).stderr(Stdio::null()).spawn();
        // It says nothing until something happens.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let told = move || {
            let text = fs::read_to_string(&output).unwrap_or_default();
            let words = text.split_whitespace().filter(|word| word.starts_with("/tasks/"));
            words.map(str::to_owned).collect()
        };
        (events.expect("ctr starts"), told)
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
        self.records().len()
    }

    /// containerd's log, for messages.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for namespace in ["default", PODS] {
            for id in self.run(&["-n", namespace, "task", "ls", "-q"]).stdout.lines() {
                let _ = self.run(&["-n", namespace, "task", "rm", "--force", id]);
            }
        }
        self.kill();
        if let Some(mut holder) = self.network.take() {
            let _ = holder.kill().and_then(|()| holder.wait());
        }
    }
}

/// Of this process.
fn held_by(proc: &str) -> usize {
    let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap_or_default();
    let known: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').next()).collect();
    let files = fs::read_dir(format!("{proc}/fd")).into_iter().flatten().filter_map(Result::ok);
    let lost = |file: fs::DirEntry| {
        let number = file.file_name().into_string().ok()?;
        let path = fs::read_link(file.path()).ok()?;
        let info = fs::read_to_string(format!("{proc}/fdinfo/{number}")).ok()?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().to_owned();
        // The log is the shim's, passed in, as the standard streams and the guest's memory are.
        let passed = path.starts_with("/dev") || path.to_string_lossy().contains("memfd:");
        let ours = path.is_absolute() && !passed && number != "2";
        (ours && !known.contains(&mount.as_str())).then_some(())
    };
    files.filter_map(lost).count()
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
