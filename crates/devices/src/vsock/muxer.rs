//! All connections of a guest: found by name, woken by the host's sockets, asked for packets in turn.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::epoll;

use super::connection::{Connection, End};
use super::packet::{HEADER, Header, Invalid, Operation, Packet, Ports};
use crate::chain::{Buffers, Chain};

/// More connections are refused.
const CONNECTIONS_MAX: usize = 1023;
/// Answers to packets of no connection that may wait; the guest's packets wait when there are more.
const ANSWERS_MAX: usize = 64;
/// The longest first line of a host's connection, in bytes: `CONNECT 4294967295\n`.
const GREETING_MAX: usize = 19;
/// Ports that the host's side gets from here on, as the guest sees them.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Rounds of events in a call; what is left makes the descriptor readable at once.
const ROUNDS_MAX: usize = 8;
/// Events in a round.
const EVENTS_MAX: usize = 64;
/// The listener among the events; connections count from 1.
const LISTENER: u64 = 0;

/// The host's side of all connections.
#[derive(Debug)]
pub struct Muxer {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    next_token: u64,
    next_host_port: u32,
    /// Connected to the listener, but their first line is not complete.
    greeting: HashMap<u64, UnixStream>,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Connections that may have a packet for the guest, each at most once.
    ready: VecDeque<u64>,
    /// Resets for packets of connections that do not exist.
    answers: VecDeque<Packet>,
}

impl Muxer {
    /// Listens at `path` for the host's programs. They wait until [`Muxer::start`].
    pub fn new(cid: u64, path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Muxer {
            cid,
            path: path.to_owned(),
            listener,
            epoll,
            next_token: LISTENER + 1,
            next_host_port: FIRST_HOST_PORT,
            greeting: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            answers: VecDeque::new(),
        })
    }

    /// Readable when [`Muxer::host_events`] has something to do.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// From now on connections are accepted.
    pub fn start(&mut self) {
        let data = epoll::EventData::new_u64(LISTENER);
        if let Err(error) = epoll::add(&self.epoll, &self.listener, data, epoll::EventFlags::IN) {
            tracing::error!(%error, "the host cannot connect to the guest");
        }
    }

    /// Ends all connections and accepts no more; the host's programs see their sockets close.
    pub fn reset(&mut self) {
        // It is not there when the device was never started.
        let _ = epoll::delete(&self.epoll, &self.listener);
        self.greeting.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.answers.clear();
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packets(&self) -> bool {
        !self.answers.is_empty() || !self.ready.is_empty()
    }

    /// Looks at what happened on the host's sockets.
    pub fn host_events(&mut self) {
        for _ in 0..ROUNDS_MAX {
            let mut events = [std::mem::MaybeUninit::<epoll::Event>::uninit(); EVENTS_MAX];
            let now = rustix::time::Timespec::default();
            let ready = match epoll::wait(&self.epoll, &mut events, Some(&now)) {
                Ok((ready, _)) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "the vsock device cannot wait for its sockets");
                    return;
                }
            };
            // Others would have had room. A new connection's first line is usually there already.
            let accepted = ready.iter().any(|event| event.data.u64() == LISTENER);
            let all = ready.len() < EVENTS_MAX && !accepted;
            for event in ready {
                self.host_event(event.data.u64(), event.flags);
            }
            if all {
                return;
            }
        }
    }

    fn host_event(&mut self, token: u64, flags: epoll::EventFlags) {
        use epoll::EventFlags;
        if token == LISTENER {
            self.accept();
        } else if self.greeting.contains_key(&token) {
            self.greet(token);
        } else if let Some(connection) = self.connections.get_mut(&token) {
            connection.host_event(flags);
            match if flags.contains(EventFlags::OUT) { connection.flush() } else { Ok(()) } {
                Ok(()) => self.settle(token),
                Err(end) => self.end(token, &end),
            }
        }
    }

    fn accept(&mut self) {
        // Level-triggered: one is enough, the next comes with the next event.
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "no connection from the host after all");
                return;
            }
        };
        if self.greeting.len() + self.connections.len() >= CONNECTIONS_MAX {
            tracing::warn!(path = %self.path.display(), "a connection to the guest was refused: there are {CONNECTIONS_MAX}");
            return;
        }
        match self.watch(&stream) {
            Ok(token) => {
                self.greeting.insert(token, stream);
            }
            Err(error) => tracing::warn!(%error, "a connection to the guest cannot be watched"),
        }
    }

    /// Watches a socket edge-triggered under a new number. Its room is of interest only while something waits for it: it
    /// changes with every piece that the host's program takes.
    fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        use epoll::EventFlags;
        stream.set_nonblocking(true)?;
        let token = self.next_token;
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, stream, epoll::EventData::new_u64(token), flags)?;
        self.next_token += 1;
        Ok(token)
    }

    /// Reads the first line, `CONNECT <port>`, and not a byte of what follows.
    fn greet(&mut self, token: u64) {
        let Some(stream) = self.greeting.get(&token) else { return };
        match greeting(stream) {
            Ok(None) => {}
            Ok(Some(guest)) => {
                let Some(stream) = self.greeting.remove(&token) else { return };
                let ports = Ports { guest, host: self.free_host_port(guest) };
                self.insert(token, Connection::requested(ports, stream));
            }
            Err(error) => {
                tracing::debug!(%error, "a connection from the host was closed before it began");
                self.greeting.remove(&token);
            }
        }
    }

    /// A port that is in use with no connection of this port of the guest. There are 2^30 of them and at most
    /// [`CONNECTIONS_MAX`] connections.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = FIRST_HOST_PORT | host.wrapping_add(1) & (FIRST_HOST_PORT - 1);
            if !self.by_ports.contains_key(&Ports { guest, host }) {
                return host;
            }
        }
    }

    fn insert(&mut self, token: u64, connection: Connection) {
        self.by_ports.insert(connection.ports(), token);
        self.connections.insert(token, connection);
        self.wake(token);
    }

    /// After anything that happened to a connection: what it waits for is watched, and it has its turn if it has packets.
    fn settle(&mut self, token: u64) {
        use epoll::EventFlags;
        if let Some(connection) = self.connections.get_mut(&token)
            && let Some(waits) = connection.changes_its_wait()
        {
            let room = if waits { EventFlags::OUT } else { EventFlags::empty() };
            let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET | room;
            let data = epoll::EventData::new_u64(token);
            if let Err(error) = epoll::modify(&self.epoll, connection.stream(), data, flags) {
                return self.end(token, &End::Host(error.into()));
            }
        }
        self.wake(token);
    }

    fn wake(&mut self, token: u64) {
        let has_packets = self.connections.get(&token).is_some_and(Connection::has_packets);
        if has_packets && !self.ready.contains(&token) {
            self.ready.push_back(token);
        }
    }

    /// Forgets a connection; the host's socket closes with it, and the guest is told.
    fn end(&mut self, token: u64, end: &End) {
        if let Some(ports) = self.forget(token) {
            tracing::debug!(?ports, %end, "a connection ends");
            self.answers.push_back(Packet::new(ports, Operation::Reset));
        }
    }

    fn forget(&mut self, token: u64) -> Option<Ports> {
        let ports = self.connections.remove(&token)?.ports();
        self.by_ports.remove(&ports);
        self.ready.retain(|other| *other != token);
        Some(ports)
    }

    /// Works on a packet of the guest. False when it has to wait until the guest has taken some of the answers.
    pub fn receive(&mut self, mut chain: Chain<'_>) -> bool {
        if self.answers.len() >= ANSWERS_MAX {
            return false;
        }
        let Ok(header) = chain.readable.read_obj::<Header>() else { return true };
        let packet = match Packet::of_guest(&header, self.cid) {
            Ok(packet) => packet,
            Err(Invalid::Address) => return true,
            Err(Invalid::Unknown(ports)) => {
                self.answers.push_back(Packet::new(ports, Operation::Reset));
                return true;
            }
        };
        let whole = chain.readable.split_off(u64::from(packet.length)).is_ok();
        match self.by_ports.get(&packet.ports).copied() {
            Some(token) if whole => self.receive_in(token, &packet, chain.readable),
            Some(token) => self.end(token, &End::Order(packet.operation)),
            None => self.receive_stray(&packet),
        }
        true
    }

    fn receive_in(&mut self, token: u64, packet: &Packet, data: Buffers<'_>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        match connection.receive(packet, data) {
            Ok(()) => self.settle(token),
            // The guest is the one who said so.
            Err(End::Closed) if packet.operation == Operation::Reset => {
                self.forget(token);
            }
            Err(end) => self.end(token, &end),
        }
    }

    fn receive_stray(&mut self, packet: &Packet) {
        match packet.operation {
            Operation::Reset => {}
            Operation::Request => match self.connect(packet.ports.host) {
                Ok((token, stream)) => {
                    self.insert(token, Connection::accepted(packet.ports, stream, packet.credit));
                }
                Err(error) => {
                    tracing::debug!(ports = ?packet.ports, %error, "nobody on the host takes the guest's connection");
                    self.answers.push_back(Packet::new(packet.ports, Operation::Reset));
                }
            },
            _ => self.answers.push_back(Packet::new(packet.ports, Operation::Reset)),
        }
    }

    /// Connects to the host's socket for a port: the listener's path, an underscore and the port.
    fn connect(&mut self, port: u32) -> io::Result<(u64, UnixStream)> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
        if self.greeting.len() + self.connections.len() >= CONNECTIONS_MAX {
            return Err(io::Error::other(format!("there are {CONNECTIONS_MAX} connections")));
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        // Non-blocking from the start: a full backlog is a refusal, not a reason to wait.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        let stream = UnixStream::from(socket);
        let token = self.watch(&stream)?;
        Ok((token, stream))
    }

    /// Writes the next packet for the guest into a chain and returns its length; `None` when there is none.
    pub fn send(&mut self, mut chain: Chain<'_>) -> Option<u32> {
        let Ok(data) = chain.writable.split_off(HEADER) else {
            tracing::debug!("a buffer for packets is shorter than a header");
            return Some(0);
        };
        let packet = self.next_packet(&data)?;
        match chain.writable.write(vm_memory::ByteValued::as_slice(&packet.to_guest(self.cid))) {
            Ok(()) => Some(HEADER as u32 + packet.length),
            Err(_) => Some(0),
        }
    }

    fn next_packet(&mut self, data: &Buffers<'_>) -> Option<Packet> {
        loop {
            if let Some(answer) = self.answers.pop_front() {
                return Some(answer);
            }
            let token = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            match connection.next_packet(data) {
                Ok(Some(packet)) => {
                    self.wake(token);
                    return Some(packet);
                }
                // The buffer has no room for data; the connection keeps its turn for the next.
                Ok(None) if connection.has_packets() => {
                    self.ready.push_back(token);
                    return None;
                }
                Ok(None) => {}
                Err(end) => self.end(token, &end),
            }
        }
    }

    #[cfg(test)]
    pub fn connections(&self) -> usize {
        self.connections.len() + self.greeting.len()
    }
}

/// The port in the first line of a connection, once the line is complete.
fn greeting(stream: &UnixStream) -> io::Result<Option<u32>> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut bytes = [0; GREETING_MAX];
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    let seen = match rustix::net::recv(stream, &mut bytes[..], flags) {
        Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((seen, _)) => &bytes[..seen],
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() < GREETING_MAX { Ok(None) } else { Err(invalid("the first line is too long")) };
    };
    let port = std::str::from_utf8(&seen[..end])
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT "))
        .and_then(|port| port.trim_end().parse().ok())
        .ok_or_else(|| invalid("the first line is not CONNECT and a port"))?;
    let mut line = [0; GREETING_MAX];
    io::Read::read_exact(&mut &*stream, &mut line[..=end])?;
    Ok(Some(port))
}
