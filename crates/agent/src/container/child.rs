//! The life of a child between its birth and its program, in order. Read it from top to bottom to see what a container's
//! process can and cannot do at each point.
//!
//! The child is a fork of the agent: it shares nothing with it, reports over one socket, and ends by execve(2) or _exit(2).

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, StatxFlags, Uid};
use rustix::mount::UnmountFlags;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use crate::sys::{self, MountAttr};

use super::mounts::{self, CgroupView};
use super::order::{self, Order};
use super::plan::Plan;
use super::process::ProcessPlan;
use super::report::{ChildError, During, Message, Step, Stopwatch};
use super::root::Root;
use super::user::Accounts;
use super::{devices, finish, hooks, terminal};

/// What the agent opened for a child before its birth.
#[derive(Debug)]
pub struct Inheritance<'a> {
    /// The child's end of the report socket.
    pub socket: &'a OwnedFd,
    /// Standard streams, unless there is a terminal.
    pub stdio: Option<&'a [OwnedFd; 3]>,
}

/// The namespaces of a running container that an added process joins.
#[derive(Debug)]
pub struct Joined<'a> {
    /// The container's first process.
    pub init: BorrowedFd<'a>,
    /// CLONE_NEW*: all that the container does not share with the agent, except the pid namespace, in which the child already is.
    pub namespaces: u64,
}

/// Becomes a container's first process.
pub fn container(
    id: &str,
    plan: &Plan,
    cgroup: &CStr,
    joined: &[(u64, OwnedFd)],
    inherited: &Inheritance<'_>,
) -> ! {
    let run = || -> Result<std::convert::Infallible, ChildError> {
        close_others(inherited, joined.iter().map(|(_, fd)| fd.as_fd()))?;
        let mut watch = Stopwatch::start();
        let tty = build(plan, cgroup, joined, inherited, &mut watch)?;
        // What can be done before the process is known, every clone of a template finds done.
        let accounts = plan.process.is_none().then(Accounts::read);
        finish::seccomp(&plan.early_seccomp)?;
        report(inherited, &Message::Ready(watch.into_laps(), tty))?;
        let process = match &plan.process {
            Some(process) => {
                wait_for_byte(inherited)?;
                Cow::Borrowed(process)
            }
            None => Cow::Owned(wait_for_order(inherited)?),
        };
        let mut watch = Stopwatch::start();
        if !plan.start_hooks.is_empty() {
            hooks::run(&plan.start_hooks, id, inherited)?;
            watch.lap(Step::Hooks);
        }
        finish::execute(&process, accounts, watch, inherited.socket)
    };
    fail(run().err(), inherited)
}

/// Becomes a process that is added to a running container.
pub fn added(process: &ProcessPlan, joined: &Joined<'_>, inherited: &Inheritance<'_>) -> ! {
    let run = || -> Result<std::convert::Infallible, ChildError> {
        let mut watch = Stopwatch::start();
        close_others(inherited, std::iter::once(joined.init))?;
        // From here on the container's processes may see this one.
        sys::set_undumpable();
        connect_stdio(inherited)?;
        let flags = ThreadNameSpaceType::from_bits_retain(joined.namespaces as u32);
        rustix::thread::move_into_thread_name_spaces(joined.init, flags)
            .during(Step::Namespaces, || "joining the container's namespaces".into())?;
        watch.lap(Step::Namespaces);
        let mut tty = None;
        if let Some(size) = process.terminal {
            let root = Root::open(c"/").during(Step::Terminal, || "opening the container's root".into())?;
            tty = Some(terminal::open(&root, size, false)?);
            watch.lap(Step::Terminal);
        }
        finish::make_cwd(process);
        report(inherited, &Message::Ready(vec![], tty))?;
        finish::execute(process, None, watch, inherited.socket)
    };
    fail(run().err(), inherited)
}

/// Closes what the agent holds for others: a descriptor kept open here would keep their pipes from ending.
fn close_others<'a>(
    inherited: &Inheritance<'a>,
    needed: impl Iterator<Item = BorrowedFd<'a>>,
) -> Result<(), ChildError> {
    let stdio = inherited.stdio.into_iter().flatten().map(AsFd::as_fd);
    let keep: Vec<_> = needed.chain(stdio).chain([inherited.socket.as_fd()]).collect();
    sys::close_except(&keep).during(Step::Wake, || "closing the agent's descriptors".into())
}

fn fail(error: Option<ChildError>, inherited: &Inheritance<'_>) -> ! {
    if let Some(error) = error {
        // If this fails too the agent sees the child end without a word, and says so.
        let _ = Message::Failed(error).send(inherited.socket);
    }
    sys::exit_now(127)
}

fn report(inherited: &Inheritance<'_>, message: &Message) -> Result<(), ChildError> {
    message.send(inherited.socket).during(Step::Wake, || "reporting to the agent".into())
}

/// Waits for the one byte that the agent sends; its hanging up ends the child.
fn wait_for_byte(inherited: &Inheritance<'_>) -> Result<(), ChildError> {
    let mut byte = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(inherited.socket, &mut byte)) {
        Ok(1) => Ok(()),
        Ok(_) => sys::exit_now(0),
        Err(error) => Err(error).during(Step::Wake, || "waiting for the agent".into()),
    }
}

/// Waits to be told which process to become, and takes its streams.
fn wait_for_order(inherited: &Inheritance<'_>) -> Result<ProcessPlan, ChildError> {
    // A pod's first process never gets an order. If others are in its pid namespace, it inherits their children.
    sys::disown_children(true);
    let order = order::receive(inherited.socket).during(Step::Wake, || "waiting for the agent".into())?;
    sys::disown_children(false);
    let Some(Order { process, stdio }) = order else { sys::exit_now(0) };
    if let Some(streams) = &stdio {
        take_streams(streams)?;
    }
    let mut tty = None;
    if let Some(size) = process.terminal {
        let root = Root::open(c"/").during(Step::Terminal, || "opening the container's root".into())?;
        tty = Some(terminal::open(&root, size, true)?);
    }
    finish::make_cwd(&process);
    report(inherited, &Message::Ready(vec![], tty))?;
    Ok(process)
}

/// Everything up to the point where the program would be executed. Returns the terminal's master side.
fn build(
    plan: &Plan,
    cgroup: &CStr,
    joined: &[(u64, OwnedFd)],
    inherited: &Inheritance<'_>,
    watch: &mut Stopwatch,
) -> Result<Option<OwnedFd>, ChildError> {
    connect_stdio(inherited)?;
    namespaces(plan, joined, inherited, watch)?;
    let null = mounts::clone_tree(rustix::fs::CWD, c"/dev/null", false)
        .during(Step::Rootfs, || "opening /dev/null".into())?;
    let old_root = Root::open(c"/").during(Step::Rootfs, || "opening the guest's root".into())?;
    let root = open_rootfs(&plan.rootfs)?;
    watch.lap(Step::Rootfs);

    let view = CgroupView { path: cgroup, own_namespace: plan.new_cgroup_namespace };
    // Modes of directories and nodes are given exactly.
    rustix::process::umask(Mode::empty());
    for mount in &plan.mounts {
        mounts::mount(mount, &root, view)?;
    }
    watch.lap(Step::Mounts);
    if plan.fill_dev {
        devices::fill(&root)?;
    }
    devices::make(&plan.devices, &root)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    watch.lap(Step::Devices);
    let mut tty = None;
    if let Some(size) = plan.process.as_ref().and_then(|process| process.terminal) {
        tty = Some(terminal::open(&root, size, true)?);
        watch.lap(Step::Terminal);
    }
    sysctls(plan)?;
    identity(plan)?;
    watch.lap(Step::Hostname);
    pivot(&root, &old_root)?;
    watch.lap(Step::Pivot);
    plan.process.iter().for_each(finish::make_cwd);
    mounts::protect(&plan.masked_paths, &plan.readonly_paths, null)?;
    finish_root(plan, &root)?;
    watch.lap(Step::Mask);
    Ok(tty)
}

fn connect_stdio(inherited: &Inheritance<'_>) -> Result<(), ChildError> {
    // A session of its own, without the agent's terminal, which a new one can be given.
    rustix::process::setsid().during(Step::Wake, || "making a session".into())?;
    inherited.stdio.map_or(Ok(()), take_streams)
}

fn take_streams(streams: &[OwnedFd; 3]) -> Result<(), ChildError> {
    for (stream, number) in streams.iter().zip(0..) {
        sys::dup_onto(stream, number).during(Step::Wake, || "connecting the standard streams".into())?;
    }
    Ok(())
}

fn namespaces(
    plan: &Plan,
    joined: &[(u64, OwnedFd)],
    inherited: &Inheritance<'_>,
    watch: &mut Stopwatch,
) -> Result<(), ChildError> {
    if plan.id_maps.is_some() {
        // The agent, which has the rights, writes the maps; then the ids in the new namespace can be taken.
        report(inherited, &Message::NeedsIdMaps)?;
        wait_for_byte(inherited)?;
        let context = || "becoming root of the user namespace".to_owned();
        finish::set_ids(0, 0, &[]).during(Step::UserMap, context)?;
        watch.lap(Step::UserMap);
    }
    for (flag, fd) in joined {
        rustix::thread::move_into_link_name_space(fd.as_fd(), None)
            .during(Step::Namespaces, || format!("joining the namespace {flag:#x}"))?;
    }
    if plan.new_cgroup_namespace {
        // Only now, as its root is the cgroup in which the process is when it makes the namespace.
        // SAFETY: no CLONE_FILES: descriptors stay as they are.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
            .during(Step::Namespaces, || "making a cgroup namespace".into())?;
    }
    if plan.new_namespaces & libc::CLONE_NEWNET as u64 != 0 {
        crate::net::loopback_up().during(Step::Namespaces, || "bringing the loopback interface up".into())?;
    }
    watch.lap(Step::Namespaces);
    Ok(())
}

/// Opens the root file system, as a mount: pivot_root(2) takes nothing less.
fn open_rootfs(path: &CStr) -> Result<Root, ChildError> {
    /// STATX_ATTR_MOUNT_ROOT
    const MOUNT_ROOT: u64 = 0x2000;
    let context = || format!("opening the root file system {}", path.to_string_lossy());
    let root = Root::open(path).during(Step::Rootfs, context)?;
    let stat = rustix::fs::statx(&root, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .during(Step::Rootfs, context)?;
    if stat.stx_attributes.bits() & MOUNT_ROOT != 0 {
        return Ok(root);
    }
    let tree = mounts::clone_tree(&root, c"", true).during(Step::Rootfs, context)?;
    mounts::move_onto(&tree, &root).during(Step::Rootfs, context)?;
    Root::open(path).during(Step::Rootfs, context)
}

fn sysctls(plan: &Plan) -> Result<(), ChildError> {
    if plan.sysctls.is_empty() {
        return Ok(());
    }
    // The guest's own /proc shows the parameters of this process's namespaces, and no image can have put anything there.
    let proc = Root::open(c"/proc/sys").during(Step::Sysctl, || "opening /proc/sys".into())?;
    for (name, value) in &plan.sysctls {
        let context = || format!("setting the kernel parameter {}", name.to_string_lossy());
        let file = proc.get(name, OFlags::WRONLY).during(Step::Sysctl, context)?;
        rustix::io::write(file, value.as_bytes()).during(Step::Sysctl, context)?;
    }
    Ok(())
}

fn identity(plan: &Plan) -> Result<(), ChildError> {
    if !plan.hostname.is_empty() {
        rustix::system::sethostname(plan.hostname.as_bytes())
            .during(Step::Hostname, || "setting the host name".into())?;
    }
    if !plan.domainname.is_empty() {
        rustix::system::setdomainname(plan.domainname.as_bytes())
            .during(Step::Hostname, || "setting the domain name".into())?;
    }
    Ok(())
}

/// Makes the root file system the root, and removes the guest's from this mount namespace.
fn pivot(root: &Root, old_root: &Root) -> Result<(), ChildError> {
    let context = || "changing the root".to_owned();
    rustix::process::fchdir(root).during(Step::Pivot, context)?;
    // Stacks the old root on top of the new one, which spares a directory for it.
    rustix::process::pivot_root(c".", c".").during(Step::Pivot, context)?;
    rustix::process::fchdir(old_root).during(Step::Pivot, context)?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).during(Step::Pivot, context)?;
    rustix::process::chdir(c"/").during(Step::Pivot, context)
}

/// Propagation and write protection of the root itself, last, when all else in it is done.
fn finish_root(plan: &Plan, root: &Root) -> Result<(), ChildError> {
    let context = || "setting the root's mount attributes".to_owned();
    if plan.readonly {
        mounts::set(root.as_fd(), false, &mounts::read_only()).during(Step::Mask, context)?;
    }
    if let Some((propagation, recursive)) = plan.propagation {
        let attr = MountAttr { propagation, ..MountAttr::default() };
        mounts::set(root.as_fd(), recursive, &attr).during(Step::Mask, context)?;
    }
    Ok(())
}

/// For user and group ids as the kernel's types.
pub(super) fn ids(uid: u32, gid: u32) -> (Uid, Gid) {
    (Uid::from_raw(uid), Gid::from_raw(gid))
}
