//! Sessions between the two real ends, over a socket pair in place of the serial port.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use kapsel_channel::mux::{Mux, Side};
use kapsel_channel::{Channel, Error, GuestPort, connect, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(5);

fn socket_pair() -> (UnixStream, StdStream) {
    let (host, guest) = StdStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    guest.set_nonblocking(true).unwrap();
    (UnixStream::from_std(host).unwrap(), guest)
}

fn guest_port(guest: StdStream) -> GuestPort {
    GuestPort::from_file(OwnedFd::from(guest).into()).unwrap()
}

/// A session of both real ends. It begins for the guest with the host's first frame, here a stream that is dropped again.
async fn session() -> (Mux, Mux) {
    let (host, guest) = socket_pair();
    let mut port = guest_port(guest);
    let guest = tokio::spawn(async move { port.next_session().await.unwrap() });
    let host = connect(host, SOON).await.unwrap();
    let first = host.open(0).await.unwrap();
    let guest = timeout(SOON, guest).await.unwrap().unwrap();
    timeout(SOON, guest.accept()).await.unwrap().unwrap();
    drop(first);
    (host, guest)
}

async fn stream_to(host: &Mux, guest: &Mux, port: u32) -> (kapsel_channel::Stream, kapsel_channel::Stream) {
    let ours = host.open(port).await.unwrap();
    loop {
        let (at, theirs) = timeout(SOON, guest.accept()).await.unwrap().unwrap();
        if at == port {
            return (ours, theirs);
        }
    }
}

#[tokio::test]
async fn streams_carry_bytes_both_ways_and_half_close() {
    let (host, guest) = session().await;
    let (mut ours, mut theirs) = stream_to(&host, &guest, 1024).await;
    ours.write_all(b"question").await.unwrap();
    ours.shutdown().await.unwrap();
    let mut text = String::new();
    timeout(SOON, theirs.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "question");
    theirs.write_all(b"answer").await.unwrap();
    theirs.shutdown().await.unwrap();
    drop(theirs);
    text.clear();
    timeout(SOON, ours.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "answer");
}

#[tokio::test]
async fn the_guest_opens_streams_too() {
    let (host, guest) = session().await;
    let mut theirs = guest.open(7).await.unwrap();
    theirs.write_all(b"x").await.unwrap();
    let (port, mut ours) = timeout(SOON, host.accept()).await.unwrap().unwrap();
    assert_eq!((port, ours.read_u8().await.unwrap()), (7, b'x'));
}

#[tokio::test]
async fn a_dropped_stream_is_not_taken_for_a_complete_one() {
    let (host, guest) = session().await;
    let (mut ours, mut theirs) = stream_to(&host, &guest, 1).await;
    theirs.write_all(b"half").await.unwrap();
    drop(theirs);
    let mut bytes = Vec::new();
    let error = timeout(SOON, ours.read_to_end(&mut bytes)).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(bytes, b"half");
    assert!(ours.write_all(b"more").await.is_err());
}

#[tokio::test]
async fn what_nobody_reads_stops_the_writer_and_no_one_else() {
    let (host, guest) = session().await;
    let (mut stalled, theirs) = stream_to(&host, &guest, 1).await;
    let flood = vec![7; 64 * 1024];
    let mut sent = 0;
    while let Ok(n) = timeout(Duration::from_millis(200), stalled.write(&flood)).await {
        sent += n.unwrap();
    }
    assert_eq!(sent, limits::WINDOW as usize - 4, "the window, less the four bytes of the port");
    let (mut ours, mut other) = stream_to(&host, &guest, 2).await;
    ours.write_all(b"still alive").await.unwrap();
    let mut bytes = [0; 11];
    timeout(SOON, other.read_exact(&mut bytes)).await.unwrap().unwrap();
    assert_eq!(&bytes, b"still alive");
    drop(theirs);
}

#[tokio::test]
async fn streams_are_bounded_and_places_come_back() {
    let (host, guest) = session().await;
    let mut open = Vec::new();
    let error = loop {
        match timeout(SOON, host.open(9)).await.unwrap() {
            Ok(stream) => open.push(stream),
            Err(error) => break error,
        }
        assert!(open.len() <= limits::MAX_STREAMS);
    };
    assert!(matches!(error, Error::TooManyStreams));
    for stream in &mut open {
        let (_, mut theirs) = timeout(SOON, guest.accept()).await.unwrap().unwrap();
        stream.write_u8(1).await.unwrap();
        assert_eq!(theirs.read_u8().await.unwrap(), 1);
    }
    open.clear();
    let again = timeout(SOON, async {
        loop {
            match host.open(9).await {
                Ok(stream) => break stream,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    again.await.unwrap();
}

#[tokio::test]
async fn many_streams_open_and_end_without_a_trace() {
    let (host, guest) = session().await;
    let server = tokio::spawn(async move {
        while let Ok((_, mut stream)) = guest.accept().await {
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                if stream.read_to_end(&mut bytes).await.is_ok() {
                    let _ = stream.write_all(&bytes).await;
                    let _ = stream.shutdown().await;
                }
            });
        }
    });
    for round in 0..2000u32 {
        let mut stream = timeout(SOON, host.open(round)).await.unwrap().unwrap();
        stream.write_u32(round).await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(timeout(SOON, stream.read_u32()).await.unwrap().unwrap(), round);
    }
    drop(host);
    timeout(SOON, server).await.unwrap().unwrap();
}

#[tokio::test]
async fn dropping_the_session_ends_the_other_side_after_what_was_written() {
    let (host, guest) = session().await;
    let (mut ours, mut theirs) = stream_to(&host, &guest, 1).await;
    let payload = vec![3; 100_000];
    ours.write_all(&payload).await.unwrap();
    ours.shutdown().await.unwrap();
    drop((ours, host));
    let mut bytes = Vec::new();
    let _ = timeout(SOON, theirs.read_to_end(&mut bytes)).await.unwrap();
    assert_eq!(bytes, payload);
    assert!(matches!(timeout(SOON, guest.closed()).await.unwrap(), Error::Closed));
    assert!(guest.open(1).await.is_err());
}

#[tokio::test]
async fn a_new_session_begins_behind_the_bytes_of_an_old_one() {
    let (host, guest) = socket_pair();
    let mut port = guest_port(guest);
    // A stale hello, then the frames of a session that the guest never saw the beginning of.
    let mut host = host;
    host.write_all(b"\xf5kapsel\xf5\x01\x00\x01\x00stale-nonce-1234").await.unwrap();
    host.write_all(b"noise that is no preamble").await.unwrap();
    let guest = tokio::spawn(async move { (port.next_session().await.unwrap(), port) });
    let host = connect(host, SOON).await.unwrap();
    let mut stream = host.open(5).await.unwrap();
    stream.write_u8(42).await.unwrap();
    let (guest, _port) = timeout(SOON, guest).await.unwrap().unwrap();
    let (at, mut theirs) = timeout(SOON, guest.accept()).await.unwrap().unwrap();
    assert_eq!((at, theirs.read_u8().await.unwrap()), (5, 42));
}

#[tokio::test]
async fn a_hello_where_a_frame_should_begin_starts_the_next_session() {
    let (host, guest) = socket_pair();
    let mut port = guest_port(guest);
    let second = host.into_std().unwrap();
    let first = UnixStream::from_std(second.try_clone().unwrap()).unwrap();
    let first_guest = tokio::spawn(async move { (port.next_session().await.unwrap(), port) });
    let host = connect(first, SOON).await.unwrap();
    let mut stream = host.open(5).await.unwrap();
    stream.write_u8(1).await.unwrap();
    let (guest, mut port) = timeout(SOON, first_guest).await.unwrap().unwrap();
    // The host goes away without a word (as it does when a machine is saved and restored) and a new one comes.
    stream.flush().await.unwrap();
    let next = tokio::spawn(async move { port.next_session().await.unwrap() });
    std::mem::forget(stream);
    let leaked = Box::leak(Box::new(host));
    let second = UnixStream::from_std(second).unwrap();
    let host = connect(second, SOON).await.unwrap();
    drop(host.open(6).await.unwrap());
    timeout(SOON, guest.closed()).await.unwrap();
    timeout(SOON, next).await.unwrap().unwrap();
    leaked.close();
}

#[tokio::test]
async fn a_silent_guest_meets_the_deadline_and_a_foreign_one_an_error() {
    let (host, _guest) = socket_pair();
    let error = connect(host, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, Error::Deadline(_)));

    let (host, guest) = socket_pair();
    let garbage = tokio::task::spawn_blocking(move || {
        use std::io::Write;
        guest.set_nonblocking(false).unwrap();
        let mut guest = guest;
        while guest.write_all(&[0x55; 65536]).is_ok() {}
    });
    let error = timeout(SOON, connect(host, SOON)).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
    garbage.await.unwrap();
}

#[tokio::test]
async fn a_peer_of_another_version_is_told_apart() {
    let (host, guest) = socket_pair();
    let mut guest = UnixStream::from_std(guest).unwrap();
    let answer = tokio::spawn(async move {
        let mut hello = [0; 28];
        guest.read_exact(&mut hello).await.unwrap();
        (hello[8], hello[10]) = (9, 2);
        guest.write_all(&hello).await.unwrap();
        guest
    });
    let error = connect(host, SOON).await.unwrap_err();
    assert!(matches!(error, Error::Version { ours: 1, theirs: 9 }));
    answer.await.unwrap();
}

#[tokio::test]
async fn the_guest_returns_to_waiting_when_the_host_goes() {
    // Closing one end of a socket pair cannot be undone, so this only sees that the session ends.
    let (host, guest) = session().await;
    drop(host);
    assert!(matches!(timeout(SOON, guest.closed()).await.unwrap(), Error::Closed));
    assert!(matches!(guest.accept().await, Err(Error::Closed)));
}

/// Runs the host's side against bytes that no honest guest sends.
async fn against(bytes: Vec<u8>) -> Mux {
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let mux = Mux::new(near, Side::Host, Vec::new());
    far.write_all(&bytes).await.unwrap();
    tokio::spawn(async move {
        let mut sink = tokio::io::sink();
        let _ = tokio::io::copy(&mut far, &mut sink).await;
    });
    mux
}

fn frame(kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let mut bytes = vec![0, kind];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

#[tokio::test]
async fn broken_frames_end_the_session() {
    let mut beyond_window = frame(0, 1, 2, 4);
    beyond_window.extend([1, 0, 0, 0]);
    beyond_window.extend(frame(0, 0, 2, limits::WINDOW));
    let mut wide = frame(1, 1, 2, 0);
    wide.extend(frame(1, 0, 2, u32::MAX));
    let mut twice = frame(1, 1, 2, 0);
    twice.extend(frame(1, 1, 2, 0));
    let mut after_end = frame(0, 1 | 4, 2, 4);
    after_end.extend([1, 0, 0, 0]);
    after_end.extend(frame(0, 0, 2, 1));
    let cases = [
        vec![3; 12],
        frame(9, 0, 0, 0),
        frame(1, 1, 1, 0),
        frame(1, 1, 0, 0),
        beyond_window,
        wide,
        twice,
        after_end,
    ];
    for (case, bytes) in cases.into_iter().enumerate() {
        let mux = against(bytes).await;
        let error = timeout(SOON, mux.closed()).await.unwrap();
        assert!(matches!(error, Error::Protocol(_)), "case {case}: {error}");
    }
}

#[tokio::test]
async fn a_peer_that_opens_too_many_streams_is_refused_them() {
    let mut bytes = Vec::new();
    for n in 0..2 * limits::MAX_STREAMS as u32 {
        bytes.extend(frame(0, 1, 2 + 2 * n, 4));
        bytes.extend([1, 0, 0, 0]);
    }
    let mux = against(bytes).await;
    let mut accepted = Vec::new();
    while let Ok(Ok(stream)) = timeout(Duration::from_millis(200), mux.accept()).await {
        accepted.push(stream);
    }
    assert_eq!(accepted.len(), limits::MAX_STREAMS);
}

#[tokio::test]
async fn pings_without_end_from_a_peer_that_does_not_read_cost_no_memory() {
    let (near, mut far) = tokio::io::duplex(4096);
    let mux = Mux::new(near, Side::Host, Vec::new());
    for n in 0..200_000 {
        timeout(SOON, far.write_all(&frame(2, 1, 0, n))).await.unwrap().unwrap();
    }
    // The session still works once the peer reads.
    let mut stream = mux.open(1).await.unwrap();
    stream.write_u8(1).await.unwrap();
    let mut bytes = vec![0; 64 * 1024];
    let mut seen = Vec::new();
    while !seen.windows(5).any(|bytes| bytes == [0, 0, 0, 1, 1]) {
        let n = timeout(SOON, far.read(&mut bytes)).await.unwrap().unwrap();
        seen.extend_from_slice(&bytes[..n]);
    }
    assert!(seen.len() < 2 * limits::OUT_BUFFER, "{} bytes of answers were kept", seen.len());
}
