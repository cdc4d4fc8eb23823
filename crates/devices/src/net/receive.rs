//! The way of a frame from the tap to the guest.

use std::io;

use super::counters::Counters;
use super::metadata::Metadata;
use super::tap::Tap;
use super::{FRAME_MAX, HEADER};
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
        for _ in 0..queue.size() {
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

    /// The frame that waits, or the next one: the service's, or the tap's.
    fn next(&mut self, tap: &Tap, metadata: Option<&mut Metadata>, counters: &mut Counters) -> Option<usize> {
        if self.waiting.is_none()
            && let Some(frame) = metadata.and_then(Metadata::next_frame)
        {
            self.frame.resize(FRAME_MAX, 0);
            self.frame[..frame.len()].copy_from_slice(&frame);
            self.waiting = Some(frame.len());
        }
        while self.waiting.is_none() && self.more {
            self.frame.resize(FRAME_MAX, 0);
            match tap.receive(&mut self.frame) {
                Ok(length) if length > HEADER => self.waiting = Some(length),
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
