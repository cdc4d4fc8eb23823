//! A back end: negotiation, the device's configuration, and its rings.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use super::connection::{Connection, Fault};
use super::message::{PROTOCOL_FEATURES, Request, longs, protocol, words};
use crate::Memory;
use crate::mmio::feature::VERSION_1;
use crate::queue::Queue;

/// In messages the memory begins here. The protocol has addresses of the front end's own there, which a back end uses for nothing but
/// to find a ring in the table; it need not learn where things are in this process.
pub(super) const ORIGIN: u64 = 1 << 44;

/// The process that serves the device, and what was agreed on with it.
#[derive(Debug)]
pub struct Backend {
    connection: Connection,
    /// Features that it has, of those that were wanted.
    pub features: u64,
    protocol: u64,
}

impl Backend {
    /// Begins a session. `wanted` are features of the device and of its queues.
    pub fn negotiate(stream: UnixStream, wanted: u64, patience: Duration) -> Result<Self, Error> {
        let mut connection = Connection::new(stream, patience).map_err(Error::Connect)?;
        connection.begin();
        let told =
            |request, result: Result<(), Fault>| result.map_err(|fault| Error::Request(request, fault));
        let number = |connection: &Connection, request| {
            connection.number(request).map_err(|fault| Error::Request(request, fault))
        };
        told(Request::SetOwner, connection.tell(Request::SetOwner, &[], &[]))?;
        let features = number(&connection, Request::GetFeatures)?;
        // Without the first a driver of today finds no device, without the second rings cannot be held.
        for (feature, name) in [(VERSION_1, "VIRTIO_F_VERSION_1"), (PROTOCOL_FEATURES, "protocol features")] {
            if features & feature == 0 {
                return Err(Error::Lacking(name));
            }
        }
        let protocol = number(&connection, Request::GetProtocolFeatures)?;
        let protocol = protocol & (protocol::REPLY_ACK | protocol::CONFIG);
        told(
            Request::SetProtocolFeatures,
            connection.tell(Request::SetProtocolFeatures, &longs(&[protocol]), &[]),
        )?;
        connection.acknowledged = protocol & protocol::REPLY_ACK != 0;
        Ok(Backend { connection, features: features & (wanted | VERSION_1), protocol })
    }

    /// The first bytes of the device's configuration space.
    pub fn config(&mut self, length: usize) -> Result<Vec<u8>, Error> {
        if self.protocol & protocol::CONFIG == 0 {
            return Err(Error::Lacking("the protocol feature CONFIG"));
        }
        self.connection.begin();
        let failed = |fault| Error::Request(Request::GetConfig, fault);
        let head = words(&[0, length as u32, 0]);
        let body = [&head[..], &vec![0; length]].concat();
        let answer = self.connection.ask(Request::GetConfig, &body, body.len()).map_err(failed)?;
        match answer.split_at_checked(head.len()) {
            // The protocol's way to say no.
            Some((answered, [])) if answered[4..8] == [0; 4] => Err(failed(Fault::Refused)),
            Some((answered, space)) if answered[..8] == head[..8] && space.len() == length => {
                Ok(space.to_vec())
            }
            _ => Err(failed(Fault::Malformed("it is of another part of the configuration"))),
        }
    }

    /// Hands over the rings: the event of each, and the one that interrupts the driver.
    pub fn start(
        &mut self,
        features: u64,
        queues: &[Queue],
        events: &[EventFd],
        line: &EventFd,
    ) -> Result<(), Error> {
        let Some(first) = queues.first() else { return Ok(()) };
        self.connection.begin();
        self.tell(Request::SetFeatures, &longs(&[features | PROTOCOL_FEATURES]), &[])?;
        let (table, files) = table(first.memory())?;
        self.tell(Request::SetMemTable, &table, &files)?;
        for (index, (queue, event)) in queues.iter().zip(events).enumerate() {
            let number = index as u32;
            self.tell(Request::SetVringNum, &words(&[number, queue.size().into()]), &[])?;
            let [descriptors, available, used] = queue.addresses().map(|address| ORIGIN + address);
            let addresses = [&words(&[number, 0])[..], &longs(&[descriptors, used, available, 0])].concat();
            self.tell(Request::SetVringAddr, &addresses, &[])?;
            self.tell(Request::SetVringBase, &words(&[number, queue.position().next_available.into()]), &[])?;
            self.tell(Request::SetVringCall, &longs(&[index as u64]), &[borrow(line)])?;
            self.tell(Request::SetVringKick, &longs(&[index as u64]), &[borrow(event)])?;
            self.tell(Request::SetVringEnable, &words(&[number, 1]), &[])?;
        }
        Ok(())
    }

    /// Takes back the first so many rings. The back end touches none of them any more.
    pub fn stop(&mut self, rings: usize) -> Result<(), Error> {
        self.connection.begin();
        for index in 0..rings as u32 {
            let answer = self.connection.ask(Request::GetVringBase, &words(&[index, 0]), 8);
            let answer = answer.map_err(|fault| Error::Request(Request::GetVringBase, fault))?;
            if answer.len() != 8 || answer[..4] != index.to_ne_bytes() {
                let fault = Fault::Malformed("it is of another ring");
                return Err(Error::Request(Request::GetVringBase, fault));
            }
        }
        Ok(())
    }

    /// Whether the session has ended without being asked to.
    pub fn is_over(&self) -> bool {
        self.connection.is_over()
    }

    /// Ends the session.
    pub fn hang_up(&self) {
        self.connection.hang_up();
    }

    fn tell(&self, request: Request, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.connection.tell(request, body, descriptors).map_err(|fault| Error::Request(request, fault))
    }
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// The parts of the guest's memory, and the files that they are in.
fn table(memory: &Memory) -> Result<(Vec<u8>, Vec<BorrowedFd<'_>>), Error> {
    let (mut table, mut files) = (words(&[memory.num_regions() as u32, 0]), Vec::new());
    for region in memory.iter() {
        let file = region.file_offset().filter(|_| region.get_mmap().flags() & libc::MAP_SHARED != 0);
        let file = file.ok_or(Error::PrivateMemory)?;
        let start = region.start_addr().raw_value();
        table.extend(longs(&[start, region.len(), ORIGIN + start, file.start()]));
        files.push(file.file().as_fd());
    }
    Ok((table, files))
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) }
}
