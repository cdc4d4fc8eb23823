//! What the agent tells a child that was born before its program was known.
//!
//! Other children are forks that inherit what they need. The first process of a container that a template holds cannot: it is
//! told, in a message on its control socket, with its standard streams as descriptors. A request that is too long for a message
//! comes in a memory file instead; that each start makes one would be a fifteenth of all code that a clone has translated.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use kapsel_protocol::{api, limits};
use protobuf::Message;
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::process::{ProcessPlan, Seccomp};

/// Standard streams, and the memory file of a long request.
const DESCRIPTORS: usize = 4;

/// Bytes of a request that is its own message.
const INLINE_MAX: usize = 16 << 10;

/// First bytes of a message: where the request is.
const INLINE: u8 = b'o';
const LONG: u8 = b'f';

/// A process to become.
#[derive(Debug)]
pub struct Order {
    /// What to run.
    pub process: ProcessPlan,
    /// Standard streams; `None` with a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
}

/// The process that a request asks for.
///
/// # Errors
/// For everything that cannot or will not be done.
pub fn plan(request: &api::ExecRequest) -> Result<ProcessPlan, super::plan::PlanError> {
    let seccomp = Seccomp::new(request.seccomp.clone(), request.seccomp_flags)?;
    let mut process = ProcessPlan::for_start(&request.process, seccomp, request.terminal)?;
    process.set_size(request.width, request.height);
    Ok(process)
}

/// Gives a child its order.
///
/// # Errors
/// Those of memfd_create(2), write(2) and sendmsg(2).
pub fn send(
    socket: impl AsFd,
    request: &api::ExecRequest,
    stdio: Option<&[OwnedFd; 3]>,
) -> std::io::Result<()> {
    let bytes = request.write_to_bytes().map_err(std::io::Error::other)?;
    let file = (bytes.len() > INLINE_MAX).then(|| memory_file(&bytes)).transpose()?;
    let message: &[u8] = if file.is_some() { &[] } else { &bytes };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> =
        stdio.into_iter().flatten().map(AsFd::as_fd).chain(file.as_ref().map(AsFd::as_fd)).collect();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let tag = [if file.is_some() { LONG } else { INLINE }];
    let parts = [IoSlice::new(&tag), IoSlice::new(message)];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn memory_file(bytes: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(c"order", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

/// Waits for the order; `None`: the agent wants no more of this child.
///
/// # Errors
/// Those of recvmsg(2) and read(2), and what [`plan`] says of the request.
pub fn receive(socket: impl AsFd) -> std::io::Result<Option<Order>> {
    let mut message = [0; 1 + INLINE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut message)], &mut control, flags)
    })?;
    let Some((tag, inline)) = message[..received.bytes].split_first() else { return Ok(None) };
    let mut descriptors: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        })
        .collect();
    let mut bytes = Vec::new();
    let request = if *tag == LONG {
        let file = descriptors.pop().ok_or_else(|| std::io::Error::other("an order without a request"))?;
        let mut file = File::from(file);
        file.rewind()?;
        file.take(limits::MESSAGE_MAX as u64).read_to_end(&mut bytes)?;
        &bytes
    } else {
        inline
    };
    let request = api::ExecRequest::parse_from_bytes(request).map_err(std::io::Error::other)?;
    let process = plan(&request).map_err(std::io::Error::other)?;
    let stdio = <[OwnedFd; 3]>::try_from(descriptors).ok();
    Ok(Some(Order { process, stdio }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::report;

    #[test]
    fn orders_survive_the_socket() {
        let (agent, child) = report::pair().expect("socketpair");
        let json = br#"{"args":["sh","-c","true"],"cwd":"/tmp","env":["A=1"],"user":{"uid":5,"gid":6}}"#;
        let request =
            api::ExecRequest { process: json.to_vec(), width: 80, height: 24, ..Default::default() };
        let null = || OwnedFd::from(File::open("/dev/null").expect("open"));
        send(&agent, &request, Some(&[null(), null(), null()])).expect("send");
        let order = receive(&child).expect("receive").expect("an order");
        assert_eq!(order.process.args, [c"sh", c"-c", c"true"].map(std::ffi::CStr::to_owned));
        assert_eq!((order.process.uid, order.process.gid), (5, 6));
        assert!(order.stdio.is_some());
        let terminal = api::ExecRequest { terminal: true, ..request };
        send(&agent, &terminal, None).expect("send");
        let order = receive(&child).expect("receive").expect("an order");
        assert_eq!(order.process.terminal, Some((80, 24)));
        assert!(order.stdio.is_none());
        let long = "x".repeat(limits::SPEC_MAX / 2);
        let json = format!(r#"{{"args":["echo","{long}"],"cwd":"/"}}"#);
        let request = api::ExecRequest { process: json.into_bytes(), ..Default::default() };
        send(&agent, &request, Some(&[null(), null(), null()])).expect("send");
        let order = receive(&child).expect("receive").expect("an order");
        assert_eq!(order.process.args[1].to_bytes().len(), long.len());
        assert!(order.stdio.is_some());
        drop(agent);
        assert!(receive(&child).expect("the end").is_none());
    }
}
