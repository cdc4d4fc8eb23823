//! A guest under QEMU's translator with the real agent, and a session with it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kapsel_channel::{Channel, Stream};
use kapsel_guest::{Initramfs, Kernel, KernelSource};
use kapsel_machine::{Accel, Disk, ExitReason, Identity, JailOptions, MachineSpec, Monitor, Qemu};
use kapsel_protocol::service::AgentClient;
use kapsel_protocol::stdio::{Header, Kind, Token};
use kapsel_protocol::{AGENT_PORT, STDIO_PORT, api};
use tokio::io::AsyncWriteExt;
use ttrpc::asynchronous::transport::Socket;

/// Memory of the guest.
pub const MEMORY_MIB: u32 = 384;

/// A running guest; its monitor ends with it.
pub struct Machine {
    monitor: Arc<dyn kapsel_machine::Machine>,
    session: Arc<dyn Channel>,
    pub agent: AgentClient,
    pub console: PathBuf,
    _dir: tempfile::TempDir,
}

/// Why the tests cannot run here, if so.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    if agent_binary().is_none() {
        return Some("no static agent (make builds it; KAPSEL_AGENT names another)".into());
    }
    for program in ["mkfs.erofs", "busybox"] {
        if Command::new("sh").args(["-c", &format!("command -v {program}")]).output().ok()?.stdout.is_empty()
        {
            return Some(format!("no {program}"));
        }
    }
    Qemu::find(None).err().map(|error| error.to_string())
}

fn agent_binary() -> Option<PathBuf> {
    let named = std::env::var_os("KAPSEL_AGENT").map(PathBuf::from);
    let built = Path::new(env!("CARGO_BIN_EXE_kapsel-agent")).with_file_name("guest").join("kapsel-agent");
    named.or(Some(built)).filter(|path| path.exists())
}

/// An EROFS image with busybox and a few files that the tests look at.
fn make_rootfs(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    for sub in ["bin", "etc", "proc", "sys", "dev", "tmp", "home/web", "ro"] {
        std::fs::create_dir_all(root.join(sub))?;
    }
    let busybox = Command::new("sh").args(["-c", "command -v busybox"]).output()?;
    std::fs::copy(String::from_utf8(busybox.stdout)?.trim(), root.join("bin/busybox"))?;
    let applets = Command::new("busybox").arg("--list").output()?;
    for name in String::from_utf8(applets.stdout)?.lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n",
    )?;
    std::fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1001:\nmedia:x:1005:web\n")?;
    std::fs::write(root.join("bin/not-executable"), "data")?;
    std::os::unix::fs::symlink("/../../../etc", root.join("escape"))?;
    let image = dir.join("rootfs.erofs");
    let made = Command::new("mkfs.erofs").arg(&image).arg(&root).stdout(Stdio::null()).status()?;
    anyhow::ensure!(made.success(), "mkfs.erofs failed");
    Ok(image)
}

impl Machine {
    /// Boots a guest and begins a session. Not configured yet.
    pub async fn boot() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let data = Path::new(env!("CARGO_TARGET_TMPDIR")).join("data");
        let source = match std::env::var_os("KAPSEL_KERNEL") {
            Some(path) => KernelSource::Path(path.into()),
            None => KernelSource::Debian,
        };
        let kernel = Kernel::ensure(&data, &source, &mut |_| {})?;
        let agent = agent_binary().context("no agent")?;
        let initramfs = Initramfs::build(&data, &agent, &kernel)?;
        let rootfs = make_rootfs(dir.path())?;
        let sockets = dir.path().join("m");
        std::fs::create_dir(&sockets)?;
        let console = dir.path().join("console");
        let (uid, gid) = kapsel_jail::Identity::for_sandbox("agent-test").ids();
        let spec = MachineSpec {
            name: "agent-test".into(),
            dir: sockets,
            kernel: kernel.vmlinux,
            initramfs,
            cmdline: String::new(),
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            disks: vec![Disk { serial: "rootfs".into(), path: rootfs, read_only: true }],
            shares: Vec::new(),
            nics: Vec::new(),
            accel: Accel::Tcg,
            console: Some(console.clone()),
            template: false,
            memory_dir: None,
            jail: JailOptions { identity: Identity::User { uid, gid }, cgroup: None },
        };
        let monitor = Qemu::find(None)?.boot(&spec).await?;
        let session = match monitor.connect(Duration::from_secs(60)).await {
            Ok(session) => session,
            Err(error) => {
                let end = monitor.kill().await;
                bail!(
                    "{error}; the monitor ended by {end:?}; console:\n{}",
                    std::fs::read_to_string(&console)?
                );
            }
        };
        let agent =
            AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(session.open(AGENT_PORT).await?)));
        Ok(Self { monitor, session, agent, console, _dir: dir })
    }

    /// Opens one of a process's streams.
    pub async fn stream(&self, token: Token, kind: Kind) -> Result<Stream> {
        let mut stream = self.session.open(STDIO_PORT).await?;
        stream.write_all(Header { token, kind }.to_string().as_bytes()).await?;
        Ok(stream)
    }

    /// Waits until the monitor has ended by itself.
    pub async fn ended(&self, deadline: Duration) -> Result<ExitReason> {
        tokio::time::timeout(deadline, self.monitor.wait()).await.context("the machine is still on")
    }
}

/// A new token.
pub fn token() -> Token {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Unique is enough here.
    Token::from_random(NEXT.fetch_add(1, Ordering::Relaxed).into())
}

/// A deadline for a call.
pub fn context() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(60_000_000_000)
}

/// The storages of a container's root: the image below a scratch overlay.
pub fn storages(id: &str) -> Vec<api::Storage> {
    let storage = |source: &str, fstype: &str, options: Vec<String>, at: &str| api::Storage {
        source: source.into(),
        fstype: fstype.into(),
        options,
        mount_point: format!("/run/kapsel/{id}/{at}"),
        ..Default::default()
    };
    let base = format!("/run/kapsel/{id}");
    let overlay = vec![
        format!("lowerdir={base}/lower"),
        format!("upperdir={base}/rw/upper"),
        format!("workdir={base}/rw/work"),
    ];
    vec![
        storage("blk:rootfs", "erofs", vec!["ro".into()], "lower"),
        storage("tmpfs", "tmpfs", vec![], "rw"),
        storage("overlay", "overlay", overlay, "rootfs"),
    ]
}
