//! A program that takes a container's output: `binary://PATH?KEY=VALUE` (`runtime/v2/README.md` of containerd, "Shim Logging").
//!
//! It is called as `PATH KEY VALUE …` with the container's id and namespace in its environment. Its descriptors 3 and 4 are the output and
//! the errors; by closing 5 it says that it is ready.

use std::{
    collections::HashSet,
    io,
    os::fd::{OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    process::{Child, Command},
};

use super::Error;

/// How long it may take until it is ready.
const READY: Duration = Duration::from_secs(10);
/// The first of its descriptors.
const FIRST: RawFd = 3;

/// Who is logged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// As its engine calls it.
    pub id: String,
    /// In which that is unique.
    pub namespace: String,
}

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    path: PathBuf,
    args: Vec<String>,
}

impl Program {
    /// Reads what follows `binary://`; `None` when it names no program.
    pub(super) fn parse(uri: &str) -> Option<Self> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let path = percent_encoding::percent_decode_str(path).decode_utf8().ok()?;
        let path = PathBuf::from(path.as_ref());
        let mut seen = HashSet::new();
        let mut args = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            // Of several values the first counts.
            if seen.insert(key.clone()) {
                args.extend([key.into_owned(), value.into_owned()]);
            }
        }
        path.is_absolute().then_some(Self { path, args })
    }

    /// The program's name, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts it; gives what it reads output and errors from.
    ///
    /// # Errors
    /// When it cannot be started, or ends or waits instead of being ready.
    pub(super) async fn start(&self, owner: &Owner) -> Result<[pipe::Sender; 2], Error> {
        let open = |source| Error::Open { path: self.path.clone(), source };
        let (mut child, senders, ready) = self.spawn(owner).map_err(open)?;
        let mut byte = [0];
        // Its end is told by the end of the pipe.
        let said = tokio::time::timeout(READY, async {
            pipe::Receiver::from_owned_fd(ready)?.read(&mut byte).await
        });
        let said = said.await.unwrap_or_else(|_| {
            let late = format!("it was not ready within {} s", READY.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, late))
        });
        if let Err(error) = said {
            let _ = child.kill().await;
            return Err(open(error));
        }
        tokio::spawn(reap(child));
        Ok(senders)
    }

    fn spawn(&self, owner: &Owner) -> io::Result<(Child, [pipe::Sender; 2], OwnedFd)> {
        let (output, output_end) = pipe()?;
        let (errors, errors_end) = pipe()?;
        let (ready_end, ready) = pipe()?;
        let mut command = Command::new(&self.path);
        command.args(&self.args).env("CONTAINER_ID", &owner.id).env("CONTAINER_NAMESPACE", &owner.namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let places = [output, errors, ready].into_iter().zip(FIRST..);
        let mappings = places.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        command.fd_mappings(mappings).map_err(io::Error::other)?;
        let child = command.spawn()?;
        let sender = |end| {
            rustix::io::ioctl_fionbio(&end, true)?;
            pipe::Sender::from_owned_fd(end)
        };
        rustix::io::ioctl_fionbio(&ready_end, true)?;
        Ok((child, [sender(output_end)?, sender(errors_end)?], ready_end))
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// It ends when it has read everything.
async fn reap(mut child: Child) {
    match child.wait().await {
        Ok(status) if status.success() => {}
        Ok(status) => tracing::warn!(%status, "the program that logs a container has failed"),
        Err(error) => tracing::warn!(%error, "the program that logs a container cannot be waited for"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_as_containerd_writes_them() {
        let parse = |uri| Program::parse(uri).map(|p| (p.path.display().to_string(), p.args.join(" ")));
        let some = |path: &str, args: &str| Some((path.to_owned(), args.to_owned()));
        assert_eq!(parse("/bin/logger"), some("/bin/logger", ""));
        assert_eq!(
            parse("/usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fx"),
            some("/usr/bin/nerdctl", "_NERDCTL_INTERNAL_LOGGING /var/lib/x")
        );
        assert_eq!(parse("/a%20b?k&l=1&l=2&m=x+y"), some("/a b", "k  l 1 m x y"));
        for bad in ["", "logger", "?x", "host/logger"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
