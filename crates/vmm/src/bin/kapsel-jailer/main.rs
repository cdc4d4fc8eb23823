//! `kapsel-jailer`: runs a monitor in a root of its own, as a user of its own. Its options and the layout that it makes are
//! those of Firecracker's jailer.
//!
//! Everything is opened and checked on the host first; then come, in the order of [`run`], the limits, the cgroups and the
//! namespaces, and at last the user. Directories that a jail may have had before are entered without following links.

mod cgroup;
mod options;
mod root;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kapsel_vmm::boot_timer::processor_time;
use options::Options;
use rustix::process::{Gid, Rlimit, Uid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use rustix::time::{ClockId, clock_gettime};

/// When the jailer was started, for the monitor's metrics.
struct Started {
    wall: Duration,
    processor: Duration,
}

fn main() -> ExitCode {
    let started = Started {
        wall: clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default(),
        processor: processor_time(),
    };
    match run(&Options::parse(), &started) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kapsel-jailer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns only when it fails, or as the parent of a monitor in a new PID namespace.
fn run(options: &Options, started: &Started) -> Result<ExitCode> {
    close_inherited()?;
    let program = options::program(&options.exec_file)?;
    let name = options::program_name(&program)?;
    let base = options::base(&options.chroot_base_dir)?;
    let network = options.netns.as_ref().map(|path| open(path)).transpose()?;
    let null = options.daemonize.then(|| open("/dev/null".as_ref())).transpose()?;
    let faults = root::fault_device()?;

    root::own_mounts()?;
    let root = root::make(&base, name, &options.id)?;
    root::copy_program(&root, &program, name)?;
    limit(options)?;
    let parent = options.parent_cgroup.as_deref();
    cgroup::join(options.cgroup_version, &options.cgroup, parent, name, &options.id)?;
    if let Some(network) = network {
        rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("cannot join the network namespace {:?}", options.netns))?;
    }
    root::enter(&root)?;
    root::fill(&root, options.uid, options.gid, faults)?;
    if let Some(null) = null {
        detach(&null)?;
    }
    if options.new_pid_ns && fork(name)? {
        return Ok(ExitCode::SUCCESS);
    }
    if !options.new_pid_ns {
        root::write_pid(name, std::process::id())?;
    }
    drop_privileges(options.uid, options.gid)?;
    let error = monitor(options, started, name).exec();
    Err(error).with_context(|| format!("cannot run {name} in the jail; is it linked statically?"))
}

/// What the caller has open is no concern of the jail.
fn close_inherited() -> Result<()> {
    // SAFETY: nothing of this process is open yet but its standard streams, so nobody owns what is closed.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).context("cannot close inherited descriptors"),
    }
}

fn open(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(path == Path::new("/dev/null")).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

fn limit(options: &Options) -> Result<()> {
    for limit in options::limits(&options.resource_limit) {
        let both = Rlimit { current: Some(limit.value), maximum: Some(limit.value) };
        rustix::process::setrlimit(limit.resource, both)
            .with_context(|| format!("cannot limit {} to {}", limit.name, limit.value))?;
    }
    Ok(())
}

/// A session of its own, and nothing to read from or write to.
fn detach(null: &File) -> Result<()> {
    rustix::process::setsid().context("cannot make a session; is the jailer a process group's leader?")?;
    rustix::stdio::dup2_stdin(null)
        .and_then(|()| rustix::stdio::dup2_stdout(null))
        .and_then(|()| rustix::stdio::dup2_stderr(null))
        .context("cannot redirect the standard streams to /dev/null")
}

/// Goes on as process 1 of a new PID namespace. True in the parent, which has written down who that is.
fn fork(name: &str) -> Result<bool> {
    // SAFETY: the new namespace is for children only; descriptors and memory stay as they are.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.context("cannot make a PID namespace")?;
    // SAFETY: this process has one thread, so the child's copy of everything is whole.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).context("cannot start a process in the new PID namespace"),
        0 => Ok(false),
        child => root::write_pid(name, child.cast_unsigned()).map(|()| true),
    }
}

/// For good: a user who is not root has no capabilities left, and no program gives any back.
fn drop_privileges(uid: u32, gid: u32) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .and_then(|()| rustix::thread::set_no_new_privs(true))
        .with_context(|| format!("cannot become user {uid:?} and group {gid:?}"))
}

fn monitor(options: &Options, started: &Started, name: &str) -> Command {
    let mut command = Command::new(Path::new("/").join(name));
    let microseconds =
        |option: &str, time: Duration| OsString::from(format!("{option}={}", time.as_micros()));
    // A process of a new namespace has used nothing; what the jailer has used is its parent's.
    let (own, parents) =
        if options.new_pid_ns { (Duration::ZERO, Some(processor_time())) } else { (started.processor, None) };
    command
        .env_clear()
        .arg("--id")
        .arg(&options.id)
        .arg(microseconds("--start-time-us", started.wall))
        .arg(microseconds("--start-time-cpu-us", own))
        .args(parents.map(|time| microseconds("--parent-cpu-time-us", time)))
        .args(&options.arguments);
    command
}

/// The part of a path that nobody may use to leave the place where it is put.
fn plain_name(name: &str) -> Result<&str> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        bail!("{name:?} is not a file's name");
    }
    Ok(name)
}
