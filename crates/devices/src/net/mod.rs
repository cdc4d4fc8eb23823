//! The network device (virtio 1.2, section 5.1) on a tap device of the host.
//!
//! Frames come and go with the header that both the guest's driver and the host's tap understand, so large pieces and
//! missing checksums pass through as they are. A frame for the guest is kept until the guest has room for it; then the tap
//! keeps those behind it, and drops what is too much.

mod counters;
pub mod metadata;
mod receive;
mod tap;

#[cfg(test)]
mod tests;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use crate::calls::{SystemCall, SystemCalls, any, only};
use crate::queue::{Position, Queue, QueueError};
use crate::rate::{Limiter, Limits};
use crate::timer::Timer;
use crate::{Activation, Device, Event, Kind, Metric};
use counters::Counters;
use metadata::Metadata;
use receive::Receiver;
use tap::{Tap, offload};

/// `struct virtio_net_hdr_v1`, in bytes.
const HEADER: usize = 12;
/// The longest frame with its header, in bytes: 64 KiB of IP, Ethernet and a VLAN tag.
const FRAME_MAX: usize = 65_562;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// What the device's own set of descriptors wakes it for.
const TAP: u64 = 0;
const RECEIVE_LIMIT: u64 = 1;
const TRANSMIT_LIMIT: u64 = 2;
const METADATA: u64 = 3;

/// Frames move, and the limiters' timers are set.
const CALLS: &[SystemCall] =
    &[any(libc::SYS_readv), any(libc::SYS_epoll_wait), any(libc::SYS_timerfd_settime)];
/// The tap is watched from the driver's start to its reset, and told what the guest can take.
const REGISTERS: &[SystemCall] = &[
    only(libc::SYS_ioctl, 1, tap::TUNSETOFFLOAD as u32),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_timerfd_settime),
];

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tap device.
    #[error("Cannot open/create the tap device {name}: {source}")]
    Tap {
        /// Which one.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// The host has no more descriptors.
    #[error("a network device needs timers: {0}")]
    Host(#[from] io::Error),
}

/// What a network device is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The tap's name.
    pub tap: String,
    /// The guest's address; the guest makes one up if there is none.
    pub mac: Option<[u8; 6]>,
    /// The longest frame that the guest shall send, without its Ethernet header.
    pub mtu: Option<u16>,
    /// How fast the guest may receive.
    pub receive: Limits,
    /// How fast the guest may send.
    pub transmit: Limits,
}

/// Whether a device can be attached to the tap of that name.
///
/// # Errors
/// [`Error`] when it cannot.
pub fn check(tap: &str) -> Result<(), Error> {
    Tap::open(tap).map(drop)
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    config: Config,
    tap: Tap,
    /// A service of the monitor's, and when it has to go on by itself.
    metadata: Option<(Metadata, Timer)>,
    /// Stands for the tap and the timers.
    epoll: OwnedFd,
    receiver: Receiver,
    receive_limiter: Limiter,
    transmit_limiter: Limiter,
    counters: Counters,
    /// More of the guest's frames are to be taken than the last time allowed.
    unsent: bool,
    queues: Option<[Queue; 2]>,
}

impl Net {
    /// Attaches to the tap.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(config: Config) -> Result<Self, Error> {
        let tap = Tap::open(&config.tap)?;
        Self::on(tap, config)
    }

    fn on(tap: Tap, config: Config) -> Result<Self, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let (receive_limiter, transmit_limiter) =
            (Limiter::new(config.receive)?, Limiter::new(config.transmit)?);
        for (limiter, token) in [(&receive_limiter, RECEIVE_LIMIT), (&transmit_limiter, TRANSMIT_LIMIT)] {
            let data = epoll::EventData::new_u64(token);
            epoll::add(&epoll, limiter.timer(), data, epoll::EventFlags::IN).map_err(io::Error::from)?;
        }
        let (receiver, counters) = (Receiver::default(), Counters::default());
        Ok(Net {
            config,
            tap,
            metadata: None,
            epoll,
            receiver,
            receive_limiter,
            transmit_limiter,
            counters,
            unsent: false,
            queues: None,
        })
    }

    /// Has the guest find a service behind the card, which no frame leaves for.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn serve(&mut self, metadata: Metadata) -> Result<(), Error> {
        let timer = Timer::new()?;
        let data = epoll::EventData::new_u64(METADATA);
        epoll::add(&self.epoll, &timer, data, epoll::EventFlags::IN).map_err(io::Error::from)?;
        self.metadata = Some((metadata, timer));
        Ok(())
    }

    /// Changes how fast the guest may receive and send; limits that are absent stay.
    pub fn limit(&mut self, receive: Limits, transmit: Limits) {
        self.receive_limiter.set(receive);
        self.transmit_limiter.set(transmit);
    }

    /// What the tap has to know of the features that the driver accepted.
    fn offloads(activation: &Activation) -> u32 {
        [
            (VIRTIO_NET_F_GUEST_CSUM, offload::CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, offload::TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, offload::TSO6),
            (VIRTIO_NET_F_GUEST_ECN, offload::TSO_ECN),
        ]
        .iter()
        .filter(|(feature, _)| activation.has(*feature))
        .fold(0, |bits, (_, bit)| bits | bit)
    }

    fn set_offloads(&self, bits: u32) {
        if let Err(error) = self.tap.set_offload(bits) {
            tracing::debug!(tap = self.config.tap, %error, "the tap's offloads cannot be set");
        }
    }

    /// Finds out what the device was woken for.
    fn wake(&mut self) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
        let now = rustix::time::Timespec::default();
        let Ok((ready, _)) = epoll::wait(&self.epoll, &mut events, Some(&now)) else { return };
        for event in ready {
            match event.data.u64() {
                RECEIVE_LIMIT => self.receive_limiter.wake(),
                TRANSMIT_LIMIT => self.transmit_limiter.wake(),
                METADATA => self.metadata.iter().for_each(|(_, timer)| timer.clear()),
                _ => {
                    self.counters.rx_tap_event_count += 1;
                    self.receiver.tap_has_frames();
                }
            }
        }
    }

    /// Takes the guest's frames; true when there are more.
    fn transmit(&mut self) -> Result<bool, QueueError> {
        let Some([_, queue]) = &mut self.queues else { return Ok(false) };
        let (tap, limiter, counters) = (&self.tap, &mut self.transmit_limiter, &mut self.counters);
        let metadata = &mut self.metadata;
        queue.serve(|chain| {
            let frame = match chain {
                Ok(chain) => chain.readable,
                Err(error) => {
                    tracing::debug!(%error, "a frame of the guest is malformed");
                    counters.tx_malformed_frames += 1;
                    return Some(0);
                }
            };
            let length = frame.len();
            if length <= HEADER as u64 || length > FRAME_MAX as u64 {
                counters.tx_malformed_frames += 1;
                return Some(0);
            }
            if metadata.as_mut().is_some_and(|(metadata, _)| metadata.takes(&frame)) {
                return Some(0);
            }
            if !limiter.admits(length - HEADER as u64) {
                return None;
            }
            match tap.send(&frame) {
                Ok(()) => {
                    counters.tx_packets_count += 1;
                    counters.tx_bytes_count += length - HEADER as u64;
                }
                // A frame can be lost anywhere on its way.
                Err(error) => {
                    tracing::debug!(%error, "a frame of the guest is lost");
                    counters.tap_write_fails += 1;
                }
            }
            Some(0)
        })
    }

    fn receive(&mut self) -> Result<bool, QueueError> {
        let Some([queue, _]) = &mut self.queues else { return Ok(false) };
        let (limiter, counters) = (&mut self.receive_limiter, &mut self.counters);
        let metadata = self.metadata.as_mut().map(|(metadata, _)| metadata);
        let more = self.receiver.receive(&self.tap, metadata, queue, limiter, counters)?;
        if let Some((metadata, timer)) = &mut self.metadata {
            match metadata.delay() {
                Some(delay) => timer.once(delay),
                None => timer.stop(),
            }
        }
        Ok(more)
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        let mut features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit);
        features |= u64::from(self.config.mac.is_some()) << VIRTIO_NET_F_MAC;
        features | u64::from(self.config.mtu.is_some()) << VIRTIO_NET_F_MTU
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    /// The layout is that of section 5.1.4.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[..6].copy_from_slice(&self.config.mac.unwrap_or_default());
        // One pair of queues.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.config.mtu.unwrap_or_default().to_le_bytes());
        config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        self.set_offloads(Self::offloads(&activation));
        self.receiver = Receiver::new(activation.has(VIRTIO_NET_F_MRG_RXBUF));
        self.queues = Some([activation.take(RECEIVE)?, activation.take(TRANSMIT)?]);
        // Edge-triggered: while the guest has no room the tap stays readable.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, &self.tap, epoll::EventData::new_u64(TAP), flags) {
            tracing::error!(tap = self.config.tap, %error, "the guest cannot receive");
        }
        Ok(())
    }

    fn reset(&mut self) {
        // It is not there when the device was never started.
        let _ = epoll::delete(&self.epoll, &self.tap);
        self.receive_limiter.rest();
        self.transmit_limiter.rest();
        (self.queues, self.unsent) = (None, false);
        self.receiver = Receiver::default();
        if let Some((metadata, timer)) = &mut self.metadata {
            metadata.reset();
            timer.stop();
        }
        self.set_offloads(0);
    }

    fn positions(&self) -> Vec<Option<Position>> {
        self.queues.iter().flatten().map(|queue| Some(queue.position())).collect()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.epoll.as_fd()]
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: REGISTERS }
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = self.counters.named();
        metrics.push(("rx_rate_limiter_throttled", self.receive_limiter.throttled()));
        metrics.push(("tx_rate_limiter_throttled", self.transmit_limiter.throttled()));
        metrics
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        match event {
            Event::Queue(TRANSMIT) => {
                let more = self.transmit()?;
                // The service's answers; there is no other event for them.
                Ok(if self.metadata.is_some() { self.receive()? | more } else { more })
            }
            Event::Source(_) => {
                self.wake();
                self.unsent = self.transmit()?;
                Ok(self.receive()? | self.unsent)
            }
            // What an event of the tap or of a timer leaves to be done comes as one of this queue.
            Event::Queue(_) => {
                if self.unsent {
                    self.unsent = self.transmit()?;
                }
                Ok(self.receive()? | self.unsent)
            }
        }
    }
}
