//! QEMU's command line: the machine's shape, in one place.
//!
//! The machine is `microvm`: no PCI, no firmware to speak of, virtio-mmio slots at fixed addresses. Measured under TCG with Debian's
//! 6.12 kernel it reaches user space in about 0.7 of the time of `q35`, and its state is smaller to save.
//!
//! It has a real-time clock: without one, Linux waits a second for its answer when it first sets the time, and one more when it
//! probes the driver (`mc146818_avoid_UIP` in `drivers/rtc/rtc-mc146818-lib.c`), which was half of a cold start.

use std::ffi::OsString;

use serde_json::{Value, json};

use crate::spec::NEEDLESS;
use crate::{Accel, Error, MachineSpec, Nic, Result};

/// Slots, by what is in them. The last sixteen are those that the guest's ACPI table (crate guest) tells of: shares from the first,
/// network interfaces from the last.
///
/// Slot 0 is for what needs no interrupt: QEMU's emulated IOAPIC takes this one, the first of the second IOAPIC, for the ISA timer's and
/// moves it.
const PLUGGER_SLOT: usize = 0;
const SERIAL: usize = 1;
const ENTROPY: usize = 2;
const BALLOON: usize = 3;
const FIRST_DISK: usize = 4;
const FIRST_SHARE: usize = 8;
const SLOTS: usize = 24;

/// The most processors of a machine.
pub(super) const MAX_CPUS: u32 = 255;
/// The most disks of a machine.
pub(super) const MAX_DISKS: usize = FIRST_SHARE - FIRST_DISK;
/// The most shares and network interfaces of a machine together.
pub(super) const MAX_PLUGGED: usize = SLOTS - FIRST_SHARE;

/// The guest's port for the channel: `/dev/virtio-ports/kapsel.0`.
const PORT: &str = "kapsel.0";

/// What the guest's kernel needs to be told, whichever it is.
///
/// `reboot=t`: there is no ACPI reset or keyboard controller; a triple fault ends the machine (`-no-reboot`). `panic=-1` does so at
/// once. The rest is what a virtual machine need not wait for: the timer check, a second source for the clock, checks of the
/// kernel's own cryptography, serial ports that do not exist; and under TCG mitigations, as it has no speculation, and watchdogs of
/// processors, which the host may well not let run.
pub(super) fn cmdline(spec: &MachineSpec, tsc_khz: Option<u64>) -> String {
    let mut line = String::from(
        "console=ttyS0 reboot=t panic=-1 quiet no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests \
         8250.nr_uarts=1 audit=0 nokaslr pci=off lsm=landlock",
    );
    if spec.accel == Accel::Tcg {
        line.push_str(" mitigations=off nowatchdog");
        // The guest reads the host's counter and would measure its frequency against an emulated timer. On a busy host that fails,
        // and as the machine has no second reference, Linux then waits for ever for its first tick.
        if let Some(khz) = tsc_khz {
            line.push_str(&format!(" tsc_early_khz={khz}"));
        }
    }
    line.push_str(" initcall_blacklist=");
    line.push_str(&NEEDLESS.join(","));
    if !spec.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&spec.cmdline);
    }
    line
}

/// Descriptors that QEMU inherits, by number.
pub(super) mod fds {
    /// The control socket.
    pub(in super::super) const CONTROL: i32 = 3;
    /// The guest's console.
    pub(in super::super) const CONSOLE: i32 = 4;
    /// The listening socket of the channel.
    pub(in super::super) const CHANNEL: i32 = 5;
    /// The saved state to restore.
    pub(in super::super) const STATE: i32 = 6;
    /// Memory that is shared with back ends.
    pub(in super::super) const MEMORY: i32 = 7;
    /// The first disk; the others follow.
    pub(in super::super) const DISKS: i32 = 10;
    /// The first share; the others follow.
    pub(in super::super) const SHARES: i32 = 20;
    /// The tap of the first network interface; the others follow.
    pub(in super::super) const TAPS: i32 = 40;
}

/// Paths in the jail.
pub(super) mod paths {
    pub(in super::super) const KERNEL: &str = "/kernel";
    pub(in super::super) const INITRAMFS: &str = "/initramfs";
    pub(in super::super) const MEMORY: &str = "/memory";
    pub(in super::super) const DESCRIPTORS: &str = "/fd";
}

/// Where the guest's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// Of the process alone.
    Anonymous,
    /// A file, written through: a template in the making.
    File,
    /// A memfd: of a clone, or shared with the back ends of shared directories.
    Shared,
}

/// How the machine starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// Its kernel boots, on a host whose time stamp counter has this frequency.
    Kernel {
        /// In kHz.
        tsc_khz: u64,
    },
    /// It continues.
    Snapshot,
}

impl From {
    fn tsc_khz(self) -> Option<u64> {
        match self {
            From::Kernel { tsc_khz } => Some(tsc_khz),
            From::Snapshot => None,
        }
    }
}

/// The arguments for `spec`.
pub(super) fn build(spec: &MachineSpec, memory: Memory, start: From) -> Result<Vec<OsString>> {
    check(spec)?;
    let mut args = Args::default();
    args.add("-nodefaults").add("-no-user-config").add("-no-reboot").pair("-display", "none");
    args.pair("-name", format!("kapsel-{}", spec.name));
    args.pair("-machine", "microvm,acpi=on,rtc=on,auto-kernel-cmdline=off,memory-backend=ram");
    args.pair("-global", "virtio-mmio.force-legacy=off");
    match spec.accel {
        Accel::Kvm => args.pair("-accel", "kvm").pair("-cpu", "host"),
        // One translation thread per processor; the cache's size is memory that every sandbox pays for. Without `erms` Linux and
        // C libraries copy and clear by words: the translator makes a loop of a string instruction, so bytes take eight times as many turns.
        Accel::Tcg => args.pair("-accel", "tcg,thread=multi,tb-size=64").pair("-cpu", "max,erms=off"),
    };
    args.pair("-smp", spec.vcpus.to_string()).pair("-m", format!("{}M", spec.memory_mib));
    args.pair("-object", memory_backend(spec, memory));
    args.pair("-kernel", paths::KERNEL)
        .pair("-initrd", paths::INITRAMFS)
        .pair("-append", cmdline(spec, start.tsc_khz()));
    args.pair("-chardev", format!("socket,id=control,fd={}", fds::CONTROL))
        .pair("-mon", "chardev=control,mode=control");
    args.pair("-chardev", format!("socket,id=console,fd={}", fds::CONSOLE))
        .pair("-serial", "chardev:console");
    args.pair("-chardev", format!("socket,id=channel,fd={},server=on,wait=off", fds::CHANNEL));
    args.pair("-device", format!("virtio-serial-device,bus=virtio-mmio-bus.{SERIAL},id=ports,max_ports=2"));
    args.pair("-device", format!("virtserialport,bus=ports.0,chardev=channel,name={PORT},id=channel0"));
    args.pair("-device", format!("virtio-rng-device,bus=virtio-mmio-bus.{ENTROPY}"));
    args.pair("-device", format!("virtio-balloon-device,bus=virtio-mmio-bus.{BALLOON},id=balloon,free-page-reporting=on,deflate-on-oom=on"));
    for (n, disk) in spec.disks.iter().enumerate() {
        let fd = fds::DISKS + n as i32;
        args.pair("-add-fd", format!("fd={fd},set={n}"));
        // The host's page cache is shared by all sandboxes of an image, so it is used; a scratch disk lives no longer than its
        // machine, so that flushing it would be for nothing. What the guest discards is given back to the host.
        let mode = if disk.read_only {
            "read-only=on"
        } else {
            "cache.no-flush=on,discard=unmap,detect-zeroes=unmap"
        };
        args.pair("-blockdev", format!("raw,node-name=disk{n},{mode},file.driver=file,file.filename=/dev/fdset/{n},file.locking=off,file.aio=threads"));
        args.pair(
            "-device",
            format!(
                "virtio-blk-device,bus=virtio-mmio-bus.{},drive=disk{n},serial={},num-queues=1",
                FIRST_DISK + n,
                disk.serial
            ),
        );
    }
    if memory == Memory::Shared {
        args.pair("-device", format!("virtio-scsi-device,bus=virtio-mmio-bus.{PLUGGER_SLOT},id=plugger"));
    }
    for (n, share) in spec.shares.iter().enumerate() {
        args.pair("-chardev", format!("socket,id={},fd={}", share_chardev(n), fds::SHARES + n as i32));
        // QEMU refuses to load a saved state while it has such a device, so that one is plugged in afterwards.
        if start != From::Snapshot {
            args.pair("-device", share_device(n, &share.tag).to_string());
        }
    }
    for (n, nic) in spec.nics.iter().enumerate() {
        args.pair("-netdev", format!("tap,id={},fd={}", nic_backend(n), fds::TAPS + n as i32));
        // A saved machine has none, so that those that need none are spared it.
        if start != From::Snapshot {
            args.pair("-device", nic_device(n, nic).to_string());
        }
    }
    if start == From::Snapshot {
        args.pair("-incoming", "defer");
    }
    Ok(args.0)
}

/// The connection to the back end of the share `n`.
pub(super) fn share_chardev(n: usize) -> String {
    format!("share{n}")
}

/// What handles the plugging in of shares and network interfaces.
///
/// QEMU's virtio-mmio buses have no hotplug handler, but take one. Of those that QEMU has, a SCSI bus's does with the device what has to be
/// done here, which is nothing (the machine's own wants a processor); so such machines have an empty SCSI controller.
pub(super) const PLUGGER: &str = "plugger.0";

/// The back end of the network interface `n`.
pub(super) fn nic_backend(n: usize) -> String {
    format!("net{n}")
}

/// The network interface `n`, as `-device` and `device_add` take it.
pub(super) fn nic_device(n: usize, nic: &Nic) -> Value {
    let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({
        "driver": "virtio-net-device",
        "id": format!("nic{n}"),
        "bus": format!("virtio-mmio-bus.{}", SLOTS - 1 - n),
        "netdev": nic_backend(n),
        "mac": mac.join(":"),
    })
}

/// The device of the share `n`, as `-device` and `device_add` take it.
pub(super) fn share_device(n: usize, tag: &str) -> Value {
    json!({
        "driver": "vhost-user-fs-device",
        "id": format!("fs{n}"),
        "bus": format!("virtio-mmio-bus.{}", FIRST_SHARE + n),
        "chardev": share_chardev(n),
        "tag": tag,
        "queue-size": 512,
    })
}

/// Refuses a tag that a device cannot have.
pub(super) fn check_tag(name: &str, tag: &str) -> Result<()> {
    if plain(tag, 36) {
        return Ok(());
    }
    let what = format!("the share tag {tag:?}: letters, digits, '-', '_' and '.', at most 36");
    Err(Error::Invalid { name: name.to_owned(), what })
}

/// Text that cannot begin another option in QEMU's option strings.
fn plain(text: &str, max: usize) -> bool {
    !text.is_empty()
        && text.len() <= max
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn memory_backend(spec: &MachineSpec, memory: Memory) -> String {
    let size = format!("id=ram,size={}M", spec.memory_mib);
    match memory {
        Memory::Anonymous => format!("memory-backend-ram,{size}"),
        Memory::File => format!("memory-backend-file,{size},mem-path={},share=on", paths::MEMORY),
        Memory::Shared => {
            format!("memory-backend-file,{size},mem-path={}/{},share=on", paths::DESCRIPTORS, fds::MEMORY)
        }
    }
}

fn check(spec: &MachineSpec) -> Result<()> {
    let invalid = |what: String| Err(Error::Invalid { name: spec.name.clone(), what });
    if !plain(&spec.name, 64) {
        return invalid("a name has letters, digits, '-', '_' and '.', at most 64".into());
    }
    if spec.vcpus == 0 || spec.vcpus > MAX_CPUS {
        return invalid(format!("{} processors; it can have 1 to {MAX_CPUS}", spec.vcpus));
    }
    if spec.memory_mib < 64 {
        return invalid(format!("{} MiB of memory; the guest's kernel needs at least 64", spec.memory_mib));
    }
    if spec.disks.len() > MAX_DISKS {
        return invalid(format!("{} disks; it can have {MAX_DISKS}", spec.disks.len()));
    }
    if spec.shares.len() + spec.nics.len() > MAX_PLUGGED {
        let (shares, nics) = (spec.shares.len(), spec.nics.len());
        let what = "shared directories and network interfaces";
        return invalid(format!("{shares} and {nics} {what}; it can have {MAX_PLUGGED} of both together"));
    }
    if let Some(disk) = spec.disks.iter().find(|disk| !plain(&disk.serial, 20)) {
        return invalid(format!(
            "the disk serial {:?}: letters, digits, '-', '_' and '.', at most 20",
            disk.serial
        ));
    }
    for share in &spec.shares {
        check_tag(&spec.name, &share.tag)?;
    }
    if spec.template && !(spec.shares.is_empty() && spec.nics.is_empty()) {
        let what = "a template cannot have shared directories or network interfaces: they are plugged into its clones";
        return invalid(what.into());
    }
    Ok(())
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn add(&mut self, arg: impl Into<OsString>) -> &mut Self {
        self.0.push(arg.into());
        self
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.add(option).add(value)
    }
}
