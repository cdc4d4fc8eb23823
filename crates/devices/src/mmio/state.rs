//! A device's registers and queues as they are in a snapshot. The device's own state follows them.

use super::{Transport, empty_queues, feature, status};
use crate::queue::{Position, QueueConfig};
use crate::state::{Reader, StateError, Writer};
use crate::{Activation, Device};

impl<D: Device> Transport<D> {
    pub(super) fn save_state(&self, writer: &mut Writer) {
        writer.u32(self.status);
        writer.u64(self.features);
        for word in [self.device_features_word, self.driver_features_word, self.selected, self.generation] {
            writer.u32(word);
        }
        writer.u32(self.interrupt.status());
        writer.u32(self.queues.len() as u32);
        let positions = self.device.positions();
        for (index, queue) in self.queues.iter().enumerate() {
            writer.u16(queue.max);
            writer.u32(queue.size);
            for address in [queue.descriptors, queue.available, queue.used] {
                writer.u64(address);
            }
            writer.u8(u8::from(queue.ready));
            let position = positions.get(index).copied().flatten().unwrap_or_default();
            writer.u16(position.next_available);
            writer.u16(position.next_used);
        }
        self.device.save(writer);
    }

    /// The device has to be as it was made. If it fails it is of no use any more.
    pub(super) fn restore_state(&mut self, reader: &mut Reader<'_>) -> Result<(), StateError> {
        self.status = reader.u32()?;
        self.features = reader.u64()?;
        self.device_features_word = reader.u32()?;
        self.driver_features_word = reader.u32()?;
        self.selected = reader.u32()?;
        self.generation = reader.u32()?;
        let reasons = reader.u32()?;
        self.queues = empty_queues(&self.device);
        if reader.u32()? as usize != self.queues.len() {
            return Err(StateError::Invalid("the device has another number of queues"));
        }
        let mut positions = Vec::new();
        for queue in &mut self.queues {
            let max = queue.max;
            *queue = QueueConfig {
                max: reader.u16()?,
                size: reader.u32()?,
                descriptors: reader.u64()?,
                available: reader.u64()?,
                used: reader.u64()?,
                ready: reader.u8()? == 1,
            };
            positions.push(Position { next_available: reader.u16()?, next_used: reader.u16()? });
            if queue.max != max {
                return Err(StateError::Invalid("a queue has another size"));
            }
        }
        if self.status & status::FEATURES_OK != 0 && !self.features_fit() {
            return Err(StateError::Invalid("the driver has features that the device does not offer"));
        }
        if self.active() {
            self.continue_at(&positions)?;
        }
        self.device.restore(reader)?;
        // An interrupt that was on its way is not in anybody's state; one too many does no harm.
        if reasons != 0 {
            self.interrupt.raise(reasons);
        }
        Ok(())
    }

    fn continue_at(&mut self, positions: &[Position]) -> Result<(), StateError> {
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (queue, position) in self.queues.iter().zip(positions) {
            let frozen =
                queue.ready.then(|| queue.freeze(&self.memory, &self.interrupt, event_idx)).transpose()?;
            queues.push(frozen.map(|mut frozen| {
                frozen.set_position(*position);
                frozen
            }));
        }
        let (features, interrupt, events) = (self.features, self.interrupt.clone(), self.events.clone());
        self.device.activate(Activation { features, queues, interrupt, events })?;
        // Nobody knows which notifications were on their way.
        (0..self.events.len()).for_each(|queue| self.signal(queue));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::Memory;
    use crate::balloon::{self, Balloon};
    use crate::mmio::Slot;
    use crate::rate::Limits;
    use crate::rng::Rng;
    use crate::testing::{Random, Rig, memory};

    fn saved(slot: &dyn Slot) -> Vec<u8> {
        let mut writer = Writer::default();
        slot.save(&mut writer);
        writer.finish()
    }

    fn restored<D: Device>(device: D, memory: Memory, state: &[u8]) -> Result<Transport<D>, StateError> {
        let mut transport = Transport::new(device, memory, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        let mut reader = Reader::new(state);
        transport.restore(&mut reader)?;
        reader.finish()?;
        Ok(transport)
    }

    fn balloon() -> Balloon {
        let statistics = std::time::Duration::from_secs(1);
        Balloon::new(balloon::Config { mib: 1, deflate_on_oom: true, reporting: true, statistics }).unwrap()
    }

    #[test]
    fn a_device_goes_on_where_another_one_was_saved() {
        let mut rig = Rig::new(Rng::new(Limits::default()).unwrap());
        rig.drivers[0].add(&[(0x2000, 16, true)]);
        rig.kick(0);
        // Announced and not looked at yet.
        rig.drivers[0].add(&[(0x3000, 16, true)]);
        let state = saved(&rig.transport);
        let memory = rig.drivers[0].memory.clone();
        let mut other = restored(Rng::new(Limits::default()).unwrap(), memory, &state).unwrap();
        assert_eq!(saved(&other), state);
        assert_eq!(other.interrupt().line().read().unwrap(), 1);
        assert_eq!(other.queue_events()[0].read().unwrap(), 1);
        other.notify(0);
        assert_eq!(rig.drivers[0].used(), [(0, 16), (1, 16)]);
        assert_ne!(rig.drivers[0].get(0x3000, 16), [0; 16]);
    }

    #[test]
    fn a_device_without_a_driver_is_saved_too() {
        let fresh = restored(balloon(), memory(), &saved(&Rig::new(balloon()).transport));
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let state = saved(&Transport::new(balloon(), memory(), line).unwrap());
        assert!(!restored(balloon(), memory(), &state).unwrap().active());
        assert!(fresh.unwrap().active());
    }

    #[test]
    fn hostile_state_is_an_error_or_a_device_and_never_a_panic() {
        let rig = Rig::new(balloon());
        let state = saved(&rig.transport);
        for end in 0..state.len() {
            assert!(restored(balloon(), memory(), &state[..end]).is_err(), "{end}");
        }
        assert!(matches!(
            restored(balloon(), memory(), &[&state[..], &[0]].concat()),
            Err(StateError::TooLong)
        ));
        assert!(restored(Rng::new(Limits::default()).unwrap(), memory(), &state).is_err());
        for seed in 0..2000 {
            let mut random = Random::new(seed);
            let mut changed = state.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(changed.len() as u64) as usize;
                changed[at] = random.next() as u8;
            }
            if let Ok(mut transport) = restored(balloon(), memory(), &changed) {
                (0..4).for_each(|queue| transport.notify(queue));
                transport.source(0);
            }
        }
    }
}
