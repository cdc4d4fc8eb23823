//! The host's side: what the guests are made of, and what is expected of them.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kapsel_kvmbox::guest::{MODULES, PROGRAM, initramfs as initramfs_of};
use kapsel_kvmbox::{Kernel, KvmBox};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;

const VMM: &str = env!("CARGO_BIN_EXE_kapsel-vmm");
const SECTOR: usize = 512;
/// The longest that a guest or a monitor may take for one thing. On a busy machine an emulated one is a hundred times as slow as KVM.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// More exits in a quiet boot mean that the kernel looks for something that is not there.
const EXITS_MAX: u64 = 4000;

/// The files that guests are started with.
pub struct Files {
    pub vmm: PathBuf,
    pub vmlinux: PathBuf,
    bzimage: PathBuf,
    pub initramfs: PathBuf,
    /// Of QEMU; it is in the package of what all machines of QEMU need.
    pub storage_daemon: PathBuf,
}

impl Files {
    fn of_host() -> kapsel_kvmbox::Result<Self> {
        let kernel = Kernel::ensure(KvmBox::new().cache_directory())?;
        let initramfs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest.cpio");
        let this = std::env::current_exe().expect("this program has a path");
        let run = format!("exec {PROGRAM} {}", guest::ARGUMENT);
        let modules = [&MODULES[..], &["drivers/virtio/virtio_mem"]].concat();
        initramfs_of(&kernel, &modules, Some(&this), &run, &initramfs).expect("an initramfs can be written");
        // The program as it is shipped, if somebody names it.
        let vmm = std::env::var_os("KAPSEL_VMM").map_or_else(|| VMM.into(), PathBuf::from);
        let storage_daemon = "/usr/bin/qemu-storage-daemon".into();
        Ok(Files { vmm, vmlinux: kernel.vmlinux, bzimage: kernel.bzimage, initramfs, storage_daemon })
    }

    fn of_box() -> Self {
        let inside = |name: &str| Path::new("/kvmbox").join(name);
        Files {
            vmm: inside("kapsel-vmm"),
            vmlinux: inside("vmlinux"),
            bzimage: inside("bzimage"),
            initramfs: inside("guest.cpio"),
            storage_daemon: inside("qemu-storage-daemon"),
        }
    }

    pub fn here() -> Self {
        if kapsel_kvmbox::inside() {
            Self::of_box()
        } else {
            Self::of_host().expect("a kernel can be fetched")
        }
    }
}

/// Puts the files in the box.
pub fn prepare(kvm_box: KvmBox) -> kapsel_kvmbox::Result<KvmBox> {
    let (host, inside) = (Files::of_host()?, Files::of_box());
    Ok(kvm_box
        .timeout(6 * PATIENCE)
        .program(host.vmm, inside.vmm)?
        .program(host.storage_daemon, inside.storage_daemon)?
        .file(host.vmlinux, inside.vmlinux)
        .file(host.bzimage, inside.bzimage)
        .file(host.initramfs, inside.initramfs))
}

/// A configuration whose guest does `task`.
pub fn config(files: &Files, kernel: &Path, task: &str) -> Value {
    json!({
        "boot-source": {"kernel_image_path": kernel, "initrd_path": files.initramfs, "boot_args": guest::arguments(task)},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 256},
    })
}

/// A running monitor, which does not outlive its test.
pub struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        // It has ended already in a test that passes.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Monitor {
    /// Its console is at its standard input and output.
    pub fn start(files: &Files, directory: &Path, config: &Value) -> io::Result<Self> {
        Self::start_with(files, directory, config, &[])
    }

    /// As [`Monitor::start`], with more options.
    pub fn start_with(files: &Files, directory: &Path, config: &Value, options: &[&str]) -> io::Result<Self> {
        let path = directory.join("config.json");
        fs::write(&path, config.to_string())?;
        let child = Command::new(&files.vmm)
            .args(["--level", "info", "--no-api", "--config-file"])
            .arg(path)
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Monitor(child))
    }

    /// The guest's console, to be read by the caller instead of [`Monitor::finish`].
    pub fn take_console(&mut self) -> std::process::ChildStdout {
        self.0.stdout.take().expect("stdout is a pipe")
    }

    /// Types a line on the guest's console.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        self.0.stdin.as_mut().expect("stdin is a pipe").write_all(format!("{line}\n").as_bytes())
    }

    /// The monitor's errors until they name `what`, or end.
    pub fn errors_until(&mut self, what: &str) -> io::Result<String> {
        let pipe = self.0.stderr.as_mut().expect("stderr is a pipe");
        let (mut text, mut chunk) = (String::new(), [0; 4096]);
        while !text.contains(what) {
            let count = pipe.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            text.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
        Ok(text)
    }

    /// What was said until the end.
    pub fn finish(mut self) -> io::Result<Output> {
        let deadline = Instant::now() + PATIENCE;
        // The guest may print more than the pipe holds.
        let stdout = self.0.stdout.take().map(|stdout| std::thread::spawn(move || read_all(stdout)));
        while self.0.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.0.kill()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let console = stdout.map(|reader| reader.join().expect("the reader does not panic")).transpose()?;
        let mut stderr = String::new();
        if let Some(mut pipe) = self.0.stderr.take() {
            pipe.read_to_string(&mut stderr)?;
        }
        Ok(Output { status: self.0.wait()?, console: console.unwrap_or_default(), stderr })
    }
}

fn read_all(mut from: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What came of a monitor.
pub struct Output {
    pub status: ExitStatus,
    pub console: String,
    pub stderr: String,
}

impl Output {
    pub fn expect(&self, condition: bool) -> Result<(), Failed> {
        if condition {
            return Ok(());
        }
        Err(format!("{}\nconsole:\n{}\nerrors:\n{}", self.status, self.console, self.stderr).into())
    }
}

pub fn devices() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let (first, second, socket) =
        (directory.path().join("first"), directory.path().join("second"), directory.path().join("v"));
    fs::write(&first, guest::pattern(8 * SECTOR))?;
    fs::write(&second, vec![0xee; 64 * SECTOR])?;
    let mut config = config(&files, &files.vmlinux, "devices");
    config["drives"] = json!([
        {"drive_id": "first", "path_on_host": first, "is_root_device": false, "is_read_only": true},
        {"drive_id": "second", "path_on_host": second, "is_root_device": false, "cache_type": "Writeback"},
    ]);
    config["vsock"] = json!({"guest_cid": 42, "uds_path": socket});
    config["entropy"] = json!({});

    let listener = UnixListener::bind(format!("{}_{}", socket.display(), guest::HOST_PORT))?;
    let echo = std::thread::spawn(move || echo_once(&listener));
    let monitor = Monitor::start(&files, directory.path(), &config)?;
    let call = std::thread::spawn(move || call_guest(&socket));
    let output = monitor.finish()?;

    output.expect(output.status.success() && output.console.contains(guest::DONE))?;
    echo.join().expect("the echo does not panic")?;
    assert_eq!(call.join().expect("the call does not panic")?, "pong");
    let written = fs::read(&second)?;
    assert_eq!(written.len(), 64 * SECTOR);
    assert!(written[..4 * SECTOR] == guest::pattern(4 * SECTOR), "what the guest wrote is in the file");
    assert!(written[16 * SECTOR..24 * SECTOR].iter().all(|byte| *byte == 0), "what the guest zeroed is zero");
    assert!(written[24 * SECTOR..].iter().all(|byte| *byte == 0xee), "the rest is as it was");
    output.expect(output.stderr.contains("PowerOff"))?;
    // Notifications and interrupts take none, so what is left is the console and the devices' configuration.
    let exits =
        output.stderr.split("exits=").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    output.expect(exits.is_some_and(|exits| exits < EXITS_MAX))
}

/// Gives the guest back what it sends, until it stops sending.
pub fn echo_once(listener: &UnixListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut reader = stream.try_clone()?;
    io::copy(&mut reader, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

/// Connects to the guest as soon as it listens.
fn call_guest(socket: &Path) -> io::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = try_call(socket);
        match answer {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(100)),
            other => return other,
        }
    }
}

fn try_call(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {}", guest::GUEST_PORT)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if !line.starts_with("OK ") {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.write_all(b"ping")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    reader.read_to_string(&mut answer)?;
    Ok(answer)
}

pub fn linux_protocol() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let mut monitor = Monitor::start(&files, directory.path(), &config(&files, &files.bzimage, "console"))?;
    let mut console = BufReader::new(monitor.take_console());
    let mut text = String::new();
    // What is typed before the guest's driver is up may be lost, as on any serial port.
    while !text.contains(guest::READY) && console.read_line(&mut text)? > 0 {}
    monitor.say(guest::LINE)?;
    console.read_to_string(&mut text)?;
    let output = Output { console: text, ..monitor.finish()? };
    output.expect(output.status.success() && output.console.contains(guest::DONE))?;
    output.expect(output.stderr.contains("Reset"))
}

pub fn panic() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let mut config = config(&files, &files.vmlinux, "none");
    config["boot-source"].as_object_mut().expect("an object").remove("initrd_path");
    let output = Monitor::start(&files, directory.path(), &config)?.finish()?;
    output.expect(output.status.success() && output.console.contains("Kernel panic"))
}

pub fn bad_kernels() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let kernel = directory.path().join("kernel");
    let image = fs::read(&files.vmlinux)?;
    let mut low = image.clone();
    // Physical address of the first segment, whose header follows the file's.
    low[64 + 24..64 + 32].copy_from_slice(&0x1000u64.to_le_bytes());
    for (content, reason) in [
        (&b""[..], "cannot read the kernel"),
        (&[0; 4096], "is not a 64-bit ELF kernel or bzImage"),
        (&image[..100_000], "is not a 64-bit ELF kernel or bzImage"),
        (&low, "below 1 MiB"),
    ] {
        fs::write(&kernel, content)?;
        let output = Monitor::start(&files, directory.path(), &config(&files, &kernel, "none"))?.finish()?;
        output.expect(!output.status.success() && output.stderr.contains(reason))?;
    }
    Ok(())
}

/// The whole suite runs under the monitor's own filters; here one that forbids what every machine needs.
pub fn forbidden_call() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let filters = directory.path().join("filters.json");
    let allow =
        json!({"default_action": "allow", "filter_action": "trap", "filter": [{"syscall": "getppid"}]});
    let kvm_run = json!({"index": 1, "type": "dword", "op": "eq", "val": 0xae80});
    let mut vcpu = allow.clone();
    vcpu["filter"] = json!([{"syscall": "ioctl", "args": [kvm_run]}]);
    fs::write(&filters, json!({"api": allow, "vmm": allow, "vcpu": vcpu}).to_string())?;
    let config = config(&files, &files.vmlinux, "none");
    let options = ["--seccomp-filter", filters.to_str().expect("a plain path")];
    let output = Monitor::start_with(&files, directory.path(), &config, &options)?.finish()?;
    output.expect(output.status.code() == Some(148))?;
    let message = format!("the vcpu thread made the system call {}", libc::SYS_ioctl);
    output.expect(output.stderr.contains(&message) && output.console.is_empty())
}
