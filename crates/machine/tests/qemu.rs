//! Machines under QEMU: boot, channel, save and restore, and every way to end.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use kapsel_channel::Channel;
use kapsel_guest::{Initramfs, Kernel, KernelSource};
use kapsel_machine::{
    Accel, Attachment, Disk, Error, ExitReason, Identity, JailOptions, Machine, MachineSpec, Monitor, Qemu,
    Share, Snapshot,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Generous: two processors are shared with everything else that CI does.
const BOOT: Duration = Duration::from_secs(60);

const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Where cargo put this test: what it builds for the test goes there too, wherever the environment points from here.
fn target_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

/// Kernel and initramfs, or why there are none.
static GUEST: LazyLock<Result<Guest, String>> = LazyLock::new(|| {
    if !rustix::process::geteuid().is_root() {
        return Err("the monitor's jail needs root here".into());
    }
    Qemu::find(None).map_err(|error| error.to_string())?;
    let data = Path::new(env!("CARGO_TARGET_TMPDIR")).join("data");
    let source = std::env::var_os("KAPSEL_KERNEL")
        .map_or(KernelSource::Debian, |path| KernelSource::Path(path.into()));
    let kernel = Kernel::ensure(&data, &source, &mut |_| {}).map_err(|error| error.to_string())?;
    // For a target of its own: `cargo test` makes examples too, dynamic ones, where it would look for this one.
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--profile", "guest", "--target", GUEST_TARGET])
        .args(["--package", "kapsel-machine", "--example", "guest-agent", "--target-dir"])
        .arg(target_dir())
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .status();
    assert!(status.is_ok_and(|status| status.success()), "the guest's agent builds");
    let agent = target_dir().join(GUEST_TARGET).join("guest/examples/guest-agent");
    let initramfs = Initramfs::build(&data, &agent, &kernel).map_err(|error| error.to_string())?;
    Ok(Guest { kernel: kernel.vmlinux, initramfs })
});

macro_rules! guest {
    () => {
        match &*GUEST {
            Ok(guest) => guest,
            Err(why) => return println!("skipped: {why}"),
        }
    };
}

fn spec(guest: &Guest, dir: &Path) -> MachineSpec {
    let dir = dir.join("m");
    fs::create_dir_all(&dir).unwrap();
    MachineSpec {
        name: "test".into(),
        dir,
        kernel: guest.kernel.clone(),
        initramfs: guest.initramfs.clone(),
        cmdline: String::new(),
        vcpus: 1,
        memory_mib: 256,
        disks: Vec::new(),
        shares: Vec::new(),
        nics: Vec::new(),
        accel: Accel::Tcg,
        console: None,
        template: false,
        memory_dir: None,
        jail: JailOptions {
            identity: Identity::User { uid: 1_900_000_000, gid: 1_900_000_000 },
            cgroup: None,
        },
    }
}

fn disk(dir: &Path, name: &str, serial: &str, text: &str, read_only: bool) -> Disk {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    Disk { serial: serial.into(), path, read_only }
}

fn clone_disks(dir: &Path, n: usize) -> Vec<Disk> {
    vec![disk(dir, "a", "rootfs", &format!("disk of clone  {n}"), true), disk(dir, "s", "scratch", "", false)]
}

/// A file server for `source`, jailed as always, and the connection to it.
fn serve(source: &Path, dir: &Path) -> (kapsel_jail::Child, Share) {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        let build = ["build", "--quiet", "--release", "--package", "kapsel-fsd", "--target-dir"];
        assert!(
            Command::new(env!("CARGO"))
                .args(build)
                .arg(target_dir())
                .status()
                .is_ok_and(|status| status.success())
        );
        target_dir().join("release/kapsel-fsd")
    });
    let path = dir.join("fsd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let connection = UnixStream::connect(&path).unwrap();
    let share = kapsel_jail::profiles::Share {
        sources: &[source.into()],
        read_only: true,
        follow: false,
        tag: Some("tag0"),
    };
    let server = kapsel_jail::profiles::fsd(&BUILT, share, listener.into(), "test").unwrap().spawn().unwrap();
    (server, Share { tag: "tag0".into(), socket: Arc::new(connection.into()) })
}

async fn ask(channel: &Arc<dyn Channel>, line: &str) -> String {
    let mut stream = channel.open(2).await.unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(BOOT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

async fn boot(spec: &MachineSpec) -> (Arc<dyn Machine>, Arc<dyn Channel>) {
    let machine = Qemu::find(None).unwrap().boot(spec).await.unwrap();
    let channel = machine.connect(BOOT).await.unwrap();
    (machine, channel)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_boots_echoes_and_shuts_down() {
    let guest = guest!();
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(guest, dir.path());
    spec.vcpus = 2;
    spec.console = Some(dir.path().join("console.log"));
    spec.disks = vec![disk(dir.path(), "a", "rootfs", "contents of disk", true)];
    let (machine, channel) = boot(&spec).await;
    println!("{:?}", machine.phases());
    assert_eq!(ask(&channel, "processors").await.trim(), "0-1");
    assert_eq!(ask(&channel, "disk rootfs").await, "contents of disk");

    let mut stream = channel.open(1).await.unwrap();
    let payload: Vec<u8> = (0..8_000_000u32).map(|n| (n % 253) as u8).collect();
    let (mut from, mut to) = tokio::io::split(&mut stream);
    let mut echoed = Vec::new();
    let begun = std::time::Instant::now();
    tokio::join!(
        async {
            to.write_all(&payload).await.unwrap();
            to.shutdown().await.unwrap();
        },
        async { from.read_to_end(&mut echoed).await.unwrap() },
    );
    println!("echo: {:.1} MB/s each way", 8.0 / begun.elapsed().as_secs_f64());
    assert!(echoed == payload);

    let stats = machine.stats().await.unwrap();
    assert_eq!(stats.guest_memory, 256 << 20);
    assert!(stats.rss > 32 << 20 && stats.pss <= stats.rss, "{stats:?}");

    machine.pause().await.unwrap();
    let mut stream = channel.open(2).await.unwrap();
    stream.write_all(b"processors\n").await.unwrap();
    let mut byte = [0];
    assert!(tokio::time::timeout(Duration::from_millis(300), stream.read(&mut byte)).await.is_err());
    machine.resume().await.unwrap();
    assert_eq!(tokio::time::timeout(BOOT, stream.read(&mut byte)).await.unwrap().unwrap(), 1);

    let off = channel.open(2).await.unwrap();
    let mut off = off;
    off.write_all(b"off\n").await.unwrap();
    let pid = machine.pid();
    assert_eq!(tokio::time::timeout(BOOT, machine.wait()).await.unwrap(), ExitReason::Shutdown);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(fs::read_to_string(dir.path().join("console.log")).unwrap().contains("AGENT-UP"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_gives_clones_with_disks_of_their_own() {
    let guest = guest!();
    let dir = tempfile::tempdir().unwrap();
    let template_dir = dir.path().join("template");
    fs::create_dir(&template_dir).unwrap();
    let mut template = spec(guest, dir.path());
    template.template = true;
    template.memory_dir = Some(template_dir.clone());
    template.disks = vec![
        disk(dir.path(), "a", "rootfs", "template's bytes", true),
        disk(dir.path(), "s", "scratch", "", false),
    ];
    let (machine, channel) = boot(&template).await;
    assert_eq!(ask(&channel, "remember what the template knew").await, "");
    drop(channel);
    let snapshot = machine.snapshot(&template_dir).await.unwrap();
    drop(machine);

    let qemu = Qemu::find(None).unwrap();
    let mut clones = Vec::new();
    for n in 0..2 {
        let dir = dir.path().join(n.to_string());
        fs::create_dir(&dir).unwrap();
        let mut clone = spec(guest, &dir);
        clone.name = format!("clone-{n}");
        clone.disks = clone_disks(&dir, n);
        let machine = qemu.restore(&snapshot, &clone).await.unwrap();
        let channel = machine.connect(BOOT).await.unwrap();
        println!("{:?}", machine.phases());
        clones.push((machine, channel));
    }
    for (n, (_, channel)) in clones.iter().enumerate() {
        assert_eq!(ask(channel, "disk rootfs").await, format!("disk of clone  {n}"));
        assert_eq!(ask(channel, "recall").await, "what the template knew");
        ask(channel, &format!("remember {n}")).await;
    }
    assert_eq!(ask(&clones[0].1, "recall").await, "0");
    assert_eq!(ask(&clones[1].1, "recall").await, "1");

    // A share that the template did not have, in the slot that its guest saw empty.
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("hello"), "from the host").unwrap();
    let sharing_dir = dir.path().join("sharing");
    fs::create_dir(&sharing_dir).unwrap();
    let mut sharing = spec(guest, &sharing_dir);
    sharing.disks = clone_disks(&sharing_dir, 9);
    let (_server, share) = serve(&shared, &sharing_dir);
    sharing.shares = vec![share];
    let machine = qemu.restore(&snapshot, &sharing).await.unwrap();
    let channel = machine.connect(BOOT).await.unwrap();
    println!("{:?}", machine.phases());
    assert_eq!(ask(&channel, "mount tag0").await, "from the host");
    assert_eq!(ask(&channel, "disk rootfs").await, "disk of clone  9");
    drop((machine, channel));

    let mut other = spec(guest, dir.path());
    other.memory_mib = 512;
    let refused = qemu.restore(&snapshot, &other).await.err().unwrap();
    assert!(matches!(refused, Error::Mismatch { .. }), "{refused}");

    let file = fs::File::options().write(true).open(template_dir.join("memory")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap();
    let mut clone = template.clone();
    clone.template = false;
    let refused = qemu.restore(&snapshot, &clone).await.err().unwrap();
    assert!(refused.to_string().contains("changed after it was saved"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_is_there_from_the_start() {
    let guest = guest!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("hello"), "good morning").unwrap();
    let mut spec = spec(guest, dir.path());
    let (_server, share) = serve(dir.path(), &spec.dir);
    spec.shares = vec![share];
    let (machine, channel) = boot(&spec).await;
    assert_eq!(ask(&channel, "mount tag0").await, "good morning");

    let later = dir.path().join("later");
    fs::create_dir(&later).unwrap();
    fs::write(later.join("hello"), "good evening").unwrap();
    let (_server, mut share) = serve(&later, &later);
    share.tag = "tag1".into();
    machine.attach(Attachment::Share(share)).await.unwrap();
    assert_eq!(ask(&channel, "mount tag1").await, "good evening");
    machine.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_end_is_told_apart() {
    let guest = guest!();
    let dir = tempfile::tempdir().unwrap();

    let (machine, channel) = boot(&spec(guest, dir.path())).await;
    let mut stream = channel.open(2).await.unwrap();
    stream.write_all(b"panic\n").await.unwrap();
    let reason = tokio::time::timeout(BOOT, machine.wait()).await.unwrap();
    assert!(matches!(&reason, ExitReason::Panic(text) if !text.is_empty()), "{reason:?}");
    assert!(matches!(machine.pause().await, Err(Error::Ended { .. } | Error::Control { .. })));
    drop(machine);

    let (machine, channel) = boot(&spec(guest, dir.path())).await;
    ask(&channel, "flood 3000").await;
    assert_eq!(machine.console().len(), kapsel_machine::CONSOLE_MEMORY);
    assert_eq!(machine.kill().await, ExitReason::Killed(9));
    drop(machine);

    let machine = Qemu::find(None).unwrap().boot(&spec(guest, dir.path())).await.unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(machine.pid() as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let error = machine.connect(BOOT).await.err().unwrap();
    assert!(error.to_string().contains("killed by signal 9"), "{error}");
    assert_eq!(machine.wait().await, ExitReason::Killed(9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_machine_kills_it_and_a_deadline_is_kept() {
    let guest = guest!();
    let dir = tempfile::tempdir().unwrap();
    let machine = Qemu::find(None).unwrap().boot(&spec(guest, dir.path())).await.unwrap();
    let error = machine.connect(Duration::from_millis(50)).await.err().unwrap();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    let pid = machine.pid();
    drop(machine);
    for _ in 0..100 {
        if !Path::new(&format!("/proc/{pid}")).exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("QEMU is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_start_says_why() {
    let guest = guest!();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("kernel");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    let mut bad = spec(guest, dir.path());
    bad.kernel = script;
    let error = Qemu::find(None).unwrap().boot(&bad).await.err().unwrap();
    assert!(matches!(error, Error::Ended { .. }), "{error}");
    let mut bad = spec(guest, dir.path());
    bad.name = "a,share=on".into();
    let error = Qemu::find(None).unwrap().boot(&bad).await.err().unwrap();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let nothing = Snapshot { dir: dir.path().to_owned() };
    assert!(Qemu::find(None).unwrap().restore(&nothing, &spec(guest, dir.path())).await.is_err());
}
