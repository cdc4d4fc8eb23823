//! What is timed: each contender does the same job with its own tool.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use kapsel_benches::report::Contender;

/// How much goes through standard output in the pipe measurement.
pub const PIPE_MIB: u64 = 64;

/// The programs, the image and the bundle that the contenders share.
pub struct Workshop {
    bin: PathBuf,
    /// An OCI bundle on busybox, for runc and crun; its process is written anew by each use.
    bundle: TempDir,
}

impl Workshop {
    /// Checks that kapsel and its image are there, makes the bundle and has the template built before anything is timed.
    pub fn prepare(bin: &Path) -> Result<Self> {
        let bin = bin
            .canonicalize()
            .with_context(|| format!("no binaries in {}: run make first", bin.display()))?;
        let bundle = tempfile::tempdir()?;
        let dir = bundle.path().join("rootfs/bin");
        std::fs::create_dir_all(&dir)?;
        std::fs::copy("/bin/busybox", dir.join("busybox")).context("busybox-static is not installed")?;
        for applet in ["sh", "true", "echo", "sleep", "cat", "dd"] {
            std::os::unix::fs::symlink("busybox", dir.join(applet))?;
        }
        let workshop = Self { bin, bundle };
        finish(workshop.kapsel().args(["template", "build"]))?;
        finish(workshop.kapsel().args(["run", "--rm", "busybox", "true"]))?;
        // The template with the image's container in it is built behind that run.
        for _ in 0..240 {
            let list = workshop.kapsel().args(["template", "ls", "--json"]).output()?;
            let list: serde_json::Value = serde_json::from_slice(&list.stdout)?;
            if list.as_array().is_some_and(|all| all.iter().any(|template| !template["container"].is_null()))
            {
                return Ok(workshop);
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        bail!(
            "no template with busybox's container was built within a minute: see templates/build.log in kapsel's data"
        )
    }

    /// The `kapsel` command.
    pub fn kapsel(&self) -> Command {
        Command::new(self.bin.join("kapsel"))
    }

    /// A bundle whose process is `args`, in a folder of its own beside the shared rootfs.
    fn bundle(&self, name: &str, args: &[&str]) -> Result<PathBuf> {
        let dir = self.bundle.path().join(name);
        std::fs::create_dir_all(&dir)?;
        if !dir.join("config.json").exists() {
            finish(Command::new("runc").arg("spec").current_dir(&dir))?;
        }
        let path = dir.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        spec["process"]["args"] = args.into();
        spec["process"]["terminal"] = false.into();
        spec["root"]["path"] = self.bundle.path().join("rootfs").to_string_lossy().as_ref().into();
        std::fs::write(&path, serde_json::to_vec(&spec)?)?;
        Ok(dir)
    }

    /// As [`Self::bundle`], with a root file system of its own, which may be written.
    pub fn writable_bundle(&self, name: &str, args: &[&str]) -> Result<PathBuf> {
        let dir = self.bundle(name, args)?;
        let rootfs = dir.join("rootfs");
        finish(Command::new("cp").arg("-a").arg(self.bundle.path().join("rootfs")).arg(&rootfs))?;
        let path = dir.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        spec["root"] = serde_json::json!({ "path": rootfs, "readonly": false });
        std::fs::write(&path, serde_json::to_vec(&spec)?)?;
        Ok(dir)
    }

    /// The path of one of kapsel's programs.
    pub fn program(&self, name: &str) -> String {
        self.bin.join(name).to_string_lossy().into_owned()
    }

    /// `run true`, start to exit.
    pub fn warm(&self) -> Result<Vec<Contender>> {
        let bundle = self.bundle("true", &["true"])?;
        let bin = self.bin.clone();
        // Of a container with a read-only root no template is made: it starts from the empty one, as an image's first run does.
        let ours = [("kapsel", &[][..]), ("kapsel, empty template", &["--read-only"])];
        let mut all: Vec<_> = ours
            .into_iter()
            .map(|(name, flags)| {
                let bin = bin.clone();
                timed(name, move || {
                    let mut command = Command::new(bin.join("kapsel"));
                    command.args(["run", "--rm"]).args(flags).args(["busybox", "true"]);
                    command
                })
            })
            .collect();
        all.push(self.standby());
        all.extend(["runc", "crun"].map(|runtime| {
            let bundle = bundle.clone();
            timed(runtime, move || oci_run(runtime, &bundle))
        }));
        all.push(timed("runsc", || runsc_do(&["true"])));
        Ok(all)
    }

    /// `run true` on a machine that stands by. The next one is made before the turn of the others: they shall not share the
    /// processors with it.
    fn standby(&self) -> Contender {
        let bin = self.bin.clone();
        let kapsel = move || Command::new(bin.join("kapsel"));
        let run = move || {
            let begun = Instant::now();
            finish(kapsel().env("KAPSEL_STANDBY", "1").args(["run", "--rm", "busybox", "true"]))?;
            let took = begun.elapsed();
            for _ in 0..600 {
                let list = kapsel().args(["template", "ls", "--json"]).output()?;
                let list: serde_json::Value = serde_json::from_slice(&list.stdout)?;
                if list.as_array().is_some_and(|all| all.iter().any(|template| template["standby"] != 0)) {
                    return Ok(took);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            bail!("no machine stood by within half a minute")
        };
        Contender { name: "kapsel, standby".into(), run: Box::new(run) }
    }

    /// Cold start to the first byte of output.
    pub fn cold(&self) -> Result<Vec<Contender>> {
        let bin = self.bin.clone();
        let by_hand = ByHand::prepare(&self.kernel()?)?;
        Ok(vec![
            Contender {
                name: "kapsel --cold".into(),
                run: Box::new(move || {
                    let mut command = Command::new(bin.join("kapsel"));
                    first_line(command.args(["run", "--rm", "--cold", "busybox", "echo", MARK]))
                }),
            },
            Contender {
                name: "qemu by hand".into(),
                run: Box::new(move || first_line(&mut by_hand.command())),
            },
        ])
    }

    /// `exec true` in a container that already runs. The containers live as long as the second value.
    pub fn exec(&self) -> Result<(Vec<Contender>, Vec<Running>)> {
        let bundle = self.bundle("sleep", &["sleep", "3600"])?;
        let ours = Running::kapsel(self, "kapsel-bench-exec", &[])?;
        let bin = self.bin.clone();
        let mut all = vec![timed("kapsel", move || {
            let mut command = Command::new(bin.join("kapsel"));
            command.args(["exec", "kapsel-bench-exec", "true"]);
            command
        })];
        let mut running = vec![ours];
        for runtime in ["runc", "crun", "runsc"] {
            let id = format!("kapsel-bench-{runtime}");
            match Running::oci(runtime, &bundle, &id) {
                Ok(container) => running.push(container),
                Err(error) => {
                    eprintln!("exec: {runtime} is left out: {error:#}");
                    continue;
                }
            }
            all.push(timed(runtime, move || {
                let mut command = oci(runtime);
                command.args(["exec", &id, "/bin/true"]);
                command
            }));
        }
        Ok((all, running))
    }

    /// Zeros through standard output into a reader that counts them.
    pub fn pipe(&self) -> Result<Vec<Contender>> {
        let script = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", PIPE_MIB << 4);
        let bundle = self.bundle("pipe", &["sh", "-c", &script])?;
        let bin = self.bin.clone();
        let for_kapsel = script.clone();
        let mut all = vec![counted("kapsel", move || {
            let mut command = Command::new(bin.join("kapsel"));
            command.args(["run", "--rm", "busybox", "sh", "-c", &for_kapsel]);
            command
        })];
        all.push(counted("runc", move || oci_run("runc", &bundle)));
        all.push(counted("runsc", move || runsc_do(&["sh", "-c", &script])));
        Ok(all)
    }

    /// The guest kernel that kapsel boots here, so that QEMU by hand boots the same.
    fn kernel(&self) -> Result<PathBuf> {
        let doctor = self.kapsel().args(["doctor", "--json"]).output()?;
        let doctor: serde_json::Value =
            serde_json::from_slice(&doctor.stdout).context("kapsel doctor --json printed no JSON")?;
        let path = doctor["kernel"].as_str().context("kapsel doctor --json names no kernel")?;
        Ok(path.into())
    }
}

/// A command line of an OCI runtime; runsc cannot have a network in the host's namespace.
fn oci(runtime: &str) -> Command {
    let mut command = Command::new(runtime);
    if runtime == "runsc" {
        command.args(["--network=none", "--ignore-cgroups"]);
    }
    command
}

fn oci_run(runtime: &str, bundle: &Path) -> Command {
    let mut command = oci(runtime);
    command.arg("run").arg("--bundle").arg(bundle).arg(format!("kapsel-bench-run-{runtime}"));
    command
}

fn runsc_do(args: &[&str]) -> Command {
    let mut command = Command::new("runsc");
    command.args(["--network=none", "--ignore-cgroups", "do"]).args(args);
    command
}

/// A contender whose whole command counts, from its start to its exit.
pub fn timed(name: &str, mut command: impl FnMut() -> Command + 'static) -> Contender {
    let run = move || {
        let start = Instant::now();
        finish(&mut command())?;
        Ok(start.elapsed())
    };
    Contender { name: name.into(), run: Box::new(run) }
}

/// A contender whose standard output must be exactly `PIPE_MIB` long.
fn counted(name: &str, mut command: impl FnMut() -> Command + 'static) -> Contender {
    let run = move || {
        let start = Instant::now();
        let mut child =
            command().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut stdout = child.stdout.take().context("no pipe")?;
        let (mut total, mut buffer) = (0u64, vec![0; 1 << 16]);
        loop {
            match stdout.read(&mut buffer)? {
                0 => break,
                n => total += n as u64,
            }
        }
        ensure!(child.wait()?.success(), "the command failed");
        ensure!(total == PIPE_MIB << 20, "{total} bytes came through, not {} MiB", PIPE_MIB);
        Ok(start.elapsed())
    };
    Contender { name: name.into(), run: Box::new(run) }
}

/// Runs to the end; a failure carries what the command said on standard error.
pub fn finish(command: &mut Command) -> Result<()> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// What a cold start prints, so that firmware's and kernel's messages do not count as output.
const MARK: &str = "kapsel-bench-is-up";

/// Time until `MARK` is printed; then the command is ended.
fn first_line(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let stdout = BufReader::new(child.stdout.take().context("no pipe")?);
    let seen = stdout
        .split(b'\n')
        .map_while(Result::ok)
        .any(|l| l.windows(MARK.len()).any(|w| w == MARK.as_bytes()));
    let took = start.elapsed();
    ensure!(seen, "{command:?} ended without its first output");
    child.wait()?;
    Ok(took)
}

/// QEMU as a person types it: the same kernel, an initramfs with busybox and a script of one line.
struct ByHand {
    kernel: PathBuf,
    dir: TempDir,
}

impl ByHand {
    fn prepare(kernel: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("bin"))?;
        std::fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        let init = root.join("init");
        std::fs::write(&init, format!("#!/bin/busybox sh\necho {MARK}; exec /bin/busybox poweroff -f\n"))?;
        finish(Command::new("chmod").arg("+x").arg(&init))?;
        let mut cpio = Command::new("/bin/busybox")
            .args(["cpio", "-o", "-H", "newc"])
            .current_dir(&root)
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(dir.path().join("initramfs"))?)
            .stderr(Stdio::null())
            .spawn()?;
        cpio.stdin.take().context("no pipe")?.write_all(b"bin\nbin/busybox\ninit\n")?;
        ensure!(cpio.wait()?.success(), "cpio failed");
        Ok(Self { kernel: kernel.into(), dir })
    }

    fn command(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-machine",
                "q35",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "256",
                "-nodefaults",
                "-nographic",
            ])
            .args(["-no-reboot", "-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(self.dir.path().join("initramfs"));
        command
    }
}

/// A container that runs while others exec into it; removed when dropped.
pub struct Running {
    remove: Command,
    _child: Option<Child>,
}

impl Running {
    /// A detached, idle kapsel sandbox.
    pub fn kapsel(workshop: &Workshop, name: &str, options: &[&str]) -> Result<Self> {
        let run = ["run", "-d", "--name", name];
        finish(workshop.kapsel().args(run).args(options).args(["busybox", "sleep", "3600"]))?;
        let mut remove = workshop.kapsel();
        remove.args(["rm", "-f", name]);
        Ok(Self { remove, _child: None })
    }

    /// A container of an OCI runtime in the foreground of a process of ours.
    pub fn oci(runtime: &str, bundle: &Path, id: &str) -> Result<Self> {
        let mut command = oci(runtime);
        command.arg("run").arg("--bundle").arg(bundle).arg(id);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut remove = oci(runtime);
        remove.args(["delete", "--force", id]);
        let running = Self { remove, _child: Some(child) };
        for _ in 0..100 {
            if oci(runtime).args(["exec", id, "/bin/true"]).output()?.status.success() {
                return Ok(running);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{runtime} did not start {id} within five seconds")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = finish(&mut self.remove) {
            eprintln!("left behind: {error:#}");
        }
        if let Some(child) = &mut self._child {
            let _ = child.wait();
        }
    }
}
