//! Virtual machines behind two small traits, and the choice of the best monitor for this host.
//!
//! [`Monitor`] knows what it can do here ([`Monitor::probe`], [`Monitor::capabilities`]) and makes machines: cold
//! ([`Monitor::boot`]) or from a [`Snapshot`] ([`Monitor::restore`]). A [`Machine`] is one running guest. What a monitor
//! cannot do is absent from its [`Capabilities`], and asking for it is a typed error before anything starts.

mod console;
mod error;
mod fingerprint;
mod kapsel_vmm;
pub mod probe;
mod process;
mod qemu;
mod session;
mod snapshot;
mod spec;
mod types;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kapsel_channel::Channel;

pub use error::Error;
pub use kapsel_vmm::KapselVmm;
pub use qemu::Qemu;
pub use spec::{Accel, Attachment, Disk, Identity, JailOptions, MachineSpec, Nic, Share};
pub use types::{Capabilities, ExitReason, Phase, Probe, Snapshot, Stats};

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A program that runs virtual machines.
#[async_trait::async_trait]
pub trait Monitor: Send + Sync {
    /// Its name in messages and records.
    fn name(&self) -> &'static str;

    /// Looks at what is installed here: found or not, version, and why it cannot be used.
    fn probe(&self) -> Probe;

    /// What machines of this monitor can do.
    fn capabilities(&self) -> Capabilities;

    /// Identifies everything outside `spec.name`, `spec.dir`, disks' contents, shares and network interfaces that a snapshot depends on:
    /// monitor binary, machine shape, kernel, initramfs, command line, CPU. A snapshot is only restored under the same value.
    ///
    /// # Errors
    /// When the monitor, the kernel or the initramfs cannot be read.
    fn fingerprint(&self, spec: &MachineSpec) -> Result<String>;

    /// Starts a machine from its kernel. Returns once the guest's processors run.
    ///
    /// # Errors
    /// [`Error`] names what is missing or what the monitor said. Nothing is left running.
    async fn boot(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;

    /// Starts a machine from a snapshot, with the disks of `spec` in the places of the snapshot's.
    ///
    /// # Errors
    /// As [`Monitor::boot`]; [`Error::Mismatch`] when `spec` does not have the snapshot's shape.
    async fn restore(&self, snapshot: &Snapshot, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;
}

/// A virtual machine. Dropping the last handle kills it.
#[async_trait::async_trait]
pub trait Machine: Send + Sync {
    /// The monitor's process.
    fn pid(&self) -> u32;

    /// How long each phase of the start took, in the order of the phases.
    fn phases(&self) -> Vec<Phase>;

    /// Begins a session with the guest's agent, ending an earlier one, and waits until the guest answers.
    ///
    /// # Errors
    /// When the machine ends or the deadline passes first; the error carries the monitor's and the console's last lines.
    async fn connect(&self, deadline: Duration) -> Result<Arc<dyn Channel>>;

    /// Stops the guest's processors.
    ///
    /// # Errors
    /// When the monitor does not obey in time or has ended.
    async fn pause(&self) -> Result<()>;

    /// Lets the guest's processors run again.
    ///
    /// # Errors
    /// When the monitor does not obey in time or has ended.
    async fn resume(&self) -> Result<()>;

    /// Saves the machine in `dir` (existing, empty). The machine must have been booted with `spec.template` set; its channel session is
    /// closed first, and it is ended afterwards, since its memory is the snapshot's.
    ///
    /// # Errors
    /// When the machine is not a template or the monitor cannot save it; `dir` may then hold partial files.
    async fn snapshot(&self, dir: &Path) -> Result<Snapshot>;

    /// Plugs a device into the running machine. Returns when the monitor has it; the guest sees it a little later.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the machine was not started for it.
    async fn attach(&self, attachment: Attachment) -> Result<()>;

    /// Takes the back end of a network interface away, and lets go of its tap. The guest keeps a device without a link, and the device its
    /// place. Returns at once when there is no interface of that address.
    ///
    /// # Errors
    /// When the monitor does not obey in time or has ended.
    async fn detach(&self, mac: [u8; 6]) -> Result<()>;

    /// The last lines of the guest's console (at most [`CONSOLE_MEMORY`] bytes).
    fn console(&self) -> Vec<u8>;

    /// Memory of the guest and of the monitor.
    ///
    /// # Errors
    /// When the machine has ended.
    async fn stats(&self) -> Result<Stats>;

    /// Kills the monitor at once.
    async fn kill(&self) -> ExitReason;

    /// Waits until the machine ends. Cancel-safe; any number may wait.
    async fn wait(&self) -> ExitReason;
}

/// How much of the guest's console is kept in memory, in bytes.
pub const CONSOLE_MEMORY: usize = 64 * 1024;

/// How much of the guest's console is kept in its log file, in bytes: a guest that floods its console must not fill the disk.
pub const CONSOLE_FILE_MAX: u64 = 1024 * 1024;
