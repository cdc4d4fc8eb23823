//! Between a monitor and a disk's server: what the one says the other hears, but for the disk's size. QEMU's storage daemon (7.2) serves a
//! disk that has grown, and goes on telling its old size.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

const HEADER: usize = 12;
const GET_CONFIG: u32 = 24;
/// Where the number of sectors is in the message.
const SECTORS: usize = HEADER + 12;

/// Listens at `socket` for one connection, to be carried to the server. What is in the returned number, if it is not zero, is the disk's
/// size in sectors.
pub fn start(socket: &Path, server: UnixStream) -> io::Result<Arc<AtomicU64>> {
    let listener = UnixListener::bind(socket)?;
    // Both may be silent for long.
    server.set_read_timeout(None)?;
    let sectors = Arc::new(AtomicU64::new(0));
    let told = sectors.clone();
    std::thread::spawn(move || {
        let Ok((client, _)) = listener.accept() else { return };
        std::thread::scope(|scope| {
            scope.spawn(|| carry(&client, &server, |_| ()));
            carry(&server, &client, |message| {
                let size = told.load(Ordering::SeqCst);
                if size != 0 && message[..4] == GET_CONFIG.to_ne_bytes() {
                    message[SECTORS..SECTORS + 8].copy_from_slice(&size.to_le_bytes());
                }
            });
        });
    });
    Ok(sectors)
}

/// Until one of them has gone; the other learns of it.
fn carry(from: &UnixStream, to: &UnixStream, edit: impl Fn(&mut [u8])) {
    while let Ok((mut message, descriptors)) = receive(from) {
        edit(&mut message);
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        // So short a message goes as a whole.
        if sendmsg(to, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL).is_err() {
            break;
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

fn receive(from: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut message = vec![0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::WAITALL;
    let read = recvmsg(from, &mut [IoSliceMut::new(&mut message)], &mut ancillary, flags)?.bytes;
    if read < HEADER {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut descriptors = Vec::new();
    for rights in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = rights {
            descriptors.extend(rights);
        }
    }
    let length = u32::from_ne_bytes(std::array::from_fn(|n| message[8 + n]));
    message.resize(HEADER + length as usize, 0);
    (&mut &*from).read_exact(&mut message[HEADER..])?;
    Ok((message, descriptors))
}
