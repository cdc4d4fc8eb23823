//! One stream between a guest's socket and a Unix socket of the host.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;

use super::packet::{Credit, Operation, Packet, Ports, shutdown};
use crate::chain::Buffers;

/// What the guest may send before the host's side has taken it, in bytes per connection.
pub const BUFFER: u32 = 64 * 1024;
/// The most data in one packet to the guest, in bytes.
const PACKET_MAX: u64 = 64 * 1024;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host asked and the guest has not answered.
    Requested,
    /// Data flows.
    Open,
}

/// Why a connection ends at once.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The guest sent more than it was allowed to.
    #[error("the guest sent more than its credit")]
    Credit,
    /// The guest's packet does not fit the connection's state.
    #[error("the guest sent {0:?} out of order")]
    Order(Operation),
    /// Both sides are done, or the guest gave up.
    #[error("closed")]
    Closed,
    /// The host's socket failed.
    #[error("the host's socket failed: {0}")]
    Host(#[from] io::Error),
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    stream: UnixStream,
    state: State,
    /// The guest's data that the host's socket did not take yet; at most [`BUFFER`] bytes.
    backlog: VecDeque<u8>,
    /// The guest's view of what it can take.
    guest: Credit,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// Bytes that the guest sent, modulo 2^32.
    received: u32,
    /// Bytes of these that the host's socket took, modulo 2^32.
    forwarded: u32,
    /// What the guest was last told about `forwarded`.
    told: u32,
    /// The guest was asked for credit and has not said anything since.
    asked: bool,
    /// The host's socket may have something to read.
    readable: bool,
    /// Whether the host's socket is watched for room.
    waits: bool,
    /// The host's socket will not send any more.
    ending: bool,
    /// The host's socket is closed entirely, not only for writing.
    hung_up: bool,
    /// Bits of [`shutdown`] that the guest sent.
    guest_shutdown: u32,
    /// The guest was told that the host will not send any more.
    host_ended: bool,
    /// Packets for the guest that are to be sent before data.
    outgoing: VecDeque<Packet>,
}

impl Connection {
    /// A connection that the host asked for.
    pub fn requested(ports: Ports, stream: UnixStream) -> Self {
        let mut connection = Self::new(ports, stream, State::Requested, Credit::default());
        connection.push(Operation::Request, 0);
        connection
    }

    /// A connection that the guest asked for and the host's socket accepted.
    pub fn accepted(ports: Ports, stream: UnixStream, guest: Credit) -> Self {
        let mut connection = Self::new(ports, stream, State::Open, guest);
        connection.push(Operation::Response, 0);
        connection
    }

    fn new(ports: Ports, stream: UnixStream, state: State, guest: Credit) -> Self {
        Connection {
            ports,
            stream,
            state,
            backlog: VecDeque::new(),
            guest,
            sent: 0,
            received: 0,
            forwarded: 0,
            told: 0,
            asked: false,
            readable: true,
            waits: false,
            ending: false,
            hung_up: false,
            guest_shutdown: 0,
            host_ended: false,
            outgoing: VecDeque::new(),
        }
    }

    /// Its name.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packets(&self) -> bool {
        !self.outgoing.is_empty() || (self.readable && self.may_send() && (self.credit() > 0 || !self.asked))
    }

    /// The host's socket has news.
    pub fn host_event(&mut self, flags: EventFlags) {
        self.hung_up |= flags.intersects(EventFlags::HUP | EventFlags::ERR);
        self.ending |= self.hung_up | flags.contains(EventFlags::RDHUP);
        self.readable |= self.ending | flags.contains(EventFlags::IN);
    }

    /// The host's socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the host's socket is to be watched for room from now on, or not any more; none when that stays.
    pub fn changes_its_wait(&mut self) -> Option<bool> {
        let waits = !self.backlog.is_empty();
        (std::mem::replace(&mut self.waits, waits) != waits).then_some(waits)
    }

    /// Works on a packet of the guest; `data` has the packet's length.
    pub fn receive(&mut self, packet: &Packet, data: Buffers<'_>) -> Result<(), End> {
        self.guest = packet.credit;
        self.asked = false;
        match (packet.operation, self.state) {
            (Operation::Response, State::Requested) => {
                self.state = State::Open;
                // The peer has just connected, so its buffer is empty and takes this line.
                self.stream.write_all(format!("OK {}\n", self.ports.host).as_bytes())?;
            }
            (Operation::Reset, _) => return Err(End::Closed),
            (Operation::Shutdown, State::Open) => {
                self.guest_shutdown |= packet.flags & shutdown::BOTH;
                self.propagate_shutdown()?;
            }
            (Operation::Data, State::Open) => self.receive_data(data)?,
            (Operation::CreditUpdate, _) => {}
            (Operation::CreditRequest, State::Open) => self.push(Operation::CreditUpdate, 0),
            (operation, _) => return Err(End::Order(operation)),
        }
        Ok(())
    }

    fn receive_data(&mut self, mut data: Buffers<'_>) -> Result<(), End> {
        if self.guest_shutdown & shutdown::SEND != 0 {
            return Err(End::Order(Operation::Data));
        }
        let length = data.len() as u32;
        let in_flight = self.received.wrapping_sub(self.forwarded);
        if u64::from(in_flight) + data.len() > u64::from(BUFFER) {
            return Err(End::Credit);
        }
        self.received = self.received.wrapping_add(length);
        if self.backlog.is_empty() {
            let taken = send(&self.stream, &data)?;
            self.forwarded = self.forwarded.wrapping_add(taken as u32);
            data = data.split_off(taken as u64).map_err(io::Error::other)?;
        }
        if !data.is_empty() {
            let mut rest = vec![0; data.len() as usize];
            data.read(&mut rest).map_err(io::Error::other)?;
            self.backlog.extend(rest);
        }
        self.tell_credit();
        Ok(())
    }

    /// Gives the host's socket what it did not take before.
    pub fn flush(&mut self) -> Result<(), End> {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match rustix::net::send(&self.stream, front, rustix::net::SendFlags::NOSIGNAL) {
                Ok(taken) => {
                    self.backlog.drain(..taken);
                    self.forwarded = self.forwarded.wrapping_add(taken as u32);
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(End::Host(error.into())),
            }
        }
        self.tell_credit();
        self.propagate_shutdown()
    }

    /// The guest's half-close reaches the host's socket once all of its data has.
    fn propagate_shutdown(&mut self) -> Result<(), End> {
        if !self.backlog.is_empty() {
            return Ok(());
        }
        if self.guest_shutdown == shutdown::BOTH {
            return Err(End::Closed);
        }
        if self.guest_shutdown & shutdown::SEND != 0 {
            self.stream.shutdown(std::net::Shutdown::Write)?;
        }
        Ok(())
    }

    /// Writes one packet into `chain`, if there is one. `Ok(None)`: there is nothing to say. After [`End::Closed`] the
    /// packet that says so is in the chain.
    pub fn next_packet(&mut self, data: &Buffers<'_>) -> Result<Option<Packet>, End> {
        if let Some(packet) = self.outgoing.pop_front() {
            if packet.operation == Operation::CreditUpdate {
                self.told = self.forwarded;
            }
            return Ok(Some(self.with_credit(packet)));
        }
        if !self.readable || !self.may_send() {
            return Ok(None);
        }
        let credit = self.credit();
        if credit == 0 {
            if std::mem::replace(&mut self.asked, true) {
                return Ok(None);
            }
            return Ok(Some(self.with_credit(Packet::new(self.ports, Operation::CreditRequest))));
        }
        let room = data.len().min(u64::from(credit)).min(PACKET_MAX);
        if room == 0 {
            return Ok(None);
        }
        match receive(&self.stream, data, room)? {
            None => {
                self.readable = false;
                Ok(None)
            }
            Some((0, _)) => {
                self.readable = false;
                self.host_ended = true;
                let mut packet = Packet::new(self.ports, Operation::Shutdown);
                packet.flags = if self.hung_up { shutdown::BOTH } else { shutdown::SEND };
                Ok(Some(self.with_credit(packet)))
            }
            Some((length, all)) => {
                // What comes next is an event of its own; the end is one that may have come before.
                self.readable = self.ending || !all;
                self.sent = self.sent.wrapping_add(length);
                self.told = self.forwarded;
                let mut packet = Packet::new(self.ports, Operation::Data);
                packet.length = length;
                Ok(Some(self.with_credit(packet)))
            }
        }
    }

    fn may_send(&self) -> bool {
        self.state == State::Open && !self.host_ended && self.guest_shutdown & shutdown::RECEIVE == 0
    }

    /// What the guest can take now; nothing when it contradicts itself.
    fn credit(&self) -> u32 {
        self.guest.buffer.saturating_sub(self.sent.wrapping_sub(self.guest.forwarded))
    }

    /// Tells the guest that its data was taken, once it believes that half of the buffer is full.
    fn tell_credit(&mut self) {
        let believed = self.received.wrapping_sub(self.told);
        let stale = self.forwarded.wrapping_sub(self.told);
        let told_soon = self.outgoing.iter().any(|packet| packet.operation == Operation::CreditUpdate);
        if believed >= BUFFER / 2 && stale >= BUFFER / 4 && !told_soon {
            self.push(Operation::CreditUpdate, 0);
        }
    }

    fn push(&mut self, operation: Operation, flags: u32) {
        // A guest that asks for credit without taking the answers is answered once.
        if self.outgoing.back().is_none_or(|last| last.operation != operation) {
            self.outgoing.push_back(Packet { flags, ..Packet::new(self.ports, operation) });
        }
    }

    fn with_credit(&self, packet: Packet) -> Packet {
        Packet { credit: Credit { buffer: BUFFER, forwarded: self.forwarded }, ..packet }
    }
}

/// A message header for the first `limit` bytes of the buffers.
fn message(vectors: &mut Vec<libc::iovec>, limit: u64) -> libc::msghdr {
    let mut left = limit as usize;
    for vector in vectors.iter_mut() {
        vector.iov_len = vector.iov_len.min(left);
        left -= vector.iov_len;
    }
    // SAFETY: msghdr is a C struct of integers and pointers; all zeroes means no name, no data, no control message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

/// How much of the buffers the socket took; none when it is full.
fn send(stream: &UnixStream, data: &Buffers<'_>) -> io::Result<usize> {
    let mut vectors = data.iovecs();
    let message = message(&mut vectors, data.len());
    loop {
        // SAFETY: the descriptor is open, `message` points to `vectors`, which live until after the call, and each vector is
        // a checked range of guest memory that stays mapped as long as `data` lives. Only the kernel reads it.
        let taken =
            unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        match usize::try_from(taken) {
            Ok(taken) => return Ok(taken),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// How much the socket gave, at most `limit` bytes, and whether that was all it had: `None` for nothing now, 0 for nothing
/// ever.
fn receive(stream: &UnixStream, data: &Buffers<'_>, limit: u64) -> io::Result<Option<(u32, bool)>> {
    let mut vectors = data.iovecs();
    let mut message = message(&mut vectors, limit);
    loop {
        // SAFETY: as for `send`; the kernel writes to guest memory, which the guest may see and change at any time.
        let given = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        match u32::try_from(given) {
            Ok(given) => {
                data.mark_written(given.into());
                // Descriptors that came along, which nobody takes, end a message early.
                let all = u64::from(given) < limit && message.msg_flags & libc::MSG_CTRUNC == 0;
                return Ok(Some((given, all)));
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                // The peer went without reading what it was sent.
                error if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Some((0, true))),
                error => return Err(error),
            },
        }
    }
}
