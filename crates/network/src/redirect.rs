//! Everything that comes in on one interface goes out on another: an ingress queueing discipline with one filter.
//!
//! The filter is `u32`, which all kernels since 2.6 have; `matchall` and `flower` are left out of some.

use std::io;

use kapsel_netlink::{CREATE, Message, Socket};
use libc::{RTM_DELQDISC, RTM_NEWQDISC, RTM_NEWTFILTER, TCA_KIND, TCA_OPTIONS};

const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
/// The handle that ingress disciplines have.
const INGRESS: u32 = 0xffff_0000;
/// Where they hang.
const TC_H_INGRESS: u32 = 0xffff_fff1;

/// Adds an ingress discipline; `AlreadyExists` when there is one.
pub(crate) fn add_ingress(socket: &mut Socket, index: u32) -> io::Result<()> {
    let body = tc(index, INGRESS, TC_H_INGRESS, 0);
    socket.request(&Message::new(RTM_NEWQDISC, CREATE, &body).with_text(TCA_KIND, "ingress"))
}

/// Removes it with its filters.
pub(crate) fn remove_ingress(socket: &mut Socket, index: u32) -> io::Result<()> {
    socket.request(&Message::new(RTM_DELQDISC, 0, &tc(index, INGRESS, TC_H_INGRESS, 0)))
}

/// Sends what comes in on the interface `from` out on `to`.
pub(crate) fn add_filter(socket: &mut Socket, from: u32, to: u32) -> io::Result<()> {
    const PRIORITY: u32 = 1 << 16;
    let all_protocols = u32::from((libc::ETH_P_ALL as u16).to_be());
    let body = tc(from, 0, INGRESS, PRIORITY | all_protocols);
    let filter = Message::new(RTM_NEWTFILTER, CREATE, &body).with_text(TCA_KIND, "u32");
    socket.request(&filter.with_nested(TCA_OPTIONS, |options| {
        options.with(TCA_U32_SEL, &any_frame()).with_nested(TCA_U32_ACT, |actions| {
            actions.with_nested(1, |action| {
                action
                    .with_text(TCA_ACT_KIND, "mirred")
                    .with_nested(TCA_ACT_OPTIONS, |mirred| mirred.with(TCA_MIRRED_PARMS, &redirect(to)))
            })
        })
    }))
}

/// `struct tcmsg`: family, index, handle, parent, info.
fn tc(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut body = [0; 20];
    for (to, value) in body[4..].chunks_exact_mut(4).zip([index, handle, parent, info]) {
        to.copy_from_slice(&value.to_ne_bytes());
    }
    body
}

/// `struct tc_u32_sel` that ends the search, with one key of which no bit has to match.
fn any_frame() -> [u8; 32] {
    const TC_U32_TERMINAL: u8 = 1;
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = 1;
    selector
}

/// `struct tc_mirred`: index, capab, action, refcnt, bindcnt, eaction, ifindex.
fn redirect(to: u32) -> [u8; 28] {
    const TC_ACT_STOLEN: u32 = 4;
    const TCA_EGRESS_REDIR: u32 = 1;
    let mut parms = [0; 28];
    for (into, value) in parms.chunks_exact_mut(4).zip([0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to]) {
        into.copy_from_slice(&value.to_ne_bytes());
    }
    parms
}
