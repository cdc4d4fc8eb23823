//! What a machine is made of: a JSON document with Firecracker's names. What is not built is not a name here, and an
//! unknown name is an error.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kapsel_devices::rate::{Limit, Limits};
use kapsel_devices::vhost_user::TAG_MAX;
use serde::{Deserialize, Serialize};

use crate::mac::Mac;
use crate::memory::HugePages;
use crate::x86::template;
use crate::{hotplug, log, metrics, mmds, serial};

/// Most processors of a machine.
pub const CPUS_MAX: u8 = 32;
/// Most memory of a machine, in MiB.
pub const MEMORY_MAX_MIB: u64 = 64 * 1024;
/// What a kernel is told when nothing else is: reset by the keyboard controller, one second after a panic; no modules; no
/// serial port; nothing to look for behind the keyboard controller.
pub const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// A whole machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Kernel, initrd and command line. A machine cannot start without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// Processors and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Disks.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Network cards.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Places that the guest is told of and finds empty, for network cards and shared directories that come with a clone.
    /// Firecracker has no such thing with virtio-mmio.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub spare_places: u8,
    /// Network cards in those places.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub late_network_interfaces: Vec<NetworkInterface>,
    /// Directories of the host, which Firecracker does not share. They are the last devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
    /// Sockets between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// The entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// The metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<mmds::Config>,
    /// Memory that can be plugged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<hotplug::Config>,
    /// Changes to the processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<template::Source>,
    /// The serial console's output. As with Firecracker it can be set through the API alone, and is in no snapshot.
    #[serde(skip)]
    pub serial: serial::Settings,
    /// The log.
    #[serde(default, skip_serializing)]
    pub logger: Option<log::Settings>,
    /// Where counters are told.
    #[serde(default, skip_serializing)]
    pub metrics: Option<metrics::Settings>,
}

fn is_zero(number: &u8) -> bool {
    *number == 0
}

/// What the machine starts from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// A 64-bit ELF image or a bzImage.
    pub kernel_image_path: PathBuf,
    /// The initial root file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The command line; [`DEFAULT_BOOT_ARGS`] when it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// Processors and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How many processors, at most [`CPUS_MAX`].
    pub vcpu_count: u8,
    /// How much memory, in MiB, at most [`MEMORY_MAX_MIB`].
    pub mem_size_mib: u64,
    /// Two processors to a core. Only `false` is possible: each has a core of its own.
    #[serde(default)]
    pub smt: bool,
    /// A log of written pages, so that a snapshot can hold only those ([`snapshot::Kind::Diff`](crate::snapshot::Kind)).
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The pages behind the memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// Changes to a [`MachineConfig`]; what is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    vcpu_count: Option<u8>,
    mem_size_mib: Option<u64>,
    smt: Option<bool>,
    track_dirty_pages: Option<bool>,
    huge_pages: Option<HugePages>,
}

impl MachineConfigUpdate {
    /// Makes the changes.
    pub fn apply(self, config: &mut MachineConfig) {
        config.vcpu_count = self.vcpu_count.unwrap_or(config.vcpu_count);
        config.mem_size_mib = self.mem_size_mib.unwrap_or(config.mem_size_mib);
        config.smt = self.smt.unwrap_or(config.smt);
        config.track_dirty_pages = self.track_dirty_pages.unwrap_or(config.track_dirty_pages);
        config.huge_pages = self.huge_pages.unwrap_or(config.huge_pages);
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, which the guest sees as its serial number.
    pub drive_id: String,
    /// A file or a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Instead of it, the socket of a process that serves the disk (vhost-user), or `fd:` and the number of a connection to it that this
    /// process was started with. What the disk is like that process says: of the other settings only the cache is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Whether the kernel shall mount it as its root.
    pub is_root_device: bool,
    /// Whether the guest may only read. Of a file; it may be written to where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_read_only: Option<bool>,
    /// Whether the guest can make its writes durable.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How fast it may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// How requests are done. Only `Sync` is possible.
    #[serde(default)]
    pub io_engine: IoEngine,
}

/// Who serves a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing<'a> {
    /// The monitor, from this file.
    File(&'a Path),
    /// The process at this socket.
    Socket(&'a str),
}

impl Drive {
    /// Who serves it.
    ///
    /// # Errors
    /// [`Error::Backing`] when nobody does, or two, or one who could not keep to a setting.
    pub fn backing(&self) -> Result<Backing<'_>, Error> {
        let plain = self.is_read_only.is_none()
            && self.rate_limiter.is_none()
            && self.io_engine == IoEngine::default();
        match (&self.path_on_host, &self.socket) {
            (Some(path), None) => Ok(Backing::File(path)),
            (None, Some(socket)) if plain => Ok(Backing::Socket(socket)),
            _ => Err(Error::Backing),
        }
    }

    /// Whether the guest may only read, as far as it is said.
    pub fn read_only(&self) -> bool {
        self.is_read_only.unwrap_or(false)
    }
}

/// A directory of the host, served by another process (virtio-fs by vhost-user).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// By which the guest mounts it: 1 to 36 bytes.
    pub tag: String,
    /// The process's socket, or `fd:` and the number of a connection to it that this process was started with.
    pub socket: String,
}

/// How a disk's requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub enum IoEngine {
    /// One after the other.
    #[default]
    Sync,
}

/// Limits, each absent for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Requests or packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A limit; a size or a refill time of zero is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// How much passes at once.
    pub size: u64,
    /// How much passes beside that, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// How many milliseconds it takes until so much may pass again.
    pub refill_time: u64,
}

impl From<TokenBucket> for Limit {
    fn from(bucket: TokenBucket) -> Self {
        Limit {
            size: bucket.size,
            burst: bucket.one_time_burst.unwrap_or(0),
            refill: Duration::from_millis(bucket.refill_time),
        }
    }
}

impl From<RateLimiter> for Limits {
    fn from(limiter: RateLimiter) -> Self {
        Limits { bandwidth: limiter.bandwidth.map(Limit::from), operations: limiter.ops.map(Limit::from) }
    }
}

impl RateLimiter {
    /// Takes the limits over that an update has.
    pub fn update(&mut self, other: RateLimiter) {
        self.bandwidth = other.bandwidth.or(self.bandwidth);
        self.ops = other.ops.or(self.ops);
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name.
    pub iface_id: String,
    /// The tap device of the host that it is connected to, or `fd:` and the number of a tap's descriptor that this process
    /// was started with; no device can have such a name.
    pub host_dev_name: String,
    /// Its address; the guest makes one up if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<Mac>,
    /// The longest packet that the guest shall send, in bytes, from 68 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How fast the guest may receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How fast the guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// What a guest's flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub enum CacheType {
    /// Nothing: the disk does not offer it, and writes are durable when the host sees fit.
    #[default]
    Unsafe,
    /// It makes what was written durable.
    Writeback,
}

/// Sockets.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// A name, which nothing uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's address, from 3 on.
    pub guest_cid: u32,
    /// The host's socket; it is made.
    pub uds_path: PathBuf,
}

/// The memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How large it shall be, in MiB.
    pub amount_mib: u32,
    /// The guest takes pages back rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest gives free pages back at all times.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// How many seconds there are between the guest's statistics; 0 for none.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
}

/// Another size for the balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// How large it shall be, in MiB.
    pub amount_mib: u32,
}

/// Another interval for the balloon's statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsUpdate {
    /// In seconds.
    pub stats_polling_interval_s: u16,
}

/// The entropy device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How much the guest gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What is wrong with a configuration. The texts are Firecracker's where it has the same error, because clients look at them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or with other names than these.
    #[error("the configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// Processors.
    #[error(
        "Machine config error: The number of vCPUs must be greater than 0, less than {CPUS_MAX} and must be 1 or an even number if SMT is enabled."
    )]
    Cpus,
    /// Memory; there is a largest one, too ([`MEMORY_MAX_MIB`]).
    #[error(
        "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
    )]
    Memory,
    /// A setting of Firecracker's with one possible value here.
    #[error("Machine config error: {0} can only be false")]
    Unsupported(&'static str),
    /// The balloon was there first.
    #[error(
        "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size."
    )]
    MemoryBelowBalloon,
    /// The memory was there first.
    #[error("Balloon config error: Amount of pages requested is too large.")]
    BalloonAboveMemory,
    /// Names of disks.
    #[error(
        "Drive config error: the drive_id {0:?} is used twice, or is not made of letters, digits and underscores"
    )]
    DriveId(String),
    /// Names of network cards.
    #[error(
        "Network config error: the iface_id {0:?} is used twice, or is not made of letters, digits and underscores"
    )]
    InterfaceId(String),
    /// Addresses of network cards.
    #[error("Network config error: The MAC address is already in use: {0}")]
    MacInUse(Mac),
    /// A packet's length.
    #[error("Network config error: the mtu is at least {MTU_MIN}, not {0}")]
    Mtu(u16),
    /// More cards than were expected.
    #[error("there are {0} spare places, which is not enough")]
    NoSparePlace(u8),
    /// The metadata service. The word is Firecracker's.
    #[error("MMMDS config error: {0}")]
    Mmds(#[from] mmds::ConfigError),
    /// A disk is one file's, or one process's.
    #[error("Drive config error: Unable to create the virtio block device: Invalid block config.")]
    Backing,
    /// Shared directories.
    #[error("Share config error: the tag {0:?} is used twice, or has not 1 to {TAG_MAX} bytes")]
    Tag(String),
    /// Memory that can be plugged.
    #[error("Memory hotplug config error: {0}")]
    Hotplug(#[from] hotplug::ConfigError),
    /// Root disks.
    #[error("Drive config error: A root block device already exists!")]
    TwoRoots,
}

/// The shortest longest packet that IPv4 allows.
const MTU_MIN: u16 = 68;

/// Whether it can be a device's name.
fn plain(id: &str) -> bool {
    !id.is_empty() && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

impl Config {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`Error`] says which part of it is impossible.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let config: Config = serde_json::from_slice(json)?;
        config.check()?;
        Ok(config)
    }

    /// Whether there can be such a machine.
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn check(&self) -> Result<(), Error> {
        let MachineConfig { vcpu_count, mem_size_mib, smt, huge_pages, .. } = self.machine_config;
        if smt {
            return Err(Error::Unsupported("smt"));
        }
        if !(1..=CPUS_MAX).contains(&vcpu_count) {
            return Err(Error::Cpus);
        }
        let odd = huge_pages == HugePages::TwoMegabytes && mem_size_mib % 2 != 0;
        if !(1..=MEMORY_MAX_MIB).contains(&mem_size_mib) || odd {
            return Err(Error::Memory);
        }
        if let Some(balloon) = self.balloon
            && u64::from(balloon.amount_mib) > mem_size_mib
        {
            return Err(Error::BalloonAboveMemory);
        }
        self.memory_hotplug.as_ref().map_or(Ok(()), hotplug::Config::check)?;
        self.check_interfaces()?;
        for (index, Share { tag, .. }) in self.shares.iter().enumerate() {
            let fits = (1..=TAG_MAX).contains(&tag.len()) && !tag.contains('\0');
            if !fits || self.shares[..index].iter().any(|other| other.tag == *tag) {
                return Err(Error::Tag(tag.clone()));
            }
        }
        let mut root = false;
        for (index, drive) in self.drives.iter().enumerate() {
            let id = &drive.drive_id;
            if !plain(id) || self.drives[..index].iter().any(|other| other.drive_id == *id) {
                return Err(Error::DriveId(id.clone()));
            }
            drive.backing()?;
            if drive.is_root_device && std::mem::replace(&mut root, true) {
                return Err(Error::TwoRoots);
            }
        }
        Ok(())
    }

    fn check_interfaces(&self) -> Result<(), Error> {
        if self.late_network_interfaces.len() > self.spare_places.into() {
            return Err(Error::NoSparePlace(self.spare_places));
        }
        let all = || self.network_interfaces.iter().chain(&self.late_network_interfaces);
        for (index, interface) in all().enumerate() {
            let (id, mut earlier) = (&interface.iface_id, all().take(index));
            if !plain(id) || earlier.clone().any(|other| other.iface_id == *id) {
                return Err(Error::InterfaceId(id.clone()));
            }
            if let Some(mac) = interface.guest_mac
                && earlier.any(|other| other.guest_mac == Some(mac))
            {
                return Err(Error::MacInUse(mac));
            }
            if let Some(mtu) = interface.mtu.filter(|mtu| *mtu < MTU_MIN) {
                return Err(Error::Mtu(mtu));
            }
        }
        if let Some(mmds) = &self.mmds_config {
            mmds.check(all().map(|interface| interface.iface_id.as_str()))?;
        }
        Ok(())
    }

    /// Devices that other processes serve, in words; empty if there are none. The guest's memory has to be shared with those, and
    /// nobody can save their state.
    pub fn served_elsewhere(&self) -> Vec<String> {
        let disks = self.drives.iter().filter(|drive| drive.socket.is_some());
        let disks = disks.map(|drive| format!("vhost-user-block(id: {})", drive.drive_id));
        let shares = self.shares.iter().map(|share| format!("vhost-user-fs(tag: {})", share.tag));
        disks.chain(shares).collect()
    }

    /// Disks in the order in which the guest sees them: the root first.
    pub fn ordered_drives(&self) -> Vec<&Drive> {
        let mut drives: Vec<_> = self.drives.iter().collect();
        drives.sort_by_key(|drive| !drive.is_root_device);
        drives
    }

    /// The kernel's command line, with the root disk if there is one.
    pub fn command_line(&self) -> String {
        let arguments = self.boot_source.as_ref().and_then(|source| source.boot_args.as_deref());
        let mut line = arguments.unwrap_or(DEFAULT_BOOT_ARGS).to_owned();
        // There is no PCI, and looking for it takes many exits.
        line.push_str(" pci=off");
        if let Some(root) = self.drives.iter().find(|drive| drive.is_root_device) {
            line.push_str(if root.read_only() { " root=/dev/vda ro" } else { " root=/dev/vda rw" });
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(rest: &str) -> Result<Config, Error> {
        Config::parse(format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}{rest}}}"#).as_bytes())
    }

    fn drive(id: &str, root: bool) -> String {
        format!(
            r#"{{"drive_id": "{id}", "path_on_host": "d", "is_root_device": {root}, "is_read_only": true}}"#
        )
    }

    fn socket(more: &str) -> String {
        format!(r#","drives":[{{"drive_id":"a","is_root_device":false,"socket":"s"{more}}}]"#)
    }

    #[test]
    fn who_serves_what_is_known() {
        let shares = r#","shares":[{"tag":"work","socket":"fd:20"}]"#;
        let config = parse(&(socket(r#","cache_type":"Writeback""#) + shares)).unwrap();
        assert_eq!(config.drives[0].backing().unwrap(), Backing::Socket("s"));
        assert_eq!(config.served_elsewhere(), ["vhost-user-block(id: a)", "vhost-user-fs(tag: work)"]);
        assert!(
            parse(&format!(r#","drives":[{}]"#, drive("a", false))).unwrap().served_elsewhere().is_empty()
        );
    }

    fn interface(id: &str) -> String {
        format!(r#"{{"iface_id":"{id}","host_dev_name":"t","guest_mac":"06:00:00:00:00:01"}}"#)
    }

    #[test]
    fn the_smallest_configuration_has_the_documented_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.machine_config, MachineConfig::default());
        assert_eq!(config.command_line(), format!("{DEFAULT_BOOT_ARGS} pci=off"));
    }

    #[test]
    fn the_root_disk_is_first_and_on_the_command_line() {
        let config =
            parse(&format!(r#","drives":[{},{}]"#, drive("data", false), drive("root", true))).unwrap();
        assert_eq!(config.ordered_drives()[0].drive_id, "root");
        assert!(config.command_line().ends_with("root=/dev/vda ro"));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for rest in [
            r#","machine-config":{"vcpu_count":0,"mem_size_mib":128}"#.to_owned(),
            r#","machine-config":{"vcpu_count":33,"mem_size_mib":128}"#.to_owned(),
            r#","machine-config":{"vcpu_count":1,"mem_size_mib":0}"#.to_owned(),
            r#","machine-config":{"vcpu_count":1,"mem_size_mib":65537}"#.to_owned(),
            r#","machine-config":{"vcpu_count":1,"mem_size_mib":129,"huge_pages":"2M"}"#.to_owned(),
            r#","machine-config":{"vcpu_count":1,"mem_size_mib":128,"smt":true}"#.to_owned(),
            r#","balloon":{"amount_mib":129,"deflate_on_oom":true}"#.to_owned(),
            r#","network-interfaces":[{"iface_id":"a","host_dev_name":"t","mtu":67}]"#.to_owned(),
            r#","network-interfaces":[{"iface_id":"a","host_dev_name":"t","guest_mac":"02:00"}]"#.to_owned(),
            format!(r#","network-interfaces":[{0},{0}]"#, r#"{"iface_id":"a","host_dev_name":"t"}"#),
            format!(r#","network-interfaces":[{},{}]"#, interface("a"), interface("b")),
            r#","late-network-interfaces":[{"iface_id":"a","host_dev_name":"t"}]"#.to_owned(),
            format!(
                r#","spare-places":9,"network-interfaces":[{0}],"late-network-interfaces":[{0}]"#,
                r#"{"iface_id":"a","host_dev_name":"t"}"#
            ),
            r#","mmds-config":{"network_interfaces":["a"]}"#.to_owned(),
            r#","entropy":{"rate":{}}"#.to_owned(),
            format!(r#","drives":[{},{}]"#, drive("a", true), drive("b", true)),
            format!(r#","drives":[{},{}]"#, drive("a", true), drive("a", false)),
            format!(r#","drives":[{}]"#, drive("a-b", false)),
            format!(r#","drives":[{}]"#, drive("", false)),
            r#","drives":[{"drive_id":"a","is_root_device":false}]"#.to_owned(),
            socket(r#","path_on_host":"d""#),
            socket(r#","is_read_only":false"#),
            socket(r#","rate_limiter":{}"#),
            r#","shares":[{"tag":"","socket":"s"}]"#.to_owned(),
            r#","shares":[{"tag":"a","socket":"s"},{"tag":"a","socket":"t"}]"#.to_owned(),
            format!(r#","shares":[{{"tag":"{}","socket":"s"}}]"#, "x".repeat(37)),
        ] {
            assert!(parse(&rest).is_err(), "{rest}");
        }
    }
}
