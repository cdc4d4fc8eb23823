//! `delete`: clears away what a process that was killed, or never came to be, left of a container.

use std::io::Write;

use anyhow::Context;
use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};
use kapsel_sandbox::{paths::Id, record::now, registry::Registry, removal};

use super::{Host, flags::Flags, rootfs, sandbox_file, start::socket_path};
use crate::convert;

/// What containerd shall say of a container whose end nobody saw: killed.
const KILLED: u32 = 128 + 9;

/// `delete`.
pub fn delete(host: &Host, flags: &Flags) -> anyhow::Result<()> {
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().context("-bundle is missing, and there is no working directory")?,
    };
    // Only where the container is the sandbox's own, and not one of several: those end with their pod.
    if let Ok(id) = std::fs::read_to_string(sandbox_file(&bundle)) {
        let id: Id = id.parse().with_context(|| format!("cannot use {}", sandbox_file(&bundle).display()))?;
        let sandbox = host.paths.bundle(&id);
        if sandbox.dir().exists() {
            let runtime = crate::runtime()?;
            let registry = Registry::open(&host.paths)?;
            runtime.block_on(removal::remove(&registry, &sandbox, Some(&id)))?;
        }
    }
    rootfs::unmount(&bundle)?;
    let socket = socket_path(host, flags, &flags.id);
    if std::os::unix::net::UnixStream::connect(&socket).is_err() {
        let _ = std::fs::remove_file(&socket);
    }
    let response =
        DeleteResponse { exit_status: KILLED, exited_at: convert::timestamp(now()), ..Default::default() };
    std::io::stdout().write_all(&response.write_to_bytes()?).context("cannot answer")
}
