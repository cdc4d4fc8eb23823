//! A guest to try the file server from: Debian's kernel with busybox as its only program, in a jailed QEMU without KVM.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kapsel_guest::{Kernel, KernelSource};
use kapsel_jail::profiles::{self, Share};
use kapsel_jail::{Child, Exit, Identity};

/// The file server under test.
pub const FSD: &str = env!("CARGO_BIN_EXE_kapsel-fsd");

/// How long a guest may take: it boots in a few seconds, on a busy machine in many.
pub const PATIENCE: Duration = Duration::from_secs(100);

/// What is missing for these tests, if anything.
pub fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    let needed = ["/usr/bin/qemu-system-x86_64", "/bin/busybox"];
    needed.into_iter().find(|path| !Path::new(path).exists())
}

/// A directory for one test, with the sockets and the console in it.
pub struct Scene {
    pub dir: tempfile::TempDir,
    shares: Vec<(String, Child)>,
}

impl Scene {
    pub fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let m = dir.path().join("m");
        fs::create_dir(&m).unwrap();
        own(&m);
        Scene { dir, shares: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a jailed file server for the share, to be mounted in the guest by this tag.
    pub fn serve(&mut self, tag: &str, source: &Path, read_only: bool) -> u32 {
        let socket = self.path("m").join(tag);
        let listener = UnixListener::bind(&socket).unwrap();
        own(&socket);
        let log = fs::File::create(self.path(&format!("{tag}.log"))).unwrap();
        let share = Share { sources: &[source.into()], read_only, follow: false, tag: None };
        let jail = profiles::fsd(Path::new(FSD), share, listener.into(), "test").unwrap();
        let child = jail.stderr(log.into()).spawn().unwrap();
        let pid = child.pid();
        self.shares.push((tag.to_owned(), child));
        pid
    }

    #[allow(dead_code, reason = "each test program uses its part")]
    /// Boots a guest with all shares, which runs the script and powers off. Its output.
    pub fn run(&mut self, script: &str) -> String {
        let mut guest = self.boot(script);
        let exit = guest.wait_timeout(PATIENCE).unwrap();
        let output = fs::read_to_string(self.path("m/console")).unwrap_or_default();
        assert_eq!(exit, Some(Exit::Code(0)), "{output}\n{:?}", self.logs());
        output
    }

    /// Boots a guest with all shares.
    pub fn boot(&self, script: &str) -> Child {
        let kernel = kernel();
        let initrd = self.path("initrd");
        fs::write(&initrd, initramfs(script)).unwrap();
        let memory = "memory-backend-memfd,id=memory,size=256M,share=on";
        let mut jail = profiles::qemu(Path::new("/usr/bin/qemu-system-x86_64"))
            .unwrap()
            .identity(Identity::of_sandbox("test"))
            .bind_ro(&kernel.vmlinux, "/kernel")
            .bind_ro(&initrd, "/initrd")
            .bind_rw(self.path("m"), "/m")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", "q35,accel=tcg,memory-backend=memory", "-cpu", "max", "-m", "256M"])
            .args(["-object", memory, "-serial", "file:/m/console"])
            .args(["-kernel", "/kernel", "-initrd", "/initrd", "-append", "console=ttyS0 quiet panic=-1"]);
        for (tag, _) in &self.shares {
            jail = jail
                .args(["-chardev".to_owned(), format!("socket,id={tag},path=/m/{tag}")])
                .args(["-device".to_owned(), format!("vhost-user-fs-pci,chardev={tag},tag={tag}")]);
        }
        let log = fs::File::create(self.path("qemu.log")).unwrap();
        jail.stderr(log.into()).spawn().unwrap()
    }

    /// What the processes wrote to their standard errors.
    pub fn logs(&self) -> Vec<String> {
        let names = self.shares.iter().map(|(tag, _)| format!("{tag}.log")).chain(["qemu.log".to_owned()]);
        names.map(|name| fs::read_to_string(self.path(&name)).unwrap_or_default()).collect()
    }

    /// How the file servers ended, which they do by themselves when their monitor has gone.
    pub fn exits(&mut self) -> Vec<Option<Exit>> {
        self.shares.iter_mut().map(|(_, child)| child.wait_timeout(Duration::from_secs(5)).unwrap()).collect()
    }
}

/// Gives the file to the monitor's user.
fn own(path: &Path) {
    let (uid, gid) = Identity::of_sandbox("test").ids();
    std::os::unix::fs::chown(path, Some(uid), Some(gid)).unwrap();
}

/// Debian's kernel, fetched once for all tests of the workspace.
fn kernel() -> Kernel {
    let data = Path::new(env!("CARGO_TARGET_TMPDIR")).join("data");
    Kernel::ensure(&data, &KernelSource::Debian, &mut |_| {}).unwrap()
}

/// A newc cpio archive with busybox and an `/init` that runs the script.
fn initramfs(script: &str) -> Vec<u8> {
    let init = "#!/bin/busybox sh\n\
        export PATH=/bin\n\
        /bin/busybox --install -s /bin\n\
        mount -t devtmpfs dev /dev; mount -t proc proc /proc\n\
        sh /script > /dev/ttyS0 2>&1\n\
        poweroff -f\n";
    let busybox = fs::read("/bin/busybox").unwrap();
    let mut archive = Vec::new();
    for dir in ["bin", "dev", "proc", "mnt"] {
        entry(&mut archive, dir, 0o040_755, b"");
    }
    entry(&mut archive, "bin/busybox", 0o100_755, &busybox);
    entry(&mut archive, "init", 0o100_755, init.as_bytes());
    entry(&mut archive, "script", 0o100_644, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, b"");
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, u32::try_from(data.len()).unwrap(), 0, 0, 0, 0];
    let name_len = u32::try_from(name.len()).unwrap() + 1;
    archive.extend(b"070701");
    fields.iter().chain(&[name_len, 0]).for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A process's share of memory (PSS) in bytes, without the guest's memory that it has mapped.
#[allow(dead_code, reason = "each test program uses its part")]
pub fn own_memory(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut guest = false;
    let mut kib = 0;
    for line in maps.lines() {
        if let Some(value) = line.strip_prefix("Pss:") {
            let value: u64 = value.trim().trim_end_matches(" kB").parse().unwrap();
            kib += if guest { 0 } else { value };
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            guest = line.contains("memfd:");
        }
    }
    kib << 10
}
