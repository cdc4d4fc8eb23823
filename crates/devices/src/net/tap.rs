//! A tap device: the host's end of a network cable, on which each read or write is a frame with a virtio header.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{Error, HEADER};
use crate::chain::Buffers;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
pub(super) const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;

/// What the guest can take without help (`TUN_F_*` in linux/if_tun.h).
pub mod offload {
    /// Frames without checksums.
    pub const CSUM: u32 = 1;
    /// TCP over IPv4 in large pieces.
    pub const TSO4: u32 = 2;
    /// TCP over IPv6 in large pieces.
    pub const TSO6: u32 = 4;
    /// Such pieces with congestion marks.
    pub const TSO_ECN: u32 = 8;
}

/// A tap device, attached to.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

#[cfg(test)]
impl From<std::os::unix::net::UnixDatagram> for Tap {
    /// A socket with boundaries between messages behaves like a tap, but has no offloads.
    fn from(socket: std::os::unix::net::UnixDatagram) -> Self {
        Tap { file: std::os::fd::OwnedFd::from(socket).into() }
    }
}

impl Tap {
    /// Attaches to the tap device of that name, which is made if it is not there and this user may. `fd:` and a number is
    /// the tap that this process has open as that descriptor.
    ///
    /// # Errors
    /// [`Error`] when there is none, when it is not this user's, or when somebody else is attached to it.
    pub fn open(name: &str) -> Result<Self, Error> {
        let failed = |source| Error::Tap { name: name.to_owned(), source };
        // The kernel gives no device a name with a colon.
        if let Some(number) = name.strip_prefix("fd:") {
            let number = number.parse::<u16>().map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
            return Self::inherited(number.into()).map_err(failed);
        }
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0', '%']) {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "no device can have this name")));
        }
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let tap = Tap { file: file.map_err(failed)? };
        // SAFETY: integers and a union of them, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the request reads and writes an ifreq.
        tap.ioctl(unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETIFF, &mut request) }).map_err(failed)?;
        tap.set_header().map_err(failed)?;
        Ok(tap)
    }

    /// A copy of the descriptor of that number, which stays open.
    fn inherited(number: RawFd) -> io::Result<Self> {
        // SAFETY: a number that is no open descriptor is refused; one that is becomes a new descriptor, owned by nobody else.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let tap = Tap { file: unsafe { File::from_raw_fd(copy) } };
        // SAFETY: integers and a union of them, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the request writes an ifreq. What is no tap refuses it: its number is of no other kind of file.
        tap.ioctl(unsafe { libc::ioctl(copy, TUNGETIFF, &mut request) })?;
        // SAFETY: every one of the union's members is integers, of which this one was written.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let (all, wanted) =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR, "a tap with virtio headers");
        if flags & all != all {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is not {wanted}")));
        }
        rustix::io::ioctl_fionbio(&tap.file, true)?;
        tap.set_header()?;
        Ok(tap)
    }

    fn set_header(&self) -> io::Result<()> {
        let size = HEADER as libc::c_int;
        // SAFETY: the request reads an int.
        self.ioctl(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETVNETHDRSZ, &size) })
    }

    fn ioctl(&self, result: libc::c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Says what the guest can take, by bits of [`offload`].
    pub fn set_offload(&self, bits: u32) -> io::Result<()> {
        // SAFETY: the request's argument is a number, not a pointer.
        self.ioctl(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }

    /// Takes the next frame, which is cut if `into` is shorter.
    pub fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.file, into)?)
    }

    /// Takes the next frame into the buffers, which is cut if they are shorter. How much is in them has to be marked as
    /// written.
    pub fn receive_into(&self, vectors: &[libc::iovec]) -> io::Result<usize> {
        let count = vectors.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: the descriptor is open, and the caller's vectors are ranges of guest memory that buffers checked and keep
        // mapped. Only the kernel writes to them; the guest may see and change that at any time.
        let length = unsafe { libc::readv(self.file.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(length).map_err(|_| io::Error::last_os_error())
    }

    /// Sends one frame.
    pub fn send(&self, frame: &Buffers<'_>) -> io::Result<()> {
        let vectors = frame.iovecs();
        // SAFETY: the descriptor is open, and each vector is a range of guest memory that `frame` checked and keeps mapped
        // for its lifetime. The guest may change the bytes meanwhile; only the kernel reads them, once.
        let sent =
            unsafe { libc::writev(self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
