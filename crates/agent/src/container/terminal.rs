//! The pseudo-terminal of a process, made inside its container so that its name there is right.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::sys;

use super::mounts;
use super::report::{ChildError, During, Step};
use super::root::Root;

/// The kernel's DEVPTS_SUPER_MAGIC.
const DEVPTS: u64 = 0x1cd1;

/// Makes a terminal in the `/dev/pts` below `root`, puts its slave side on the standard streams of this session leader, and
/// returns the master side. `console`: also mount it on `/dev/console`.
///
/// # Errors
/// When the container has no `/dev/pts`, or those of the system calls.
pub fn open(root: &Root, (columns, rows): (u16, u16), console: bool) -> Result<OwnedFd, ChildError> {
    let context = || "opening a terminal in the container's /dev/pts (is devpts mounted there?)".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let master = root.get(c"/dev/pts/ptmx", flags).during(Step::Terminal, context)?;
    is_master(&master).during(Step::Terminal, context)?;
    let slave = slave(&master).during(Step::Terminal, context)?;
    if (columns, rows) != (0, 0) {
        resize(&master, columns, rows).during(Step::Terminal, context)?;
    }
    if console {
        let context = || "mounting the terminal on /dev/console".to_owned();
        let tree = mounts::clone_tree(&slave, c"", false).during(Step::Terminal, context)?;
        let target = root.file(c"/dev/console").during(Step::Terminal, context)?;
        mounts::move_onto(tree, target).during(Step::Terminal, context)?;
    }
    for stream in 0..=2 {
        sys::dup_onto(&slave, stream).during(Step::Terminal, || "duplicating the terminal".into())?;
    }
    sys::set_controlling_terminal(slave.as_fd()).during(Step::Terminal, || "taking the terminal".into())?;
    Ok(master)
}

fn slave(master: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::pty::unlockpt(master)?;
    rustix::pty::ioctl_tiocgptpeer(master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
}

/// Whether a descriptor, which may have come out of a hostile container, is the master side of a pseudo-terminal.
///
/// # Errors
/// `ENOTTY` when it is not, and those of the system calls.
pub fn is_master(fd: impl AsFd) -> rustix::io::Result<()> {
    let stat = rustix::fs::statat(fd.as_fd(), c"", AtFlags::EMPTY_PATH)?;
    let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(5, 2);
    match device && rustix::fs::fstatfs(fd)?.f_type as u64 == DEVPTS {
        true => Ok(()),
        false => Err(Errno::NOTTY),
    }
}

/// Sets a terminal's size.
///
/// # Errors
/// Those of TIOCSWINSZ.
pub fn resize(fd: impl AsFd, columns: u16, rows: u16) -> rustix::io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(fd, size)
}
