//! Sets up the file system and serves the monitor's connection until it ends.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{CWD, Mode, OFlags};
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, PassthroughFs};
use virtiofsd::soft_idmap::cmdline::IdMap;
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::args::Args;
use crate::keep_cache::KeepCache;

/// How long the guest may take names and attributes for unchanged. What the host changes is seen after that.
const CACHE_TIME: Duration = Duration::from_secs(1);

/// Descriptors for this process's own use, beside those that the guest makes it hold.
const OWN_DESCRIPTORS: u64 = 64;

/// Serves the directory until the monitor disconnects.
pub fn serve(args: Args) -> Result<()> {
    let config = config(&args)?;
    // SAFETY: the caller of this program passes a descriptor for just this, and nothing else here uses it. If the number is
    // not open, or no socket, `accept` says so.
    let listener = unsafe { Listener::from_raw_fd(args.socket) };
    let share = || format!("cannot serve {}", args.share.display());
    if args.read_only {
        run(KeepCache::new(PassthroughFsRo::new(config).with_context(share)?), listener, args.tag)
    } else {
        run(KeepCache::new(PassthroughFs::new(config).with_context(share)?), listener, args.tag)
    }
}

fn config(args: &Args) -> Result<Config> {
    let share = args.share.to_str().context("--share is not UTF-8")?;
    let maps = args.map_owner.then(owner_maps);
    Ok(Config {
        root_dir: share.to_owned(),
        entry_timeout: CACHE_TIME,
        attr_timeout: CACHE_TIME,
        // The guest caches, and forgets when a file is opened again; not if `KeepCache` knows that it has not changed.
        cache_policy: CachePolicy::Auto,
        // Others may write to the directory meanwhile.
        writeback: false,
        // Off: it costs a request per write, and security.* attributes (file capabilities) are not the guest's to set on the host.
        xattr: false,
        // Off: opening by handle would need a capability with which any file of the host can be opened.
        inode_file_handles: InodeFileHandlesMode::Never,
        // Off, although two files of different mounts may then show one inode number: an announced mount point is one to mount on
        // first use, and overlayfs, which `kapsel do` lays over a share of /, refuses such directories (EREMOTE).
        announce_submounts: false,
        // A guest that clears set-id bits by itself asks for a file's mode before each change of owner. Here they go as on any file of
        // the host's: with the owner, and with a write by somebody who has no right to keep them.
        killpriv_v2: true,
        allow_direct_io: false,
        clean_noatime: true,
        proc_sfd_rawfd: Some(own_descriptors()?),
        uid_map: maps.as_ref().map(|m| m.0.clone()),
        gid_map: maps.map(|m| m.1),
        guest_fd_limit: descriptor_limit()?,
        ..Config::default()
    })
}

/// The directory of our own descriptors, through which an `O_PATH` one is opened for reading or writing. The jail shows it as
/// `/fd`; outside a jail it is where Linux has it.
fn own_descriptors() -> Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |path| rustix::fs::openat(CWD, path, flags, Mode::empty());
    let fd =
        open("/fd").or_else(|_| open("/proc/self/fd")).context("neither /fd nor /proc/self/fd is there")?;
    Ok(fd.into())
}

/// How many descriptors the guest can make us hold: one per file that it has cached, one per file that it has open.
fn descriptor_limit() -> Result<u64> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 20);
    match limit.checked_sub(OWN_DESCRIPTORS) {
        Some(left) if left >= OWN_DESCRIPTORS => Ok(left),
        _ => bail!("{limit} open files are too few to serve a directory: raise the limit (ulimit -n)"),
    }
}

/// Our own user is the guest's root, in both directions. Whatever other user the guest creates a file as, it is ours (we could not give
/// it away); files of others show as nobody's.
fn owner_maps() -> (Vec<IdMap>, Vec<IdMap>) {
    const NOBODY: u32 = 65534;
    let maps = |own: u32| {
        let mut maps = vec![
            IdMap::Guest { from_guest: 0, to_host: own, count: 1 },
            IdMap::SquashGuest { from_guest: 1, to_host: own, count: u32::MAX - 1 },
            IdMap::Host { from_host: own, to_guest: 0, count: 1 },
            IdMap::SquashHost { from_host: own + 1, to_guest: NOBODY, count: u32::MAX - own - 1 },
        ];
        if own > 0 {
            maps.push(IdMap::SquashHost { from_host: 0, to_guest: NOBODY, count: own });
        }
        maps
    };
    (maps(rustix::process::geteuid().as_raw()), maps(rustix::process::getegid().as_raw()))
}

fn run<F>(fs: F, mut listener: Listener, tag: Option<String>) -> Result<()>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    // All is loaded and open: from here on no memory becomes executable. Before any thread starts, as each inherits the filter.
    kapsel_jail::filters::lock_down_fsd()?;
    // Without a thread pool: requests are answered one by one on the queue's thread, which takes a tenth of the memory and is as
    // fast for one guest.
    let backend = VhostUserFsBackendBuilder::default()
        .set_tag(tag)
        .build(fs)
        .map_err(|e| anyhow!("cannot set up the virtio-fs device: {e}"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("kapsel-fsd".to_owned(), Arc::new(backend), memory)
        .map_err(|e| anyhow!("cannot set up the vhost-user back end: {e}"))?;
    daemon.start(&mut listener).map_err(|e| anyhow!("cannot accept the monitor's connection: {e}"))?;
    // One monitor: nobody else is to connect.
    drop(listener);
    match daemon.wait() {
        Ok(()) => Ok(()),
        // The end of the sandbox.
        Err(BackendError::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => Ok(()),
        Err(error) => bail!("the connection to the monitor failed: {error}"),
    }
}
