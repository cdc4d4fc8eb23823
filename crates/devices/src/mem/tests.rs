use std::sync::{Arc, Mutex};

use super::*;
use crate::mmio::Slot;
use crate::testing::{Random, Rig, assert_marked, fuzz};

const BLOCK: u64 = 0x1000;
/// In the test's memory of 1 MiB.
const REGION: Config = Config { address: 0x8_0000, size: 0x8_0000, block: BLOCK, slot: 0x1_0000 };
const REQUEST: u64 = 0x2000;
const ANSWER: u64 = 0x3000;

/// Slots that the guest has, and how many more it can have.
#[derive(Clone)]
struct Given(Arc<Mutex<(Vec<usize>, usize)>>);

impl Host for Given {
    fn give(&mut self, slot: usize, there: bool) -> io::Result<()> {
        let (slots, room) = &mut *self.0.lock().unwrap();
        assert_eq!(slots.contains(&slot), !there, "slot {slot} is given or taken twice");
        if there {
            *room = room.checked_sub(1).ok_or(io::ErrorKind::OutOfMemory)?;
            slots.push(slot);
        } else {
            *room += 1;
            slots.retain(|other| *other != slot);
        }
        Ok(())
    }
}

struct Test {
    rig: Rig<Mem>,
    given: Given,
}

impl Test {
    fn new(room: usize) -> Self {
        let given = Given(Arc::new(Mutex::new((Vec::new(), room))));
        Test { rig: Rig::new(Mem::new(REGION, Box::new(given.clone()))), given }
    }

    fn resize(&mut self, blocks: u64) {
        self.rig.transport.reconfigure(|mem| mem.resize(blocks * BLOCK)).unwrap();
    }

    /// Code and state of the answer.
    fn ask(&mut self, kind: u16, block: u64, blocks: u16) -> (u16, u16) {
        let driver = &mut self.rig.drivers[0];
        let request = Request { kind, address: REGION.address + block * BLOCK, blocks, ..Request::default() };
        driver.put(REQUEST, request.as_slice());
        driver.put(ANSWER, &[0xff; 10]);
        driver.add(&[(REQUEST, 24, false), (ANSWER, 10, true)]);
        self.rig.kick(0);
        let driver = &mut self.rig.drivers[0];
        assert_eq!(driver.used().iter().map(|(_, length)| *length).collect::<Vec<_>>(), [10]);
        let answer = driver.get(ANSWER, 10);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    fn slots(&self) -> Vec<usize> {
        self.given.0.lock().unwrap().0.clone()
    }

    fn counts(&self, name: &str) -> u64 {
        self.rig.transport.metrics().iter().find(|(other, _)| *other == name).unwrap().1
    }
}

#[test]
fn blocks_are_plugged_up_to_what_is_asked_for_and_slots_follow() {
    let mut test = Test::new(9);
    assert_eq!(test.ask(request::PLUG, 0, 1).0, response::ERROR, "nothing is usable");
    test.resize(20);
    assert_eq!(test.ask(request::STATE, 0, 20), (response::ACK, UNPLUGGED));
    assert_eq!(test.ask(request::PLUG, 15, 3).0, response::ACK);
    assert_eq!(test.slots(), [0, 1]);
    assert_eq!(test.ask(request::STATE, 0, 20), (response::ACK, MIXED));
    assert_eq!(test.ask(request::STATE, 15, 3), (response::ACK, PLUGGED));
    assert_eq!(test.ask(request::PLUG, 15, 1).0, response::ERROR, "it is plugged");
    assert_eq!(test.ask(request::PLUG, 18, 14).0, response::ACK, "beyond the size, in the last slot");
    assert_eq!(test.ask(request::PLUG, 0, 4).0, response::NACK, "more than is asked for");
    assert_eq!(test.rig.transport.device().plugged(), 17 * BLOCK);

    test.rig.drivers[0].put(REGION.address + 17 * BLOCK, &[1; 0x1000]);
    assert_eq!(test.ask(request::UNPLUG, 16, 16).0, response::ACK);
    assert_eq!((test.slots(), test.rig.transport.device().plugged()), (vec![0], BLOCK));
    assert_eq!(test.rig.drivers[0].get(REGION.address + 17 * BLOCK, 0x1000), [0; 0x1000]);
    assert_eq!(test.ask(request::UNPLUG, 15, 2).0, response::ERROR, "half of it is not plugged");
    assert_eq!(test.ask(request::UNPLUG_ALL, 0, 0).0, response::ACK);
    assert_eq!((test.slots(), test.rig.transport.device().slots().count()), (vec![], 0));
    assert_eq!((test.counts("plug_count"), test.counts("plug_fails")), (5, 3));
    assert_eq!((test.counts("plug_bytes"), test.counts("unplug_bytes")), (17 * BLOCK, 16 * BLOCK));
    assert_marked(&test.rig.drivers[0].memory);
}

#[test]
fn ranges_outside_of_what_is_usable_are_errors() {
    let mut test = Test::new(9);
    test.resize(16);
    for (block, blocks) in
        [(0, 0), (0, 17), (16, 1), (15, 2), (u64::MAX / BLOCK - 0x80, 1), (1 << 40, u16::MAX)]
    {
        for kind in [request::PLUG, request::UNPLUG, request::STATE] {
            assert_eq!(test.ask(kind, block, blocks).0, response::ERROR, "{kind} {block} {blocks}");
        }
    }
    assert_eq!(test.ask(7, 0, 1).0, response::ERROR);
    assert!(test.slots().is_empty());
}

#[test]
fn a_host_that_has_no_more_gives_nothing_of_a_range() {
    let mut test = Test::new(1);
    test.resize(32);
    assert_eq!(test.ask(request::PLUG, 0, 32).0, response::BUSY);
    assert_eq!((test.slots(), test.rig.transport.device().plugged()), (vec![], 0));
    assert_eq!(test.ask(request::PLUG, 0, 16).0, response::ACK);
    assert_eq!(test.slots(), [0]);
}

#[test]
fn sizes_are_whole_blocks_of_the_region_and_the_driver_reads_them() {
    let mut test = Test::new(9);
    let mem = test.rig.transport.device_mut();
    assert!(mem.resize(REGION.size).is_ok() && mem.resize(REGION.size + BLOCK).is_err());
    assert_eq!(mem.resize(BLOCK + 1), Err(InvalidSize(BLOCK + 1)));
    test.resize(3);
    let mut bytes = [0; 56];
    test.rig.transport.read(0x100, &mut bytes);
    let words: Vec<u64> = bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [BLOCK, 0, REGION.address, REGION.size, REGION.size, 0, 3 * BLOCK]);
}

#[test]
fn what_is_plugged_survives_a_reset_and_a_snapshot() {
    let mut test = Test::new(9);
    test.resize(40);
    assert_eq!(test.ask(request::PLUG, 20, 5).0, response::ACK);
    test.rig.transport.device_mut().reset();
    assert_eq!((test.slots(), test.rig.transport.device().plugged()), (vec![1], 5 * BLOCK));

    let mut writer = Writer::default();
    test.rig.transport.device().save(&mut writer);
    let state = writer.finish();
    let other = Test::new(9);
    let mut device = other.rig.transport;
    let mem = device.device_mut();
    mem.restore(&mut Reader::new(&state)).unwrap();
    assert_eq!((mem.plugged(), mem.requested()), (5 * BLOCK, 40 * BLOCK));
    assert_eq!(other.given.0.lock().unwrap().0, [1]);
    for end in 0..state.len() {
        let given = Given(Arc::new(Mutex::new((Vec::new(), 9))));
        let mut mem = Mem::new(REGION, Box::new(given));
        assert!(mem.restore(&mut Reader::new(&state[..end])).is_err(), "{end} bytes");
    }
}

#[test]
fn hostile_drivers_do_no_harm() {
    let make = || {
        let given = Given(Arc::new(Mutex::new((Vec::new(), 3))));
        let mut mem = Mem::new(REGION, Box::new(given));
        mem.resize(60 * BLOCK).unwrap();
        mem
    };
    fuzz(400, make, |random: &mut Random| {
        let request = Request {
            kind: random.below(5) as u16,
            address: if random.below(8) == 0 {
                random.next()
            } else {
                REGION.address + random.below(128) * BLOCK
            },
            blocks: random.below(40) as u16,
            ..Request::default()
        };
        request.as_slice()[..random.below(3) as usize * 8 + 8].to_vec()
    });
}
