//! What a child tells the agent while it turns itself into a container's process.
//!
//! One sequenced-packet socket pair per child. The child's end is close-on-exec: once its program runs, the agent reads the
//! end of file, and that is the news of success.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Longest message, in bytes.
const MESSAGE_MAX: usize = 2048;

/// Longest explanation, in bytes.
const DETAIL_MAX: usize = 1024;

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What a child was doing.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            const ALL: &[Self] = &[$(Self::$name,)*];

            /// For phases and messages.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

steps! {
    /// Joining and making namespaces.
    Namespaces = "namespaces",
    /// Waiting for the id maps.
    UserMap = "user-map",
    /// Binding the root file system.
    Rootfs = "rootfs",
    /// One of the mounts.
    Mounts = "mounts",
    /// Device nodes.
    Devices = "devices",
    /// The pseudo-terminal.
    Terminal = "terminal",
    /// Kernel parameters.
    Sysctl = "sysctl",
    /// Host and domain name.
    Hostname = "hostname",
    /// Changing the root.
    Pivot = "pivot",
    /// Masked and read-only paths.
    Mask = "mask",
    /// startContainer hooks.
    Hooks = "hooks",
    /// Resource limits.
    Rlimits = "rlimits",
    /// Working directory.
    Cwd = "cwd",
    /// User and groups.
    User = "user",
    /// Capabilities.
    Capabilities = "capabilities",
    /// The filter.
    Seccomp = "seccomp",
    /// execve(2).
    Exec = "exec",
    /// From the request for the start to its execution by the child.
    Wake = "wake",
}

/// Why a child gave up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}: {}", std::io::Error::from(*.errno))]
pub struct ChildError {
    /// While doing what.
    pub step: Step,
    /// The kernel's answer.
    pub errno: Errno,
    /// On what.
    pub detail: String,
}

/// Adds the step and the object to an error of the kernel.
pub trait During<T> {
    /// The step and the object.
    fn during(self, step: Step, detail: impl FnOnce() -> String) -> Result<T, ChildError>;
}

impl<T, E: Into<std::io::Error>> During<T> for Result<T, E> {
    fn during(self, step: Step, detail: impl FnOnce() -> String) -> Result<T, ChildError> {
        self.map_err(|error| {
            let error: std::io::Error = error.into();
            let errno = error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
            ChildError { step, errno, detail: detail() }
        })
    }
}

/// How long a step took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Which.
    pub step: Step,
    /// CLOCK_MONOTONIC in microseconds.
    pub start_us: u64,
    /// Microseconds.
    pub duration_us: u64,
}

/// A stopwatch whose laps are steps.
#[derive(Debug)]
pub struct Stopwatch {
    last: u64,
    laps: Vec<Timing>,
}

/// CLOCK_MONOTONIC in microseconds.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Self { last: monotonic_us(), laps: Vec::with_capacity(20) }
    }

    /// What was done since the last lap was `step`.
    pub fn lap(&mut self, step: Step) {
        let now = monotonic_us();
        self.laps.push(Timing { step, start_us: self.last, duration_us: now - self.last });
        self.last = now;
    }
}

/// A message of a child.
#[derive(Debug)]
pub enum Message {
    /// In a new user namespace whose id maps it needs.
    NeedsIdMaps,
    /// The container is built, or joined; the terminal's master side comes along.
    Ready(Vec<Timing>, Option<OwnedFd>),
    /// Everything is done but execve(2).
    Executing(Vec<Timing>),
    /// It gave up.
    Failed(ChildError),
}

/// A connected pair: the agent's end, non-blocking, and the child's.
///
/// # Errors
/// Those of socketpair(2).
pub fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (agent, child) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::io::ioctl_fionbio(&agent, true)?;
    Ok((agent, child))
}

impl Message {
    /// Sends it.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&self, socket: impl AsFd) -> rustix::io::Result<()> {
        let mut bytes = Vec::with_capacity(512);
        let mut fd = None;
        match self {
            Self::NeedsIdMaps => bytes.push(b'M'),
            Self::Ready(timings, tty) => {
                bytes.push(b'R');
                write_timings(timings, &mut bytes);
                fd = tty.as_ref().map(AsFd::as_fd);
            }
            Self::Executing(timings) => {
                bytes.push(b'X');
                write_timings(timings, &mut bytes);
            }
            Self::Failed(error) => {
                bytes.extend([b'F', error.step as u8]);
                bytes.extend(error.errno.raw_os_error().to_le_bytes());
                bytes.extend(error.detail.bytes().take(DETAIL_MAX));
            }
        }
        let Some(fd) = fd else {
            // The plainest of calls, as a seccomp filter may be in force already.
            rustix::io::write(socket, &bytes)?;
            return Ok(());
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Receives the next one; `None` is the end: the program runs, or the child died.
    ///
    /// # Errors
    /// Those of recvmsg(2); `EPROTO` for nonsense, which a child that has not executed anything cannot send.
    pub fn receive(socket: impl AsFd) -> rustix::io::Result<Option<Self>> {
        let mut bytes = [0; MESSAGE_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = match rustix::net::recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)
        {
            // A child that ends with unread bytes on its side resets the connection.
            Err(Errno::CONNRESET) => return Ok(None),
            other => other?,
        };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let Some((tag, rest)) = bytes[..received.bytes].split_first() else { return Ok(None) };
        match tag {
            b'M' => Some(Self::NeedsIdMaps),
            b'R' => read_timings(rest).map(|timings| Self::Ready(timings, fd)),
            b'X' => read_timings(rest).map(Self::Executing),
            b'F' => read_error(rest).map(Self::Failed),
            _ => None,
        }
        .map(Some)
        .ok_or(Errno::PROTO)
    }
}

impl Stopwatch {
    /// The laps so far.
    pub fn into_laps(self) -> Vec<Timing> {
        self.laps
    }
}

fn write_timings(timings: &[Timing], bytes: &mut Vec<u8>) {
    for timing in timings {
        bytes.push(timing.step as u8);
        bytes.extend(timing.start_us.to_le_bytes());
        bytes.extend(timing.duration_us.to_le_bytes());
    }
}

fn read_timings(bytes: &[u8]) -> Option<Vec<Timing>> {
    let word = |b: &[u8]| b.try_into().map(u64::from_le_bytes).ok();
    let one = |b: &[u8]| {
        Some(Timing {
            step: *Step::ALL.get(usize::from(*b.first()?))?,
            start_us: word(b.get(1..9)?)?,
            duration_us: word(b.get(9..17)?)?,
        })
    };
    bytes.chunks(17).map(one).collect()
}

fn read_error(bytes: &[u8]) -> Option<ChildError> {
    Some(ChildError {
        step: *Step::ALL.get(usize::from(*bytes.first()?))?,
        errno: Errno::from_raw_os_error(i32::from_le_bytes(bytes.get(1..5)?.try_into().ok()?)),
        detail: String::from_utf8_lossy(bytes.get(5..)?).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_socket() {
        let (agent, child) = pair().expect("socketpair");
        let mut watch = Stopwatch::start();
        watch.lap(Step::Mounts);
        watch.lap(Step::Wake);
        let laps = watch.into_laps();
        let file = OwnedFd::from(std::fs::File::open("/dev/null").expect("open"));
        Message::Ready(laps.clone(), Some(file)).send(&child).expect("send");
        match Message::receive(&agent).expect("receive") {
            Some(Message::Ready(got, Some(_))) => assert_eq!(got, laps),
            other => panic!("{other:?}"),
        }
        let error = ChildError { step: Step::Exec, errno: Errno::NOENT, detail: "x".into() };
        Message::Failed(error.clone()).send(&child).expect("send");
        match Message::receive(&agent).expect("receive") {
            Some(Message::Failed(got)) => assert_eq!(got, error),
            other => panic!("{other:?}"),
        }
        assert!(matches!(Message::receive(&agent), Err(Errno::AGAIN)));
        drop(child);
        assert!(matches!(Message::receive(&agent), Ok(None)));
    }
}
