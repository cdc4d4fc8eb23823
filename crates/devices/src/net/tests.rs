use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::*;
use crate::mmio::Slot;
use crate::rate::Limit;
use crate::testing::{Random, Rig, fuzz};

const BUFFER: u64 = 0x8000;
const MAC: [u8; 6] = [6, 0, 0, 0, 0, 1];

fn config() -> Config {
    let (receive, transmit) = (Limits::default(), Limits::default());
    Config { tap: "test".into(), mac: Some(MAC), mtu: Some(1400), receive, transmit }
}

/// A device and the other end of its cable.
fn device() -> (Net, UnixDatagram) {
    let (tap, cable) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    cable.set_nonblocking(true).unwrap();
    (Net::on(tap.into(), config()).unwrap(), cable)
}

fn rig(merge: bool) -> (Rig<Net>, UnixDatagram) {
    let (device, cable) = device();
    let without = if merge { 0 } else { 1 << VIRTIO_NET_F_MRG_RXBUF };
    (Rig::with_features(device, !without), cable)
}

/// A frame of that length, header included; no two bytes next to each other are the same.
fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|n| n as u8).collect();
    frame[..HEADER].fill(0);
    frame
}

#[test]
fn the_guests_frames_leave_whole_and_what_is_none_does_not() {
    let (mut rig, cable) = rig(true);
    let sent = frame(1000);
    rig.drivers[TRANSMIT].put(BUFFER, &sent);
    rig.drivers[TRANSMIT].add(&[(BUFFER, 5, false), (BUFFER + 5, 995, false)]);
    rig.drivers[TRANSMIT].add(&[(BUFFER, HEADER as u32, false)]);
    rig.drivers[TRANSMIT].add(&[(BUFFER, FRAME_MAX as u32 + 1, false)]);
    rig.drivers[TRANSMIT].add(&[(BUFFER, 100, true)]);
    rig.kick(TRANSMIT);
    assert_eq!(rig.drivers[TRANSMIT].used().len(), 4);
    let mut received = [0; 2000];
    assert_eq!(cable.recv(&mut received).unwrap(), 1000);
    assert_eq!(received[..1000], sent);
    assert!(cable.recv(&mut received).is_err());
    let metrics = rig.transport.metrics();
    for expected in [("tx_packets_count", 1), ("tx_bytes_count", 988), ("tx_malformed_frames", 3)] {
        assert!(metrics.contains(&expected), "{metrics:?}");
    }
}

#[test]
fn a_frame_goes_over_as_many_buffers_as_it_needs_and_says_over_how_many() {
    let (mut rig, cable) = rig(true);
    cable.send(&frame(1000)).unwrap();
    rig.transport.source(0);
    assert_eq!(rig.drivers[RECEIVE].used(), []);
    // Two are not enough, and are not touched; the third one is.
    for n in 0..3 {
        rig.drivers[RECEIVE].add(&[(BUFFER + n * 0x1000, 400, true)]);
        rig.kick(RECEIVE);
        assert_eq!(rig.drivers[RECEIVE].used().len(), if n == 2 { 3 } else { 0 });
    }
    let driver = &rig.drivers[RECEIVE];
    let received: Vec<u8> = [(0, 400), (0x1000, 400), (0x2000, 200)]
        .iter()
        .flat_map(|(at, n)| driver.get(BUFFER + at, *n))
        .collect();
    let mut expected = frame(1000);
    expected[10] = 3;
    assert_eq!(received, expected);
}

#[test]
fn frames_go_straight_into_buffers_that_hold_the_longest_one_and_leave_the_others() {
    const STEP: u64 = 0x1200;
    let (mut rig, cable) = rig(true);
    let driver = &mut rig.drivers[RECEIVE];
    // The first one is shorter than the header.
    driver.add(&[(BUFFER - 11, 11, true)]);
    for n in 0..15 {
        driver.add(&[(BUFFER + n * STEP, STEP as u32, true)]);
    }
    for frame in [frame(5000), frame(100), vec![0; 4]] {
        cable.send(&frame).unwrap();
    }
    rig.transport.source(0);
    let driver = &mut rig.drivers[RECEIVE];
    assert_eq!(driver.used(), [(0, 11), (1, STEP as u32), (2, 5000 - 11 - STEP as u32), (3, 100)]);
    let mut expected = frame(5000);
    expected[10] = 3;
    assert_eq!(driver.get(BUFFER - 11, 11 + STEP as usize), expected[..11 + STEP as usize]);
    assert_eq!(driver.get(BUFFER + 2 * STEP + 10, 2), [1, 0]);
    // What is left has no room for the longest one, but for this one.
    cable.send(&frame(300)).unwrap();
    rig.transport.source(0);
    let driver = &mut rig.drivers[RECEIVE];
    assert_eq!(driver.used(), [(4, 300)]);
    assert_eq!(driver.get(BUFFER + 3 * STEP + 12, 288), frame(300)[12..]);
    crate::testing::assert_marked(&driver.memory);
    for expected in [("rx_packets_count", 3), ("rx_bytes_count", 5400 - 36), ("no_rx_avail_buffer", 0)] {
        assert!(rig.transport.metrics().contains(&expected), "{expected:?}");
    }
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_lost_and_the_next_one_is_not() {
    let (mut rig, cable) = rig(false);
    cable.send(&frame(1000)).unwrap();
    cable.send(&frame(100)).unwrap();
    for _ in 0..2 {
        rig.drivers[RECEIVE].add(&[(BUFFER, 400, true)]);
    }
    rig.transport.source(0);
    assert_eq!(rig.drivers[RECEIVE].used(), [(0, 0), (1, 100)]);
    assert!(rig.transport.metrics().contains(&("rx_fails", 1)));
}

#[test]
fn buffers_that_can_never_hold_a_frame_do_not_stop_the_ones_behind_it() {
    let (mut rig, cable) = rig(true);
    cable.send(&frame(1000)).unwrap();
    cable.send(&frame(100)).unwrap();
    for _ in 0..16 {
        rig.drivers[RECEIVE].add(&[(BUFFER, 10, true)]);
    }
    rig.transport.source(0);
    let lost: u32 = rig.drivers[RECEIVE].used().iter().map(|(_, length)| length).sum();
    assert_eq!(lost, 160);
    rig.drivers[RECEIVE].add(&[(BUFFER, 400, true)]);
    rig.kick(RECEIVE);
    assert_eq!(rig.drivers[RECEIVE].used().last().unwrap().1, 100);
}

#[test]
fn limits_hold_in_both_directions_and_can_be_changed() {
    let (mut rig, cable) = rig(true);
    let once = |size| {
        let limit = Limit { size, burst: 0, refill: Duration::from_secs(3600) };
        Limits { bandwidth: None, operations: Some(limit) }
    };
    rig.transport.device_mut().limit(once(1), once(2));
    for _ in 0..3 {
        cable.send(&frame(100)).unwrap();
        rig.drivers[RECEIVE].add(&[(BUFFER, 400, true)]);
        rig.drivers[TRANSMIT].add(&[(BUFFER, 100, false)]);
    }
    rig.transport.source(0);
    rig.kick(TRANSMIT);
    assert_eq!((rig.drivers[RECEIVE].used().len(), rig.drivers[TRANSMIT].used().len()), (1, 2));
    rig.transport.device_mut().limit(once(9), once(9));
    rig.transport.source(0);
    assert_eq!((rig.drivers[RECEIVE].used().len(), rig.drivers[TRANSMIT].used().len()), (2, 1));
}

#[test]
fn a_cable_that_is_cut_is_an_error_and_the_device_lives() {
    let (mut rig, cable) = rig(true);
    drop(cable);
    rig.drivers[RECEIVE].add(&[(BUFFER, 400, true)]);
    rig.drivers[TRANSMIT].add(&[(BUFFER, 100, false)]);
    rig.transport.source(0);
    rig.kick(TRANSMIT);
    assert_eq!(rig.drivers[TRANSMIT].used().len(), 1);
    assert!(rig.transport.active());
    assert!(rig.transport.metrics().contains(&("tap_write_fails", 1)));
}

#[test]
fn the_driver_learns_address_and_mtu() {
    let (rig, _cable) = rig(true);
    let mut rig = rig;
    let mut bytes = [0; 12];
    rig.transport.read(0x100, &mut bytes);
    assert_eq!((&bytes[..6], &bytes[8..]), (&MAC[..], &[1, 0, 0x78, 0x05][..]));
}

#[test]
fn names_that_no_device_can_have_are_refused() {
    for name in ["", "a/b", "a-name-of-sixteen", "tap%d", "fd:", "fd:-1", "fd:0", "fd:65535"] {
        assert!(matches!(check(name), Err(Error::Tap { .. })), "{name}");
    }
}

#[test]
fn hostile_drivers_do_no_harm() {
    let cables = std::cell::RefCell::new(Vec::new());
    let make = || {
        let (device, cable) = device();
        for length in [13, 100, 5000] {
            cable.send(&frame(length)).unwrap();
        }
        cables.borrow_mut().push(cable);
        device
    };
    fuzz(400, make, |random: &mut Random| vec![0; random.below(3000) as usize]);
}
