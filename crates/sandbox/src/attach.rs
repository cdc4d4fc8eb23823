//! The protocol of `attach.sock`: the standard streams of a sandbox's processes, and copies of files.
//!
//! One connection carries one stream. The client connects to the Unix socket in the bundle (mode 0600 below a 0700
//! directory: only its owner can) and sends one line of JSON, a [`Request`]; the shim answers with one line, a
//! [`Reply`]. From there on the connection is the stream's raw bytes, so that both sides may splice(2): the end of
//! the connection is the end of the stream, a half-closed connection is the end of a process's input.
//!
//! Terminal sizes and everything else that is no byte of a stream go by the Task API. Shim and clients come from one
//! build; `version` refuses others.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::paths::Bundle;

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// The longest request or reply line, with its end.
pub(crate) const MAX_LINE: usize = 64 << 10;
/// How long the shim may take for a reply line; a copy's last one takes as long as the copy.
const REPLY: Duration = Duration::from_secs(20);

/// What failed between a client and the shim's streams.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be reached.
    #[error("cannot attach to {path}: {source}; see `kapsel ps -a` whether the sandbox still runs")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The shim said no.
    #[error("{0}")]
    Refused(String),
    /// A standard stream of this command cannot be used.
    #[error("cannot use my own output: {0}")]
    Own(#[source] io::Error),
    /// The stream broke.
    #[error("the connection to the sandbox broke: {0}")]
    Io(#[from] io::Error),
    /// What came is not this protocol.
    #[error("the sandbox sent {0}; kapsel and its shim must be of one version")]
    Protocol(String),
}

/// The first line from a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is wanted.
    pub want: Want,
}

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Want {
    /// A stream of one process.
    Stream {
        /// Empty: the container's first process, also before it is created.
        #[serde(default)]
        exec_id: String,
        /// Which.
        stream: StreamKind,
        /// Whether the process waits when this client reads slowly; otherwise the client is cut off.
        #[serde(default)]
        lossless: bool,
    },
    /// A tar archive of `path` comes.
    CopyOut {
        /// As the container sees it.
        path: String,
        /// Archive what a symbolic link in the last place points to.
        #[serde(default)]
        follow: bool,
    },
    /// A tar archive goes and is unpacked in directory `path`; a second [`Reply`] line tells when it is complete.
    CopyIn {
        /// As the container sees it.
        path: String,
        /// Keep the archive's owners.
        #[serde(default)]
        keep_owner: bool,
    },
    /// What is at `path`; the answer is in the reply.
    Stat {
        /// As the container sees it.
        path: String,
        /// Also follow a symbolic link in the last place.
        #[serde(default)]
        follow: bool,
    },
}

/// Which stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamKind {
    /// To the process. Several clients' bytes are mixed; the first that ends it ends it for all.
    Stdin,
    /// From the process.
    Stdout,
    /// From the process.
    Stderr,
    /// Both ways, for a process with a terminal. Closing it detaches.
    Tty,
}

/// The first line from the shim, and the last one of a copy into the container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The answer to a stat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stat: Option<FileStat>,
    /// After a copy: entries of the archive.
    #[serde(default)]
    pub entries: u64,
    /// After a copy: bytes of file content.
    #[serde(default)]
    pub bytes: u64,
}

/// One file of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// `st_mode`.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Where a symbolic link points to.
    pub link_target: String,
}

/// Opens a stream of a process (`exec_id` empty: the container's first, even before it is created). When this returns,
/// nothing that the process prints from now on is missed.
///
/// # Errors
/// When the sandbox is gone, or has no such process or stream.
pub fn open(bundle: &Bundle, exec_id: &str, stream: StreamKind, lossless: bool) -> Result<UnixStream, Error> {
    let (connection, _) = request(bundle, Want::Stream { exec_id: exec_id.into(), stream, lossless })?;
    Ok(connection)
}

/// Opens a tar archive of `path` of the running container. An archive without its end marker is incomplete: the guest
/// failed.
///
/// # Errors
/// When the sandbox is gone or there is no such path.
pub fn copy_out(bundle: &Bundle, path: &str, follow: bool) -> Result<UnixStream, Error> {
    let (connection, _) = request(bundle, Want::CopyOut { path: path.into(), follow })?;
    Ok(connection)
}

/// Unpacks the tar archive `from` in directory `path` of the running container.
///
/// # Errors
/// When the sandbox is gone, the path is no directory, or the archive is not accepted.
pub fn copy_in(bundle: &Bundle, path: &str, keep_owner: bool, from: &mut impl Read) -> Result<Reply, Error> {
    let (mut connection, _) = request(bundle, Want::CopyIn { path: path.into(), keep_owner })?;
    let sent = io::copy(from, &mut connection).and_then(|_| connection.shutdown(Shutdown::Write));
    // When the guest gave up in the middle its reason says more than a broken pipe.
    match (reply(&mut connection), sent) {
        (Err(Error::Io(_) | Error::Protocol(_)), Err(sent)) => Err(sent.into()),
        (reply, _) => reply,
    }
}

/// What is at `path` of the running container.
///
/// # Errors
/// When the sandbox is gone or there is nothing.
pub fn stat(bundle: &Bundle, path: &str, follow: bool) -> Result<FileStat, Error> {
    let (_, reply) = request(bundle, Want::Stat { path: path.into(), follow })?;
    reply.stat.ok_or_else(|| Error::Protocol("no answer to a stat".into()))
}

fn request(bundle: &Bundle, want: Want) -> Result<(UnixStream, Reply), Error> {
    let path = bundle.attach_socket();
    let mut connection = UnixStream::connect(&path).map_err(|source| Error::Connect { path, source })?;
    let mut line = serde_json::to_vec(&Request { version: VERSION, want }).map_err(io::Error::from)?;
    line.push(b'\n');
    connection.write_all(&line)?;
    connection.set_read_timeout(Some(REPLY))?;
    let reply = reply(&mut connection)?;
    connection.set_read_timeout(None)?;
    Ok((connection, reply))
}

/// Reads one line and not a byte more: what follows belongs to the stream.
fn reply(connection: &mut UnixStream) -> Result<Reply, Error> {
    let mut line = Vec::new();
    let mut byte = [0u8];
    while line.len() < MAX_LINE {
        connection.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            let reply: Reply = serde_json::from_slice(&line)
                .map_err(|e| Error::Protocol(format!("a line of no sense ({e})")))?;
            return match reply.error {
                Some(error) => Err(Error::Refused(error)),
                None => Ok(reply),
            };
        }
        line.push(byte[0]);
    }
    Err(Error::Protocol("an endless line".into()))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    fn shim(answer: &'static [u8]) -> (tempfile::TempDir, Bundle, thread::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        let listener = UnixListener::bind(bundle.attach_socket()).unwrap();
        let server = thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut byte = [0u8];
            while byte[0] != b'\n' {
                connection.read_exact(&mut byte).unwrap();
            }
            connection.write_all(answer).unwrap();
        });
        (dir, bundle, server)
    }

    #[test]
    fn bytes_after_the_reply_belong_to_the_stream() {
        let (_dir, bundle, server) = shim(b"{}\n{\"not\": \"ours\"}\n\0\xff");
        let mut stream = open(&bundle, "", StreamKind::Stdout, true).unwrap();
        server.join().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"{\"not\": \"ours\"}\n\0\xff");
    }

    #[test]
    fn refusals_and_nonsense_are_told() {
        let (_dir, bundle, _server) = shim(b"{\"error\":\"no such process\"}\n");
        let error = open(&bundle, "x", StreamKind::Stdin, false).unwrap_err();
        assert!(matches!(&error, Error::Refused(why) if why == "no such process"), "{error}");
        let (_dir, bundle, _server) = shim(b"hello\n");
        assert!(matches!(stat(&bundle, "/", false), Err(Error::Protocol(_))));
        let (_dir, bundle, _server) = shim(b"{");
        assert!(matches!(stat(&bundle, "/", false), Err(Error::Io(_))));
    }
}
