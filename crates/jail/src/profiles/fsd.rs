//! kapsel-fsd's jail.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::caps::{Cap, CapSet};
use crate::error::{Error, Result};
use crate::filters;
use crate::identity::Identity;
use crate::jail::{Access, Beneath, Jail, Resource};

/// A host directory, or files, to share with a guest.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    /// One directory; or files, which the guest then finds by their places in this list (`0`, `1`, …) in a directory that
    /// holds nothing else.
    pub sources: &'a [PathBuf],
    /// Whether the guest may only read. Enforced by the mount in the jail and by the file server.
    pub read_only: bool,
    /// Whether what is mounted in the directory later, on the host, is served too, and what is unmounted no more. The directory must
    /// be a shared mount; itself it cannot be written to.
    pub follow: bool,
    /// The virtio-fs tag to report, for monitors that ask for it (QEMU has it as a device property).
    pub tag: Option<&'a str>,
}

/// Descriptors that a guest can make the server hold: one per file that the guest has cached or open. A bound on the host kernel's
/// memory (about 1 KiB each), and far above what a guest of a few GiB caches.
const OPEN_FILES: u64 = 256 << 10;

/// What a writable share needs, for the guest's root to be a root over these files: create as any user, change owner and mode, pass
/// permission bits, keep set-id bits. Not CAP_MKNOD: a device node on the host is no file. Not CAP_SETFCAP, which gives
/// programs on the host capabilities. Not CAP_DAC_READ_SEARCH, which opens files by handle, anywhere.
const WRITE_CAPS: CapSet =
    CapSet::of(&[Cap::Chown, Cap::DacOverride, Cap::Fowner, Cap::Fsetid, Cap::Setuid, Cap::Setgid]);

/// What a read-only share needs: reading whatever the guest's root may read. Opening by handle is not on the filter's list.
const READ_CAPS: CapSet = CapSet::of(&[Cap::DacReadSearch]);

/// The number of the socket in the child.
const SOCKET: i32 = 3;

/// kapsel-fsd's jail for one share of sandbox `id`. `socket` is a listening Unix socket; the first connection to it is served until
/// it ends, and the process with it.
///
/// The share is at `/share`, with the file systems that are mounted beneath it, but not the kernel's own (/proc, /sys, …): those are hidden,
/// and sharing one itself is an error. As root, a writable share is served as user 0 with six capabilities, a
/// read-only one as the sandbox's user with one; otherwise as ourselves, and our files are the guest's root's.
///
/// # Errors
/// When the program, or the shared file or directory, cannot be used.
pub fn fsd(program: &Path, share: Share<'_>, socket: OwnedFd, id: &str) -> Result<Jail> {
    let access = if share.read_only { Access::Read } else { Access::Write };
    let mut jail = Jail::new("kapsel-fsd")
        .program_with_libraries(program)?
        .own_descriptors("/fd")
        .args(["--share", "/share", "--socket-fd", "3"])
        .fd(socket, SOCKET)
        .rlimit(Resource::OpenFiles, OPEN_FILES)
        .seccomp(filters::fsd()?)
        // The server applies the guest's own mask.
        .umask(0);
    jail = bind_sources(jail, share, access)?;
    if share.read_only {
        jail = jail.arg("--read-only");
    }
    if let Some(tag) = share.tag {
        jail = jail.args(["--tag", tag]);
    }
    Ok(match (rustix::process::geteuid().is_root(), share.read_only) {
        (true, true) => jail.identity(Identity::of_sandbox(id)).capabilities(READ_CAPS),
        (true, false) => jail.identity(Identity::Ids { uid: 0, gid: 0 }).capabilities(WRITE_CAPS),
        (false, _) => jail.arg("--map-owner"),
    })
}

fn bind_sources(mut jail: Jail, share: Share<'_>, access: Access) -> Result<Jail> {
    let failed = |path: &Path, source| Error::Prepare {
        name: "kapsel-fsd".to_owned(),
        action: "share",
        subject: path.display().to_string(),
        source,
    };
    if let [directory] = share.sources
        && directory.metadata().map_err(|error| failed(directory, error))?.is_dir()
    {
        let beneath = if share.follow { Beneath::Always } else { Beneath::Now };
        return Ok(jail.bind(directory, "/share", access, beneath));
    }
    jail = jail.directory("/share");
    for (place, file) in share.sources.iter().enumerate() {
        if !file.metadata().map_err(|error| failed(file, error))?.is_file() {
            let what = "it is neither a directory of its own nor a regular file";
            return Err(failed(file, io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        jail = jail.bind(file, Path::new("/share").join(place.to_string()), access, Beneath::Now);
    }
    Ok(jail)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// What a jailed `ls -A` says that the server would find.
    fn listing(source: &Path, path: &str) -> String {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let jail = Jail::new("busybox")
            .program("/bin/busybox")
            .bind_exec("/bin/busybox", "/bin/busybox")
            .args(["ls", "-A", path])
            .bind(source, "/share", Access::Read, Beneath::Now)
            .stdout(writer.try_clone().unwrap().into())
            .stderr(writer.into());
        let mut child = jail.spawn().unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        child.wait().unwrap();
        text
    }

    #[test]
    fn the_kernels_interfaces_are_no_part_of_a_share() {
        if !rustix::process::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
            println!("skipped: needs root and busybox-static");
            return;
        }
        let root = Path::new("/");
        assert!(listing(root, "/share").contains("etc\n"));
        assert!(listing(root, "/share/etc").contains("passwd\n"));
        for hidden in ["/share/proc", "/share/sys", "/share/dev"] {
            assert_eq!(listing(root, hidden), "", "{hidden}");
        }
        let error =
            Jail::new("x").bind("/proc/sys", "/share", Access::Write, Beneath::Now).spawn().unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains("proc"), "{error}");
    }

    #[test]
    fn only_files_and_directories_can_be_shared() {
        for (sources, refused) in
            [(&["/dev/null"][..], "/dev/null"), (&["/nowhere"], "/nowhere"), (&["/bin/true", "/usr"], "/usr")]
        {
            let sources: Vec<PathBuf> = sources.iter().map(PathBuf::from).collect();
            let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
            let share = Share { sources: &sources, read_only: true, follow: false, tag: None };
            let jail = fsd(Path::new("/bin/true"), share, socket.into(), "id");
            assert!(jail.unwrap_err().to_string().contains(refused));
        }
    }
}
