//! The machine that a specification asks for.

use std::collections::HashMap;

use oci_spec::runtime::Spec;
use serde::Deserialize;

use super::refusal::{Refusal, Why, refuse};
use crate::{
    annotations::{PREFIX, Wishes},
    config::Config,
    spec::GUEST_RESERVE,
};

/// `vm.hwConfig` of specification 1.3.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hardware {
    /// Virtual CPUs.
    vcpus: Option<u32>,
    /// Bytes.
    memory: Option<u64>,
}

impl Hardware {
    /// Reads `vm`.
    pub fn of(vm: serde_json::Value) -> Result<Self, Refusal> {
        let serde_json::Value::Object(mut vm) = vm else { return Ok(Self::default()) };
        let hardware = vm.remove("hwConfig").unwrap_or_default();
        if let Some(other) = vm.keys().next() {
            refuse!(
                "it asks for vm.{other}, which an engine does not choose here: see the configuration's kernel and qemu"
            );
        }
        let hardware: Option<Self> = serde_json::from_value(hardware)
            .why("vm.hwConfig has something else than vcpus and memory (in bytes)")?;
        Ok(hardware.unwrap_or_default())
    }
}

/// What the machine is to be: by annotations that the administrator allows, else by `vm.hwConfig`, else so that the container's
/// limits fit into it.
pub fn wishes(
    spec: &Spec,
    hardware: &Hardware,
    annotations: &HashMap<String, String>,
    config: &Config,
) -> Result<Wishes, Refusal> {
    let ours: HashMap<String, String> = annotations
        .iter()
        .filter(|(key, _)| key.starts_with(PREFIX))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    // First whether they make sense: a key that does not exist cannot be allowed either.
    let mut wishes = Wishes::parse(&ours)?;
    for key in ours.keys() {
        let name = key.strip_prefix(PREFIX).unwrap_or(key);
        if !config.engine_annotations().any(|allowed| allowed == name) {
            refuse!(
                "annotation {key} is not allowed to engines here; the administrator allows it by engine_annotations = [{name:?}]"
            );
        }
    }
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let limit = resources.memory().as_ref().and_then(|memory| memory.limit());
    let limit = limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
    // Without a larger machine than by default nothing is gained: the guest's cgroup keeps the limit.
    let needed =
        limit.map(|limit| limit.saturating_add(GUEST_RESERVE)).filter(|memory| *memory > config.memory());
    wishes.memory = wishes.memory.or(hardware.memory).or(needed);
    let cpu = resources.cpu().as_ref();
    let quota =
        cpu.and_then(|cpu| Some((u64::try_from(cpu.quota()?).ok()?, cpu.period().unwrap_or(100_000))));
    let whole = quota
        .filter(|(quota, period)| *quota > 0 && *period > 0)
        .and_then(|(quota, period)| u32::try_from(quota.div_ceil(period)).ok())
        .filter(|cpus| *cpus > config.cpus());
    wishes.cpus = wishes.cpus.or(hardware.vcpus).or(whole);
    if let Some(cpus) = wishes.cpus.filter(|cpus| !(1..=64).contains(cpus)) {
        refuse!("it asks for {cpus} virtual CPUs, and a machine has 1 to 64");
    }
    Ok(wishes)
}
