//! The entropy device (virtio 1.2, section 5.4).

use std::io;
use std::os::fd::BorrowedFd;

use crate::calls::{SystemCall, SystemCalls, any};
use crate::chain::Chain;
use crate::queue::{Position, Queue, QueueError};
use crate::rate::{Limiter, Limits};
use crate::{Activation, Device, Event, Kind, Metric};

/// A request is given at most this much, in bytes; a driver that wants more asks again.
const REQUEST_MAX: u64 = 64 * 1024;

/// The limiter's timer is stopped.
const RESET: &[SystemCall] = &[any(libc::SYS_timerfd_settime)];
const CALLS: &[SystemCall] = &[any(libc::SYS_getrandom), RESET[0]];

/// Gives the guest random bytes of the host's kernel.
#[derive(Debug)]
pub struct Rng {
    limiter: Limiter,
    queue: Option<Queue>,
    requests: u64,
    bytes: u64,
}

impl Rng {
    /// A source without a driver, which gives no more than `limits` let it.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Ok(Rng { limiter: Limiter::new(limits)?, queue: None, requests: 0, bytes: 0 })
    }
}

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        self.queue = Some(activation.take(0)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.limiter.rest();
        self.queue = None;
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: RESET }
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.limiter.timer()]
    }

    fn positions(&self) -> Vec<Option<Position>> {
        vec![self.queue.as_ref().map(Queue::position)]
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![
            ("entropy_event_count", self.requests),
            ("entropy_bytes", self.bytes),
            ("entropy_rate_limiter_throttled", self.limiter.throttled()),
        ]
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        if let Event::Source(_) = event {
            self.limiter.wake();
        }
        let Rng { limiter, queue: Some(queue), requests, bytes } = self else { return Ok(false) };
        queue.serve(|chain| match chain {
            Ok(chain) if !limiter.admits(wanted(&chain)) => None,
            Ok(chain) => {
                let written = fill(chain);
                *requests += 1;
                *bytes += u64::from(written);
                Some(written)
            }
            Err(error) => {
                tracing::debug!(%error, "a request for random bytes is malformed");
                Some(0)
            }
        })
    }
}

/// What a request is given, in bytes.
fn wanted(chain: &Chain<'_>) -> u64 {
    chain.writable.len().min(REQUEST_MAX)
}

fn fill(mut chain: Chain<'_>) -> u32 {
    let wanted = wanted(&chain);
    let mut written = 0;
    let mut bytes = [0; 512];
    while written < wanted {
        let part = &mut bytes[..(wanted - written).min(512) as usize];
        // Requests of up to 256 bytes are never interrupted; larger ones may be answered in part.
        let Ok(count @ 1..) = rustix::rand::getrandom(&mut *part, rustix::rand::GetRandomFlags::empty())
        else {
            break;
        };
        if chain.writable.write(&part[..count]).is_err() {
            break;
        }
        written += count as u64;
    }
    written as u32
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::mmio::Slot;
    use crate::rate::Limit;
    use crate::testing::{Rig, fuzz};

    fn unlimited() -> Rng {
        Rng::new(Limits::default()).unwrap()
    }

    #[test]
    fn a_limited_source_makes_its_driver_wait() {
        let limit = Limit { size: 64, burst: 0, refill: Duration::from_secs(3600) };
        let mut rig = Rig::new(Rng::new(Limits { bandwidth: Some(limit), operations: None }).unwrap());
        for address in [0x2000, 0x3000] {
            rig.drivers[0].add(&[(address, 64, true)]);
        }
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), [(0, 64)]);
        // As if an hour had passed.
        rig.transport.device_mut().limiter.set(Limits { bandwidth: Some(limit), operations: None });
        rig.transport.source(0);
        assert_eq!(rig.drivers[0].used(), [(1, 64)]);
        assert!(rig.transport.metrics().contains(&("entropy_rate_limiter_throttled", 1)));
        assert_ne!(rig.drivers[0].get(0x3000, 64), [0; 64]);
    }

    #[test]
    fn buffers_are_filled_with_different_bytes() {
        let mut rig = Rig::new(unlimited());
        rig.drivers[0].add(&[(0x2000, 1000, true), (0x4000, 7, true)]);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), [(0, 1007)]);
        let first = rig.drivers[0].get(0x2000, 1000);
        assert_eq!(rig.drivers[0].get(0x2000 + 1000, 8), [0; 8]);
        rig.drivers[0].add(&[(0x2000, 1000, true)]);
        rig.kick(0);
        assert_ne!(first, rig.drivers[0].get(0x2000, 1000));
    }

    #[test]
    fn a_request_is_bounded() {
        let mut rig = Rig::new(unlimited());
        rig.drivers[0].add(&[(0x2000, 0x8_0000, true)]);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), [(0, REQUEST_MAX as u32)]);
    }

    #[test]
    fn nothing_is_written_to_readable_or_foreign_buffers() {
        let mut rig = Rig::new(unlimited());
        rig.drivers[0].add(&[(0x2000, 16, false)]);
        rig.drivers[0].add(&[(0xf_fff8, 16, true)]);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), [(0, 0), (1, 0)]);
        assert_eq!(rig.drivers[0].get(0x2000, 16), [0; 16]);
    }

    #[test]
    fn hostile_drivers_do_no_harm() {
        fuzz(400, unlimited, |random| vec![0; random.below(4096) as usize]);
    }
}
