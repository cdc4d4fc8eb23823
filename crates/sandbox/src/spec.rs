//! From an image's configuration and what a person asked for to an OCI runtime specification.

mod defaults;
mod options;
mod process;
mod signal;
mod syscalls;

use std::path::PathBuf;

pub use defaults::GUEST_RESERVE;
use oci_spec::runtime::{
    Hooks, Linux, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, LinuxSeccomp, Mount, MountBuilder, Root,
    Spec,
};
pub use options::{ImageDefaults, Limits, RunOptions, Seccomp, Tmpfs, Ulimit, Volume};
pub use process::{ExecOptions, INIT, exec_process};
pub use signal::{parse_signal, signal_name};

use crate::annotations::Wishes;

/// What cannot be turned into a container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither image nor person said what to run.
    #[error("nothing to run: the image has no command; give one after the image's name")]
    NoCommand,
    /// A flag's value has the wrong form.
    #[error("{what} {value:?} is not valid: expected {expected}")]
    BadValue {
        /// The flag's meaning.
        what: &'static str,
        /// Its value.
        value: String,
        /// The form.
        expected: &'static str,
    },
    /// A volume's source is missing.
    #[error("volume source {path} cannot be used: {source}; create it first")]
    VolumeSource {
        /// The host's path.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Two things want the same place.
    #[error("{0} is mounted twice; give each volume and tmpfs a place of its own")]
    DuplicateMount(PathBuf),
    /// A capability's name.
    #[error("unknown capability {0:?}; see capabilities(7)")]
    UnknownCapability(String),
    /// The seccomp file.
    #[error("cannot use seccomp profile {path}: {reason}")]
    SeccompFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Whether a profile is the one that a container with the default capabilities gets.
pub fn is_default_profile(profile: &LinuxSeccomp) -> bool {
    *profile == syscalls::default_profile(&defaults::capabilities())
}

/// Builds the specification of one container in a sandbox of its own.
///
/// The result is complete in itself: nothing of the image's configuration is needed later. Users stay names here
/// (`process.user.username`): only the guest looks into the image's `/etc/passwd`.
///
/// # Errors
/// When there is nothing to run, or an option cannot be followed.
pub fn build(image: &ImageDefaults, options: &RunOptions) -> Result<Spec, Error> {
    let process = process::init_process(image, options)?;
    let mounts = mounts(image, options)?;
    let capabilities = process.capabilities().as_ref().and_then(|c| c.bounding().clone()).unwrap_or_default();
    let seccomp = match &options.seccomp {
        Seccomp::Default => Some(syscalls::default_profile(&capabilities)),
        Seccomp::Unconfined => None,
        Seccomp::File(path) => Some(read_profile(path)?),
    };

    let mut root = Root::default();
    root.set_path("rootfs".into()).set_readonly(Some(options.read_only));
    let mut spec = Spec::default();
    spec.set_version("1.2.0".into())
        .set_process(Some(process))
        .set_root(Some(root))
        .set_hostname(options.hostname.clone())
        .set_mounts(Some(mounts))
        .set_annotations(Some(wishes(image, options)?.to_annotations()))
        .set_hooks(None::<Hooks>)
        .set_linux(Some(linux(&options.limits, seccomp)));
    Ok(spec)
}

fn wishes(image: &ImageDefaults, options: &RunOptions) -> Result<Wishes, Error> {
    let stop_signal = options.stop_signal.as_ref().or(image.stop_signal.as_ref());
    let stop_signal = stop_signal
        .map(|name| {
            parse_signal(name).ok_or_else(|| Error::BadValue {
                what: "stop signal",
                value: name.clone(),
                expected: "a signal such as SIGTERM or 15",
            })
        })
        .transpose()?;
    Ok(Wishes {
        isolation: options.isolation,
        // The machine must hold the container's share and what the guest's kernel and agent need beside it.
        memory: options.limits.memory.map(|limit| limit + defaults::GUEST_RESERVE),
        cpus: options.limits.cpus.map(whole_cpus),
        cold: options.cold,
        storage: options.storage,
        network: Some(options.network.clone()),
        dns: options.dns.clone(),
        add_hosts: options.add_hosts.clone(),
        publish: options.publish.clone(),
        stop_signal,
        pod: false,
    })
}

/// The machine has whole processors; the guest's cgroup gives the fraction.
fn whole_cpus(cpus: f64) -> u32 {
    cpus.ceil().clamp(1.0, 64.0) as u32
}

fn linux(limits: &Limits, seccomp: Option<LinuxSeccomp>) -> Linux {
    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(defaults::namespaces()))
        .set_masked_paths(Some(defaults::masked_paths()))
        .set_readonly_paths(Some(defaults::readonly_paths()))
        .set_devices(None)
        .set_resources(Some(resources(limits)))
        .set_seccomp(seccomp);
    linux
}

/// The limits as the guest's cgroup gets them; also the body of an update.
pub fn resources(limits: &Limits) -> LinuxResources {
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(defaults::device_rules()));
    if let Some(memory) = limits.memory {
        let mut wanted = LinuxMemory::default();
        // No swap in the guest: the sum is the memory alone.
        let bytes = i64::try_from(memory).unwrap_or(i64::MAX);
        wanted.set_limit(Some(bytes)).set_swap(Some(bytes));
        resources.set_memory(Some(wanted));
    }
    if let Some(cpus) = limits.cpus.filter(|cpus| cpus.fract() != 0.0) {
        const PERIOD: u32 = 100_000;
        let mut wanted = LinuxCpu::default();
        wanted.set_period(Some(u64::from(PERIOD))).set_quota(Some((cpus * f64::from(PERIOD)) as i64));
        resources.set_cpu(Some(wanted));
    }
    if let Some(limit) = limits.pids.filter(|&limit| limit > 0) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    resources
}

fn mounts(image: &ImageDefaults, options: &RunOptions) -> Result<Vec<Mount>, Error> {
    let mut mounts = defaults::mounts(options.shm_size);
    let mut taken = Vec::new();
    for tmpfs in &options.tmpfs {
        taken.push(tmpfs.destination.clone());
        let mut flags = vec!["nosuid".to_owned(), "nodev".into(), "noexec".into()];
        for option in &tmpfs.options {
            // As in Docker: `exec` given by the person takes the default's `noexec` away.
            flags.retain(|flag| flag.strip_prefix("no") != Some(option.as_str()) && flag != option);
            flags.push(option.clone());
        }
        mounts.push(mount("tmpfs", "tmpfs".into(), &tmpfs.destination, flags));
    }
    for volume in &options.volumes {
        let source = std::fs::canonicalize(&volume.source)
            .map_err(|source| Error::VolumeSource { path: volume.source.clone(), source })?;
        taken.push(volume.destination.clone());
        let access = if volume.read_only { "ro" } else { "rw" };
        mounts.push(mount(
            "bind",
            source,
            &volume.destination,
            vec!["rbind".into(), "rprivate".into(), access.into()],
        ));
    }
    taken.sort();
    if let Some(twice) = taken.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::DuplicateMount(twice[0].clone()));
    }
    // The image says it writes there: that must work with a read-only root too.
    if options.read_only {
        for volume in image.volumes.iter().map(PathBuf::from).filter(|path| !taken.contains(path)) {
            mounts.push(mount("tmpfs", "tmpfs".into(), &volume, vec!["nosuid".into(), "nodev".into()]));
        }
    }
    // A mount must not cover one that came before it: shallow ones first (the sort keeps equals in order).
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

pub(crate) fn mount(
    kind: &str,
    source: PathBuf,
    destination: &std::path::Path,
    options: Vec<String>,
) -> Mount {
    let mut mount = MountBuilder::default().build().unwrap_or_default();
    mount
        .set_typ(Some(kind.into()))
        .set_source(Some(source))
        .set_destination(destination.into())
        .set_options(Some(options));
    mount
}

fn read_profile(path: &std::path::Path) -> Result<LinuxSeccomp, Error> {
    let bad = |reason: String| Error::SeccompFile { path: path.into(), reason };
    let text = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| bad(format!("not an OCI linux.seccomp object: {e}")))
}

#[cfg(test)]
mod tests;
