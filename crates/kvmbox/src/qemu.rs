//! The emulated machine: one run of QEMU.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::{Error, Outcome, Result};

const QEMU: &str = "qemu-system-x86_64";

/// The box is deterministic enough to trust the TSC, and nobody attacks it.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on rdinit=/init";

/// Has the box's kernel clear pages when they are freed.
const CLEARED: &str = " init_on_free=1";

/// With two, QEMU 7.2 now and then damages the memory of the box or of its guests when this machine is loaded; why was not found.
/// With one that was never seen.
const PROCESSORS: &str = "1";

/// What may be chosen of the emulated machine.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub memory_mib: u32,
    /// Its clock counts instructions, each a nanosecond, and jumps over what nobody does anything in.
    pub counted: bool,
    /// Pages are cleared when they are freed.
    pub cleared: bool,
}

/// Boots the box and reads its output until it powers off.
pub fn run(
    kernel: &Path,
    initramfs: &Path,
    work: &Path,
    machine: Machine,
    timeout: Duration,
    live: &mut dyn Write,
) -> Result<Outcome> {
    let started = Instant::now();
    let (console, status) = (work.join("console"), work.join("status"));
    let mut child = Running(spawn(kernel, initramfs, &console, &status, machine)?);
    let failed = |reason: String| Error::Box { reason, console: tail(&console) };

    let mut stdout = child.0.stdout.take().ok_or_else(|| failed("QEMU has no stdout".into()))?;
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 16384];
        while let Ok(n @ 1..) = stdout.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut output = Vec::new();
    let mut overhead = None;
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        match receiver.recv_timeout(left) {
            Ok(bytes) => {
                overhead.get_or_insert_with(|| started.elapsed());
                // Whoever watches may have gone; the outcome still has everything.
                let _ = live.write_all(&bytes).and_then(|()| live.flush());
                output.extend_from_slice(&bytes);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::Timeout { after: timeout, console: tail(&console) });
            }
        }
    }
    let _ = reader.join();
    let ended = child.0.wait().map_err(|e| failed(format!("cannot wait for QEMU: {e}")))?;
    let mut errors = String::new();
    if let Some(stderr) = child.0.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut errors);
    }
    if !ended.success() {
        return Err(failed(format!("QEMU ended with {ended}: {}", errors.trim())));
    }
    let status = fs::read_to_string(&status).unwrap_or_default();
    let status = status.trim().parse().map_err(|_| failed("the command's exit status never came".into()))?;
    Ok(Outcome { output, status, overhead: overhead.unwrap_or_else(|| started.elapsed()) })
}

/// Ends with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(kernel: &Path, initramfs: &Path, console: &Path, status: &Path, machine: Machine) -> Result<Child> {
    let mut command = Command::new(QEMU);
    if machine.counted {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args([
            "-machine",
            "q35,accel=tcg",
            "-cpu",
            "max",
            "-smp",
            PROCESSORS,
            "-m",
            &machine.memory_mib.to_string(),
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &format!("{COMMAND_LINE}{}", if machine.cleared { CLEARED } else { "" })])
        .args([
            "-chardev",
            &format!("file,id=console,path={}", console.display()),
            "-serial",
            "chardev:console",
        ])
        // Not the `stdio` kind: at the end of stdin that one tells the guest that nobody reads any more.
        .args(["-chardev", "file,id=output,path=/proc/self/fd/1"])
        .args(["-chardev", &format!("file,id=status,path={}", status.display())])
        .args(["-device", "virtio-serial-pci"])
        .args(["-device", "virtserialport,chardev=output,name=kapsel.output"])
        .args(["-device", "virtserialport,chardev=status,name=kapsel.status"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent. It makes QEMU end with the thread that
    // started it, which waits for QEMU, so that a killed test leaves nothing running.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        });
    }
    command.spawn().map_err(|e| Error::Box {
        reason: format!("cannot start {QEMU}: {e}; it is in Debian's package qemu-system-x86"),
        console: String::new(),
    })
}

/// The last lines of the console.
fn tail(console: &Path) -> String {
    let text = fs::read(console).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned()
}
