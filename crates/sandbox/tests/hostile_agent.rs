//! The host against a guest whose agent is an attacker's: whatever it answers, a call ends within its deadline, with an error
//! where the answer makes no sense, and nothing of the answer is believed, shown or kept beyond its bounds.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kapsel_channel::mux::{Mux, Side};
use kapsel_channel::{Channel, Stream};
use kapsel_protocol::{api, limits};
use kapsel_sandbox::life::Error;
use kapsel_sandbox::life::agent::Agent;
use kapsel_sandbox::timings::Stopwatch;
use proptest::prelude::*;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What a call is given.
const DEADLINE: Duration = Duration::from_millis(500);
/// What no call may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the guest does with a request.
#[derive(Clone, Debug)]
enum Deed {
    /// Sends this, and goes on.
    Send(Vec<u8>),
    /// Sends this, and closes the stream.
    Close(Vec<u8>),
    /// Sends this, and ends the session.
    End(Vec<u8>),
}

const RESPONSE: u8 = 2;

/// A ttrpc frame.
fn frame(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    bytes
}

/// A sound answer with this message in it.
fn answer(stream: u32, message: &impl Message) -> Vec<u8> {
    let payload = message.write_to_bytes().unwrap();
    let response = ttrpc::proto::Response { payload, ..Default::default() };
    frame(stream, RESPONSE, &response.write_to_bytes().unwrap())
}

/// Plays the guest: does `deed` for the number of each request.
async fn play(guest: Mux, deed: impl Fn(u32) -> Deed) {
    let Ok((_, mut stream)) = guest.accept().await else { return };
    while let Some(number) = request(&mut stream).await {
        match deed(number) {
            Deed::Send(bytes) => drop(stream.write_all(&bytes).await),
            Deed::Close(bytes) => {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
                // Stays, and says no more.
                guest.closed().await;
            }
            Deed::End(bytes) => {
                let _ = stream.write_all(&bytes).await;
                return;
            }
        }
    }
}

/// Reads one request; gives the number that its answer must have.
async fn request(stream: &mut Stream) -> Option<u32> {
    let mut header = [0; 10];
    stream.read_exact(&mut header).await.ok()?;
    let [a, b, c, d, e, f, g, h, ..] = header;
    let mut payload = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some(u32::from_be_bytes([e, f, g, h]))
}

/// Calls a guest that does `deed` for each request.
fn call<T, F: Future<Output = Result<T, Error>>>(
    deed: impl Fn(u32) -> Deed + Send + 'static,
    ask: impl FnOnce(Agent) -> F,
) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (near, far) = tokio::io::duplex(64 << 10);
        let host: Arc<dyn Channel> = Arc::new(Mux::new(near, Side::Host, Vec::new()));
        tokio::spawn(play(Mux::new(far, Side::Guest, Vec::new()), deed));
        let agent = Agent::open(&host, Stopwatch::default()).await?;
        tokio::time::timeout(PATIENCE, ask(agent)).await.expect("the call hangs")
    })
}

/// A call with a short deadline, whose answer is empty.
async fn kill(agent: Agent) -> Result<(), Error> {
    agent.kill("container", "", 15, false, DEADLINE).await
}

#[test]
fn what_is_no_answer_is_an_error_within_the_deadline() {
    let sound = |number| answer(number, &api::KillResponse::new());
    assert!(call(move |number| Deed::Send(sound(number)), kill).is_ok(), "the guest here can be honest");
    let noise = || (0..65_536u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>();
    type Play = Box<dyn Fn(u32) -> Deed + Send>;
    let plays: Vec<(&str, Play)> = vec![
        ("silence", Box::new(|_| Deed::Send(Vec::new()))),
        ("noise", Box::new(move |_| Deed::Send(noise()))),
        ("a stream that closes", Box::new(|_| Deed::Close(Vec::new()))),
        ("a session that ends", Box::new(|_| Deed::End(Vec::new()))),
        ("half a header", Box::new(move |n| Deed::Close(sound(n)[..5].to_vec()))),
        ("half a message", Box::new(|n| Deed::Close(frame(n, RESPONSE, &[8; 1000])[..500].to_vec()))),
        (
            "half a message, then the end",
            Box::new(|n| Deed::End(frame(n, RESPONSE, &[8; 99])[..50].to_vec())),
        ),
        ("a length of 4 GiB", Box::new(|n| Deed::Send([&[0xff; 4][..], &n.to_be_bytes(), &[2, 0]].concat()))),
        ("no protobuf", Box::new(|n| Deed::Send(frame(n, RESPONSE, &[0xff; 64])))),
        ("another's answer", Box::new(move |n| Deed::Send(sound(n + 2)))),
        ("a request", Box::new(|n| Deed::Send(frame(n, 1, b"")))),
        ("an unknown kind", Box::new(|n| Deed::Send(frame(n, 77, b"")))),
    ];
    for (name, play) in plays {
        let begun = Instant::now();
        let result = call(play, kill);
        assert!(result.is_err(), "{name} was taken for an answer");
        assert!(begun.elapsed() < PATIENCE, "{name} took {:?}", begun.elapsed());
    }
}

#[test]
fn answers_that_lie_are_not_believed() {
    let hello = api::HelloResponse { version: "another".repeat(1000), ..Default::default() };
    let error = call(move |n| Deed::Send(answer(n, &hello)), |agent| async move { agent.hello(true).await });
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Nonsense { .. }) && error.to_string().len() < 500, "{error}");

    let exit = api::WaitResponse { exit_code: 256, ..Default::default() };
    let error = call(move |n| Deed::Send(answer(n, &exit)), |agent| async move { agent.wait("c", "").await });
    assert!(matches!(error.unwrap_err(), Error::Nonsense { .. }), "an exit code that there cannot be");

    let processes = vec![Default::default(); limits::PIDS_MAX + 1];
    let pids = api::PidsResponse { processes, ..Default::default() };
    let error = call(move |n| Deed::Send(answer(n, &pids)), |agent| async move { agent.pids("c").await });
    assert!(matches!(error.unwrap_err(), Error::Nonsense { .. }), "more processes than there can be");

    let link = api::StatResponse { link_target: "x".repeat(1 << 20), ..Default::default() };
    let stat =
        call(move |n| Deed::Send(answer(n, &link)), |agent| async move { agent.stat("c", "/", true).await });
    assert_eq!(stat.unwrap().link_target.len(), limits::PATH_MAX, "it is cut");
}

#[test]
fn messages_of_the_guest_are_cut_and_cleaned() {
    let status = ttrpc::get_status(ttrpc::Code::INTERNAL, format!("\x1b]0;owned\x07{}", "x".repeat(1 << 20)));
    let refused = ttrpc::proto::Response { status: Some(status).into(), ..Default::default() };
    let refused = refused.write_to_bytes().unwrap();
    let error = call(move |n| Deed::Send(frame(n, RESPONSE, &refused)), kill).unwrap_err().to_string();
    // A replaced character takes three bytes instead of one.
    assert!(error.len() <= limits::ERROR_MESSAGE_MAX + 16, "{} bytes", error.len());
    assert!(!error.contains(['\x1b', '\x07']), "{error:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any bytes after a request, in frames that look right or not: the call ends.
    #[test]
    fn any_bytes_end_the_call(
        payload in proptest::collection::vec(any::<u8>(), 0..300),
        framed: bool,
        end in 0..3,
    ) {
        let deed = move |number| {
            let bytes = if framed { frame(number, RESPONSE, &payload) } else { payload.clone() };
            match end {
                0 => Deed::Send(bytes),
                1 => Deed::Close(bytes),
                _ => Deed::End(bytes),
            }
        };
        // Some bytes are a sound answer: what counts is that there is an end to it.
        let _ = call(deed, |agent| async move { agent.kill("c", "", 9, true, Duration::from_millis(50)).await });
    }
}
