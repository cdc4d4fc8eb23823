//! The confinement, in the order in which it is applied. This is the file to audit: [`confine`] is the whole story, and each
//! step below it says why it is there and why it is there *now*.
//!
//! It runs in the child, between clone and exec, in a copy of a process that may have had other threads: no allocation, no locks, no
//! formatting, no panics, only the calls in [`sys`]. All that it needs has been prepared in a [`Plan`].
//!
//! What holds at each point:
//! * from the clone on: new mount, pid, net, ipc, uts (and user) namespaces; the child is process 1 of its pid namespace;
//!   on cgroup v2 it is in its cgroup already;
//! * after [`enter_cgroup`]: nothing it uses escapes its limits;
//! * after [`pivot`]: the host's files are unreachable by path;
//! * after [`place_descriptors`]: at exec, nothing open remains but what was passed;
//! * after [`drop_privileges`]: another user, no capability that was not asked for, and no way to get one back;
//! * after [`tie_to_parent`]: it cannot outlive its parent;
//! * after [`restrict_files`] and [`restrict_calls`]: what the program itself needs, and the one exec.

use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, RawFd};

use crate::error::Step;
use crate::jail::Beneath;
use crate::plan::{IdMaps, Op, Plan};
use crate::ruleset::PathBeneath;
use crate::sys::{self, Errno, Res};

/// What the child tells its parent: a failure, or with errno 0 that it is about to execute its program.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Report {
    pub step: u8,
    pub index: u32,
    pub errno: i32,
}

/// Size of a [`Report`] on the pipe.
pub(crate) const REPORT_LEN: usize = 9;

impl Report {
    pub fn from_bytes(bytes: &[u8; REPORT_LEN]) -> Report {
        let [step, i0, i1, i2, i3, e0, e1, e2, e3] = *bytes;
        Report {
            step,
            index: u32::from_le_bytes([i0, i1, i2, i3]),
            errno: i32::from_le_bytes([e0, e1, e2, e3]),
        }
    }

    fn to_bytes(self) -> [u8; REPORT_LEN] {
        let ([i0, i1, i2, i3], [e0, e1, e2, e3]) = (self.index.to_le_bytes(), self.errno.to_le_bytes());
        [self.step, i0, i1, i2, i3, e0, e1, e2, e3]
    }
}

/// A step that failed, on which of its items, and why.
struct Failure {
    step: Step,
    index: u32,
    errno: Errno,
}

/// Marks a call's failure with the step that it belongs to.
trait In<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
    fn at_item(self, step: Step, index: usize) -> Result<T, Failure>;
}

impl<T> In<T> for Res<T> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.at_item(step, 0)
    }

    fn at_item(self, step: Step, index: usize) -> Result<T, Failure> {
        self.map_err(|errno| Failure { step, index: index as u32, errno })
    }
}

type Done = Result<(), Failure>;

/// The descriptors that the confinement itself works with, moved out of the way of those that are passed on.
struct Own {
    reports: RawFd,
    parent: RawFd,
    ruleset: Option<RawFd>,
    root: RawFd,
}

/// Confines this process and executes the program; on failure reports it and exits.
pub(crate) fn run(plan: &Plan, reports: RawFd) -> ! {
    let mut own = Own { reports, parent: -1, ruleset: None, root: -1 };
    let Err(failure) = confine(plan, &mut own);
    report(own.reports, failure.step, failure.index, failure.errno);
    loop {
        // SAFETY: exit_group takes only a number. It does not return; the loop is for the type.
        let _ = unsafe { sys::exit_group(127) };
    }
}

/// The order of it all.
fn confine(plan: &Plan, own: &mut Own) -> Result<Infallible, Failure> {
    // 1. A clean start: nothing inherited from the parent's way of life.
    open_umask();
    reset_signals()?;
    own_session()?;
    set_own_descriptors_aside(plan, own)?;
    // 2. Limits first, so that all that follows is accounted for.
    enter_cgroup(plan)?;
    map_ids(plan)?;
    enter_cgroup_namespace(plan)?;
    // 3. The file tree. Needs CAP_SYS_ADMIN (in the user namespace at least), so it comes before the privileges go.
    build_root(plan, own)?;
    pivot(own)?;
    add_file_rules(plan, own)?;
    // 4. Descriptors. From here on the numbers that the program will see are in use.
    place_descriptors(plan)?;
    set_limits(plan)?;
    // 5. Privileges.
    drop_privileges(plan)?;
    // 6. After the last change of user, since that clears both of these.
    forbid_inspection()?;
    tie_to_parent(own)?;
    // 7. The program's own fences; none can be installed without no_new_privs, and the steps above would not pass them.
    close_umask(plan);
    restrict_files(own)?;
    announce_exec(own);
    restrict_calls(plan)?;
    execute(plan)
}

// --- 1. A clean start ---------------------------------------------------------------------------------------------------------

/// The modes given below are meant as they are; the parent's mask could make the jail's directories unsearchable for its user.
fn open_umask() {
    // SAFETY: umask takes only a number, and cannot fail.
    let _ = unsafe { sys::umask(0) };
}

/// Ignored signals stay ignored over an exec (Rust programs ignore SIGPIPE, which C programs do not expect), and blocked ones blocked.
fn reset_signals() -> Done {
    // The kernel's sigaction: handler SIG_DFL (0), flags, restorer, mask.
    let default = [0_usize; 4];
    for signal in 1..=64 {
        // SIGKILL and SIGSTOP refuse, rightly.
        // SAFETY: `default` is a valid kernel sigaction with an 8-byte mask.
        let _ = unsafe { sys::rt_sigaction(signal, default.as_ptr() as usize, 0, 8) };
    }
    let none = 0_u64;
    // SAFETY: `none` is a valid 8-byte signal set.
    unsafe { sys::rt_sigprocmask(libc::SIG_SETMASK as usize, &raw const none as usize, 0, 8) }
        .at(Step::Signals)?;
    Ok(())
}

/// No controlling terminal (TIOCSTI would type into it), and a process group that the shell's Ctrl-C does not reach.
fn own_session() -> Done {
    // SAFETY: no arguments.
    unsafe { sys::setsid() }.at(Step::Session)?;
    Ok(())
}

/// Moves the descriptors that the confinement needs until its end above the numbers that the program's get.
fn set_own_descriptors_aside(plan: &Plan, own: &mut Own) -> Done {
    own.reports = above(plan, own.reports).at(Step::Descriptors)?;
    own.parent = above(plan, plan.parent.as_raw_fd()).at(Step::Descriptors)?;
    if let Some(ruleset) = &plan.ruleset {
        own.ruleset = Some(above(plan, ruleset.fd.as_raw_fd()).at(Step::Descriptors)?);
    }
    Ok(())
}

/// A close-on-exec duplicate with a number of at least `plan.fd_base`.
fn above(plan: &Plan, fd: RawFd) -> Res<RawFd> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC takes only numbers.
    let new = unsafe { sys::fcntl(sys::fd(fd), libc::F_DUPFD_CLOEXEC as usize, plan.fd_base as usize) }?;
    Ok(new as RawFd)
}

// --- 2. Limits, ids -----------------------------------------------------------------------------------------------------------

/// On cgroup v1 a process must move itself (on v2 it was created inside). "0" is the caller; in `tasks` rather than
/// `cgroup.procs` that moves just this thread, the only one there is, without the kernel-wide lock that costs a grace period.
fn enter_cgroup(plan: &Plan) -> Done {
    for (index, tasks) in plan.cgroup_v1.iter().enumerate() {
        write(tasks.as_raw_fd(), b"0").at_item(Step::Cgroup, index)?;
    }
    Ok(())
}

/// In a user namespace: maps our own user, and no other, to itself. Without a map every id would be the overflow id, and with
/// another number files would seem to belong to somebody else. `setgroups` must be given up before the group map.
fn map_ids(plan: &Plan) -> Done {
    let Some(IdMaps { uid, gid }) = &plan.id_maps else { return Ok(()) };
    // An undumpable parent would make /proc/self belong to root.
    prctl(libc::PR_SET_DUMPABLE, 1).at(Step::IdMap)?;
    for (file, text) in [
        (c"/proc/self/setgroups", b"deny".as_slice()),
        (c"/proc/self/gid_map", gid.as_slice()),
        (c"/proc/self/uid_map", uid.as_slice()),
    ] {
        let fd = open(libc::AT_FDCWD, file, libc::O_WRONLY, 0).at(Step::IdMap)?;
        write(fd, text).at(Step::IdMap)?;
        close(fd);
    }
    Ok(())
}

/// After entering the cgroup, so that the namespace's root is that cgroup.
fn enter_cgroup_namespace(plan: &Plan) -> Done {
    if plan.cgroup_namespace {
        // SAFETY: unshare takes only flags. This process has one thread.
        unsafe { sys::unshare(libc::CLONE_NEWCGROUP as usize) }.at(Step::CgroupNamespace)?;
    }
    Ok(())
}

// --- 3. The file tree ---------------------------------------------------------------------------------------------------------

/// Copies of the mounts that go into the new root, by the index of their [`Op`]; -1 for those that are none.
type Sources = [RawFd; crate::plan::MAX_OPS];

/// Takes a copy of everything that is to be shown, mounted nowhere yet, and restricted before it becomes visible. All of it before the
/// new root exists, which would otherwise be part of a copy of `/`; and before propagation is cut, since a copy that is to hear of the
/// host's later mounts must still be one of a shared mount. Nothing here is mounted, so nothing can propagate.
fn take_sources(plan: &Plan) -> Result<Sources, Failure> {
    let mut sources = [-1; crate::plan::MAX_OPS];
    for (index, (copy, op)) in sources.iter_mut().zip(&plan.ops).enumerate() {
        match op {
            Op::Bind { source, device, inode, attrs, beneath, .. } => {
                let found = open_same(source, *device, *inode).at_item(Step::Bind, index)?;
                *copy = copy_mount(found, c"", *attrs, *beneath).at_item(Step::Bind, index)?;
                close(found);
            }
            Op::OwnDescriptors { .. } => {
                let attrs = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
                *copy = copy_mount(libc::AT_FDCWD, c"/proc/self/fd", attrs, Beneath::Nothing)
                    .at_item(Step::Bind, index)?;
            }
            _ => {}
        }
    }
    Ok(sources)
}

/// Builds the new root: a tmpfs, stacked upon the old root, which all paths still start from until [`pivot`]. Targets are relative to
/// its descriptor, so that no name can mean something in both.
fn build_root(plan: &Plan, own: &mut Own) -> Done {
    let sources = take_sources(plan)?;
    // Before the first mount: nothing done here may propagate to the host's mount namespace.
    let private = (libc::MS_REC | libc::MS_PRIVATE) as usize;
    // SAFETY: mount with only a target string and flags.
    unsafe { sys::mount(0, sys::ptr(c"/"), 0, private, 0) }.at(Step::Private)?;
    // Room for mount points only, and no way to fill the host's memory with them.
    let options = [(c"size", c"64k"), (c"nr_inodes", c"4k"), (c"mode", c"0755")];
    own.root = tmpfs(&options, 0).at(Step::Root)?;
    move_mount(own.root, libc::AT_FDCWD, c"/").at(Step::Root)?;
    for (index, (op, source)) in plan.ops.iter().zip(sources).enumerate() {
        apply(plan, own.root, index, op, source)?;
    }
    let sealed = MountAttr { attr_set: plan.root_attrs, ..MountAttr::default() };
    set_attributes(own.root, &sealed, false).at(Step::Seal)
}

fn apply(plan: &Plan, root: RawFd, index: usize, op: &Op, source: RawFd) -> Done {
    match op {
        Op::Directory { target } => {
            // SAFETY: a valid descriptor, string and mode.
            let made = unsafe { sys::mkdirat(sys::fd(root), sys::ptr(target), 0o755) };
            made.at_item(Step::MountPoint, index)?;
        }
        Op::File { target } => {
            let mode = (libc::S_IFREG | 0o444) as usize;
            // SAFETY: a valid descriptor, string and mode.
            unsafe { sys::mknodat(sys::fd(root), sys::ptr(target), mode, 0) }
                .at_item(Step::MountPoint, index)?;
        }
        Op::Tmpfs { target, size, uid, gid } => {
            let options = [
                (c"size", size.as_c_str()),
                (c"mode", c"0700"),
                (c"uid", uid.as_c_str()),
                (c"gid", gid.as_c_str()),
            ];
            let attrs = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
            let mount = tmpfs(&options, attrs).at_item(Step::Tmpfs, index)?;
            move_mount(mount, root, target).at_item(Step::Tmpfs, index)?;
            close(mount);
        }
        Op::Bind { target, .. } | Op::OwnDescriptors { target } => {
            move_mount(source, root, target).at_item(Step::Bind, index)?;
            close(source);
        }
        Op::Cover { target } => {
            let options = [(c"size", c"4k"), (c"nr_inodes", c"2"), (c"mode", c"0555")];
            let attrs = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
            let mount = tmpfs(&options, attrs | libc::MOUNT_ATTR_RDONLY).at_item(Step::Tmpfs, index)?;
            move_mount_over(mount, root, target).at_item(Step::Tmpfs, index)?;
            close(mount);
        }
        Op::CoverFile { target } => {
            let attrs = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
            let tree = copy_mount(root, c".empty", attrs | libc::MOUNT_ATTR_RDONLY, Beneath::Nothing)
                .at_item(Step::Bind, index)?;
            move_mount_over(tree, root, target).at_item(Step::Bind, index)?;
            close(tree);
        }
        Op::Node { target, mode, rdev } => {
            node(plan, root, target, *mode, *rdev).at_item(Step::Device, index)?;
        }
    }
    Ok(())
}

/// Opens a bind's source, which must be the very object that the parent saw: its path was made free of symbolic links, and if
/// somebody has put one there since, or another object, this fails.
fn open_same(source: &CStr, device: u64, inode: u64) -> Res<RawFd> {
    let fd = open(libc::AT_FDCWD, source, libc::O_PATH, libc::RESOLVE_NO_SYMLINKS)?;
    // SAFETY: stat is plain numbers, for which zeroes are a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: a valid descriptor, and a stat structure to fill in.
    unsafe { sys::fstat(sys::fd(fd), &raw mut stat as usize) }?;
    if (stat.st_dev, stat.st_ino) == (device, inode) { Ok(fd) } else { Err(Errno(libc::ESTALE)) }
}

/// A copy of the mount at `dir`/`path`, restricted, mounted nowhere yet. Only adds restrictions: in a user namespace those of the
/// host's mount cannot be taken away. What the host mounts later does not reach it, or reaches it and nothing comes back.
fn copy_mount(dir: RawFd, path: &CStr, attrs: u64, beneath: Beneath) -> Res<RawFd> {
    let submounts = beneath != Beneath::Nothing;
    let recursive = if submounts { libc::AT_RECURSIVE as usize } else { 0 };
    let flags =
        libc::OPEN_TREE_CLONE as usize | libc::OPEN_TREE_CLOEXEC as usize | libc::AT_EMPTY_PATH as usize;
    // SAFETY: a valid descriptor and string.
    let tree = unsafe { sys::open_tree(sys::fd(dir), sys::ptr(path), flags | recursive) }? as RawFd;
    let following = beneath == Beneath::Always;
    let propagation = if following { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    let attributes = MountAttr { attr_set: attrs, propagation, ..MountAttr::default() };
    set_attributes(tree, &attributes, submounts)?;
    if following {
        let read_only = MountAttr { attr_set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
        set_attributes(tree, &read_only, false)?;
    }
    Ok(tree)
}

/// Attaches a mount at a place inside a bound tree, which is somebody else's: no symbolic link on the way is followed.
fn move_mount_over(mount: RawFd, root: RawFd, target: &CStr) -> Res {
    let place = open(root, target, libc::O_PATH, libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_BENEATH)?;
    let flags = (libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH) as usize;
    // SAFETY: valid descriptors, and empty strings.
    unsafe { sys::move_mount(sys::fd(mount), sys::ptr(c""), sys::fd(place), sys::ptr(c""), flags) }?;
    close(place);
    Ok(())
}

/// A device node of the jail's own, for its user only.
fn node(plan: &Plan, root: RawFd, target: &CStr, mode: u32, rdev: u64) -> Res {
    // SAFETY: a valid descriptor, string, mode and device number.
    unsafe { sys::mknodat(sys::fd(root), sys::ptr(target), mode as usize, rdev as usize) }?;
    if let Some((uid, gid)) = plan.ids {
        let flags = libc::AT_SYMLINK_NOFOLLOW as usize;
        // SAFETY: a valid descriptor and string, and numbers.
        unsafe { sys::fchownat(sys::fd(root), sys::ptr(target), uid as usize, gid as usize, flags) }?;
    }
    Ok(())
}

/// Makes the new root the root. With "." for both, the old root is mounted upon the new one, where it is detached at once: there is no
/// moment in which it has a name in the new tree. The current directory and the root are both inside afterwards.
fn pivot(own: &Own) -> Done {
    // SAFETY: a descriptor of ours, and valid strings.
    unsafe {
        sys::fchdir(sys::fd(own.root)).at(Step::Pivot)?;
        sys::pivot_root(sys::ptr(c"."), sys::ptr(c".")).at(Step::Pivot)?;
        sys::umount2(sys::ptr(c"."), libc::MNT_DETACH as usize).at(Step::Pivot)?;
        sys::chdir(sys::ptr(c"/")).at(Step::Pivot)?;
    }
    Ok(())
}

/// Landlock's rules name objects, so they are made when the objects are in place. They bind nobody before [`restrict_files`].
fn add_file_rules(plan: &Plan, own: &Own) -> Done {
    const RULE_PATH_BENEATH: usize = 1;
    let Some(ruleset) = own.ruleset else { return Ok(()) };
    for (index, (path, rights)) in plan.rules.iter().enumerate() {
        let parent_fd =
            open(own.root, path, libc::O_PATH, libc::RESOLVE_NO_SYMLINKS).at_item(Step::Landlock, index)?;
        let rule = PathBeneath { allowed_access: *rights, parent_fd };
        // SAFETY: a ruleset's descriptor and a valid rule of the kind that is named.
        let added = unsafe {
            sys::landlock_add_rule(sys::fd(ruleset), RULE_PATH_BENEATH, &raw const rule as usize, 0)
        };
        added.at_item(Step::Landlock, index)?;
        close(parent_fd);
    }
    Ok(())
}

// --- 4. Descriptors and limits -------------------------------------------------------------------------------------------------

/// Puts the passed descriptors at their numbers and marks everything else close-on-exec. First all are duplicated above the
/// numbers in use, so that none overwrites another; then everything from 3 on is marked; what is put in place after that is not.
fn place_descriptors(plan: &Plan) -> Done {
    const MAX: usize = crate::plan::MAX_FDS;
    let mut lifted = [-1; MAX];
    for (index, (slot, (fd, _))) in lifted.iter_mut().zip(&plan.fds).enumerate() {
        *slot = above(plan, fd.as_raw_fd()).at_item(Step::Descriptors, index)?;
    }
    let (last, cloexec) = (u32::MAX as usize, libc::CLOSE_RANGE_CLOEXEC as usize);
    // SAFETY: only numbers; no descriptor is closed now.
    unsafe { sys::close_range(3, last, cloexec) }.at(Step::CloseRange)?;
    for (index, (fd, (_, number))) in lifted.iter().zip(&plan.fds).enumerate() {
        // SAFETY: only numbers. What is overwritten is a copy of a descriptor of the parent's that the child does not need.
        unsafe { sys::dup3(sys::fd(*fd), sys::fd(*number), 0) }.at_item(Step::Descriptors, index)?;
    }
    Ok(())
}

/// No core dumps (they would hold guest memory), and what the profile sets.
fn set_limits(plan: &Plan) -> Done {
    for (index, (resource, limit)) in plan.rlimits.iter().enumerate() {
        // SAFETY: `limit` is a valid rlimit64.
        let set = unsafe { sys::prlimit64(0, *resource as usize, std::ptr::from_ref(limit) as usize, 0) };
        set.at_item(Step::Rlimit, index)?;
    }
    Ok(())
}

// --- 5. Privileges -------------------------------------------------------------------------------------------------------------

/// In this order: the bounding set while we have CAP_SETPCAP; groups and ids while we have CAP_SETGID and CAP_SETUID; then the sets
/// themselves; the ambient set after the inheritable one that it must be part of; no_new_privs last, as nothing here needs more.
fn drop_privileges(plan: &Plan) -> Done {
    let kept = |cap: &u32| plan.caps & (1 << cap) != 0;
    for cap in (0..=plan.last_cap).filter(|cap| !kept(cap)) {
        prctl(libc::PR_CAPBSET_DROP, cap as usize).at_item(Step::BoundingSet, cap as usize)?;
    }
    if let Some((uid, gid)) = plan.ids {
        if plan.caps != 0 {
            // Undone by the exec.
            prctl(libc::PR_SET_KEEPCAPS, 1).at(Step::KeepCaps)?;
        }
        let (uid, gid) = (uid as usize, gid as usize);
        // SAFETY: only numbers, and an empty list.
        unsafe {
            sys::setgroups(0, 0).at(Step::Groups)?;
            sys::setresgid(gid, gid, gid).at(Step::Gid)?;
            sys::setresuid(uid, uid, uid).at(Step::Uid)?;
        }
    }
    set_capabilities(plan.caps).at(Step::Capabilities)?;
    let (clear, raise) = (libc::PR_CAP_AMBIENT_CLEAR_ALL as usize, libc::PR_CAP_AMBIENT_RAISE as usize);
    prctl(libc::PR_CAP_AMBIENT, clear).at(Step::AmbientSet)?;
    for cap in (0..=plan.last_cap).filter(kept) {
        // SAFETY: only numbers.
        let raised = unsafe { sys::prctl(libc::PR_CAP_AMBIENT as usize, raise, cap as usize, 0, 0) };
        raised.at_item(Step::AmbientSet, cap as usize)?;
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).at(Step::NoNewPrivs)
}

/// Effective, permitted and inheritable all become `caps`.
fn set_capabilities(caps: u64) -> Res {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let (low, high) = (caps as u32, (caps >> 32) as u32);
    let data = [low, low, low, high, high, high];
    // SAFETY: a version 3 header for the calling thread, and the two triples of sets that it announces.
    unsafe { sys::capset(header.as_ptr() as usize, data.as_ptr() as usize) }.map(|_| ())
}

// --- 6. Ties -------------------------------------------------------------------------------------------------------------------

/// This process still is a copy of its parent's memory: until the exec, no other process of the same user may look into it.
fn forbid_inspection() -> Done {
    prctl(libc::PR_SET_DUMPABLE, 0).at(Step::Dumpable)
}

/// SIGKILL when the thread that cloned us ends, which is when the parent's process does (see `spawn`). If it has ended already, the
/// signal will never come: so look afterwards. `getppid` cannot tell, being 0 in a new pid namespace; the parent's pidfd can.
fn tie_to_parent(own: &Own) -> Done {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as usize).at(Step::DeathSignal)?;
    let mut parent = libc::pollfd { fd: own.parent, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd; no waiting.
    let ended = unsafe { sys::poll(&raw mut parent as usize, 1, 0) }.at(Step::DeathSignal)?;
    if ended == 0 { Ok(()) } else { Err(Errno(libc::ESRCH)).at(Step::Orphan) }
}

// --- 7. The program's own fences -------------------------------------------------------------------------------------------------

fn close_umask(plan: &Plan) {
    // SAFETY: umask takes only a number, and cannot fail.
    let _ = unsafe { sys::umask(plan.umask as usize) };
}

fn restrict_files(own: &Own) -> Done {
    if let Some(ruleset) = own.ruleset {
        // SAFETY: only numbers.
        unsafe { sys::landlock_restrict_self(sys::fd(ruleset), 0) }.at(Step::Landlock)?;
    }
    Ok(())
}

/// The parent takes silence after this for success.
fn announce_exec(own: &Own) {
    report(own.reports, Step::Exec, 0, Errno(0));
}

/// Last, since all of the above would have to be allowed otherwise.
fn restrict_calls(plan: &Plan) -> Done {
    const SET_MODE_FILTER: usize = 1;
    let Some(filter) = &plan.seccomp else { return Ok(()) };
    let len = u16::try_from(filter.len()).map_err(|_| Errno(libc::E2BIG)).at(Step::Seccomp)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut().cast() };
    // SAFETY: a program of `len` instructions, in seccompiler's copy of `struct sock_filter`, which the kernel only reads.
    unsafe { sys::seccomp(SET_MODE_FILTER, 0, &raw const program as usize) }.at(Step::Seccomp)?;
    Ok(())
}

fn execute(plan: &Plan) -> Result<Infallible, Failure> {
    let (argv, envp) = (plan.argv.as_ptr() as usize, plan.envp.as_ptr() as usize);
    // SAFETY: a string and two null-terminated arrays of pointers to strings, all of them owned by the plan.
    let error = unsafe { sys::execve(sys::ptr(&plan.program), argv, envp) };
    Err(Failure { step: Step::Exec, index: 0, errno: error.err().unwrap_or(Errno(0)) })
}

// --- Tools ---------------------------------------------------------------------------------------------------------------------

/// `struct mount_attr`.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn set_attributes(mount: RawFd, attributes: &MountAttr, recursive: bool) -> Res {
    let flags = libc::AT_EMPTY_PATH as usize | if recursive { libc::AT_RECURSIVE as usize } else { 0 };
    let (attr, size) = (std::ptr::from_ref(attributes) as usize, size_of::<MountAttr>());
    // SAFETY: a mount's descriptor, an empty path, and a valid structure of that size.
    unsafe { sys::mount_setattr(sys::fd(mount), sys::ptr(c""), flags, attr, size) }.map(|_| ())
}

/// A new tmpfs that is mounted nowhere yet.
fn tmpfs(options: &[(&CStr, &CStr)], attrs: u64) -> Res<RawFd> {
    const SET_STRING: usize = 1;
    const CREATE: usize = 6;
    // SAFETY: valid strings; the descriptor is the one just made.
    unsafe {
        let context = sys::fsopen(sys::ptr(c"tmpfs"), libc::FSOPEN_CLOEXEC as usize)?;
        for (key, value) in options {
            sys::fsconfig(context, SET_STRING, sys::ptr(key), sys::ptr(value), 0)?;
        }
        sys::fsconfig(context, CREATE, 0, 0, 0)?;
        let mount = sys::fsmount(context, libc::FSMOUNT_CLOEXEC as usize, attrs as usize)?;
        sys::close(context)?;
        Ok(mount as RawFd)
    }
}

/// Attaches a mount at `dir`/`target`.
fn move_mount(mount: RawFd, dir: RawFd, target: &CStr) -> Res {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH as usize;
    // SAFETY: valid descriptors and strings.
    unsafe { sys::move_mount(sys::fd(mount), sys::ptr(c""), sys::fd(dir), sys::ptr(target), flags) }
        .map(|_| ())
}

/// `struct open_how` of openat2(2).
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

fn open(dir: RawFd, path: &CStr, flags: i32, resolve: u64) -> Res<RawFd> {
    let how = OpenHow { flags: (flags | libc::O_CLOEXEC) as u64, mode: 0, resolve };
    let (how, size) = (&raw const how as usize, size_of::<OpenHow>());
    // SAFETY: a descriptor, a string, and a valid structure of that size.
    unsafe { sys::openat2(sys::fd(dir), sys::ptr(path), how, size) }.map(|fd| fd as RawFd)
}

fn write(fd: RawFd, data: &[u8]) -> Res {
    // SAFETY: a descriptor, and a slice of that length.
    unsafe { sys::write(sys::fd(fd), data.as_ptr() as usize, data.len()) }.map(|_| ())
}

fn close(fd: RawFd) {
    // SAFETY: only a number, of a descriptor that this file opened.
    let _ = unsafe { sys::close(sys::fd(fd)) };
}

fn prctl(option: i32, value: usize) -> Res {
    // SAFETY: all the options used in this file take numbers.
    unsafe { sys::prctl(option as usize, value, 0, 0, 0) }.map(|_| ())
}

fn report(reports: RawFd, step: Step, index: u32, errno: Errno) {
    let bytes = Report { step: step as u8, index, errno: errno.0 }.to_bytes();
    // If this fails the parent has gone, and there is nobody to tell.
    let _ = write(reports, &bytes);
}
