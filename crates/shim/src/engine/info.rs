//! `-info`: what containerd 2 asks a runtime about itself.

use std::io::Write;

use anyhow::Context;
use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use kapsel_sandbox::engine;

/// How containerd names the specification's features, which are JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// `-info`.
pub fn info() -> anyhow::Result<()> {
    std::io::stdout().write_all(&told()?.write_to_bytes()?).context("cannot answer")
}

fn told() -> anyhow::Result<RuntimeInfo> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features = Any {
        type_url: FEATURES.into(),
        value: serde_json::to_vec(&engine::features())?,
        ..Default::default()
    };
    Ok(RuntimeInfo {
        name: "io.containerd.kapsel.v2".into(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    })
}
