//! The header of a packet (virtio 1.2, section 5.10.6).

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// A stream; the only type of socket here.
pub const STREAM: u16 = 1;
/// Size of the header in a queue, in bytes.
pub const HEADER: u64 = size_of::<Header>() as u64;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// There is no such connection, or not any more.
    Reset = 3,
    /// The sender will not send, or not receive, any more.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// How much the sender can take.
    CreditUpdate = 6,
    /// Asks how much the receiver can take.
    CreditRequest = 7,
}

impl Operation {
    fn of(number: u16) -> Option<Self> {
        use Operation::*;
        [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|operation| *operation as u16 == number)
    }
}

/// Bits in the flags of a shutdown.
pub mod shutdown {
    /// The sender will not receive.
    pub const RECEIVE: u32 = 1;
    /// The sender will not send.
    pub const SEND: u32 = 2;
    /// Neither.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// A packet's header as it is in guest memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, packed)]
pub struct Header {
    source_cid: Le64,
    destination_cid: Le64,
    source_port: Le32,
    destination_port: Le32,
    length: Le32,
    kind: Le16,
    operation: Le16,
    flags: Le32,
    buffer: Le32,
    forwarded: Le32,
}

// SAFETY: integers only; packed, so there is no padding, and every pattern of bytes is a header.
unsafe impl ByteValued for Header {}

/// A connection's name: the guest's port and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The guest's end.
    pub guest: u32,
    /// The host's end.
    pub host: u32,
}

/// What a sender says about what it can take, with every packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Credit {
    /// Size of its buffer, in bytes.
    pub buffer: u32,
    /// Bytes that have left the buffer so far, modulo 2^32.
    pub forwarded: u32,
}

/// A packet without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The connection.
    pub ports: Ports,
    /// What for.
    pub operation: Operation,
    /// Bits of [`shutdown`].
    pub flags: u32,
    /// The sender's.
    pub credit: Credit,
    /// Bytes of data that follow.
    pub length: u32,
}

/// A packet of the guest that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    /// Not from this guest, or to somebody who is not the host. Such a packet has no answer.
    Address,
    /// A type or an operation that does not exist; the sender is told with a reset.
    Unknown(Ports),
}

impl Packet {
    /// A packet without flags, credit or data.
    pub fn new(ports: Ports, operation: Operation) -> Self {
        Packet { ports, operation, flags: 0, credit: Credit::default(), length: 0 }
    }

    /// Reads a packet that the guest `cid` sent.
    pub fn of_guest(header: &Header, cid: u64) -> Result<Self, Invalid> {
        if header.source_cid.to_native() != cid || header.destination_cid.to_native() != HOST_CID {
            return Err(Invalid::Address);
        }
        let ports =
            Ports { guest: header.source_port.to_native(), host: header.destination_port.to_native() };
        let operation = Operation::of(header.operation.to_native()).ok_or(Invalid::Unknown(ports))?;
        if header.kind.to_native() != STREAM {
            return Err(Invalid::Unknown(ports));
        }
        Ok(Packet {
            ports,
            operation,
            flags: header.flags.to_native(),
            credit: Credit { buffer: header.buffer.to_native(), forwarded: header.forwarded.to_native() },
            length: header.length.to_native(),
        })
    }

    /// The packet's header on its way from the host to the guest `cid`.
    pub fn to_guest(self, cid: u64) -> Header {
        Header {
            source_cid: HOST_CID.into(),
            destination_cid: cid.into(),
            source_port: self.ports.host.into(),
            destination_port: self.ports.guest.into(),
            length: self.length.into(),
            kind: STREAM.into(),
            operation: (self.operation as u16).into(),
            flags: self.flags.into(),
            buffer: self.credit.buffer.into(),
            forwarded: self.credit.forwarded.into(),
        }
    }

    /// The header of a packet of the guest, for tests of the host's side.
    #[cfg(test)]
    pub fn sent_by_guest(self, cid: u64) -> Header {
        Header {
            source_cid: cid.into(),
            destination_cid: HOST_CID.into(),
            source_port: self.ports.guest.into(),
            destination_port: self.ports.host.into(),
            ..self.to_guest(cid)
        }
    }
}
