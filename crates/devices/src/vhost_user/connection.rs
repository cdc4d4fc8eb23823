//! The connection to a back end: requests and answers, each awaited with a deadline. What comes may be anything.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::message::{self, HEADER, Request};

/// The most descriptors of a message: one for each region of memory.
const DESCRIPTORS_MAX: usize = 8;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The back end has gone.
    #[error("the back end has hung up")]
    HungUp,
    /// The back end is there and says nothing.
    #[error("the back end did not answer within {0:?}")]
    Deadline(Duration),
    /// The back end says what makes no sense.
    #[error("the back end's answer is malformed: {0}")]
    Malformed(&'static str),
    /// The back end says that it cannot.
    #[error("the back end refused it")]
    Refused,
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    patience: Duration,
    until: Instant,
    /// Whether the back end answers requests that have no answer of their own.
    pub acknowledged: bool,
}

impl Connection {
    /// On a connected socket. Requests that follow each other take no longer than `patience` together; the last of them may take as
    /// long again.
    pub fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Connection { socket: stream.into(), patience, until: Instant::now(), acknowledged: false })
    }

    /// The time for the next requests begins now.
    pub fn begin(&mut self) {
        self.until = Instant::now() + self.patience;
    }

    /// Asks for something that gives nothing. If it can, the back end says whether it is done.
    pub fn tell(&self, request: Request, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        self.send(&message::request(request, self.acknowledged, body), descriptors)?;
        if !self.acknowledged {
            return Ok(());
        }
        match self.receive(request, 8)?.iter().any(|byte| *byte != 0) {
            true => Err(Fault::Refused),
            false => Ok(()),
        }
    }

    /// Asks for an answer of at most so many bytes.
    pub fn ask(&self, request: Request, body: &[u8], most: usize) -> Result<Vec<u8>, Fault> {
        self.send(&message::request(request, false, body), &[])?;
        self.receive_up_to(request, most)
    }

    /// Asks for one number.
    pub fn number(&self, request: Request) -> Result<u64, Fault> {
        self.send(&message::request(request, false, &[]), &[])?;
        let bytes = self.receive(request, 8)?;
        Ok(u64::from_ne_bytes(std::array::from_fn(|n| bytes[n])))
    }

    /// Whether the back end has hung up, or said something that it was not asked for.
    pub fn is_over(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut RecvAncillaryBuffer::default(),
            flags,
        );
        !matches!(peeked, Err(Errno::AGAIN | Errno::INTR))
    }

    /// Ends it for both sides, whoever else has a descriptor of it.
    pub fn hang_up(&self) {
        // It fails when the other side was first.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    fn send(&self, mut bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Fault::Io(io::Error::other("there are too many descriptors for one message")));
        }
        while !bytes.is_empty() {
            self.in_time()?;
            match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    bytes = &bytes[sent.min(bytes.len())..];
                    // They went with the first part.
                    ancillary.clear();
                }
                Err(error) => self.failed(error)?,
            }
        }
        Ok(())
    }

    fn receive(&self, to: Request, length: usize) -> Result<Vec<u8>, Fault> {
        let body = self.receive_up_to(to, length)?;
        if body.len() == length { Ok(body) } else { Err(Fault::Malformed("it is too short")) }
    }

    fn receive_up_to(&self, to: Request, most: usize) -> Result<Vec<u8>, Fault> {
        let mut header = [0; HEADER];
        self.read(&mut header)?;
        let length = message::answer(header, to).map_err(Fault::Malformed)?;
        if length > most {
            return Err(Fault::Malformed("it is too long"));
        }
        let mut body = vec![0; length];
        self.read(&mut body)?;
        Ok(body)
    }

    /// There is no room for descriptors: those that come all the same the kernel closes, and says so.
    fn read(&self, mut bytes: &mut [u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            self.in_time()?;
            let mut buffers = [IoSliceMut::new(bytes)];
            let mut none = RecvAncillaryBuffer::default();
            match recvmsg(&self.socket, &mut buffers, &mut none, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) if message.bytes == 0 => return Err(Fault::HungUp),
                Ok(message) if message.flags.contains(ReturnFlags::CTRUNC) => {
                    return Err(Fault::Malformed("it has descriptors"));
                }
                Ok(message) => bytes = &mut bytes[message.bytes..],
                Err(error) => self.failed(error)?,
            }
        }
        Ok(())
    }

    fn in_time(&self) -> Result<(), Fault> {
        if Instant::now() < self.until { Ok(()) } else { Err(Fault::Deadline(self.patience)) }
    }

    fn failed(&self, error: Errno) -> Result<(), Fault> {
        match error {
            Errno::INTR => Ok(()),
            Errno::AGAIN => Err(Fault::Deadline(self.patience)),
            Errno::PIPE | Errno::CONNRESET => Err(Fault::HungUp),
            other => Err(Fault::Io(other.into())),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
