use std::time::Duration;

use kapsel_channel::{Channel, Stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::UnixStream,
    sync::mpsc,
};

use super::*;
use crate::logs::{ReadOptions, Reader};

/// A channel whose other ends a test holds.
struct FakeChannel(mpsc::UnboundedSender<DuplexStream>);

#[async_trait::async_trait]
impl Channel for FakeChannel {
    async fn open(&self, port: u32) -> kapsel_channel::Result<Stream> {
        assert_eq!(port, STDIO_PORT);
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        self.0.send(theirs).map_err(|_| kapsel_channel::Error::Closed)?;
        Ok(Stream::new(ours))
    }

    async fn accept(&self) -> kapsel_channel::Result<(u32, Stream)> {
        Err(kapsel_channel::Error::Closed)
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), test).await.expect("hangs") });
}

async fn header(guest: &mut DuplexStream) -> Header {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(guest.read_u8().await.unwrap());
    }
    line.pop();
    Header::parse(&line).unwrap()
}

fn attach(hub: &Hub, kind: StreamKind, lossless: bool) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    hub.attach(kind, Attacher { connection: theirs, lossless }).unwrap();
    ours
}

/// Connects `plan`; gives the guest's ends in the order stdin, stdout, stderr.
async fn connect(plan: &Plan, hub: &Hub, log: Option<Log>) -> (Streams, Vec<DuplexStream>) {
    let (sender, mut opened) = mpsc::unbounded_channel();
    let token = token();
    let streams = Streams::connect(&FakeChannel(sender), token, plan, hub, log).await.unwrap();
    let mut guests = Vec::new();
    while let Some(mut guest) = opened.recv().await {
        assert_eq!(header(&mut guest).await.token, token);
        guests.push(guest);
    }
    (streams, guests)
}

fn attached_plan() -> Plan {
    let kapsel = Endpoint::Kapsel { log: true };
    Plan {
        terminal: false,
        stdin: kapsel.clone(),
        stdout: kapsel.clone(),
        stderr: kapsel,
        owner: Owner::default(),
    }
}

#[test]
fn attachers_before_the_streams_miss_nothing_and_the_log_has_it_too() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let log: Log = Arc::new(Mutex::new(Writer::create(&path, 1 << 20).unwrap()));
        let hub = Hub::default();
        let mut out = attach(&hub, StreamKind::Stdout, true);
        let mut err = attach(&hub, StreamKind::Stderr, true);
        let (mut streams, mut guests) = connect(&attached_plan(), &hub, Some(log)).await;
        guests[1].write_all(b"\0out\xff").await.unwrap();
        guests[2].write_all(b"err").await.unwrap();
        drop(guests);
        streams.drained().await;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        out.read_to_end(&mut stdout).await.unwrap();
        err.read_to_end(&mut stderr).await.unwrap();
        assert_eq!((&stdout[..], &stderr[..]), (&b"\0out\xff"[..], &b"err"[..]));
        let logged: Vec<_> =
            Reader::open(&path, ReadOptions::default()).unwrap().map(Result::unwrap).collect();
        assert_eq!(logged.len(), 2);
        assert!(!hub.accepts(StreamKind::Stdout), "a stream that ended takes no more clients");
    });
}

#[test]
fn a_slow_lossless_client_holds_the_process_and_loses_nothing() {
    run(async {
        const TOTAL: usize = 8 << 20;
        let hub = Hub::default();
        let mut slow = attach(&hub, StreamKind::Stdout, true);
        let (mut streams, mut guests) = connect(&attached_plan(), &hub, None).await;
        let mut guest = guests.remove(1);
        let written = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = written.clone();
        let process = tokio::spawn(async move {
            for n in 0..TOTAL / 4096 {
                guest.write_all(&[n as u8; 4096]).await.unwrap();
                count.fetch_add(4096, std::sync::atomic::Ordering::Relaxed);
            }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let ahead = written.load(std::sync::atomic::Ordering::Relaxed);
        assert!(ahead < 1 << 20, "the process is {ahead} bytes ahead of a client that reads nothing");
        let mut got = Vec::new();
        slow.read_to_end(&mut got).await.unwrap();
        process.await.unwrap();
        drop(guests);
        streams.drained().await;
        assert_eq!(got.len(), TOTAL);
        assert!(got.chunks(4096).enumerate().all(|(n, piece)| piece.iter().all(|&b| b == n as u8)));
    });
}

#[test]
fn a_lossy_client_that_does_not_read_is_cut_off() {
    run(async {
        let hub = Hub::default();
        let _deaf = attach(&hub, StreamKind::Stdout, false);
        let (mut streams, mut guests) = connect(&attached_plan(), &hub, None).await;
        for _ in 0..256 {
            guests[1].write_all(&[1; 32 << 10]).await.unwrap();
        }
        drop(guests);
        streams.drained().await;
    });
}

#[test]
fn a_client_that_goes_does_not_disturb_the_process() {
    run(async {
        let hub = Hub::default();
        drop(attach(&hub, StreamKind::Stdout, true));
        let mut stays = attach(&hub, StreamKind::Stdout, true);
        let (mut streams, mut guests) = connect(&attached_plan(), &hub, None).await;
        guests[1].write_all(b"still here").await.unwrap();
        drop(guests);
        streams.drained().await;
        let mut got = String::new();
        stays.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "still here");
    });
}

#[test]
fn input_travels_and_its_end_too() {
    run(async {
        let hub = Hub::default();
        let mut client = attach(&hub, StreamKind::Stdin, true);
        let (_streams, mut guests) = connect(&attached_plan(), &hub, None).await;
        let data: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        let sent = data.clone();
        let sender = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            client
        });
        let mut got = Vec::new();
        guests[0].read_to_end(&mut got).await.unwrap();
        assert_eq!(got, data);
        sender.await.unwrap();
        assert!(
            hub.attach(
                StreamKind::Stdin,
                Attacher { connection: UnixStream::pair().unwrap().0, lossless: true }
            )
            .is_err()
        );
    });
}

#[test]
fn close_io_ends_the_input_of_a_fifo_after_what_is_in_it() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        make_fifo(&path);
        let plan = Plan { stdin: Endpoint::Fifo(path.clone()), ..attached_plan() };
        let (streams, mut guests) = connect(&plan, &Hub::default(), None).await;
        // Open to the end of the test, as an engine's.
        let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut writer, &[b'x'; 60_000]).unwrap();
        streams.close_stdin().await;
        let mut all = Vec::new();
        guests[0].read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), 60_000);
    });
}

#[test]
fn a_fifo_ends_with_its_last_writer() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        make_fifo(&path);
        let plan = Plan { stdin: Endpoint::Fifo(path.clone()), ..attached_plan() };
        let (_streams, mut guests) = connect(&plan, &Hub::default(), None).await;
        // Without a writer yet it has not ended.
        let nothing = tokio::time::timeout(Duration::from_millis(50), guests[0].read_u8()).await;
        assert!(nothing.is_err(), "{nothing:?}");
        tokio::task::spawn_blocking(move || std::fs::write(path, "typed")).await.unwrap().unwrap();
        let mut all = String::new();
        guests[0].read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "typed");
    });
}

#[test]
fn terminal_clients_type_see_and_detach() {
    run(async {
        let hub = Hub::default();
        let plan = Plan { terminal: true, stderr: Endpoint::Nowhere, ..attached_plan() };
        let mut first = attach(&hub, StreamKind::Tty, true);
        let (_streams, mut guests) = connect(&plan, &hub, None).await;
        let guest = &mut guests[0];
        let mut two = [0; 2];
        first.write_all(b"ls").await.unwrap();
        guest.read_exact(&mut two).await.unwrap();
        assert_eq!(&two, b"ls");
        guest.write_all(b"ok").await.unwrap();
        first.read_exact(&mut two).await.unwrap();
        drop(first);
        let mut second = attach(&hub, StreamKind::Tty, true);
        second.write_all(b"id").await.unwrap();
        guest.read_exact(&mut two).await.unwrap();
        assert_eq!(&two, b"id", "the terminal's input outlives its first client");
    });
}

fn make_fifo(path: &std::path::Path) {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
}
