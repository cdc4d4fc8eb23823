//! The description of a jail: what the child sees, may do and may use.

use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use seccompiler::BpfProgram;

use crate::caps::CapSet;
use crate::cgroup::Cgroup;
use crate::error::Result;
use crate::identity::Identity;
use crate::process::Child;

/// A resource that can be limited (getrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Open descriptors.
    OpenFiles,
    /// Bytes of a file that the process writes.
    FileSize,
    /// Processes and threads of the process's user, counted in its user namespace.
    Processes,
    /// Bytes of locked memory.
    LockedMemory,
    /// Bytes of address space.
    AddressSpace,
}

impl Resource {
    pub(crate) fn number(self) -> libc::__rlimit_resource_t {
        match self {
            Resource::OpenFiles => libc::RLIMIT_NOFILE,
            Resource::FileSize => libc::RLIMIT_FSIZE,
            Resource::Processes => libc::RLIMIT_NPROC,
            Resource::LockedMemory => libc::RLIMIT_MEMLOCK,
            Resource::AddressSpace => libc::RLIMIT_AS,
        }
    }
}

/// Which namespaces the child gets fresh ones of; all by default. The mount namespace is always fresh, and so is the user namespace
/// when we are not root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces {
    /// Network: no interface but an unconfigured loopback.
    pub net: bool,
    /// Processes: the child is number 1, and its end kills all others in it.
    pub pid: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
    /// View of the cgroup tree.
    pub cgroup: bool,
}

impl Default for Namespaces {
    fn default() -> Self {
        Namespaces { net: true, pid: true, ipc: true, uts: true, cgroup: true }
    }
}

/// What may be done beneath a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read.
    Read,
    /// Read, map executable, execute.
    Execute,
    /// Read and write, not execute.
    Write,
}

/// What of the mounts beneath a bound directory is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beneath {
    /// None.
    Nothing,
    /// Those that are there at the start.
    Now,
    /// Those that are there at any time, each as it was made; the directory itself is read-only. It must be a shared mount.
    Always,
}

/// One thing in the jail's file tree.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Bind { host: PathBuf, access: Access, beneath: Beneath },
    Device { host: PathBuf },
    Tmpfs { bytes: u64 },
    Directory,
    OwnDescriptors,
}

/// A confined child process to be: a builder, like [`std::process::Command`] with the defaults turned round. Nothing of ours is
/// inherited: no descriptor, no environment, no file, no privilege; all that the child is to have is named here.
///
/// The order in which the confinement is applied is in `child.rs`, to be read from top to bottom.
#[must_use = "a jail does nothing until it is spawned"]
#[derive(Debug)]
pub struct Jail {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) identity: Identity,
    pub(crate) items: Vec<(PathBuf, Item)>,
    pub(crate) namespaces: Namespaces,
    pub(crate) caps: CapSet,
    pub(crate) rlimits: Vec<(Resource, u64)>,
    pub(crate) umask: u32,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) fds: Vec<(OwnedFd, RawFd)>,
    pub(crate) seccomp: Option<BpfProgram>,
    pub(crate) landlock: bool,
    pub(crate) connect: bool,
}

impl Jail {
    /// An empty jail. `name` appears in errors, and is the child's `argv[0]` until [`Jail::arg0`] gives another.
    pub fn new(name: impl Into<String>) -> Jail {
        let name = name.into();
        Jail {
            program: PathBuf::from("/"),
            args: vec![OsString::from(&name)],
            name,
            env: Vec::new(),
            identity: Identity::Current,
            items: Vec::new(),
            namespaces: Namespaces::default(),
            caps: CapSet::NONE,
            rlimits: Vec::new(),
            umask: 0o077,
            cgroup: None,
            fds: Vec::new(),
            seccomp: None,
            landlock: true,
            connect: false,
        }
    }

    /// The program to execute, by its path *inside*. It must have been bound with [`Jail::bind_exec`], as must its libraries and
    /// dynamic loader; [`Jail::program_with_libraries`] does all of it.
    pub fn program(mut self, inside: impl Into<PathBuf>) -> Jail {
        self.program = inside.into();
        self
    }

    /// Sets `argv[0]`.
    pub fn arg0(mut self, arg0: impl Into<OsString>) -> Jail {
        if let Some(first) = self.args.first_mut() {
            *first = arg0.into();
        }
        self
    }

    /// Appends an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Jail {
        self.args.push(arg.into());
        self
    }

    /// Appends arguments.
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Jail {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment, which is empty otherwise.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Jail {
        self.env.push((key.into(), value.into()));
        self
    }

    /// The user to run as; [`Identity::Current`] by default.
    pub fn identity(mut self, identity: Identity) -> Jail {
        self.identity = identity;
        self
    }

    /// Shows a host file or directory (without what is mounted beneath it) inside: read-only, nosuid, nodev, noexec.
    pub fn bind_ro(self, host: impl AsRef<Path>, inside: impl Into<PathBuf>) -> Jail {
        self.bind(host, inside, Access::Read, Beneath::Nothing)
    }

    /// Like [`Jail::bind_ro`], but what it shows may be executed.
    pub fn bind_exec(self, host: impl AsRef<Path>, inside: impl Into<PathBuf>) -> Jail {
        self.bind(host, inside, Access::Execute, Beneath::Nothing)
    }

    /// Like [`Jail::bind_ro`], but writable.
    pub fn bind_rw(self, host: impl AsRef<Path>, inside: impl Into<PathBuf>) -> Jail {
        self.bind(host, inside, Access::Write, Beneath::Nothing)
    }

    pub(crate) fn bind(
        self,
        host: impl AsRef<Path>,
        inside: impl Into<PathBuf>,
        access: Access,
        beneath: Beneath,
    ) -> Jail {
        let host = host.as_ref().to_owned();
        self.item(inside, Item::Bind { host, access, beneath })
    }

    /// Makes one device node of the host available at the same path: for root a node of its own that only the jail's user can
    /// open, else a bind mount of the host's.
    pub fn device(self, path: impl AsRef<Path>) -> Jail {
        let host = path.as_ref().to_owned();
        self.item(host.clone(), Item::Device { host })
    }

    /// Mounts a writable tmpfs of at most `bytes` bytes (nosuid, nodev, noexec), owned by the jail's user.
    pub fn tmpfs(self, inside: impl Into<PathBuf>, bytes: u64) -> Jail {
        self.item(inside, Item::Tmpfs { bytes })
    }

    /// Makes an empty directory, which like all of the root cannot be written to.
    pub fn directory(self, inside: impl Into<PathBuf>) -> Jail {
        self.item(inside, Item::Directory)
    }

    /// Shows the child's own `/proc/<pid>/fd`, and nothing else of /proc, as the directory `inside`: what a file server needs to
    /// reopen an `O_PATH` descriptor. It is a bind mount of that directory alone, so that `..` leads nowhere.
    pub fn own_descriptors(self, inside: impl Into<PathBuf>) -> Jail {
        self.item(inside, Item::OwnDescriptors)
    }

    fn item(mut self, inside: impl Into<PathBuf>, item: Item) -> Jail {
        self.items.push((inside.into(), item));
        self
    }

    /// Which namespaces are fresh; all by default.
    pub fn namespaces(mut self, namespaces: Namespaces) -> Jail {
        self.namespaces = namespaces;
        self
    }

    /// The capabilities to keep; none by default. They are kept in all sets, bounding to ambient, and the rest in none.
    pub fn capabilities(mut self, caps: CapSet) -> Jail {
        self.caps = caps;
        self
    }

    /// Limits a resource, soft and hard. Core dumps are always off. A limit above the one in force is lowered to it.
    pub fn rlimit(mut self, resource: Resource, limit: u64) -> Jail {
        self.rlimits.push((resource, limit));
        self
    }

    /// The file mode creation mask; 0o077 by default.
    pub fn umask(mut self, mask: u32) -> Jail {
        self.umask = mask;
        self
    }

    /// Starts the child inside this cgroup: it never runs an instruction outside.
    pub fn cgroup(mut self, cgroup: &Cgroup) -> Jail {
        self.cgroup = Some(cgroup.clone());
        self
    }

    /// Passes an open descriptor, as number `at`. 0, 1 and 2 are /dev/null unless given.
    ///
    /// A directory descriptor of the host passed in would be a way out of the jail (`openat(fd, "..")`): bind it instead.
    pub fn fd(mut self, fd: OwnedFd, at: RawFd) -> Jail {
        self.fds.push((fd, at));
        self
    }

    /// Passes the child's standard output.
    pub fn stdout(self, fd: OwnedFd) -> Jail {
        self.fd(fd, 1)
    }

    /// Passes the child's standard error.
    pub fn stderr(self, fd: OwnedFd) -> Jail {
        self.fd(fd, 2)
    }

    /// The seccomp filter, installed last. Executing [`Jail::program`] is let through in front of it, so that the filter itself
    /// need not allow `execve`.
    pub fn seccomp(mut self, program: BpfProgram) -> Jail {
        self.seccomp = Some(program);
        self
    }

    /// Whether to add Landlock rules that repeat the file tree's permissions, where the kernel can; on by default.
    pub fn landlock(mut self, on: bool) -> Jail {
        self.landlock = on;
        self
    }

    /// Lets the child connect by TCP, which Landlock refuses otherwise, where the kernel can. Of use without [`Namespaces::net`] only.
    pub fn connects(mut self) -> Jail {
        self.connect = true;
        self
    }

    /// Starts the child. Returns when it executes its program, or with the step that failed.
    ///
    /// Blocks for about a millisecond. Call it from any thread: the child is tied to the life of this *process* (see `spawn.rs`).
    pub fn spawn(self) -> Result<Child> {
        crate::spawn::spawn(self)
    }
}
