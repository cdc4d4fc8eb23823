//! A service that the guest finds at an address behind its network card, and nobody else does.
//!
//! Frames for that address are taken out of the guest's and never reach the tap; a small network stack (smoltcp) answers
//! them. All that it has is bounded when it is made: so many connections, so much of each, and so many frames that the
//! guest has not taken yet. While those are not taken nothing more is done, so neither a flood nor silence makes it grow
//! or run.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, IpCidr};

use super::HEADER;
use crate::chain::Buffers;

/// The service's own Ethernet address; Firecracker's has the same.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
/// Where it listens.
const PORT: u16 = 80;
/// Connections at once; those beyond are refused.
const CONNECTIONS: usize = 16;
/// What a connection takes in before it is read, which is the window that the guest sees, in bytes.
const RECEIVED: usize = 4096;
/// What a connection sends before it is acknowledged.
const SENT: usize = 8192;
/// The longest request.
const REQUEST_MAX: usize = 8192;
/// The longest frame of the guest's that is looked at. Its kernel makes larger ones only for more than the window.
const FRAME_MAX: usize = 2 * RECEIVED;
/// The longest frame that is sent: every Ethernet carries it.
const MTU: usize = 1514;
/// Frames that wait for the guest.
const FRAMES: usize = 32;
/// A guest that is silent for so long, although it was asked, has gone.
const SILENCE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);
/// How often it is asked.
const KEEP_ALIVE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(20);
/// What of a frame tells whom it is for: Ethernet's header, and ARP's or IP's up to the destination.
const HEAD: usize = 42;

/// What a service makes of the bytes of a connection so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// So many of them were a request.
    pub used: usize,
    /// This is the answer to it.
    pub bytes: Vec<u8>,
    /// No other follows.
    pub last: bool,
}

/// Answers requests.
pub trait Service: Send + std::fmt::Debug {
    /// Looks for a request at the beginning of `received`; `None` until it is complete. The bytes are the guest's.
    fn answer(&mut self, received: &[u8]) -> Option<Answer>;
}

/// A service that several network cards may lead to.
pub type SharedService = Arc<Mutex<dyn Service>>;

/// The service as one network card has it.
#[derive(Debug)]
pub struct Metadata {
    address: Ipv4Addr,
    service: SharedService,
    stack: Stack,
}

impl Metadata {
    /// `service` at `address`.
    pub fn new(address: Ipv4Addr, service: SharedService) -> Self {
        Metadata { address, service, stack: Stack::new(address) }
    }

    /// Takes the guest's frame, which follows its virtio header, if it is for the service. True when it was.
    pub fn takes(&mut self, frame: &Buffers<'_>) -> bool {
        let mut head = [0; HEADER + HEAD];
        if frame.peek(&mut head) < HEADER + 34 || !self.concerns(&head[HEADER..]) {
            return false;
        }
        let length = frame.len() as usize;
        if length <= HEADER + FRAME_MAX {
            let mut bytes = vec![0; length];
            frame.peek(&mut bytes);
            bytes.drain(..HEADER);
            self.accept(bytes);
        }
        true
    }

    /// Works on a frame for the service. The guest may have changed it since, to anything.
    pub fn accept(&mut self, frame: Vec<u8>) {
        self.stack.wire.from_guest = Some(frame);
        self.stack.work(&self.service);
        // What there was no room to answer is lost, as on any network.
        self.stack.wire.from_guest = None;
    }

    /// Whether a frame that begins so is for the address: IPv4, or a question for it by ARP.
    fn concerns(&self, head: &[u8]) -> bool {
        let destination = match head[12..14] {
            [0x08, 0x00] => &head[30..34],
            [0x08, 0x06] => &head[38..42],
            _ => return false,
        };
        destination == self.address.octets()
    }

    /// The next frame for the guest, after a virtio header of zeroes.
    pub fn next_frame(&mut self) -> Option<Vec<u8>> {
        if self.stack.wire.to_guest.is_empty() {
            self.stack.work(&self.service);
        }
        self.stack.wire.to_guest.pop_front()
    }

    /// When there may be something to do although the guest does nothing. While frames wait for the guest there is not.
    pub fn delay(&mut self) -> Option<Duration> {
        self.stack.delay()
    }

    /// Forgets everything that was said.
    pub fn reset(&mut self) {
        self.stack.wire.to_guest.clear();
        for connection in &mut self.stack.connections {
            self.stack.sockets.get_mut::<tcp::Socket>(connection.socket).abort();
            connection.advance(self.stack.sockets.get_mut(connection.socket), &self.service);
        }
    }
}

/// One connection's bytes on their way.
#[derive(Debug)]
struct Connection {
    socket: SocketHandle,
    received: Vec<u8>,
    unsent: Vec<u8>,
    last: bool,
}

struct Stack {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    started: Instant,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("wire", &self.wire).finish_non_exhaustive()
    }
}

impl Stack {
    fn new(address: Ipv4Addr) -> Self {
        let mut wire = Wire::default();
        let mut config = Config::new(MAC.into());
        // It chooses sequence numbers; the guest, who alone could guess them, is at the other end.
        config.random_seed = u64::from(address.to_bits());
        let mut interface = Interface::new(config, &mut wire, Moment::ZERO);
        // Whatever address the guest has, it is on this link.
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(address.into(), 0));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let connection = |_| {
            let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
            let mut socket = tcp::Socket::new(buffer(RECEIVED), buffer(SENT));
            socket.set_timeout(Some(SILENCE));
            socket.set_keep_alive(Some(KEEP_ALIVE));
            let socket = sockets.add(socket);
            Connection { socket, received: Vec::new(), unsent: Vec::new(), last: false }
        };
        let connections = (0..CONNECTIONS).map(connection).collect();
        Stack { wire, interface, sockets, connections, started: Instant::now() }
    }

    fn now(&self) -> Moment {
        Moment::from_micros(self.started.elapsed().as_micros() as i64)
    }

    /// Takes the frame of the guest, answers what is complete, and makes frames until there is no room for more.
    fn work(&mut self, service: &SharedService) {
        // A connection's answer follows its request at once; what else there is waits for the guest's next frame.
        for _ in 0..2 {
            let now = self.now();
            for connection in &mut self.connections {
                connection.advance(self.sockets.get_mut(connection.socket), service);
            }
            if self.interface.poll(now, &mut self.wire, &mut self.sockets) == PollResult::None {
                break;
            }
        }
    }

    fn delay(&mut self) -> Option<Duration> {
        if !self.wire.to_guest.is_empty() {
            return None;
        }
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Duration::from)
    }
}

impl Connection {
    fn advance(&mut self, socket: &mut tcp::Socket<'static>, service: &SharedService) {
        if !socket.is_open() {
            (self.received, self.unsent, self.last) = (Vec::new(), Vec::new(), false);
            // It fails only where there is no port.
            let _ = socket.listen(PORT);
        }
        self.send(socket);
        while self.unsent.is_empty() && !self.last {
            let answer = match self.received[..] {
                [] => None,
                _ => service.lock().unwrap_or_else(PoisonError::into_inner).answer(&self.received),
            };
            if let Some(answer) = answer {
                self.received.drain(..answer.used.clamp(1, self.received.len()));
                (self.unsent, self.last) = (answer.bytes, answer.last);
                self.send(socket);
            } else if self.received.len() == REQUEST_MAX {
                socket.abort();
                return;
            } else if !self.receive(socket) {
                break;
            }
        }
        // The guest has said that it is done, or there is nothing to be said any more.
        if self.unsent.is_empty() && (self.last || !socket.may_recv()) && socket.may_send() {
            socket.close();
        }
    }

    /// Takes what has come, as far as a request may be long. False when there is nothing.
    fn receive(&mut self, socket: &mut tcp::Socket<'static>) -> bool {
        let room = REQUEST_MAX - self.received.len();
        let taken = socket.recv(|bytes| {
            let taken = bytes.len().min(room);
            self.received.extend_from_slice(&bytes[..taken]);
            (taken, taken)
        });
        taken.is_ok_and(|taken| taken > 0)
    }

    fn send(&mut self, socket: &mut tcp::Socket<'static>) {
        if !self.unsent.is_empty()
            && let Ok(sent) = socket.send_slice(&self.unsent)
        {
            self.unsent.drain(..sent);
        }
    }
}

/// The cable between the stack and the guest.
#[derive(Debug, Default)]
struct Wire {
    from_guest: Option<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
}

impl Wire {
    fn room(&mut self) -> Option<ToGuest<'_>> {
        (self.to_guest.len() < FRAMES).then_some(ToGuest(&mut self.to_guest))
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = FromGuest;
    type TxToken<'a> = ToGuest<'a>;

    fn receive(&mut self, _: Moment) -> Option<(FromGuest, ToGuest<'_>)> {
        if self.to_guest.len() >= FRAMES {
            return None;
        }
        let frame = self.from_guest.take()?;
        Some((FromGuest(frame), self.room()?))
    }

    fn transmit(&mut self, _: Moment) -> Option<ToGuest<'_>> {
        self.room()
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        // The guest leaves its own to the card.
        let mut checksum = ChecksumCapabilities::default();
        (checksum.ipv4, checksum.tcp) = (Checksum::Tx, Checksum::Tx);
        capabilities.checksum = checksum;
        capabilities
    }
}

struct FromGuest(Vec<u8>);

impl phy::RxToken for FromGuest {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct ToGuest<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for ToGuest<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; HEADER + length];
        let result = fill(&mut frame[HEADER..]);
        self.0.push_back(frame);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    /// Answers each line with as many bytes as it asks for, and the empty one with a farewell.
    #[derive(Debug)]
    struct Lines;

    impl Service for Lines {
        fn answer(&mut self, received: &[u8]) -> Option<Answer> {
            let used = received.iter().position(|byte| *byte == b'\n')? + 1;
            let asked = std::str::from_utf8(&received[..used - 1]).unwrap_or("0").parse().unwrap_or(0);
            Some(Answer { used, bytes: vec![b'x'; asked], last: asked == 0 })
        }
    }

    /// A guest with a stack of its own.
    struct Guest {
        metadata: Metadata,
        wire: Wire,
        interface: Interface,
        sockets: SocketSet<'static>,
        now: i64,
    }

    impl Guest {
        fn new() -> Self {
            let mut wire = Wire::default();
            let config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 1]).into());
            let mut interface = Interface::new(config, &mut wire, Moment::ZERO);
            interface
                .update_ip_addrs(|all| all.push(IpCidr::new(Ipv4Addr::new(10, 0, 0, 2).into(), 0)).unwrap());
            let metadata = Metadata::new(ADDRESS, Arc::new(Mutex::new(Lines)));
            Guest { metadata, wire, interface, sockets: SocketSet::new(Vec::new()), now: 0 }
        }

        fn connect(&mut self, from: u16) -> SocketHandle {
            let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
            let mut socket = tcp::Socket::new(buffer(), buffer());
            socket.connect(self.interface.context(), (ADDRESS, PORT), from).unwrap();
            self.sockets.add(socket)
        }

        fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
            self.sockets.get_mut(handle)
        }

        /// Has frames pass both ways until there are none.
        fn settle(&mut self) {
            loop {
                self.now += 1;
                self.interface.poll(Moment::from_millis(self.now), &mut self.wire, &mut self.sockets);
                if let Some(frame) = self.wire.to_guest.pop_front() {
                    assert!(self.metadata.concerns(&frame[HEADER..]));
                    self.metadata.accept(frame[HEADER..].to_vec());
                } else if let Some(frame) = self.metadata.next_frame() {
                    self.wire.from_guest = Some(frame[HEADER..].to_vec());
                } else {
                    return;
                }
            }
        }

        fn received(&mut self, handle: SocketHandle) -> usize {
            let mut bytes = vec![0; 65_536];
            self.socket(handle).recv_slice(&mut bytes).unwrap_or(0)
        }
    }

    #[test]
    fn requests_are_answered_one_after_the_other_until_the_last() {
        let mut guest = Guest::new();
        let socket = guest.connect(5000);
        guest.settle();
        guest.socket(socket).send_slice(b"50000\n7\n").unwrap();
        guest.settle();
        assert_eq!(guest.received(socket), 50_007);
        guest.socket(socket).send_slice(b"\n").unwrap();
        guest.settle();
        assert!(!guest.socket(socket).may_recv());
        guest.socket(socket).close();
        guest.settle();
        assert_eq!(guest.metadata.stack.delay(), None, "nothing is left to be done");
    }

    #[test]
    fn a_flood_is_bounded_and_there_is_room_again_afterwards() {
        let mut guest = Guest::new();
        let sockets: Vec<_> = (0..CONNECTIONS as u16 + 4).map(|n| guest.connect(6000 + n)).collect();
        guest.settle();
        let open =
            sockets.iter().filter(|socket| guest.sockets.get::<tcp::Socket>(**socket).may_send()).count();
        assert_eq!(open, CONNECTIONS);
        // Answers that nobody takes wait, and no more are made.
        for socket in &sockets[..CONNECTIONS] {
            guest.socket(*socket).send_slice(b"60000\n").unwrap();
        }
        for _ in 0..100 {
            guest.now += 1;
            guest.interface.poll(Moment::from_millis(guest.now), &mut guest.wire, &mut guest.sockets);
            while let Some(frame) = guest.wire.to_guest.pop_front() {
                guest.metadata.accept(frame[HEADER..].to_vec());
            }
        }
        assert!(guest.metadata.stack.wire.to_guest.len() <= FRAMES);
        assert_eq!(guest.metadata.delay(), None);
        for socket in &sockets {
            guest.socket(*socket).abort();
        }
        guest.settle();
        let again = guest.connect(7000);
        guest.settle();
        guest.socket(again).send_slice(b"3\n").unwrap();
        guest.settle();
        assert_eq!(guest.received(again), 3);
    }

    #[test]
    fn a_request_without_an_end_ends_its_connection() {
        let mut guest = Guest::new();
        let socket = guest.connect(5000);
        guest.settle();
        guest.socket(socket).send_slice(&[b'9'; 2 * REQUEST_MAX]).unwrap();
        guest.settle();
        assert!(!guest.socket(socket).is_open());
    }

    #[test]
    fn only_frames_for_the_address_are_taken() {
        let metadata = Metadata::new(ADDRESS, Arc::new(Mutex::new(Lines)));
        let mut arp = [0; HEAD];
        arp[12..14].copy_from_slice(&[8, 6]);
        arp[38..42].copy_from_slice(&ADDRESS.octets());
        assert!(metadata.concerns(&arp));
        arp[41] = 1;
        assert!(!metadata.concerns(&arp));
        arp[13] = 0;
        arp[30..34].copy_from_slice(&ADDRESS.octets());
        assert!(metadata.concerns(&arp));
        arp[12] = 0x86;
        assert!(!metadata.concerns(&arp));
    }
}
