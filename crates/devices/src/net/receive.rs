//! The way of a frame from the tap to the guest.

use std::collections::VecDeque;
use std::io;

use super::counters::Counters;
use super::metadata::Metadata;
use super::tap::Tap;
use super::{FRAME_MAX, HEADER};
use crate::chain::Buffers;
use crate::queue::{Queue, QueueError, Request};
use crate::rate::Limiter;

/// Where the header says over how many buffers the frame goes.
const BUFFERS: std::ops::Range<usize> = 10..12;

/// Has at most one frame that the guest has not taken.
#[derive(Debug, Default)]
pub struct Receiver {
    /// Whether a frame may go over several buffers.
    merge: bool,
    /// Whether there may be frames in the tap.
    more: bool,
    /// Room for a frame, made with the first one.
    frame: Vec<u8>,
    /// Length of the frame that waits, if one does.
    waiting: Option<usize>,
    /// Whether the limiter has let that one pass.
    admitted: bool,
}

impl Receiver {
    /// Frames go over several buffers if `merge` is set.
    pub fn new(merge: bool) -> Self {
        Receiver { merge, ..Self::default() }
    }

    /// There is something new in the tap.
    pub fn tap_has_frames(&mut self) {
        self.more = true;
    }

    /// Gives the guest frames, at most as many as its queue has places. True when there are more.
    pub fn receive(
        &mut self,
        tap: &Tap,
        mut metadata: Option<&mut Metadata>,
        queue: &mut Queue,
        limiter: &mut Limiter,
        counters: &mut Counters,
    ) -> Result<bool, QueueError> {
        let mut more = true;
        let direct = self.merge && self.waiting.is_none() && metadata.is_none() && limiter.is_unlimited();
        let delivered = if direct { self.receive_directly(tap, queue, counters)? } else { 0 };
        for _ in delivered..queue.size() {
            let Some(length) = self.next(tap, metadata.as_deref_mut(), counters) else {
                more = false;
                break;
            };
            self.admitted = self.admitted || limiter.admits((length - HEADER) as u64);
            if !self.admitted || !self.deliver(length, queue, counters)? {
                more = false;
                break;
            }
            (self.waiting, self.admitted) = (None, false);
        }
        queue.notify()?;
        Ok(more)
    }

    /// Has the tap write into the guest's buffers, for as long as these have room for the longest frame. Says how many frames
    /// there were; what is left is to be done frame by frame.
    fn receive_directly(
        &mut self,
        tap: &Tap,
        queue: &mut Queue,
        counters: &mut Counters,
    ) -> Result<u16, QueueError> {
        let memory = queue.memory().clone();
        let mut ahead: VecDeque<(Request, Buffers<'_>)> = VecDeque::new();
        let (mut room, mut frames) = (0, 0);
        while self.more && frames < queue.size() {
            while room < FRAME_MAX as u64 && ahead.len() < usize::from(queue.size()) {
                let Some(request) = queue.pop()? else { break };
                // One that is malformed has room for nothing.
                let buffers =
                    queue.chain_in(&memory, request).map(|chain| chain.writable).unwrap_or_default();
                room += buffers.len();
                ahead.push_back((request, buffers));
            }
            if room < FRAME_MAX as u64 {
                break;
            }
            let vectors: Vec<_> = ahead.iter().flat_map(|(_, buffers)| buffers.iovecs()).collect();
            if vectors.len() > libc::UIO_MAXIOV as usize {
                break;
            }
            let Some(length) = self.read(|| tap.receive_into(&vectors), counters) else { break };
            room -= complete(&mut ahead, length as u64, queue)?;
            frames += 1;
            counters.rx_packets_count += 1;
            counters.rx_bytes_count += (length - HEADER) as u64;
        }
        ahead.iter().for_each(|_| queue.undo_pop());
        Ok(frames)
    }

    /// The length of the next frame of the tap, which `read` reads.
    fn read(
        &mut self,
        mut read: impl FnMut() -> io::Result<usize>,
        counters: &mut Counters,
    ) -> Option<usize> {
        while self.more {
            match read() {
                Ok(length) if length > HEADER => return Some(length),
                // Not a frame.
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.more = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                ended => {
                    let error = ended.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                    tracing::error!(%error, "the tap device fails; was it removed or is it down? the guest receives nothing");
                    counters.tap_read_fails += 1;
                    self.more = false;
                }
            }
        }
        None
    }

    /// The frame that waits, or the next one: the service's, or the tap's.
    fn next(&mut self, tap: &Tap, metadata: Option<&mut Metadata>, counters: &mut Counters) -> Option<usize> {
        if self.waiting.is_none()
            && let Some(frame) = metadata.and_then(Metadata::next_frame)
        {
            self.frame.resize(FRAME_MAX, 0);
            self.frame[..frame.len()].copy_from_slice(&frame);
            self.waiting = Some(frame.len());
        }
        if self.waiting.is_none() && self.more {
            let mut frame = std::mem::take(&mut self.frame);
            frame.resize(FRAME_MAX, 0);
            self.waiting = self.read(|| tap.receive(&mut frame), counters);
            self.frame = frame;
        }
        self.waiting
    }

    /// Writes the frame into the guest's buffers. False when there is not enough room yet.
    fn deliver(
        &mut self,
        length: usize,
        queue: &mut Queue,
        counters: &mut Counters,
    ) -> Result<bool, QueueError> {
        let Some(requests) = self.room(length, queue)? else {
            counters.no_rx_avail_buffer += 1;
            return Ok(false);
        };
        let buffers = u16::try_from(requests.len()).unwrap_or(u16::MAX);
        self.frame[BUFFERS].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.frame[..length];
        for request in requests {
            let mut written = 0;
            // What is malformed, or of no use to a driver that cannot merge, is given back empty.
            if let Ok(mut chain) = queue.chain(request) {
                let (part, after) = rest.split_at(rest.len().min(chain.writable.len() as usize));
                if (self.merge || after.is_empty()) && chain.writable.write(part).is_ok() {
                    written = part.len() as u32;
                    rest = after;
                }
            }
            queue.complete(request, written)?;
        }
        if rest.is_empty() {
            counters.rx_packets_count += 1;
            counters.rx_bytes_count += (length - HEADER) as u64;
        } else {
            counters.rx_fails += 1;
        }
        Ok(true)
    }

    /// Buffers that hold the frame together, if the guest has so many; otherwise they stay where they are.
    fn room(&self, length: usize, queue: &mut Queue) -> Result<Option<Vec<Request>>, QueueError> {
        let mut requests = Vec::new();
        let mut room = 0;
        loop {
            match queue.pop()? {
                Some(request) => {
                    room += queue.chain(request).map_or(0, |chain| chain.writable.len());
                    requests.push(request);
                }
                // The driver may have added one in between.
                None if queue.enable_notification()? => {}
                None => {
                    requests.iter().for_each(|_| queue.undo_pop());
                    return Ok(None);
                }
            }
            if room >= length as u64 || !self.merge {
                return Ok(Some(requests));
            }
            // A queue's buffers that do not suffice all together never will.
            if requests.len() >= usize::from(queue.size()) {
                return Ok(Some(requests));
            }
        }
    }
}

/// Gives the buffers back that a frame of so many bytes is in, with their number in its header, and says how much room they
/// had.
fn complete(
    ahead: &mut VecDeque<(Request, Buffers<'_>)>,
    length: u64,
    queue: &mut Queue,
) -> Result<u64, QueueError> {
    let (mut rest, mut count) = (length, 0u16);
    for (_, buffers) in ahead.iter() {
        if rest == 0 {
            break;
        }
        let part = buffers.len().min(rest);
        buffers.mark_written(part);
        (rest, count) = (rest - part, count + 1);
    }
    let mut at = 0;
    for slice in ahead.iter().flat_map(|(_, buffers)| buffers.slices()) {
        for (place, byte) in BUFFERS.zip(count.to_le_bytes()) {
            if (at..at + slice.len()).contains(&place)
                && let Ok(part) = slice.subslice(place - at, 1)
            {
                part.copy_from(&[byte]);
            }
        }
        at += slice.len();
        if at >= BUFFERS.end {
            break;
        }
    }
    let (mut rest, mut room) = (length, 0);
    for (request, buffers) in ahead.drain(..usize::from(count)) {
        let part = buffers.len().min(rest);
        (rest, room) = (rest - part, room + buffers.len());
        queue.complete(request, part as u32)?;
    }
    Ok(room)
}
