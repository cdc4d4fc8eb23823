//! Against back ends that do as they are told, or as they like.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::message::{PROTOCOL_FEATURES, longs, protocol, words};
use super::*;
use crate::Memory;
use crate::mmio::{Slot, Transport, register};
use crate::testing::{Driver, SIZE, shared_memory};

/// Bits of the status register.
const NEEDS_RESET: u32 = 64;
/// The capacity of the disk, and its place in the configuration.
const SECTORS: u64 = 0x1234;
/// Long enough for an honest back end on a busy machine.
pub(super) const LONG: Duration = Duration::from_secs(100);
/// Of which a part has to pass.
const SHORT: Duration = Duration::from_millis(200);

/// What a back end was asked for.
pub(super) struct Asked {
    request: u32,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// The bytes that answer it, if any, and whether the back end stays.
pub(super) type Answers = dyn FnMut(&Asked) -> (Vec<u8>, bool) + Send;

/// A back end in a thread. It ends with the connection, and gives what it was asked for.
pub(super) fn serve(mut answers: Box<Answers>) -> (UnixStream, JoinHandle<Vec<Asked>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut heard = Vec::new();
        while let Some(asked) = next(&theirs) {
            let (answer, stays) = answers(&asked);
            heard.push(asked);
            // Nobody may listen any more.
            if (&theirs).write_all(&answer).is_err() || !stays {
                break;
            }
        }
        heard
    });
    (ours, server)
}

fn next(stream: &UnixStream) -> Option<Asked> {
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let head = &mut bytes[..message::HEADER];
    let read = recvmsg(stream, &mut [IoSliceMut::new(head)], &mut ancillary, RecvFlags::WAITALL).ok()?.bytes;
    if read < message::HEADER {
        return None;
    }
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors.collect::<Vec<_>>()),
            _ => None,
        })
        .flatten()
        .collect();
    let word = |n: usize| u32::from_ne_bytes(std::array::from_fn(|byte| bytes[4 * n + byte]));
    let (request, flags, length) = (word(0), word(1), word(2) as usize);
    assert_eq!(flags & 7, 1, "a request of version 1");
    let mut body = vec![0; length];
    std::io::Read::read_exact(&mut &*stream, &mut body).ok()?;
    Some(Asked { request, body, descriptors })
}

pub(super) fn answer(request: u32, body: &[u8]) -> Vec<u8> {
    [&words(&[request, 5, body.len() as u32])[..], body].concat()
}

pub(super) const FEATURES: u64 = 1 << 32 | 1 << 29 | PROTOCOL_FEATURES | 1 << VIRTIO_BLK_F_RO | 1 << 63;
const PROTOCOL: u64 = protocol::REPLY_ACK | protocol::CONFIG | 1 << 5;

/// What an honest disk answers.
pub(super) fn honest(asked: &Asked) -> Vec<u8> {
    match asked.request {
        1 => answer(1, &longs(&[FEATURES])),
        15 => answer(15, &longs(&[PROTOCOL])),
        // Before there is anything to acknowledge.
        3 | 16 => Vec::new(),
        24 => {
            let mut body = asked.body.clone();
            body[12..20].copy_from_slice(&SECTORS.to_le_bytes());
            answer(24, &body)
        }
        11 => answer(11, &asked.body[..8]),
        other => answer(other, &longs(&[0])),
    }
}

fn disk(stream: UnixStream) -> Result<VhostUser, Error> {
    VhostUser::on(Model::Disk { flush: true }, stream, LONG)
}

/// A disk with its driver's side, brought up.
fn bring_up(device: VhostUser, memory: Memory) -> (Transport<VhostUser>, Driver) {
    let driver = Driver::new(memory.clone(), 0, 16);
    let mut transport = Transport::new(device, memory, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    transport.bring_up(u64::MAX, &[driver.config(256)]);
    (transport, driver)
}

#[test]
fn a_disk_is_handed_over_and_taken_back() {
    let (stream, server) = serve(Box::new(|asked| (honest(asked), true)));
    let (mut transport, driver) = bring_up(disk(stream).unwrap(), shared_memory());
    assert!(transport.active());
    let mut sectors = [0; 8];
    transport.read(register::CONFIG, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), SECTORS);
    // Whoever raises the interrupt cannot say why.
    assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 1);
    driver.put(0x2000, b"seen");
    transport.write_u32(register::STATUS, 0);
    assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 0);
    transport.bring_up(u64::MAX, &[driver.config(256)]);
    assert!(transport.active(), "it can be had again");
    let line = transport.interrupt().line().try_clone().unwrap();
    let kick = transport.queue_events()[0].try_clone().unwrap();
    drop(transport);

    let mut heard = server.join().unwrap();
    let requests: Vec<u32> = heard.iter().map(|asked| asked.request).collect();
    assert_eq!(requests, [3, 1, 15, 16, 24, 2, 5, 8, 9, 10, 13, 12, 18, 11, 2, 5, 8, 9, 10, 13, 12, 18]);
    assert_eq!(heard[3].body, longs(&[protocol::REPLY_ACK | protocol::CONFIG]));
    // What was offered and is known; the driver took all of it.
    assert_eq!(heard[5].body, longs(&[FEATURES & !(1 << 63)]));
    let origin = 1 << 44;
    let table = [words(&[1, 0]), longs(&[0, SIZE as u64, origin, 0])].concat();
    assert_eq!(heard[6].body, table);
    assert_eq!(heard[7].body, words(&[0, 16]));
    let addresses = [words(&[0, 0]), longs(&[origin, origin + 0x800, origin + 0x400, 0])].concat();
    assert_eq!(heard[8].body, addresses);
    let file = File::from(heard[6].descriptors.remove(0));
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0x2000).unwrap();
    assert_eq!(&bytes, b"seen", "the file is the guest's memory");
    // The driver's event reaches the back end, and the back end's the driver.
    kick.write(1).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&heard[11].descriptors[0], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1, "nobody but the driver signals it");
    rustix::io::write(&heard[10].descriptors[0], &1u64.to_ne_bytes()).unwrap();
    assert_eq!(line.read().unwrap(), 1);
}

#[test]
fn a_directory_has_its_tag_and_two_queues_and_asks_for_no_configuration() {
    let (stream, server) = serve(Box::new(|asked| (honest(asked), true)));
    let model = Model::Directory { tag: "tag0".into() };
    let device = VhostUser::on(model, stream, LONG).unwrap();
    assert_eq!(
        (device.kind(), device.queue_sizes(), device.features()),
        (Kind::FileSystem, &[512, 512][..], 0)
    );
    let config = device.config();
    assert_eq!((config.len(), &config[..5], &config[36..]), (40, &b"tag0\0"[..], &[1, 0, 0, 0][..]));
    // One of its queues is not there.
    let (transport, _driver) = bring_up(device, shared_memory());
    assert!(!transport.active());
    drop(transport);
    assert!(server.join().unwrap().iter().all(|asked| asked.request != 24));
}

#[test]
fn only_what_the_back_end_has_is_offered() {
    let plain = |asked: &Asked| match asked.request {
        1 => answer(1, &longs(&[1 << 32 | PROTOCOL_FEATURES])),
        15 => answer(15, &longs(&[protocol::CONFIG])),
        24 | 11 => honest(asked),
        _ => Vec::new(),
    };
    let (stream, server) = serve(Box::new(move |asked| (plain(asked), true)));
    let (mut transport, _driver) = bring_up(disk(stream).unwrap(), shared_memory());
    assert!(transport.active(), "without acknowledgements, too");
    transport.write_u32(register::DEVICE_FEATURES_SEL, 0);
    assert_eq!(transport.read_u32(register::DEVICE_FEATURES), 0);
    drop(transport);
    server.join().unwrap();
}

/// Answers `request` with `wrong`, and everything else honestly.
fn with(request: u32, wrong: &[u8]) -> Box<Answers> {
    let wrong = wrong.to_vec();
    Box::new(
        move |asked| {
            if asked.request == request { (wrong.clone(), true) } else { (honest(asked), true) }
        },
    )
}

#[test]
fn malformed_answers_are_told_apart() {
    let features = |flags: u32, length: u32| [&words(&[1, flags, length])[..], &[0xff; 8]].concat();
    let config = |offset: u32, size: u32, length: usize| {
        answer(24, &[&words(&[offset, size, 0])[..], &vec![0; length]].concat())
    };
    for (request, wrong, reason) in [
        (
            1,
            answer(15, &longs(&[FEATURES])),
            "Get features failed: the back end's answer is malformed: it answers another request",
        ),
        (1, features(4, 8), "it has another version"),
        (1, features(1, 8), "it is no answer"),
        (1, features(5, u32::MAX), "it is too long"),
        (1, features(5, 9), "it is too long"),
        (1, features(5, 7), "it is too short"),
        (1, answer(1, &[]), "it is too short"),
        (1, answer(1, &longs(&[PROTOCOL_FEATURES])), "does not offer VIRTIO_F_VERSION_1"),
        (1, answer(1, &longs(&[1 << 32])), "does not offer protocol features"),
        (15, answer(15, &longs(&[protocol::REPLY_ACK])), "does not offer the protocol feature CONFIG"),
        (24, answer(24, &words(&[0, 0, 0])), "Get config failed: the back end refused it"),
        (24, config(0, 60, 59), "another part of the configuration"),
        (24, config(4, 60, 60), "another part of the configuration"),
        (24, config(0, 59, 60), "another part of the configuration"),
        (24, config(0, 61, 61), "it is too long"),
        (24, answer(24, &[1]), "another part of the configuration"),
    ] {
        let (stream, server) = serve(with(request, &wrong));
        let error = disk(stream).unwrap_err().to_string();
        assert!(error.contains(reason), "{request}: {error} instead of {reason}");
        server.join().unwrap();
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let server = std::thread::spawn(move || {
        while let Some(asked) = next(&theirs) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
            let descriptors = [writer.as_fd()];
            if asked.request == 1 {
                ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors));
            }
            let bytes = honest(&asked);
            let bytes = [std::io::IoSlice::new(&bytes)];
            let _ = rustix::net::sendmsg(&theirs, &bytes, &mut ancillary, rustix::net::SendFlags::NOSIGNAL);
        }
    });
    assert!(disk(ours).unwrap_err().to_string().contains("it has descriptors"));
    server.join().unwrap();
    assert_eq!(std::io::Read::read(&mut { reader }, &mut [0]).unwrap(), 0, "no copy is left");
}

#[test]
fn who_hangs_up_or_says_nothing_is_not_waited_for() {
    for request in [3, 1, 15, 16, 24] {
        // In the middle of an answer.
        let (stream, server) = serve(Box::new(move |asked| {
            let whole = honest(asked);
            if asked.request == request { (whole[..whole.len() / 2].to_vec(), false) } else { (whole, true) }
        }));
        let error = disk(stream).unwrap_err().to_string();
        assert!(error.contains("has hung up"), "{request}: {error}");
        server.join().unwrap();
    }
    for request in [1, 15, 24] {
        let begun = Instant::now();
        let (stream, server) = serve(with(request, &[]));
        let error = VhostUser::on(Model::Disk { flush: false }, stream, SHORT).unwrap_err().to_string();
        assert!(error.contains("did not answer within 200ms"), "{request}: {error}");
        assert!((SHORT / 2..LONG).contains(&begun.elapsed()));
        server.join().unwrap();
    }
    let nowhere = VhostUser::connect(Model::Disk { flush: false }, "/nonexistent").unwrap_err().to_string();
    assert!(nowhere.starts_with("Failed to connect to UDS Unix stream: "), "{nowhere}");
    for number in ["fd:", "fd:x", "fd:-1", "fd:60000"] {
        assert!(VhostUser::connect(Model::Disk { flush: false }, number).is_err(), "{number}");
    }
}

#[test]
fn one_byte_at_a_time_is_no_way_to_keep_a_session() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        while let Some(asked) = next(&theirs) {
            for byte in honest(&asked) {
                std::thread::sleep(SHORT / 8);
                if (&theirs).write_all(&[byte]).is_err() {
                    return;
                }
            }
        }
    });
    let error = VhostUser::on(Model::Disk { flush: false }, ours, SHORT).unwrap_err().to_string();
    assert!(error.contains("did not answer"), "{error}");
    server.join().unwrap();
}

#[test]
fn a_back_end_that_fails_while_it_is_handed_the_rings_is_not_used_and_not_tried_again() {
    for (request, wrong) in [
        (2, answer(2, &longs(&[1]))),
        (5, answer(5, &longs(&[1]))),
        (8, answer(9, &longs(&[0]))),
        (18, words(&[18, 5, 4, 0])),
    ] {
        let (stream, server) = serve(with(request, &wrong));
        let (mut transport, driver) = bring_up(disk(stream).unwrap(), shared_memory());
        for _ in 0..2 {
            assert!(!transport.active(), "{request}");
            assert_eq!(transport.read_u32(register::STATUS) & NEEDS_RESET, NEEDS_RESET);
            assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 2);
            transport.bring_up(u64::MAX, &[driver.config(256)]);
        }
        assert!(matches!(transport.device_mut().refresh(), Err(Error::Over)));
        let failed = transport.metrics().iter().find(|(name, _)| *name == "activate_fails").unwrap().1;
        assert_eq!(failed, 3);
        drop(transport);
        let asked = server.join().unwrap();
        assert_eq!(asked.iter().filter(|asked| asked.request == request).count(), 1);
    }
}

#[test]
fn memory_of_this_process_alone_is_given_to_nobody() {
    let (stream, server) = serve(Box::new(|asked| (honest(asked), true)));
    let (transport, _driver) = bring_up(disk(stream).unwrap(), crate::testing::memory());
    assert!(!transport.active());
    drop(transport);
    assert!(server.join().unwrap().iter().all(|asked| asked.request != 5));
}

#[test]
fn a_back_end_that_goes_or_speaks_unasked_costs_the_guest_its_device() {
    for parting in [&b""[..], b"\0"] {
        let (stream, server) = serve(Box::new(move |asked| {
            let bytes = honest(asked);
            let last = asked.request == 18;
            (if last { [&bytes[..], parting].concat() } else { bytes }, !last)
        }));
        let (mut transport, driver) = bring_up(disk(stream).unwrap(), shared_memory());
        server.join().unwrap();
        transport.source(0);
        assert!(!transport.active());
        assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 2);
        // Nothing is left that would wake the event loop again and again.
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(epoll::wait(&transport.device().watch, &mut events, Some(&now)).unwrap(), 0);
        transport.bring_up(u64::MAX, &[driver.config(256)]);
        assert!(!transport.active());
    }
}

#[test]
fn a_wake_up_without_a_reason_changes_nothing() {
    let (stream, server) = serve(Box::new(|asked| (honest(asked), true)));
    let (mut transport, _driver) = bring_up(disk(stream).unwrap(), shared_memory());
    transport.source(0);
    transport.notify(0);
    assert!(transport.active());
    drop(transport);
    server.join().unwrap();
}

#[test]
fn a_new_configuration_is_asked_for_and_a_refused_one_leaves_the_old() {
    let mut sectors = SECTORS;
    let (stream, server) = serve(Box::new(move |asked| {
        let mut bytes = honest(asked);
        if asked.request == 24 {
            bytes[24..32].copy_from_slice(&sectors.to_le_bytes());
            sectors += 1;
            if sectors > SECTORS + 2 {
                return (answer(24, &words(&[0, 0, 0])), true);
            }
        }
        (bytes, true)
    }));
    let mut device = disk(stream).unwrap();
    device.refresh().unwrap();
    assert_eq!(device.config()[..8], (SECTORS + 1).to_le_bytes());
    assert!(device.refresh().unwrap_err().to_string().contains("refused"));
    assert_eq!(device.config()[..8], (SECTORS + 1).to_le_bytes());
    let (_, fails) = device.metrics()[1];
    assert_eq!(fails, 1);
    drop(device);
    server.join().unwrap();
}

#[test]
fn it_is_in_no_snapshot() {
    let (stream, server) = serve(Box::new(|asked| (honest(asked), true)));
    let (transport, _driver) = bring_up(disk(stream).unwrap(), shared_memory());
    let mut writer = crate::state::Writer::default();
    transport.save(&mut writer);
    drop(transport);
    server.join().unwrap();
    let (stream, server) = serve(Box::new(|asked| (honest(asked), true)));
    let memory = shared_memory();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut other = Transport::new(disk(stream).unwrap(), memory, line).unwrap();
    let state = writer.finish();
    assert!(matches!(other.restore(&mut Reader::new(&state)), Err(StateError::Invalid(_))));
    drop(other);
    server.join().unwrap();
}
