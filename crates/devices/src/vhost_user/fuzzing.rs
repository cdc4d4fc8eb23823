//! Against back ends that say anything: the bytes of all their answers, over a checked-in corpus and its mutations. Neither panics nor
//! waits may come of it, and whatever was said, what the front end says is a request and tells nothing of this process.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};

use kapsel_testkit::fuzz::{corpus, run};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::backend::ORIGIN;
use super::message::{HEADER, PROTOCOL_FEATURES, longs, words};
use super::tests::{FEATURES, LONG, answer, honest, serve};
use super::*;
use crate::mmio::{Slot, Transport, register};
use crate::testing::{Driver, SIZE, shared_memory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bits of the first byte: which device it is, and what happens to it.
const DIRECTORY: u8 = 1;
/// The event loop wakes while the back end has the rings.
const WAKES: u8 = 2;
/// The configuration is asked for again.
const REFRESHES: u8 = 4;
/// A descriptor comes with what is said.
const DESCRIPTOR: u8 = 8;
/// More than fits in no socket's buffer.
const MOST: usize = 64 << 10;

fn fuzz(data: &[u8]) {
    replay(data);
}

/// As [`session`], with a back end that has said everything before it was asked for anything, and has hung up.
fn replay(data: &[u8]) -> u32 {
    let Some((how, said)) = data.split_first() else { return 0 };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let said = &said[..said.len().min(MOST)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [theirs.as_fd()];
    if how & DESCRIPTOR != 0 {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(&theirs, &[IoSlice::new(said)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let handed_over = session(*how, ours);
    check_requests(theirs);
    handed_over
}

/// How often the back end had the rings of a device that is used as a machine does.
fn session(how: u8, stream: UnixStream) -> u32 {
    let model = match how & DIRECTORY != 0 {
        true => Model::Directory { tag: "tag0".into() },
        false => Model::Disk { flush: true },
    };
    let (length, wanted) = (if how & DIRECTORY != 0 { 40 } else { BLOCK_SPACE }, model.features());
    let Ok(device) = VhostUser::on(model, stream, LONG) else { return 0 };
    assert_eq!(device.config().len(), length);
    assert_eq!((device.features() | device.queue_features()) & !wanted, 0);
    let memory = shared_memory();
    let queues: Vec<_> = (0..device.queue_sizes().len() as u64)
        .map(|index| Driver::new(memory.clone(), index, 16).config(256))
        .collect();
    let mut transport = Transport::new(device, memory, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    let mut handed_over = 0;
    for _ in 0..2 {
        transport.bring_up(u64::MAX, &queues);
        handed_over += u32::from(transport.active());
        if how & WAKES != 0 {
            transport.source(0);
        }
        if how & REFRESHES != 0 {
            // It may well be refused.
            let _ = transport.device_mut().refresh();
        }
        let mut space = vec![0; length];
        transport.read(register::CONFIG, &mut space);
    }
    transport.write_u32(register::STATUS, 0);
    handed_over
}

/// What the front end said is one request after the other, and addresses in it are the guest's.
fn check_requests(mut theirs: UnixStream) {
    let mut told = Vec::new();
    // Its end closes the connection while there is something that it did not read.
    let _ = theirs.read_to_end(&mut told);
    let mut rest = &told[..];
    while let Some((header, after)) = rest.split_first_chunk::<HEADER>() {
        let word = |n: usize| u32::from_ne_bytes(std::array::from_fn(|byte| header[4 * n + byte]));
        let (request, flags, length) = (word(0), word(1), word(2) as usize);
        assert!(request <= 24 && flags & 7 == 1 && length <= 1024, "{request} {flags:#x} {length}");
        let (body, after) = after.split_at(length);
        let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| body[at + byte]));
        let addresses: &[usize] = match request {
            5 => &[24],
            9 => &[8, 16, 24],
            _ => &[],
        };
        for at in addresses {
            assert!((ORIGIN..ORIGIN + SIZE as u64).contains(&long(*at)), "{request}: {:#x}", long(*at));
        }
        rest = after;
    }
    assert!(rest.is_empty(), "a request is not whole");
}

#[test]
fn answers() {
    let accepted = answer(18, &longs(&[0]));
    let position = answer(11, &words(&[0, 7]));
    let config = answer(24, &words(&[0, BLOCK_SPACE as u32, 0]));
    let features = longs(&[FEATURES]);
    let none = longs(&[1 << 32 | PROTOCOL_FEATURES]);
    let words: [&[u8]; 7] =
        [&accepted, &position, &config, &features, &none, &words(&[5, 8]), &words(&[1, 8])];
    run(env!("CARGO_MANIFEST_DIR"), "vhost-user", &words, fuzz, |_| {});
}

/// Otherwise mutations of it are refused for other reasons than those that they were made for. The files are what an honest back end
/// answers; when the front end asks for something else, write them again.
#[test]
fn the_corpus_has_the_answers_of_honest_back_ends() {
    let corpus = corpus(env!("CARGO_MANIFEST_DIR"), "vhost-user");
    for how in [0, DIRECTORY, REFRESHES, WAKES, DESCRIPTOR, DIRECTORY | WAKES] {
        let said = Arc::new(Mutex::new(vec![how]));
        let recorded = said.clone();
        let (stream, server) = serve(Box::new(move |asked| {
            let bytes = honest(asked);
            recorded.lock().unwrap().extend_from_slice(&bytes);
            (bytes, true)
        }));
        assert_eq!(session(how, stream), 2);
        server.join().unwrap();
        let said = said.lock().unwrap().clone();
        if !corpus.contains(&said) {
            let today = std::env::temp_dir().join(format!("kapsel-fuzz-corpus-vhost-user-{how}"));
            std::fs::write(&today, &said).unwrap();
            panic!("the corpus lacks what a back end answers today: {}", today.display());
        }
        // A back end that wakes the event loop then has hung up, and nobody wants its descriptor.
        let expected = if how & DESCRIPTOR != 0 {
            0
        } else if how & WAKES != 0 {
            1
        } else {
            2
        };
        assert_eq!(replay(&said), expected, "{how}");
    }
}
