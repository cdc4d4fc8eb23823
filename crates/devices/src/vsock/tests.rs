//! The device against a guest's driver on one side and real Unix sockets on the other.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use vm_memory::ByteValued;

use super::packet::{Credit, Header, Operation, Packet, Ports, shutdown};
use super::*;
use crate::mmio::Slot;
use crate::testing::{Random, Rig, fuzz};

const CID: u64 = 42;
const PORTS: Ports = Ports { guest: 1000, host: 1024 };
const TX: u64 = 0x4000;
const RX: u64 = 0x2_0000;
const RX_STEP: u64 = 0x2000;
const RX_LENGTH: u32 = 0x1000 + 44;
const PLENTY: Credit = Credit { buffer: 0x10_0000, forwarded: 0 };

struct Test {
    rig: Rig<Vsock>,
    path: PathBuf,
    received: Vec<(Packet, Vec<u8>)>,
    offered: u64,
    _directory: tempfile::TempDir,
}

impl Test {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let rig = Rig::new(Vsock::new(CID, &path).unwrap());
        let mut test = Test { rig, path, received: Vec::new(), offered: 0, _directory: directory };
        test.offer(8);
        test
    }

    /// Gives the device buffers for packets.
    fn offer(&mut self, count: u64) {
        for _ in 0..count {
            self.rig.drivers[0].add(&[(RX + self.offered % 16 * RX_STEP, RX_LENGTH, true)]);
            self.offered += 1;
        }
        self.rig.kick(0);
    }

    /// Lets the device look at the host's sockets, and takes the packets that it has for the guest.
    fn run(&mut self) {
        self.rig.transport.source(0);
        self.collect();
    }

    fn collect(&mut self) {
        for (_, length) in self.rig.drivers[0].used() {
            let at = RX + self.received.len() as u64 % 16 * RX_STEP;
            let bytes = self.rig.drivers[0].get(at, length as usize);
            let mut header = Header::default();
            header.as_mut_slice().copy_from_slice(&bytes[..44]);
            // The host's packets read as a guest's would when the addresses are turned around.
            self.received.push((turned(&header), bytes[44..].to_vec()));
        }
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let driver = &mut self.rig.drivers[1];
        driver.put(TX, header.as_slice());
        driver.put(TX + 0x100, data);
        if data.is_empty() {
            driver.add(&[(TX, 44, false)]);
        } else {
            driver.add(&[(TX, 44, false), (TX + 0x100, data.len() as u32, false)]);
        }
        self.rig.kick(1);
        self.collect();
    }

    fn send(&mut self, ports: Ports, operation: Operation, data: &[u8]) {
        self.send_with(ports, operation, 0, PLENTY, data);
    }

    fn send_with(&mut self, ports: Ports, operation: Operation, flags: u32, credit: Credit, data: &[u8]) {
        let packet = Packet { flags, credit, length: data.len() as u32, ..Packet::new(ports, operation) };
        self.send_raw(&packet.sent_by_guest(CID), data);
    }

    fn operations(&self) -> Vec<Operation> {
        self.received.iter().map(|(packet, _)| packet.operation).collect()
    }

    /// A stream that the guest opened, on the host's side.
    fn guest_stream(&mut self) -> UnixStream {
        let listener = UnixListener::bind(format!("{}_{}", self.path.display(), PORTS.host)).unwrap();
        self.send(PORTS, Operation::Request, &[]);
        assert_eq!(self.operations(), [Operation::Response]);
        listener.accept().unwrap().0
    }

    /// A stream that the host opened, and its name.
    fn host_stream(&mut self, credit: Credit) -> (UnixStream, Ports) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.write_all(b"CONNECT 77\n").unwrap();
        self.run();
        let ports = self.received[0].0.ports;
        assert_eq!((self.operations(), ports.guest), (vec![Operation::Request], 77));
        self.send_with(ports, Operation::Response, 0, credit, &[]);
        let mut line = vec![0; format!("OK {}\n", ports.host).len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", ports.host).into_bytes());
        (stream, ports)
    }
}

/// A packet of the host, read with the guest's eyes.
fn turned(header: &Header) -> Packet {
    let bytes = header.as_slice();
    let mut other = Header::default();
    let turned = [&bytes[8..16], &bytes[..8], &bytes[20..24], &bytes[16..20], &bytes[24..]].concat();
    other.as_mut_slice().copy_from_slice(&turned);
    Packet::of_guest(&other, CID).unwrap()
}

#[test]
fn a_guests_stream_carries_data_both_ways() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    test.send(PORTS, Operation::Data, b"from the guest");
    let mut bytes = [0; 14];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");

    stream.write_all(b"from the host").unwrap();
    test.run();
    let (packet, data) = &test.received[1];
    assert_eq!(
        (packet.ports, packet.operation, data.as_slice()),
        (PORTS, Operation::Data, &b"from the host"[..])
    );
    assert_eq!(packet.credit.forwarded, 14);
}

#[test]
fn nothing_wakes_the_device_when_the_host_takes_what_it_was_sent() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    test.send(PORTS, Operation::Data, b"word");
    test.run();
    stream.read_exact(&mut [0; 4]).unwrap();
    let device = test.rig.transport.device();
    let sources = device.sources();
    let mut wanted = [rustix::event::PollFd::new(&sources[0], rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut wanted, Some(&Default::default())).unwrap(), 0);
}

#[test]
fn descriptors_that_come_with_the_hosts_data_do_not_hold_up_what_is_behind() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [stream.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(&stream, &[io::IoSlice::new(b"one ")], &mut control, SendFlags::empty()).unwrap();
    stream.write_all(b"two").unwrap();
    test.run();
    let data: Vec<u8> = test.received.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(data, b"one two");
}

#[test]
fn a_hosts_stream_begins_with_a_line_and_nothing_after_it_is_lost() {
    let mut test = Test::new();
    let mut stream = UnixStream::connect(&test.path).unwrap();
    stream.write_all(b"CONN").unwrap();
    test.run();
    assert_eq!(test.received, []);
    stream.write_all(b"ECT 5\nearly").unwrap();
    test.run();
    let ports = test.received[0].0.ports;
    assert_eq!(ports.guest, 5);
    test.send(ports, Operation::Response, &[]);
    test.run();
    assert_eq!(test.received[1].1, b"early");
}

#[test]
fn a_bad_first_line_closes_the_hosts_socket() {
    let mut test = Test::new();
    for line in [
        &b"CONNECT x\n"[..],
        b"GET / HTTP/1.1\r\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 00000000000001\n",
        b"\n",
    ] {
        let mut stream = UnixStream::connect(&test.path).unwrap();
        stream.write_all(line).unwrap();
        test.run();
        // What was not read of the line makes the end a reset.
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)), "{line:?}");
    }
    assert_eq!((test.received.len(), test.rig.transport.device().muxer.connections()), (0, 0));
}

#[test]
fn nobody_listening_is_a_reset() {
    let mut test = Test::new();
    test.send(PORTS, Operation::Request, &[]);
    assert_eq!(test.operations(), [Operation::Reset]);
}

#[test]
fn a_half_close_goes_through_in_both_directions() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    test.send(PORTS, Operation::Data, b"last words");
    test.send_with(PORTS, Operation::Shutdown, shutdown::SEND, PLENTY, &[]);
    let mut words = String::new();
    stream.read_to_string(&mut words).unwrap();
    assert_eq!(words, "last words");

    stream.write_all(b"answer").unwrap();
    test.run();
    assert_eq!(test.received[1].1, b"answer");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    test.run();
    // Now that both directions are closed, so is the socket.
    let (packet, _) = test.received[2];
    assert_eq!((packet.operation, packet.flags), (Operation::Shutdown, shutdown::BOTH));
}

#[test]
fn a_host_that_only_stops_sending_still_receives() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    test.run();
    let (packet, _) = test.received[1];
    assert_eq!((packet.operation, packet.flags), (Operation::Shutdown, shutdown::SEND));
    test.send(PORTS, Operation::Data, b"more");
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"more");
}

#[test]
fn a_closed_host_is_told_after_its_data() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    test.run();
    assert_eq!(test.operations(), [Operation::Response, Operation::Data, Operation::Shutdown]);
    assert_eq!(test.received[2].0.flags, shutdown::BOTH);
    test.send(PORTS, Operation::Reset, &[]);
    assert_eq!(test.rig.transport.device().muxer.connections(), 0);
    assert_eq!(test.received.len(), 3);
}

#[test]
fn a_guest_that_closes_is_answered_with_a_reset() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    test.send_with(PORTS, Operation::Shutdown, shutdown::BOTH, PLENTY, &[]);
    assert_eq!(test.operations(), [Operation::Response, Operation::Reset]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_host_waits_for_the_guests_credit() {
    let mut test = Test::new();
    let (mut stream, ports) = test.host_stream(Credit { buffer: 10, forwarded: 0 });
    stream.write_all(b"0123456789abc").unwrap();
    test.run();
    assert_eq!(test.received[1].1, b"0123456789");
    assert_eq!(test.operations()[2..], [Operation::CreditRequest]);
    test.run();
    assert_eq!(test.received.len(), 3);
    test.send_with(ports, Operation::CreditUpdate, 0, Credit { buffer: 10, forwarded: 10 }, &[]);
    assert_eq!(test.received[3].1, b"abc");
}

#[test]
fn contradictory_credit_is_no_credit() {
    let mut test = Test::new();
    let (mut stream, ports) = test.host_stream(Credit { buffer: 10, forwarded: 0 });
    stream.write_all(b"data").unwrap();
    // As if the guest had taken more than it was sent.
    test.send_with(ports, Operation::CreditUpdate, 0, Credit { buffer: 10, forwarded: 5 }, &[]);
    test.run();
    assert!(!test.operations().contains(&Operation::Data));
}

#[test]
fn a_guest_beyond_its_credit_is_cut_off_and_the_host_keeps_what_it_has_room_for() {
    let mut test = Test::new();
    let _stream = test.guest_stream();
    // Nobody reads on the host, so in the end the socket is full and then the backlog.
    let block = vec![7; 4096];
    for _ in 0..2000 {
        test.send(PORTS, Operation::Data, &block);
        test.offer(u64::from(test.offered - test.received.len() as u64 == 0));
        if test.operations().last() == Some(&Operation::Reset) {
            assert_eq!(test.rig.transport.device().muxer.connections(), 0);
            return;
        }
    }
    panic!("the guest was never cut off");
}

#[test]
fn the_guest_learns_that_its_data_was_taken() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    let block = vec![7; 4096];
    for _ in 0..12 {
        test.send(PORTS, Operation::Data, &block);
    }
    let update = test.received.last().unwrap().0;
    assert_eq!(update.operation, Operation::CreditUpdate);
    assert!(update.credit.forwarded >= 8 * 4096, "{update:?}");
    let mut bytes = vec![0; 12 * 4096];
    stream.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn a_full_socket_is_flushed_when_the_host_reads_and_nothing_is_lost() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    let mut sent = Vec::new();
    // Until the socket is full and some of the data is in the backlog.
    for n in 0..2000u32 {
        let block: Vec<u8> = (0..1024).flat_map(|m| (n * 1024 + m).to_le_bytes()).collect();
        let told = test.received.iter().map(|(packet, _)| packet.credit.forwarded).max().unwrap();
        if sent.len() + block.len() - told as usize > 64 * 1024 {
            break;
        }
        test.send(PORTS, Operation::Data, &block);
        sent.extend(block);
        test.offer(test.received.len() as u64 + 8 - test.offered);
    }
    test.send_with(PORTS, Operation::Shutdown, shutdown::SEND, PLENTY, &[]);
    stream.set_nonblocking(true).unwrap();
    let mut got: Vec<u8> = Vec::new();
    let mut bytes = [0; 65536];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(n) => got.extend(&bytes[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => test.run(),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(got.len(), sent.len());
    assert!(got == sent);
}

#[test]
fn nonsense_is_reset_or_ignored() {
    let mut test = Test::new();
    let header = Packet::new(PORTS, Operation::Request).sent_by_guest(CID);
    let mut edit = |at: usize, value: u8| {
        let mut other = header;
        other.as_mut_slice()[at] = value;
        test.send_raw(&other, &[]);
        std::mem::take(&mut test.received).len()
    };
    // Another sender, another receiver: no answer. Another type, another operation: a reset.
    assert_eq!([edit(0, 43), edit(8, 3), edit(28, 2), edit(30, 99)], [0, 0, 1, 1]);
}

#[test]
fn data_of_another_length_than_the_header_says_ends_the_connection() {
    let mut test = Test::new();
    let _stream = test.guest_stream();
    let mut packet = Packet::new(PORTS, Operation::Data);
    packet.length = u32::MAX;
    test.send_raw(&packet.sent_by_guest(CID), b"short");
    assert_eq!(test.operations(), [Operation::Response, Operation::Reset]);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut test = Test::new();
    // The eight buffers are used up first; then answers wait, then packets do.
    for _ in 0..200 {
        test.send(Ports { guest: 9, host: 9 }, Operation::Data, &[]);
        if test.rig.drivers[1].used().is_empty() {
            assert_eq!(test.received.len(), 8);
            test.offer(8);
            test.collect();
            assert_eq!(test.received.len(), 16);
            return;
        }
    }
    panic!("the guest's packets never waited");
}

#[test]
fn a_reset_closes_everything_and_the_host_can_connect_again() {
    let mut test = Test::new();
    let mut stream = test.guest_stream();
    test.rig.transport.write_u32(crate::mmio::register::STATUS, 0);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(test.rig.transport.device().muxer.connections(), 0);

    // While there is no driver, the host waits.
    let mut stream = UnixStream::connect(&test.path).unwrap();
    stream.write_all(b"CONNECT 1\n").unwrap();
    test.rig.transport.source(0);
    for driver in &test.rig.drivers {
        driver.put(0, &[0; 0x4000]);
    }
    let test = Test { rig: restarted(test.rig), received: Vec::new(), offered: 0, ..test };
    let mut test = test;
    test.offer(8);
    test.run();
    assert_eq!(test.operations(), [Operation::Request]);
}

/// The same device with a new driver.
fn restarted(rig: Rig<Vsock>) -> Rig<Vsock> {
    let Rig { mut transport, drivers } = rig;
    let memory = drivers[0].memory.clone();
    let drivers: Vec<_> = (0..3).map(|n| crate::testing::Driver::new(memory.clone(), n, 16)).collect();
    transport.bring_up(!(1 << 29), &drivers.iter().map(|d| d.config(64)).collect::<Vec<_>>());
    Rig { transport, drivers }
}

#[test]
fn addresses_that_are_not_a_guests_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(matches!(Vsock::new(cid, &directory.path().join("v")), Err(Error::Cid(_))));
    }
    assert!(matches!(Vsock::new(3, Path::new("/nonexistent/v")), Err(Error::Listen { .. })));
}

#[test]
fn hostile_drivers_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("v_1024")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut clients: Vec<UnixStream> = Vec::new();
    let make = || {
        let path = directory.path().join("v");
        let _ = std::fs::remove_file(&path);
        let device = Vsock::new(CID, &path).unwrap();
        clients.clear();
        clients.extend((0..3).map(|port| {
            let mut stream = UnixStream::connect(&path).unwrap();
            writeln!(stream, "CONNECT {port}").unwrap();
            stream
        }));
        device
    };
    fuzz(300, make, |random: &mut Random| {
        // Accepting half of them keeps the backlog from filling up.
        if random.below(2) == 0 {
            drop(listener.accept());
        }
        let length = random.below(600);
        let operation = random.below(9) as u16;
        let ports = Ports {
            guest: random.below(3) as u32,
            host: [1024, 1 << 30, (1 << 30) + 1, 5][random.below(4) as usize],
        };
        let credit = Credit { buffer: random.next() as u32, forwarded: random.next() as u32 };
        let flags = random.below(5) as u32;
        let packet = Packet { flags, credit, length: length as u32, ..Packet::new(ports, Operation::Data) };
        let mut bytes = packet.sent_by_guest(CID).as_slice().to_vec();
        bytes[30..32].copy_from_slice(&operation.to_le_bytes());
        if random.below(6) == 0 {
            let at = random.below(44) as usize;
            bytes[at] = random.next() as u8;
        }
        bytes.extend((0..length).map(|n| n as u8));
        bytes
    });
}
