//! Turns a [`Jail`] into what the child needs after the clone: C strings, numbers and open descriptors, checked and in order.
//!
//! All that can allocate or look something up happens here, in the parent.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result, Step};
use crate::identity::Identity;
use crate::jail::{Access, Beneath, Item, Jail};
use crate::process::own_pid;
use crate::ruleset::Ruleset;
use crate::seccomp;
use crate::submounts;
use crate::sys;

/// One change of the new root's file tree. Targets are relative to the new root.
#[derive(Debug)]
pub(crate) enum Op {
    Directory {
        target: CString,
    },
    File {
        target: CString,
    },
    Tmpfs {
        target: CString,
        size: CString,
        uid: CString,
        gid: CString,
    },
    Bind {
        target: CString,
        source: CString,
        device: u64,
        inode: u64,
        attrs: u64,
        beneath: Beneath,
    },
    /// Hides a directory with an empty one.
    Cover {
        target: CString,
    },
    /// Hides a file with an empty one.
    CoverFile {
        target: CString,
    },
    Node {
        target: CString,
        mode: u32,
        rdev: u64,
    },
    OwnDescriptors {
        target: CString,
    },
}

impl Op {
    pub fn target(&self) -> &CString {
        match self {
            Op::Directory { target }
            | Op::File { target }
            | Op::Tmpfs { target, .. }
            | Op::Bind { target, .. }
            | Op::Cover { target }
            | Op::CoverFile { target }
            | Op::Node { target, .. }
            | Op::OwnDescriptors { target } => target,
        }
    }
}

/// The texts that map one user into a new user namespace.
#[derive(Debug)]
pub(crate) struct IdMaps {
    pub uid: Vec<u8>,
    pub gid: Vec<u8>,
}

/// Everything about the child, ready to use without allocation.
#[derive(Debug)]
pub(crate) struct Plan {
    pub name: String,
    pub clone_flags: u64,
    pub cgroup_v2: Option<OwnedFd>,
    pub cgroup_v1: Vec<OwnedFd>,
    pub cgroup_namespace: bool,
    pub id_maps: Option<IdMaps>,
    pub root_attrs: u64,
    pub ops: Vec<Op>,
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// A number above all that the child's descriptors get.
    pub fd_base: RawFd,
    pub rlimits: Vec<(u32, libc::rlimit64)>,
    pub caps: u64,
    pub last_cap: u32,
    /// The ids to change to, when they are to change.
    pub ids: Option<(u32, u32)>,
    pub umask: u32,
    pub parent: OwnedFd,
    pub ruleset: Option<Ruleset>,
    /// Landlock's rules: a path relative to the new root, and the rights beneath it.
    pub rules: Vec<(CString, u64)>,
    pub seccomp: Option<Vec<seccompiler::sock_filter>>,
    pub program: CString,
    /// Owns what `argv` and `envp` point to.
    _strings: Vec<CString>,
    /// Addresses of strings, null-terminated.
    pub argv: Vec<usize>,
    pub envp: Vec<usize>,
}

/// How many things the file tree can be made of; QEMU's takes about 90.
pub(crate) const MAX_OPS: usize = 512;
/// How many descriptors can be passed to a child.
pub(crate) const MAX_FDS: usize = 64;

/// In the new root: what hidden files are covered with.
pub(crate) const EMPTY_FILE: &str = ".empty";

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;

impl Plan {
    pub fn of(jail: Jail) -> Result<Plan> {
        let name = jail.name.clone();
        let we_are_root = rustix::process::geteuid().is_root();
        let user_namespace = !we_are_root;
        let ids = match jail.identity {
            Identity::Ids { uid, gid } if we_are_root => Some((uid, gid)),
            Identity::Ids { uid, .. } => {
                return Err(invalid(&name, format!("only root can run it as user {uid}")));
            }
            Identity::Current => None,
        };
        let ruleset = jail.landlock.then(|| Ruleset::new(jail.connect)).flatten();
        let mut tree = Tree::new(&name, &jail, we_are_root);
        tree.build(ruleset.as_ref())?;
        let Tree { ops, rules, has_nodes, .. } = tree;
        if ops.len() > MAX_OPS {
            return Err(invalid(
                &name,
                format!("its file tree has {} parts, more than {MAX_OPS}", ops.len()),
            ));
        }

        let cgroup = jail.cgroup.as_ref().map(|c| c.entry()).transpose()?.unwrap_or_default();
        let mut namespaces = libc::CLONE_NEWNS;
        for (fresh, flag) in [
            (jail.namespaces.net, libc::CLONE_NEWNET),
            (jail.namespaces.pid, libc::CLONE_NEWPID),
            (jail.namespaces.ipc, libc::CLONE_NEWIPC),
            (jail.namespaces.uts, libc::CLONE_NEWUTS),
            (user_namespace, libc::CLONE_NEWUSER),
        ] {
            namespaces |= if fresh { flag } else { 0 };
        }
        let own_pidfd = rustix::process::pidfd_open(own_pid(), rustix::process::PidfdFlags::empty())
            .map_err(|e| prepare(&name, "open", "our own pidfd", e.into()))?;

        let program = c_string(&name, jail.program.as_os_str())?;
        let seccomp = jail.seccomp.as_deref().map(|filter| seccomp::with_exec_gate(filter, &program));
        let args = jail.args.iter().map(|arg| c_string(&name, arg)).collect::<Result<Vec<_>>>()?;
        let env =
            jail.env.iter().map(|(key, value)| environment(&name, key, value)).collect::<Result<Vec<_>>>()?;
        let addresses =
            |strings: &[CString]| strings.iter().map(|s| sys::ptr(s)).chain([0]).collect::<Vec<_>>();
        let (argv, envp) = (addresses(&args), addresses(&env));

        let fds = descriptors(&name, jail.fds)?;
        let fd_base = fds.iter().map(|(_, at)| at + 1).max().unwrap_or(3).max(3);
        Ok(Plan {
            clone_flags: u64::from(namespaces.cast_unsigned()),
            cgroup_v2: cgroup.v2,
            cgroup_v1: cgroup.v1,
            cgroup_namespace: jail.namespaces.cgroup,
            id_maps: user_namespace.then(IdMaps::own),
            root_attrs: RDONLY | NOSUID | NOEXEC | if has_nodes { 0 } else { NODEV },
            ops,
            fds,
            fd_base,
            rlimits: rlimits(&jail.rlimits),
            caps: jail.caps.bits(),
            last_cap: last_cap(),
            ids,
            umask: jail.umask,
            parent: own_pidfd,
            ruleset,
            rules,
            seccomp,
            program,
            _strings: args.into_iter().chain(env).collect(),
            argv,
            envp,
            name,
        })
    }

    /// What step number `step` was working on when it was at item `index`, in words.
    pub fn subject(&self, step: u8, index: u32) -> Option<String> {
        let index = usize::try_from(index).ok()?;
        match Step::from_number(step)? {
            Step::MountPoint | Step::Bind | Step::Tmpfs | Step::Device => {
                self.ops.get(index).map(|op| match op {
                    Op::Bind { source, target, .. } => {
                        format!("{} on /{}", source.to_string_lossy(), target.to_string_lossy())
                    }
                    other => format!("/{}", other.target().to_string_lossy()),
                })
            }
            Step::Descriptors => self.fds.get(index).map(|(_, at)| format!("number {at}")),
            Step::Landlock => self.rules.get(index).map(|(path, _)| format!("/{}", path.to_string_lossy())),
            Step::Rlimit => {
                self.rlimits.get(index).map(|(resource, _)| format!("resource number {resource}"))
            }
            Step::BoundingSet | Step::AmbientSet => Some(format!("capability number {index}")),
            Step::Exec => Some(self.program.to_string_lossy().into_owned()),
            _ => None,
        }
    }

    pub fn prepare(&self, action: &'static str, subject: &str, source: io::Error) -> Error {
        prepare(&self.name, action, subject, source)
    }
}

impl IdMaps {
    /// Maps our own ids to themselves: the only map that needs no privilege.
    fn own() -> IdMaps {
        let line = |id: u32| format!("{id} {id} 1\n").into_bytes();
        let (uid, gid) = Identity::Current.ids();
        IdMaps { uid: line(uid), gid: line(gid) }
    }
}

/// Builds the list of [`Op`]s.
struct Tree<'a> {
    name: &'a str,
    jail: &'a Jail,
    own_nodes: bool,
    has_nodes: bool,
    ops: Vec<Op>,
    rules: Vec<(CString, u64)>,
    made: BTreeSet<PathBuf>,
    closed: BTreeSet<PathBuf>,
}

impl<'a> Tree<'a> {
    fn new(name: &'a str, jail: &'a Jail, own_nodes: bool) -> Tree<'a> {
        Tree {
            name,
            jail,
            own_nodes,
            has_nodes: false,
            ops: Vec::new(),
            rules: Vec::new(),
            made: BTreeSet::new(),
            closed: BTreeSet::new(),
        }
    }

    fn build(&mut self, ruleset: Option<&Ruleset>) -> Result<()> {
        // Parents before children, so that a tmpfs is mounted before what goes into it.
        let mut items: Vec<_> = self.jail.items.iter().collect();
        items.sort_by(|a, b| a.0.cmp(&b.0));
        for (inside, item) in items {
            let relative = self.relative(inside)?;
            self.parents(&relative)?;
            self.item(&relative, item, ruleset)?;
        }
        Ok(())
    }

    fn item(&mut self, relative: &Path, item: &Item, ruleset: Option<&Ruleset>) -> Result<()> {
        let target = c_string(self.name, relative.as_os_str())?;
        match item {
            Item::Directory => {
                self.directory(relative)?;
                self.rule(&target, ruleset.map(|r| r.rights(Access::Read, true)));
            }
            Item::Tmpfs { bytes } => {
                self.directory(relative)?;
                let (uid, gid) = self.jail.identity.ids();
                let text = |n: u64| c_string(self.name, OsStr::new(&n.to_string()));
                let (size, uid, gid) = (text(*bytes)?, text(uid.into())?, text(gid.into())?);
                self.rule(&target, ruleset.map(|r| r.rights(Access::Write, true)));
                self.ops.push(Op::Tmpfs { target, size, uid, gid });
            }
            Item::OwnDescriptors => {
                self.directory(relative)?;
                self.closed.insert(relative.to_owned());
                self.ops.push(Op::OwnDescriptors { target });
            }
            Item::Bind { host, access, beneath } => {
                let attrs = match access {
                    Access::Read => RDONLY | NOSUID | NODEV | NOEXEC,
                    Access::Execute => RDONLY | NOSUID | NODEV,
                    Access::Write => NOSUID | NODEV | NOEXEC,
                };
                let is_dir = self.bind(relative, host, attrs, *beneath)?;
                self.rule(&target, ruleset.map(|r| r.rights(*access, is_dir)));
            }
            Item::Device { host } => {
                self.device(relative, host)?;
                self.rule(&target, ruleset.map(Ruleset::device_rights));
            }
        }
        Ok(())
    }

    fn bind(&mut self, relative: &Path, host: &Path, attrs: u64, beneath: Beneath) -> Result<bool> {
        // Symbolic links are followed here and now; the child then opens exactly this object or fails.
        let open = |e| prepare(self.name, "open", &host.display().to_string(), e);
        let real = host.canonicalize().map_err(open)?;
        let meta = real.metadata().map_err(open)?;
        if meta.is_dir() {
            self.directory(relative)?
        } else {
            self.file(relative)?
        }
        self.closed.insert(relative.to_owned());
        self.ops.push(Op::Bind {
            target: c_string(self.name, relative.as_os_str())?,
            source: c_string(self.name, real.as_os_str())?,
            device: meta.dev(),
            inode: meta.ino(),
            attrs,
            beneath,
        });
        if beneath != Beneath::Nothing {
            self.hide_interfaces(relative, &real)?;
        }
        Ok(meta.is_dir())
    }

    /// A bind with its submounts is one of somebody's files; the kernel's own file systems are no part of it.
    fn hide_interfaces(&mut self, relative: &Path, real: &Path) -> Result<()> {
        let table =
            submounts::mountinfo().map_err(|e| prepare(self.name, "read", "/proc/self/mountinfo", e))?;
        let beneath = submounts::beneath(real, &table);
        if let Some(kind) = beneath.interface {
            let path = real.display();
            let problem = format!(
                "{path} cannot be shared: it is in a {kind} file system, which is an interface of the kernel"
            );
            return Err(invalid(self.name, problem));
        }
        for point in beneath.hidden {
            let target = c_string(self.name, relative.join(&point).as_os_str())?;
            // One that is out of reach even for us is out of the file server's.
            match real.join(&point).symlink_metadata() {
                Ok(meta) if meta.is_dir() => self.ops.push(Op::Cover { target }),
                Ok(_) => {
                    if self.made.insert(EMPTY_FILE.into()) {
                        self.ops.push(Op::File { target: c_string(self.name, OsStr::new(EMPTY_FILE))? });
                    }
                    self.ops.push(Op::CoverFile { target });
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(_) => self.ops.push(Op::Cover { target }),
            }
        }
        Ok(())
    }

    /// As root: a node of the jail's own, since the host's may be closed to the jail's user. Else the host's.
    fn device(&mut self, relative: &Path, host: &Path) -> Result<()> {
        if !self.own_nodes {
            return self.bind(relative, host, NOSUID | NOEXEC, Beneath::Nothing).map(|_| ());
        }
        let meta = host.metadata().map_err(|e| prepare(self.name, "open", &host.display().to_string(), e))?;
        let kind = meta.mode() & libc::S_IFMT;
        if kind != libc::S_IFCHR && kind != libc::S_IFBLK {
            return Err(invalid(self.name, format!("{} is not a device", host.display())));
        }
        self.has_nodes = true;
        self.made.insert(relative.to_owned());
        let target = c_string(self.name, relative.as_os_str())?;
        self.ops.push(Op::Node { target, mode: kind | 0o600, rdev: meta.rdev() });
        Ok(())
    }

    fn rule(&mut self, target: &CString, rights: Option<u64>) {
        if let Some(rights) = rights {
            self.rules.push((target.clone(), rights));
        }
    }

    fn parents(&mut self, relative: &Path) -> Result<()> {
        let mut ancestors: Vec<_> =
            relative.ancestors().skip(1).filter(|a| !a.as_os_str().is_empty()).collect();
        ancestors.reverse();
        ancestors.into_iter().try_for_each(|ancestor| self.directory(ancestor))
    }

    fn directory(&mut self, relative: &Path) -> Result<()> {
        // A bound tree may hold symbolic links of somebody else's: nothing is made or mounted beneath one.
        if self.closed.contains(relative) {
            return Err(invalid(
                self.name,
                format!("something is to be mounted beneath /{}", relative.display()),
            ));
        }
        if self.made.insert(relative.to_owned()) {
            let target = c_string(self.name, relative.as_os_str())?;
            self.ops.push(Op::Directory { target });
        }
        Ok(())
    }

    fn file(&mut self, relative: &Path) -> Result<()> {
        if !self.made.insert(relative.to_owned()) {
            return Err(invalid(self.name, format!("/{} is given twice", relative.display())));
        }
        let target = c_string(self.name, relative.as_os_str())?;
        self.ops.push(Op::File { target });
        Ok(())
    }

    /// The path without its leading `/`.
    fn relative(&self, inside: &Path) -> Result<PathBuf> {
        let mut parts = inside.components();
        let plain = parts.next() == Some(Component::RootDir)
            && parts.clone().next().is_some()
            && parts.clone().all(|c| matches!(c, Component::Normal(_)));
        if !plain {
            let problem = format!("{} is not an absolute path below / without `..`", inside.display());
            return Err(invalid(self.name, problem));
        }
        Ok(parts.as_path().to_owned())
    }
}

/// Adds /dev/null for the standard descriptors that are not given, and checks the numbers.
fn descriptors(name: &str, mut fds: Vec<(OwnedFd, RawFd)>) -> Result<Vec<(OwnedFd, RawFd)>> {
    let mut numbers = BTreeSet::new();
    for (_, at) in &fds {
        if !(0..512).contains(at) || !numbers.insert(*at) || numbers.len() > MAX_FDS - 3 {
            return Err(invalid(
                name,
                format!("descriptor number {at} is out of range, given twice or one too many"),
            ));
        }
    }
    for at in (0..3).filter(|at| !numbers.contains(at)) {
        let null =
            rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, 0.into())
                .map_err(|e| prepare(name, "open", "/dev/null", e.into()))?;
        fds.push((null, at));
    }
    Ok(fds)
}

/// The limits in the form of the system call: never above what is in force, so that no privilege is needed, and no core dumps.
fn rlimits(wanted: &[(crate::Resource, u64)]) -> Vec<(u32, libc::rlimit64)> {
    let lowered = |resource: u32, limit: u64| {
        let mut now = libc::rlimit64 { rlim_cur: 0, rlim_max: libc::RLIM64_INFINITY };
        // SAFETY: `now` is a valid rlimit64 for the kernel to fill in; nothing is set.
        let _ = unsafe { sys::prlimit64(0, resource as usize, 0, &raw mut now as usize) };
        let limit = limit.min(now.rlim_max);
        (resource, libc::rlimit64 { rlim_cur: limit, rlim_max: limit })
    };
    wanted
        .iter()
        .map(|(r, limit)| (r.number(), *limit))
        .chain([(libc::RLIMIT_CORE, 0)])
        .map(|(r, l)| lowered(r, l))
        .collect()
}

/// The number of the kernel's last capability.
fn last_cap() -> u32 {
    std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|s| s.trim().parse().ok())
        .unwrap_or(63)
}

fn environment(name: &str, key: &OsStr, value: &OsStr) -> Result<CString> {
    let mut line = key.to_owned();
    line.push("=");
    line.push(value);
    c_string(name, &line)
}

fn c_string(name: &str, s: &OsStr) -> Result<CString> {
    CString::new(s.as_bytes()).map_err(|_| invalid(name, format!("{} contains a NUL byte", s.display())))
}

fn invalid(name: &str, problem: String) -> Error {
    Error::Invalid { name: name.to_owned(), problem }
}

fn prepare(name: &str, action: &'static str, subject: &str, source: io::Error) -> Error {
    Error::Prepare { name: name.to_owned(), action, subject: subject.to_owned(), source }
}
