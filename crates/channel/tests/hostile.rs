//! A session against arbitrary bytes: it may end, it may not panic, hang or keep more than its bound.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use kapsel_channel::mux::{Mux, Side};
use kapsel_channel::{Channel, limits};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Frames that look right more often than random bytes do.
fn plausible_frame() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![Just(0u32), Just(4), 0u32..2000, Just(limits::WINDOW), any::<u32>()];
    (0u8..5, 0u16..16, 0u32..9, length, proptest::collection::vec(any::<u8>(), 0..2000)).prop_map(
        |(kind, flags, stream, length, payload)| {
            let mut bytes = vec![0, kind];
            bytes.extend(flags.to_be_bytes());
            bytes.extend(stream.to_be_bytes());
            bytes.extend(length.to_be_bytes());
            if kind == 0 {
                bytes.extend(payload.iter().take(length as usize));
            }
            bytes
        },
    )
}

async fn survive(side: Side, chunks: Vec<Vec<u8>>) {
    let (near, mut far) = tokio::io::duplex(64 * 1024);
    let mux = Mux::new(near, side, Vec::new());
    let user = {
        let mux = mux.clone();
        tokio::spawn(async move {
            let mut streams = Vec::new();
            for port in 0..3 {
                streams.extend(mux.open(port).await);
            }
            while let Ok((_, mut stream)) = mux.accept().await {
                let _ = stream.write_all(b"hello").await;
                let mut bytes = [0; 64];
                let _ = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut bytes)).await;
                if streams.len() < 8 {
                    streams.push(stream);
                }
            }
        })
    };
    let (mut from, mut to) = tokio::io::split(&mut far);
    let feed = async {
        for chunk in chunks {
            if to.write_all(&chunk).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    let drain = async {
        let mut bytes = vec![0; 64 * 1024];
        while matches!(from.read(&mut bytes).await, Ok(n) if n > 0) {}
    };
    tokio::time::timeout(Duration::from_secs(10), async {
        tokio::join!(feed, drain);
        mux.closed().await;
        user.await.unwrap();
    })
    .await
    .expect("a session that has lost its peer ends");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn arbitrary_bytes(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20), host: bool) {
        let side = if host { Side::Host } else { Side::Guest };
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(survive(side, chunks));
    }

    #[test]
    fn plausible_frames(chunks in proptest::collection::vec(plausible_frame(), 0..60), host: bool) {
        let side = if host { Side::Host } else { Side::Guest };
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(survive(side, chunks));
    }
}
