//! What a session knows of its streams. Pure bookkeeping: no transport, no clock.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::ReadBuf;

use super::Side;
use crate::frame::{ACK, FIN, HEADER, Header, Kind, RST, SYN};
use crate::limits::{MAX_PAYLOAD, MAX_STREAMS, OUT_BUFFER, WINDOW};
use crate::{Error, Result};

/// The state, shared by the session's task and the handles.
pub(super) struct Shared(Mutex<State>);

impl Shared {
    pub(super) fn new(side: Side) -> Self {
        Self(Mutex::new(State::new(side)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream.
struct Entry {
    /// Received, not yet read. At most [`WINDOW`] bytes.
    received: VecDeque<u8>,
    /// What the peer may still send.
    receive_window: u32,
    /// What was read and not yet given back to the peer as window.
    consumed: u32,
    /// What this side may still send.
    send_window: u32,
    /// Value of [`State::queued`] after the last write, for flushing.
    mark: u64,
    /// A handle exists (or existed, when false after [`State::release`]).
    held: bool,
    /// Opened by the peer and its port not yet known.
    nameless: bool,
    /// In [`State::chores`] already.
    listed: bool,
    acknowledge: bool,
    finish: bool,
    finished: bool,
    peer_finished: bool,
    reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Entry {
    fn new(inbound: bool) -> Self {
        Entry {
            received: VecDeque::new(),
            receive_window: WINDOW,
            consumed: 0,
            send_window: WINDOW,
            mark: 0,
            held: !inbound,
            nameless: inbound,
            listed: false,
            acknowledge: inbound,
            finish: false,
            finished: false,
            peer_finished: false,
            reset: false,
            reader: None,
            writer: None,
        }
    }

    fn wake(&mut self) {
        wake(&mut self.reader);
        wake(&mut self.writer);
    }

    fn flags(&mut self) -> u16 {
        if std::mem::take(&mut self.acknowledge) { ACK } else { 0 }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// Payload that is being received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Payload {
    pub stream: u32,
    /// Bytes still to come.
    pub left: u32,
    /// The stream ends with it.
    pub finish: bool,
}

/// The state of a session.
pub(super) struct State {
    side: Side,
    streams: BTreeMap<u32, Entry>,
    next_id: Option<u32>,
    /// Frames for the transport.
    out: Vec<u8>,
    /// Bytes ever put in `out`, and bytes that the transport has taken.
    queued: u64,
    sent: u64,
    /// Streams that have a window update, FIN or RST to send; each at most once.
    chores: VecDeque<u32>,
    /// Streams refused, to be reset; at most [`MAX_STREAMS`].
    refused: VecDeque<u32>,
    /// A ping to answer. A peer that sends more before reading gets only the last one answered.
    pong: Option<u32>,
    /// Streams that wait for room in `out`.
    starved: VecDeque<Waker>,
    flushers: Vec<Waker>,
    /// Streams from the peer whose port is known, to be accepted.
    arrived: VecDeque<(u32, u32)>,
    acceptors: Vec<Waker>,
    /// Who waits for the end.
    pub(super) watchers: Vec<Waker>,
    /// The session's task.
    pub(super) driver: Option<Waker>,
    /// The last handle is gone: send what is queued, then end.
    pub(super) closing: bool,
    /// Why the session ended.
    pub(super) ended: Option<Error>,
}

impl State {
    fn new(side: Side) -> Self {
        State {
            side,
            streams: BTreeMap::new(),
            next_id: Some(if side == Side::Host { 1 } else { 2 }),
            out: Vec::new(),
            queued: 0,
            sent: 0,
            chores: VecDeque::new(),
            refused: VecDeque::new(),
            pong: None,
            starved: VecDeque::new(),
            flushers: Vec::new(),
            arrived: VecDeque::new(),
            acceptors: Vec::new(),
            watchers: Vec::new(),
            driver: None,
            closing: false,
            ended: None,
        }
    }

    fn error(&self) -> Option<Error> {
        self.ended.clone().or_else(|| self.closing.then_some(Error::Closed))
    }

    fn wake_driver(&mut self) {
        wake(&mut self.driver);
    }

    /// Frames that may still be queued without exceeding the bound.
    fn room(&self) -> usize {
        OUT_BUFFER.saturating_sub(self.out.len())
    }

    fn push(&mut self, header: Header, payload: &[u8]) {
        self.out.extend_from_slice(&header.encode());
        self.out.extend_from_slice(payload);
        self.queued += (HEADER + payload.len()) as u64;
    }

    fn chore(&mut self, id: u32) {
        if let Some(entry) = self.streams.get_mut(&id)
            && !entry.listed
        {
            entry.listed = true;
            self.chores.push_back(id);
            self.wake_driver();
        }
    }

    // ---- what handles do -------------------------------------------------------------------------------------------

    pub(super) fn poll_open(&mut self, cx: &mut Context<'_>, port: u32) -> Poll<Result<u32>> {
        if let Some(error) = self.error() {
            return Poll::Ready(Err(error));
        }
        if self.streams.len() >= MAX_STREAMS {
            return Poll::Ready(Err(Error::TooManyStreams));
        }
        if self.room() == 0 {
            self.starved.push_back(cx.waker().clone());
            return Poll::Pending;
        }
        let Some(id) = self.next_id else {
            return Poll::Ready(Err(Error::Protocol("all stream numbers of this session are used up")));
        };
        self.next_id = id.checked_add(2);
        let mut entry = Entry::new(false);
        entry.send_window -= 4;
        self.push(Header { kind: Kind::Data, flags: SYN, stream: id, length: 4 }, &port.to_le_bytes());
        self.streams.insert(id, entry);
        self.wake_driver();
        Poll::Ready(Ok(id))
    }

    pub(super) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<(u32, u32)>> {
        while let Some((port, id)) = self.arrived.pop_front() {
            // A stream may have been reset by the peer while it waited.
            if let Some(entry) = self.streams.get_mut(&id) {
                entry.held = true;
                return Poll::Ready(Ok((port, id)));
            }
        }
        match self.error() {
            Some(error) => Poll::Ready(Err(error)),
            None => {
                self.acceptors.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        id: u32,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let ended = self.error();
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(ended.unwrap_or(Error::Closed).into()));
        };
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if entry.received.is_empty() {
            return if entry.peer_finished {
                Poll::Ready(Ok(()))
            } else if entry.reset {
                Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
            } else if let Some(error) = ended {
                Poll::Ready(Err(error.into()))
            } else {
                entry.reader = Some(cx.waker().clone());
                Poll::Pending
            };
        }
        let mut taken = 0;
        let (first, second) = entry.received.as_slices();
        for part in [first, second] {
            let n = part.len().min(buf.remaining());
            buf.put_slice(&part[..n]);
            taken += n;
        }
        entry.received.drain(..taken);
        if entry.received.is_empty() && entry.received.capacity() > MAX_PAYLOAD {
            entry.received = VecDeque::new();
        }
        // At most WINDOW, since no more was ever received.
        entry.consumed += taken as u32;
        if entry.consumed >= WINDOW / 2 && !entry.peer_finished && !entry.reset {
            self.chore(id);
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        id: u32,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(error) = self.error() {
            return Poll::Ready(Err(error.into()));
        }
        let room = self.room().saturating_sub(HEADER);
        let Some(entry) = self.streams.get_mut(&id).filter(|e| !e.reset && !e.finish) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let n = buf.len().min(MAX_PAYLOAD).min(entry.send_window as usize).min(room);
        if n == 0 {
            if entry.send_window > 0 {
                self.starved.push_back(cx.waker().clone());
            } else {
                entry.writer = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        entry.send_window -= n as u32;
        let flags = entry.flags();
        self.push(Header { kind: Kind::Data, flags, stream: id, length: n as u32 }, &buf[..n]);
        let mark = self.queued;
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.mark = mark;
        }
        self.wake_driver();
        Poll::Ready(Ok(n))
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>, id: u32) -> Poll<io::Result<()>> {
        let flushed = self.streams.get(&id).is_none_or(|entry| entry.mark <= self.sent);
        match &self.ended {
            _ if flushed => Poll::Ready(Ok(())),
            Some(error) => Poll::Ready(Err(error.clone().into())),
            None => {
                self.flushers.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Half-closes a stream.
    pub(super) fn finish(&mut self, id: u32) -> io::Result<()> {
        let Some(entry) = self.streams.get_mut(&id).filter(|e| !e.reset) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        if !entry.finish {
            entry.finish = true;
            self.chore(id);
        }
        Ok(())
    }

    /// The stream's handle is gone.
    pub(super) fn release(&mut self, id: u32) {
        let over = self.ended.is_some();
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.held = false;
        entry.received = VecDeque::new();
        (entry.reader, entry.writer) = (None, None);
        if over || entry.reset || (entry.finished && entry.peer_finished) {
            self.streams.remove(&id);
        } else if !entry.finish {
            self.chore(id);
        }
    }

    pub(super) fn close(&mut self) {
        self.closing = true;
        self.wake_driver();
        self.wake_all();
    }

    // ---- what the session's task does ------------------------------------------------------------------------------

    /// Moves what shall be sent into `buffer` (empty). False when there is nothing.
    pub(super) fn take_output(&mut self, buffer: &mut Vec<u8>) -> bool {
        while self.room() > 0 {
            if let Some(value) = self.pong.take() {
                self.push(Header { kind: Kind::Ping, flags: ACK, stream: 0, length: value }, &[]);
            } else if let Some(id) = self.refused.pop_front() {
                self.push(Header { kind: Kind::Window, flags: RST, stream: id, length: 0 }, &[]);
            } else if let Some(id) = self.chores.pop_front() {
                self.do_chore(id);
            } else {
                break;
            }
        }
        std::mem::swap(&mut self.out, buffer);
        while let Some(waker) = self.starved.pop_front() {
            waker.wake();
        }
        !buffer.is_empty()
    }

    fn do_chore(&mut self, id: u32) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.listed = false;
        if !entry.held && !entry.finish && !entry.reset {
            // Dropped before its end: the peer must not take it for complete.
            self.streams.remove(&id);
            return self.push(Header { kind: Kind::Window, flags: RST, stream: id, length: 0 }, &[]);
        }
        let mut flags = 0;
        let mut credit = 0;
        if entry.consumed >= WINDOW / 2 && !entry.peer_finished {
            credit = std::mem::take(&mut entry.consumed);
            entry.receive_window += credit;
        }
        if entry.finish && !entry.finished {
            entry.finished = true;
            flags |= FIN;
        }
        if flags != 0 || credit != 0 {
            flags |= entry.flags();
            let done = !entry.held && entry.finished && entry.peer_finished;
            if done {
                self.streams.remove(&id);
            }
            self.push(Header { kind: Kind::Window, flags, stream: id, length: credit }, &[]);
        }
    }

    /// The transport has taken `n` bytes.
    pub(super) fn sent(&mut self, n: usize) {
        self.sent += n as u64;
        self.flushers.drain(..).for_each(Waker::wake);
    }

    /// Handles a header, and tells of the payload that follows.
    pub(super) fn on_header(&mut self, header: Header) -> Result<Option<Payload>> {
        match header.kind {
            Kind::Data | Kind::Window => self.on_stream_header(header),
            Kind::Ping => {
                if header.flags & ACK == 0 {
                    self.pong = Some(header.length);
                }
                Ok(None)
            }
            Kind::GoAway => Err(Error::Closed),
        }
    }

    fn on_stream_header(&mut self, header: Header) -> Result<Option<Payload>> {
        let Header { kind, flags, stream: id, length } = header;
        let finish = flags & FIN != 0;
        let payload =
            (kind == Kind::Data && length > 0).then_some(Payload { stream: id, left: length, finish });
        if flags & SYN != 0 {
            self.on_syn(id)?;
        }
        let Some(entry) = self.streams.get_mut(&id) else {
            // Of a stream that this side has ended; what was in flight is skipped.
            return Ok(payload);
        };
        if flags & RST != 0 {
            self.on_reset(id);
            return Ok(payload);
        }
        if entry.peer_finished && payload.is_some() {
            return Err(Error::Protocol("data after the end of a stream"));
        }
        match kind {
            Kind::Data => {
                entry.receive_window = entry
                    .receive_window
                    .checked_sub(length)
                    .ok_or(Error::Protocol("more data than the window allows"))?;
                if payload.is_some() && !entry.held && entry.finish {
                    // Nobody will read it.
                    self.on_reset(id);
                    self.refuse(id)?;
                }
            }
            _ => {
                entry.send_window = entry
                    .send_window
                    .checked_add(length)
                    .ok_or(Error::Protocol("a window that is too large"))?;
                if length > 0 {
                    wake(&mut entry.writer);
                }
            }
        }
        if finish && payload.is_none() {
            self.on_fin(id)?;
        }
        Ok(payload)
    }

    fn on_syn(&mut self, id: u32) -> Result<()> {
        let parity = if self.side == Side::Host { 0 } else { 1 };
        if id == 0 || id % 2 != parity || self.streams.contains_key(&id) {
            return Err(Error::Protocol("a new stream with a wrong number"));
        }
        if self.streams.len() >= MAX_STREAMS {
            return self.refuse(id);
        }
        self.streams.insert(id, Entry::new(true));
        Ok(())
    }

    fn refuse(&mut self, id: u32) -> Result<()> {
        if self.refused.len() >= MAX_STREAMS {
            return Err(Error::Protocol("too many streams"));
        }
        self.refused.push_back(id);
        Ok(())
    }

    fn on_reset(&mut self, id: u32) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.reset = true;
        entry.wake();
        if !entry.held {
            self.streams.remove(&id);
        }
    }

    /// The peer has sent all of a stream.
    pub(super) fn on_fin(&mut self, id: u32) -> Result<()> {
        let Some(entry) = self.streams.get_mut(&id) else { return Ok(()) };
        entry.peer_finished = true;
        entry.wake();
        if entry.nameless {
            self.streams.remove(&id);
            return self.refuse(id);
        }
        if !entry.held && entry.finished {
            self.streams.remove(&id);
        }
        Ok(())
    }

    /// Payload of a stream. The window was checked with the header.
    pub(super) fn on_payload(&mut self, id: u32, bytes: &[u8]) {
        let Some(entry) = self.streams.get_mut(&id).filter(|e| !e.reset) else { return };
        if !entry.held && !entry.nameless && entry.finish {
            return;
        }
        let needed = entry.received.len() + bytes.len();
        if needed > entry.received.capacity() {
            // Doubling, but never beyond the window.
            let capacity = needed.next_power_of_two().min(WINDOW as usize).max(needed);
            entry.received.reserve_exact(capacity - entry.received.len());
        }
        entry.received.extend(bytes);
        if entry.nameless && entry.received.len() >= 4 {
            let mut port = [0; 4];
            for (byte, received) in port.iter_mut().zip(entry.received.drain(..4)) {
                *byte = received;
            }
            entry.consumed += 4;
            entry.nameless = false;
            self.arrived.push_back((u32::from_le_bytes(port), id));
            self.acceptors.drain(..).for_each(Waker::wake);
        } else {
            wake(&mut entry.reader);
        }
    }

    /// The session is over.
    pub(super) fn end(&mut self, error: Error) {
        self.ended.get_or_insert(error);
        self.streams.retain(|_, entry| entry.held);
        self.arrived.clear();
        self.out = Vec::new();
        self.wake_all();
        self.watchers.drain(..).for_each(Waker::wake);
        self.flushers.drain(..).for_each(Waker::wake);
    }

    fn wake_all(&mut self) {
        self.streams.values_mut().for_each(Entry::wake);
        self.acceptors.drain(..).for_each(Waker::wake);
        self.starved.drain(..).for_each(Waker::wake);
    }
}
