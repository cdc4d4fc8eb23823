//! The entropy device (virtio 1.2, section 5.4).

use crate::calls::{SystemCall, SystemCalls, any};
use crate::chain::Chain;
use crate::queue::{Position, Queue, QueueError};
use crate::{Activation, Device, Event, Kind, Metric};

/// A request is given at most this much, in bytes; a driver that wants more asks again.
const REQUEST_MAX: u64 = 64 * 1024;

const CALLS: &[SystemCall] = &[any(libc::SYS_getrandom)];

/// Gives the guest random bytes of the host's kernel.
#[derive(Debug, Default)]
pub struct Rng {
    queue: Option<Queue>,
    requests: u64,
    bytes: u64,
}

impl Rng {
    /// A source without a driver.
    pub fn new() -> Self {
        Self::default()
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
        self.queue = None;
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: &[] }
    }

    fn positions(&self) -> Vec<Option<Position>> {
        vec![self.queue.as_ref().map(Queue::position)]
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![("entropy_event_count", self.requests), ("entropy_bytes", self.bytes)]
    }

    fn handle(&mut self, _event: Event) -> Result<bool, QueueError> {
        let Rng { queue: Some(queue), requests, bytes } = self else { return Ok(false) };
        queue.serve(|chain| match chain {
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

fn fill(mut chain: Chain<'_>) -> u32 {
    let wanted = chain.writable.len().min(REQUEST_MAX);
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
    use super::*;
    use crate::testing::{Rig, fuzz};

    #[test]
    fn buffers_are_filled_with_different_bytes() {
        let mut rig = Rig::new(Rng::new());
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
        let mut rig = Rig::new(Rng::new());
        rig.drivers[0].add(&[(0x2000, 0x8_0000, true)]);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), [(0, REQUEST_MAX as u32)]);
    }

    #[test]
    fn nothing_is_written_to_readable_or_foreign_buffers() {
        let mut rig = Rig::new(Rng::new());
        rig.drivers[0].add(&[(0x2000, 16, false)]);
        rig.drivers[0].add(&[(0xf_fff8, 16, true)]);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), [(0, 0), (1, 0)]);
        assert_eq!(rig.drivers[0].get(0x2000, 16), [0; 16]);
    }

    #[test]
    fn hostile_drivers_do_no_harm() {
        fuzz(400, Rng::new, |random| vec![0; random.below(4096) as usize]);
    }
}
