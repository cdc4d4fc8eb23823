//! A machine in two files: its memory ([`memory`]), and everything else ([`format`](mod@format)).
//!
//! The state's sections are `config` (what the machine is made of, as JSON), `machine` (clock and interrupt controllers),
//! `cpu` for each processor, `console`, `keyboard`, and `device` for each device in the order of their places.

pub mod dirty;
pub mod format;
pub mod memory;
pub mod served;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use format::{SectionReader, State};
use kapsel_devices::Memory;
use kapsel_devices::state::StateError;
use serde::Deserialize;

use crate::x86;
use crate::{builder, config};

/// Where a snapshot is to be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// The file for the state.
    pub snapshot_path: PathBuf,
    /// The file for the memory.
    pub mem_file_path: PathBuf,
    /// How much of it.
    #[serde(default)]
    pub snapshot_type: Kind,
}

/// How much of the memory is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Kind {
    /// All.
    #[default]
    Full,
    /// What was written since the last snapshot, the load or the start. Without `track_dirty_pages` nobody knows, and that
    /// is everything.
    Diff,
}

/// Where a snapshot is, and what shall be different.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// The file with the state.
    pub snapshot_path: PathBuf,
    /// Where the memory is.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// The file with the memory: an older name for a backend of type `File`.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Whether pages that are written from now on are marked, for a snapshot that holds only those.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// An older name for that.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Whether the machine goes on at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other taps for network cards.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Network cards that the saved machine did not have. They come into its spare places, where its driver has to look for
    /// them again.
    #[serde(default)]
    pub network_additions: Vec<config::NetworkInterface>,
    /// Directories that the saved machine did not share, in such places as well.
    #[serde(default)]
    pub share_additions: Vec<config::Share>,
    /// Another socket for the socket device.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
}

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The file, or the socket.
    pub backend_path: PathBuf,
    /// What it is.
    pub backend_type: BackendType,
}

/// How memory comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum BackendType {
    /// A file is mapped.
    File,
    /// A process at a Unix socket brings pages as they are touched ([`served`]).
    Uffd,
}

/// Another tap for a network card.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which card.
    pub iface_id: String,
    /// The tap.
    pub host_dev_name: String,
}

/// Another socket for the socket device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Its path.
    pub uds_path: PathBuf,
}

impl Load {
    /// Gets the memory of such a machine, and what has to be kept for as long as it is used.
    ///
    /// # Errors
    /// [`Error::NoMemory`] when it is not said where it is, or twice, [`Error::ServedAndShared`], or what [`memory::load`],
    /// [`memory::copy`] and [`served::connect`] say.
    pub fn memory(&self, config: &config::Config) -> Result<(Memory, Option<OwnedFd>), Error> {
        let (kind, path) = match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), None) => (backend.backend_type, &backend.backend_path),
            (None, Some(path)) => (BackendType::File, path),
            _ => return Err(Error::NoMemory),
        };
        let shared = !self.share_additions.is_empty();
        match kind {
            BackendType::Uffd if shared => Err(Error::ServedAndShared),
            BackendType::File if shared => Ok((memory::copy(config.into(), path)?, None)),
            BackendType::File => {
                let tracked = config.machine_config.track_dirty_pages;
                Ok((memory::load(config.into(), path, tracked)?, None))
            }
            BackendType::Uffd => {
                let (memory, descriptor) = served::connect(config, path)?;
                Ok((memory, Some(descriptor)))
            }
        }
    }

    /// Makes the changes to what the machine is made of.
    ///
    /// # Errors
    /// [`Error::NoDevice`] when there is nothing to change, [`Error::Config`] when there is no place for something new,
    /// [`Error::NotSaved`] for a machine that nobody can have saved.
    pub fn apply(&self, config: &mut config::Config) -> Result<(), Error> {
        Error::check_served(config)?;
        for change in &self.network_overrides {
            let mut interfaces =
                config.network_interfaces.iter_mut().chain(&mut config.late_network_interfaces);
            let interface = interfaces.find(|interface| interface.iface_id == change.iface_id);
            let interface = interface.ok_or_else(|| Error::NoDevice(change.iface_id.clone()))?;
            interface.host_dev_name.clone_from(&change.host_dev_name);
        }
        if let Some(change) = &self.vsock_override {
            let vsock = config.vsock.as_mut().ok_or_else(|| Error::NoDevice("vsock".into()))?;
            vsock.uds_path.clone_from(&change.uds_path);
        }
        config.late_network_interfaces.extend_from_slice(&self.network_additions);
        // A machine that shares is never saved, so that nobody has to know which of its places were spare.
        let places = config.spare_places;
        let left = usize::from(places).checked_sub(self.share_additions.len());
        config.spare_places = left.ok_or(config::Error::NoSparePlace(places))? as u8;
        config.shares.extend_from_slice(&self.share_additions);
        config.check()?;
        config.machine_config.track_dirty_pages = self.track_dirty_pages || self.enable_diff_snapshots;
        Ok(())
    }
}

/// The sections of a state file. Only the configuration was looked into.
pub struct Saved<'a> {
    /// What the machine is made of.
    pub config: config::Config,
    /// Clock and interrupt controllers.
    pub machine: &'a [u8],
    /// Processors.
    pub cpus: Vec<&'a [u8]>,
    /// The serial port.
    pub console: &'a [u8],
    /// The keyboard.
    pub keyboard: &'a [u8],
    /// A section for each device comes.
    pub devices: SectionReader<'a>,
}

impl<'a> Saved<'a> {
    /// Finds them.
    ///
    /// # Errors
    /// [`Error`] says which is missing or impossible.
    pub fn find(state: &'a State) -> Result<Self, Error> {
        let mut sections = state.sections();
        let config = config::Config::parse(sections.take("config")?)?;
        let machine = sections.take("machine")?;
        let cpus = (0..config.machine_config.vcpu_count).map(|_| sections.take("cpu"));
        let cpus = cpus.collect::<Result<_, _>>()?;
        let (console, keyboard) = (sections.take("console")?, sections.take("keyboard")?);
        Ok(Saved { config, machine, cpus, console, keyboard, devices: sections })
    }
}

/// Why a machine cannot be saved or continued.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Only a machine that does not run stands still.
    #[error("the microVM has to be paused")]
    NotPaused,
    /// The first bytes are others.
    #[error("the state file is not a snapshot of this program")]
    NotASnapshot,
    /// Of another version of the format.
    #[error("the snapshot has version {0} of the format and this program reads version {version}", version = format::VERSION)]
    Version(u32),
    /// No snapshot is so large.
    #[error("the state file is larger than any snapshot")]
    TooLarge,
    /// It was cut or something was added.
    #[error("the state file should have {expected} bytes after its header and has {found}: was it cut?")]
    Length {
        /// As its header says.
        expected: u64,
        /// As there are.
        found: u64,
    },
    /// It was changed.
    #[error("the state file is damaged: its checksum is another")]
    Checksum,
    /// Something else comes.
    #[error("the state file has no section {0:?} where it should be")]
    Section(&'static str),
    /// A section's contents.
    #[error(transparent)]
    State(#[from] StateError),
    /// What the machine is made of.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The memory's file.
    #[error("the memory file should have {expected} bytes and has {found}")]
    MemorySize {
        /// As the machine has.
        expected: u64,
        /// As the file has.
        found: u64,
    },
    /// The memory's file has to be named once.
    #[error("either mem_backend or mem_file_path says where the memory is")]
    NoMemory,
    /// Both at once.
    #[error("memory that another process brings cannot be shared with those that serve directories")]
    ServedAndShared,
    /// Other processes' devices. The words are Firecracker's.
    #[error(
        "Cannot save the microVM state: Operation not allowed: Devices without snapshot support are present: {0}"
    )]
    NotSaved(String),
    /// A change for what is not there.
    #[error("the snapshot has no device {0}")]
    NoDevice(String),
    /// KVM does not tell or take a state.
    #[error(transparent)]
    Kvm(#[from] x86::state::Error),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] Box<builder::Error>),
}

impl Error {
    /// Refuses a machine with devices whose state other processes have.
    ///
    /// # Errors
    /// [`Error::NotSaved`].
    pub fn check_served(config: &config::Config) -> Result<(), Self> {
        let devices = config.served_elsewhere();
        if devices.is_empty() { Ok(()) } else { Err(Error::NotSaved(devices.join(","))) }
    }

    fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        Error::File { action, path: path.to_owned(), source }
    }
}
