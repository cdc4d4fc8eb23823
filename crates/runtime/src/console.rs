//! Pseudo-terminals: the engine gets the master by a socket, the stand-in has the other side.

use std::{
    io::IoSlice,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use anyhow::Context;
use rustix::{
    fs::{Mode, OFlags},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
    pty::OpenptFlags,
    termios::{OptionalActions, Winsize},
};

/// Makes a terminal, sends its master to whoever listens at `socket`, and returns the other side, raw: its line discipline is the
/// guest's.
pub fn make(socket: &Path, size: Option<(u16, u16)>) -> anyhow::Result<OwnedFd> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .context("cannot make a terminal")?;
    rustix::pty::unlockpt(&master).context("cannot unlock the terminal")?;
    let name = rustix::pty::ptsname(&master, Vec::new()).context("cannot name the terminal")?;
    let slave =
        rustix::fs::open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .context("cannot open the terminal")?;
    let mut settings = rustix::termios::tcgetattr(&slave).context("cannot read the terminal's settings")?;
    settings.make_raw();
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &settings)
        .context("cannot change the terminal's settings")?;
    if let Some((columns, rows)) = size {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&slave, size).context("cannot size the terminal")?;
    }
    send(socket, &master)
        .with_context(|| format!("cannot send the terminal to --console-socket {}", socket.display()))?;
    Ok(slave)
}

fn send(socket: &Path, master: &OwnedFd) -> std::io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    let fds = [master.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    // Receivers want at least one byte; runc sends the name.
    rustix::net::sendmsg(&stream, &[IoSlice::new(b"/dev/ptmx")], &mut control, SendFlags::empty())?;
    Ok(())
}
