//! What can go wrong between asking for a jail and having a confined child.

use std::fmt;
use std::io;

/// A failure to make a jail, a cgroup or a filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The description of the jail contradicts itself; nothing was started.
    #[error("jail for {name}: {problem}")]
    Invalid {
        /// The jail's name.
        name: String,
        /// What is wrong with the description.
        problem: String,
    },
    /// Something the jail needs on the host could not be opened or read; nothing was started.
    #[error("jail for {name}: cannot {action} {subject}: {source}")]
    Prepare {
        /// The jail's name.
        name: String,
        /// What was tried, as a verb ("open", "read").
        action: &'static str,
        /// The path or object that it was tried on.
        subject: String,
        /// The reason that the system gave.
        source: io::Error,
    },
    /// The child could not be created in its new namespaces.
    #[error("jail for {name}: cannot create a process in new namespaces: {source}{}", clone_hint(source))]
    Clone {
        /// The jail's name.
        name: String,
        /// The reason that the system gave.
        source: io::Error,
    },
    /// The child was created, and failed in one step of its confinement (or at the final exec).
    #[error("jail for {name}: {step}{}: {source}", on(subject))]
    Confine {
        /// The jail's name.
        name: String,
        /// The step that failed.
        step: Step,
        /// The path, descriptor or resource that the step was working on, where there is one.
        subject: Option<String>,
        /// The reason that the system gave.
        source: io::Error,
    },
    /// The child was killed before it reached the program, by no step of its own.
    #[error("jail for {name}: the process was killed while it was being confined ({exit})")]
    Died {
        /// The jail's name.
        name: String,
        /// How it ended.
        exit: crate::Exit,
    },
    /// A cgroup operation failed.
    #[error("cgroup {path}: cannot {action}: {source}")]
    Cgroup {
        /// The cgroup's directory, or the file in it.
        path: String,
        /// What was tried, as a verb.
        action: &'static str,
        /// The reason that the system gave.
        source: io::Error,
    },
    /// A seccomp filter could not be compiled.
    #[error("seccomp filter {name}: {source}")]
    Filter {
        /// The filter's name.
        name: &'static str,
        /// The compiler's message.
        source: seccompiler::BackendError,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn on(subject: &Option<String>) -> String {
    subject.as_ref().map_or_else(String::new, |s| format!(" ({s})"))
}

fn clone_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => {
            " (as root this needs CAP_SYS_ADMIN; without root, unprivileged user namespaces: \
             see `sysctl kernel.unprivileged_userns_clone kernel.apparmor_restrict_unprivileged_userns`)"
        }
        Some(libc::ENOSPC) => " (the limit of namespaces is reached: see `sysctl -a | grep ^user.max_`)",
        Some(libc::EAGAIN) => {
            " (the limit of processes is reached: see `ulimit -u` and the cgroup's pids.max)"
        }
        _ => "",
    }
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// One step of a child's confinement, in the order in which they are taken (see `child.rs`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            const ALL: &[Step] = &[$(Step::$name,)*];
        }

        impl fmt::Display for Step {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Step::$name => $text,)* })
            }
        }
    };
}

steps! {
    /// Default signal dispositions.
    Signals = "cannot reset the signal handlers",
    /// A session and process group of its own.
    Session = "cannot start a session",
    /// Entering the cgroup (v1 hierarchies).
    Cgroup = "cannot enter the cgroup",
    /// Writing the user namespace's id maps.
    IdMap = "cannot map the user into the user namespace",
    /// A cgroup namespace rooted at the cgroup just entered.
    CgroupNamespace = "cannot create a cgroup namespace",
    /// Cutting mount propagation.
    Private = "cannot make the mounts private",
    /// The tmpfs that becomes the root.
    Root = "cannot mount the new root",
    /// A directory or file in the new root, to mount on.
    MountPoint = "cannot create a mount point",
    /// A bind mount.
    Bind = "cannot bind",
    /// A tmpfs inside.
    Tmpfs = "cannot mount a tmpfs",
    /// A device node.
    Device = "cannot make the device available",
    /// Sealing the new root read-only.
    Seal = "cannot make the new root read-only",
    /// `pivot_root` and detaching the old root.
    Pivot = "cannot leave the old root",
    /// Moving the passed descriptors to their numbers.
    Descriptors = "cannot place a file descriptor",
    /// Marking all other descriptors close-on-exec.
    CloseRange = "cannot close the other file descriptors",
    /// A resource limit.
    Rlimit = "cannot set a resource limit",
    /// The capability bounding set.
    BoundingSet = "cannot drop a capability from the bounding set",
    /// Keeping named capabilities over the change of user.
    KeepCaps = "cannot keep capabilities over the change of user",
    /// Dropping the supplementary groups.
    Groups = "cannot drop the supplementary groups",
    /// Changing the group.
    Gid = "cannot change the group id",
    /// Changing the user.
    Uid = "cannot change the user id",
    /// The permitted, effective, inheritable sets.
    Capabilities = "cannot set the capabilities",
    /// The ambient set.
    AmbientSet = "cannot set the ambient capabilities",
    /// `no_new_privs`.
    NoNewPrivs = "cannot set no_new_privs",
    /// Not dumpable.
    Dumpable = "cannot make the process undumpable",
    /// The parent-death signal.
    DeathSignal = "cannot tie the process to its parent's life",
    /// The parent had died already.
    Orphan = "the parent ended during the start",
    /// Landlock.
    Landlock = "cannot apply the Landlock rules",
    /// The seccomp filter.
    Seccomp = "cannot install the seccomp filter",
    /// Executing the program.
    Exec = "cannot execute the program",
}

impl Step {
    /// The step with this number, as the child sends it.
    pub(crate) fn from_number(number: u8) -> Option<Step> {
        Step::ALL.get(usize::from(number)).copied()
    }
}
