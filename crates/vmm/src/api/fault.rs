//! Why a request cannot be done. The texts are Firecracker's where it has the same, because clients look at them.

use std::io;

use kapsel_devices::{balloon, block, mem, net, vhost_user};

use crate::x86::template;
use crate::{builder, config, metrics, mmds, snapshot};

/// Why a request cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Only possible before the start.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// Only possible after the start.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// Nothing to boot.
    #[error("Start microvm error: Cannot start microvm without kernel configuration.")]
    NoKernel,
    /// The machine is not made as it was asked for.
    #[error("Start microvm error: {0}")]
    Build(#[from] builder::Error),
    /// The configuration is impossible.
    #[error("{0}")]
    Config(#[from] config::Error),
    /// The kernel is not there.
    #[error("Boot source error: The kernel file cannot be opened: {0}")]
    Kernel(#[source] io::Error),
    /// The initrd is not there.
    #[error(
        "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. {0}"
    )]
    Initrd(#[source] io::Error),
    /// The disk's file cannot be used.
    #[error("Drive config error: Unable to create the virtio block device: {0}")]
    Drive(#[source] block::Error),
    /// The disk's process cannot be used.
    #[error(
        "Drive config error: Unable to create the virtio block device: Vhost user backend error: Vhost-user error: {0}"
    )]
    Backend(#[source] vhost_user::Error),
    /// The disk is not one that can be changed so.
    #[error(
        "Drive config error: Unable to patch the block device: Block: Running method expected different backend. Please verify the request arguments."
    )]
    OtherBackend,
    /// The disk's process does not say what has changed.
    #[error(
        "Drive config error: Unable to patch the block device: Block: Vhost user backend error: Vhost error: {0} Please verify the request arguments."
    )]
    PatchBackend(#[source] vhost_user::Error),
    /// No disk of that name.
    #[error(
        "Drive config error: Unable to patch the block device: there is no drive {0} Please verify the request arguments."
    )]
    NoDrive(String),
    /// The disk's new file cannot be used.
    #[error("Drive config error: Unable to patch the block device: {0} Please verify the request arguments.")]
    PatchDrive(#[from] block::Error),
    /// The tap cannot be used.
    #[error("Network config error: {0}")]
    Network(#[from] net::Error),
    /// No network card of that name.
    #[error("Network config error: Unable to update the net device: there is no interface {0}")]
    NoInterface(String),
    /// There is no balloon.
    #[error("Balloon config error: No balloon device found.")]
    NoBalloon,
    /// The balloon has no statistics.
    #[error("Balloon config error: {0}")]
    Statistics(#[from] balloon::StatisticsError),
    /// The metadata cannot be had or changed.
    #[error("MMDS error: {0}")]
    Mmds(#[source] mmds::Error),
    /// They are too long.
    #[error("MMDS limit exceeded error: {0}")]
    MmdsLimit(#[source] mmds::Error),
    /// The log cannot be written.
    #[error("Logger error: Failed to open target file: {0}")]
    Logger(#[source] io::Error),
    /// Counters cannot be told.
    #[error("Metrics error: {0}")]
    Metrics(#[from] metrics::Error),
    /// The CPU template cannot be read.
    #[error("CPU template error: {0}")]
    Template(#[from] template::Error),
    /// There is no memory that can be plugged.
    #[error("Memory hotplug update error: No memory hotplug device found.")]
    NoHotplug,
    /// Not so much can be plugged.
    #[error("Memory hotplug update error: {0}")]
    Hotplug(#[from] mem::InvalidSize),
    /// The guest does not take its keys.
    #[error("Internal VMM error: the guest has not read what was typed before")]
    Keyboard,
    /// The machine is not saved.
    #[error("Create snapshot error: {0}")]
    CreateSnapshot(#[source] snapshot::Error),
    /// The machine is not continued.
    #[error("Load snapshot error: {0}")]
    LoadSnapshot(#[source] snapshot::Error),
    /// A machine that is put together is none that was saved.
    #[error(
        "Load snapshot error: Loading a microVM snapshot is not allowed after configuring boot-specific resources."
    )]
    LoadNotAllowed,
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}

impl Fault {
    /// The status of an answer that says so.
    pub fn status(&self) -> u16 {
        if matches!(self, Fault::MmdsLimit(_)) { 413 } else { 400 }
    }
}

impl From<mmds::Error> for Fault {
    fn from(error: mmds::Error) -> Self {
        match error {
            mmds::Error::TooLarge => Fault::MmdsLimit(error),
            _ => Fault::Mmds(error),
        }
    }
}
