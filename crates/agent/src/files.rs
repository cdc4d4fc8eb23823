//! A container's files for the host: Stat and Copy.
//!
//! Each request is served by a short-lived child that enters the container's mount namespace (or, when the container has ended,
//! makes its root file system its root) before it looks at any path. So every symbolic link and every `..` means what it means
//! in the container, the event loop never waits for a disk or a share, and a hostile tree costs the child only.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use kapsel_protocol::stdio::{Kind, Token};
use kapsel_protocol::{api, limits};
use protobuf::Message;
use rustix::thread::ThreadNameSpaceType;
use tokio::io::Interest;

use crate::archive;
use crate::container::finish;
use crate::container::lifecycle::{Container, Surroundings};
use crate::container::running::IN_CHILD;
use crate::error::{Error, Result};
use crate::stdio::{self, input, output};
use crate::sys::{self, Child};

/// Longest answer of a helper, in bytes.
const ANSWER_MAX: usize = limits::PATH_MAX + 1024;

/// Looks at one path.
///
/// # Errors
/// `NotFound` when it does not exist.
pub async fn stat(
    container: &Container,
    request: &api::StatRequest,
    around: Surroundings<'_>,
) -> Result<api::StatResponse> {
    let path = checked(&request.path)?;
    let follow = request.follow;
    let (helper, answer) = Helper::start(container, around, None, move |_| archive::stat(&path, follow))?;
    helper.finish(answer).await
}

/// Copies out of or into a container.
///
/// # Errors
/// `NotFound` when the path does not exist; what went wrong with the archive otherwise.
pub async fn copy(
    container: &Container,
    request: &api::CopyRequest,
    around: Surroundings<'_>,
) -> Result<api::CopyResponse> {
    let path = checked(&request.path)?;
    let token: Token = request.token.parse().map_err(|e| Error::Invalid(format!("{e}")))?;
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    match request.direction.enum_value() {
        Ok(api::copy_request::Direction::OUT) => {
            let follow = request.follow;
            let job = move |pipe| archive::pack(&path, follow, pipe);
            let (helper, answer) = Helper::start(container, around, Some(writer), job)?;
            let pipe = stdio::watch(reader, Interest::READABLE)?;
            let pump = output(pipe, around.streams.claim(token, Kind::Stdout));
            tokio::join!(helper.finish(answer), pump).0
        }
        Ok(api::copy_request::Direction::IN) => {
            let keep_owner = request.keep_owner;
            let job = move |pipe| archive::unpack(&path, keep_owner, pipe);
            let (helper, answer) = Helper::start(container, around, Some(reader), job)?;
            let pipe = stdio::watch(writer, Interest::WRITABLE | Interest::ERROR)?;
            // When the helper gives up it closes the pipe, and the pump ends.
            let pump = input(pipe, around.streams.claim(token, Kind::Stdin));
            tokio::join!(helper.finish(answer), pump).0
        }
        _ => Err(Error::Invalid("the direction of a copy must be OUT or IN".into())),
    }
}

fn checked(path: &str) -> Result<String> {
    match path.is_empty() || path.len() >= limits::PATH_MAX || path.contains('\0') {
        true => Err(Error::Invalid(format!("{path:?} is not a path"))),
        false => Ok(format!("/{}", path.trim_start_matches('/'))),
    }
}

/// A child at work. Dropping it (the session has ended) kills the child.
struct Helper(OwnedFd);

impl Drop for Helper {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = sys::pidfd_send_signal(self.0.as_fd(), libc::SIGKILL);
    }
}

impl Helper {
    /// Starts `job` in the container's files. Returns also where its answer comes.
    fn start<T: Message>(
        container: &Container,
        around: Surroundings<'_>,
        pipe: Option<OwnedFd>,
        job: impl FnOnce(OwnedFd) -> io::Result<T>,
    ) -> Result<(Self, OwnedFd)> {
        let (answer, theirs) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        let (init, namespaces, rootfs) = container.files();
        // SAFETY: the agent is single-threaded; the child ends below in _exit.
        let child =
            unsafe { sys::clone3(0, None) }.map_err(|e| Error::Internal(format!("making a helper: {e}")))?;
        let Some(Child { pid, pidfd }) = child else {
            IN_CHILD.store(true, Ordering::Relaxed);
            let init = init.map(|running| running.pidfd());
            let keep: Vec<_> =
                init.into_iter().chain(pipe.as_ref().map(AsFd::as_fd)).chain([theirs.as_fd()]).collect();
            let done = sys::close_except(&keep)
                .and_then(|()| enter(init, namespaces, rootfs))
                .and_then(|()| pipe.map_or_else(|| rustix::io::dup(&theirs).map_err(io::Error::from), Ok))
                .and_then(job);
            tell(done, &theirs);
            sys::exit_now(0)
        };
        // Nobody waits for it: that it ends is seen by the end of its answer.
        drop(around.reaper.watch(pid));
        Ok((Self(pidfd), answer))
    }

    async fn finish<T: Message>(self, answer: OwnedFd) -> Result<T> {
        let answer = stdio::watch(answer, Interest::READABLE)?;
        let mut bytes = vec![0; ANSWER_MAX];
        let mut len = 0;
        loop {
            let read = |fd: &OwnedFd| rustix::io::read(fd, &mut bytes[len..]).map_err(io::Error::from);
            let mut read = read;
            match answer.async_io(Interest::READABLE, |fd| read(fd)).await? {
                0 => break,
                n => len += n,
            }
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match bytes[..len].split_first() {
            Some((b'=', message)) => T::parse_from_bytes(message).map_err(|e| Error::Internal(e.to_string())),
            Some((b'?', message)) => Err(Error::NotFound(text(message))),
            Some((_, message)) => Err(Error::Internal(text(message))),
            None => Err(Error::Internal("the helper died (is the guest out of memory?)".into())),
        }
    }
}

/// In the child.
fn enter(init: Option<std::os::fd::BorrowedFd<'_>>, namespaces: u64, rootfs: &CStr) -> io::Result<()> {
    match init {
        Some(init) => {
            let flags = ThreadNameSpaceType::from_bits_retain(namespaces as u32);
            rustix::thread::move_into_thread_name_spaces(init, flags)?;
            if namespaces & libc::CLONE_NEWUSER as u64 != 0 {
                finish::set_ids(0, 0, &[])?;
            }
        }
        None => {
            rustix::process::chroot(rootfs)?;
        }
    }
    rustix::process::chdir(c"/")?;
    Ok(())
}

/// In the child.
fn tell<T: Message>(done: io::Result<T>, answer: &OwnedFd) {
    let bytes = match done {
        Ok(message) => [b"=".to_vec(), message.write_to_bytes().unwrap_or_default()].concat(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => format!("?{error}").into_bytes(),
        Err(error) => format!("!{error}").into_bytes(),
    };
    // Less than a pipe holds. If the agent is gone nobody minds.
    let _ = rustix::io::write(answer, &bytes[..bytes.len().min(ANSWER_MAX)]);
}
