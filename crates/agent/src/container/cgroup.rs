//! The cgroup of a container, below `/sys/fs/cgroup/kapsel`.
//!
//! `kapsel/std` holds the containers whose device rules are the default ones: the program that enforces them is on that
//! directory and was loaded before the guest became a template, so such a container pays nothing for it. `kapsel/own` holds
//! the others, each with a program of its own.

use std::ffi::{CStr, CString};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::Interest;

use crate::sys;

use super::device_rules::Rules;
use super::limits::Setting;

/// Where cgroup2 is mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// What happened for lack of memory, as counted by the kernel, here and below.
const EVENTS: &str = "memory.events";
/// Processes that were killed, in `EVENTS`.
const OOM_KILL: &str = "oom_kill";
/// The name of the first cgroup that is asked for.
pub const FIRST: u64 = 0;
/// Longest file that is read, in bytes. `cgroup.procs` and `io.stat` are the long ones.
const FILE_MAX: usize = 1 << 20;
/// How long freezing and killing may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Makes `kapsel/std` and `kapsel/own` with all controllers, and attaches the default device rules. Once, at boot.
///
/// # Errors
/// When cgroup2 is not mounted, or those of bpf(2).
pub fn prepare() -> io::Result<()> {
    let wanted: Vec<String> = std::fs::read_to_string(format!("{MOUNT}/cgroup.controllers"))?
        .split_whitespace()
        .map(|c| format!("+{c}"))
        .collect();
    let enable = |dir: &str| {
        let file = format!("{MOUNT}{dir}/cgroup.subtree_control");
        // One by one: a controller that cannot be enabled must not keep out the others.
        wanted.iter().for_each(|controller| drop(std::fs::write(&file, controller)));
    };
    enable("");
    std::fs::create_dir_all(format!("{MOUNT}/kapsel/std"))?;
    std::fs::create_dir_all(format!("{MOUNT}/kapsel/own"))?;
    for dir in ["/kapsel", "/kapsel/std", "/kapsel/own"] {
        enable(dir);
    }
    let default = Rules::parse(&[]).map_err(io::Error::other)?;
    let dir =
        rustix::fs::open(format!("{MOUNT}/kapsel/std"), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    default.attach(dir.as_fd(), None)?;
    // The first container's, so that a clone of a template finds it made.
    std::fs::create_dir(format!("{MOUNT}/kapsel/std/{FIRST}"))
}

/// A container's cgroup. Dropping it leaves it in place; see [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    path: CString,
    dir: OwnedFd,
    /// Its own device program.
    program: Mutex<Option<OwnedFd>>,
    /// Without one of its own it has the default rules.
    default_rules: bool,
}

impl Cgroup {
    /// Makes the cgroup, applies the limits, and puts the device rules in force.
    ///
    /// # Errors
    /// With the file that could not be written.
    pub fn create(name: &str, rules: &Rules, settings: &[Setting]) -> io::Result<Self> {
        let default_rules = rules.is_default();
        let parent = if default_rules { "std" } else { "own" };
        let path = CString::new(format!("{MOUNT}/kapsel/{parent}/{name}"))?;
        match rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)) {
            // Names are numbers that are given once, so this is the prepared one.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(context("making", &path, error)),
        }
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let made = rustix::fs::open(&path, flags, Mode::empty()).map_err(io::Error::from).and_then(|dir| {
            let cgroup = Self { path: path.clone(), dir, program: Mutex::default(), default_rules };
            if !rules.allow_all() {
                cgroup
                    .set_rules(rules)
                    .map_err(|e| io::Error::new(e.kind(), format!("loading the device rules: {e}")))?;
            }
            cgroup.apply(settings)?;
            Ok(cgroup)
        });
        if made.is_err() {
            // It is empty, so this cannot fail for a reason that matters.
            let _ = rustix::fs::unlinkat(rustix::fs::CWD, &path, AtFlags::REMOVEDIR);
        }
        made
    }

    /// The path in the guest.
    pub fn path(&self) -> &CStr {
        &self.path
    }

    /// The directory, for CLONE_INTO_CGROUP.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Writes limits, in order.
    ///
    /// # Errors
    /// With the file and value that the kernel did not take.
    pub fn apply(&self, settings: &[Setting]) -> io::Result<()> {
        for setting in settings {
            let mut result = self.write(&setting.file, &setting.value);
            if let (Err(ErrorKind::NotFound), Some((file, value))) =
                (result.as_ref().map_err(io::Error::kind), &setting.fallback)
            {
                result = self.write(file, value);
            }
            match result {
                Err(error) if error.kind() == ErrorKind::NotFound && setting.optional => {}
                Err(error) => {
                    let message =
                        format!("setting the cgroup limit {} to {}: {error}", setting.file, setting.value);
                    return Err(io::Error::new(error.kind(), message));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Replaces the device rules.
    ///
    /// # Errors
    /// Those of bpf(2); `Unsupported` when the container has the default rules, which are not its own to loosen.
    pub fn set_rules(&self, rules: &Rules) -> io::Result<()> {
        if self.default_rules {
            return match rules.is_default() {
                true => Ok(()),
                false => Err(io::Error::new(
                    ErrorKind::Unsupported,
                    "the device rules of a container that began with the default ones cannot be changed",
                )),
            };
        }
        let mut program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        *program = Some(rules.attach(self.dir.as_fd(), program.as_ref().map(AsFd::as_fd))?);
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        let fd = rustix::fs::openat(&self.dir, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(fd, value.as_bytes())?;
        Ok(())
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// Those of open(2) and read(2).
    pub fn read(&self, file: &str) -> io::Result<String> {
        read_at(&self.dir, file)
    }

    /// One number of a file of `key value` lines; 0 when it is not there.
    pub fn number(&self, file: &str, key: &str) -> u64 {
        number(&self.read(file).unwrap_or_default(), key)
    }

    /// How many processes the kernel killed for lack of memory, here and below.
    pub fn oom_kills(&self) -> u64 {
        self.number(EVENTS, OOM_KILL)
    }

    /// Waits until there are more of them than `seen`; how many.
    ///
    /// # Errors
    /// Those of open(2), read(2) and epoll(7).
    pub async fn oom_kills_beyond(&self, seen: u64) -> io::Result<u64> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let events = rustix::fs::openat(&self.dir, EVENTS, flags, Mode::empty())?;
        let events = sys::in_event_loop(events, Interest::PRIORITY)?;
        loop {
            // What happens after a read of the same open file is told as urgent data.
            let mut content = [0; 512];
            let length = rustix::io::pread(events.get_ref(), &mut content, 0)?;
            let kills = number(&String::from_utf8_lossy(&content[..length]), OOM_KILL);
            if kills > seen {
                return Ok(kills);
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }

    /// The processes, here and below.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect_pids(&self.dir, 0, &mut pids);
        pids
    }

    /// Sends a signal to every process, here and below.
    ///
    /// # Errors
    /// Those of kill(2), except that a process ended meanwhile.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        if signal == libc::SIGKILL {
            return self.write("cgroup.kill", "1");
        }
        self.pids().into_iter().try_for_each(|pid| match sys::kill(pid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        })
    }

    /// Freezes or thaws, and waits until it is so.
    ///
    /// # Errors
    /// `TimedOut` when some process does not freeze, as one that waits for a device.
    pub async fn freeze(&self, freeze: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if freeze { "1" } else { "0" })?;
        self.until("frozen", u64::from(freeze)).await
    }

    /// Waits until a key of `cgroup.events` has a value.
    async fn until(&self, key: &str, value: u64) -> io::Result<()> {
        let waiting = async {
            let mut pause = Duration::from_micros(250);
            while self.number("cgroup.events", key) != value {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        };
        let late = || io::Error::new(ErrorKind::TimedOut, format!("the cgroup did not become {key} {value}"));
        tokio::time::timeout(DEADLINE, waiting).await.map_err(|_| late())
    }

    /// Kills what is left and removes the cgroup with all below.
    ///
    /// # Errors
    /// When a process cannot be killed in time.
    pub async fn remove(&self) -> io::Result<()> {
        if self.number("cgroup.events", "populated") != 0 {
            self.write("cgroup.kill", "1")?;
            self.until("populated", 0).await?;
        }
        let mut attempts = 0;
        loop {
            remove_below(&self.dir, 0)?;
            match rustix::fs::unlinkat(rustix::fs::CWD, &self.path, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                // The last process has been killed but not quite gone.
                Err(Errno::BUSY) if attempts < 100 => attempts += 1,
                Err(error) => return Err(context("removing", &self.path, error)),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// One number of `key value` lines; 0 when it is not there.
fn number(content: &str, key: &str) -> u64 {
    let value = content.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

fn context(doing: &str, path: &CStr, error: Errno) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{doing} the cgroup {}: {error}", path.to_string_lossy()))
}

fn read_at(dir: &OwnedFd, file: &str) -> io::Result<String> {
    let fd = rustix::fs::openat(dir, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = Vec::new();
    let mut chunk = [0; 4096];
    while content.len() < FILE_MAX {
        match rustix::io::read(&fd, &mut chunk)? {
            0 => break,
            n => content.extend_from_slice(&chunk[..n]),
        }
    }
    Ok(String::from_utf8_lossy(&content).into_owned())
}

/// A container may have made cgroups of its own, as deep as it liked; the kernel allows some thousands.
const DEPTH_MAX: usize = 64;

fn subdirectories(dir: &OwnedFd) -> Vec<CString> {
    let Ok(entries) = rustix::fs::Dir::read_from(dir) else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok())
        .filter(|e| {
            e.file_type() == rustix::fs::FileType::Directory && !e.file_name().to_bytes().starts_with(b".")
        })
        .map(|e| e.file_name().to_owned())
        .collect()
}

fn enter(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(dir, name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn collect_pids(dir: &OwnedFd, depth: usize, pids: &mut Vec<i32>) {
    let content = read_at(dir, "cgroup.procs").unwrap_or_default();
    // 0 stands for a process outside of this pid namespace.
    pids.extend(content.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    if depth < DEPTH_MAX {
        for name in subdirectories(dir) {
            if let Ok(below) = enter(dir, &name) {
                collect_pids(&below, depth + 1, pids);
            }
        }
    }
}

fn remove_below(dir: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other("a container made cgroups more than 64 levels deep"));
    }
    for name in subdirectories(dir) {
        if let Ok(below) = enter(dir, &name) {
            remove_below(&below, depth + 1)?;
        }
        match rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT | Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
