//! The session's frames are yamux: the `yamux` crate understands them, and is understood.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::future::poll_fn;
use std::time::Duration;

use futures::io::{AsyncReadExt as _, AsyncWriteExt as _};
use kapsel_channel::Channel;
use kapsel_channel::mux::{Mux, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::compat::TokioAsyncReadCompatExt;
use yamux::{Config, Connection, Mode};

#[tokio::test]
async fn a_megabyte_each_way_and_half_close() {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let ours = Mux::new(near, Side::Host, Vec::new());
    let mut theirs = Connection::new(far.compat(), Config::default(), Mode::Server);
    let server = tokio::spawn(async move {
        while let Some(Ok(mut stream)) = poll_fn(|cx| theirs.poll_next_inbound(cx)).await {
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.unwrap();
                // The port is the first thing on the stream.
                assert_eq!(bytes[..4], 77u32.to_le_bytes());
                stream.write_all(&bytes[4..]).await.unwrap();
                stream.close().await.unwrap();
            });
        }
    });
    let payload: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    for _ in 0..3 {
        let stream = ours.open(77).await.unwrap();
        let (mut from, mut to) = tokio::io::split(stream);
        let mut echoed = Vec::new();
        let copy = async {
            tokio::join!(
                async {
                    to.write_all(&payload).await.unwrap();
                    to.shutdown().await.unwrap();
                },
                async { from.read_to_end(&mut echoed).await.unwrap() },
            )
        };
        tokio::time::timeout(Duration::from_secs(20), copy).await.unwrap();
        assert!(echoed == payload);
    }
    drop(ours);
    tokio::time::timeout(Duration::from_secs(5), server).await.unwrap().unwrap();
}
