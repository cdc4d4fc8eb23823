//! What can be set about a machine beside its devices: its processors, its console, what the monitor's threads may do.

use std::fs;

use kapsel_vmm::x86::template::{Error, Template};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;
use crate::host::Files;
use crate::session::Session;

/// A processor's register for what is cached how, as an example of one that KVM lets be changed.
const PAT: u32 = 0x277;

/// A register of the leaf that processors describe themselves with.
fn leaf(leaf: &str, register: &str, bitmap: &str) -> Value {
    let modifiers = json!([{"register": register, "bitmap": bitmap}]);
    json!({"cpuid_modifiers": [{"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": modifiers}]})
}

pub fn settings() -> Result<(), Failed> {
    registers()?;
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let (socket, output) = (directory.path().join("api"), directory.path().join("output"));
    let mut session =
        Session::start(&files, &socket, &["--no-seccomp", "--http-api-max-payload-size", "2000"])?;
    let client = &mut session.client;
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": guest::arguments("processor"),
    });
    client.done("PUT", "/boot-source", &kernel)?;
    let start = json!({"action_type": "InstanceStart"});
    client.refused("PUT", "/cpu-config", &leaf("7", "eax", "1"), "Make sure to prefix the number")?;
    client.done("PUT", "/cpu-config", &leaf("0x6fffffff", "eax", "0b1"))?;
    client.refused("PUT", "/actions", &start, "not supported by KVM: Leaf: 6fffffff, Subleaf: 0")?;
    client.done("PUT", "/cpu-config", &json!({"kvm_capabilities": ["4294967295"]}))?;
    client.refused("PUT", "/actions", &start, "KVM cannot do 4294967295")?;
    // Bit 30 of ECX: RDRAND.
    client.done("PUT", "/cpu-config", &leaf("0x1", "ecx", &format!("0b0{}", "x".repeat(30))))?;
    client.done("PUT", "/serial", &json!({"serial_out_path": "/nonexistent/output"}))?;
    client.refused("PUT", "/actions", &start, "cannot open the serial console's output")?;
    client.done("PUT", "/serial", &json!({"serial_out_path": output}))?;
    client.done("PUT", "/actions", &start)?;
    client.refused("PUT", "/serial", &json!({}), "not supported after starting")?;
    client.refused("PUT", "/cpu-config", &json!({}), "not supported after starting")?;
    for thread in fs::read_dir(format!("/proc/{}/task", session.id()))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        if !status.contains("Seccomp:\t0") {
            return Err(format!("a thread is confined in spite of --no-seccomp:\n{status}").into());
        }
    }
    let long = json!({"serial_out_path": "x".repeat(2000)});
    session.client.refused("PUT", "/serial", &long, "larger than the limit of 2000 allowed by server")?;
    let (status, printed) = session.finish()?;
    let console = fs::read_to_string(output)?;
    if status.success() && printed.is_empty() && console.contains(guest::DONE) {
        Ok(())
    } else {
        Err(format!("{status}, console:\n{console}\nstandard output:\n{printed}").into())
    }
}

/// Only what KVM has is changed, and only as the template says.
fn registers() -> Result<(), Failed> {
    let vm = Kvm::new()?.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    let read = || -> Result<u64, Failed> {
        let mut list = Msrs::from_entries(&[kvm_msr_entry { index: PAT, ..Default::default() }])?;
        vcpu.get_msrs(&mut list)?;
        Ok(list.as_slice()[0].data)
    };
    let before = read()?;
    let template =
        |addr: &str| json!({"msr_modifiers": [{"addr": addr, "bitmap": "0b00000110xxxxxxxx"}]}).to_string();
    serde_json::from_str::<Template>(&template("0x277"))?.change_msrs(&vcpu)?;
    if read()? != before & !0xff00 | 0x0600 {
        return Err(format!("{before:#x} became {:#x}", read()?).into());
    }
    match serde_json::from_str::<Template>(&template("0x12345678"))?.change_msrs(&vcpu) {
        Err(Error::Msr(0x1234_5678)) => Ok(()),
        other => Err(format!("a register that is not there: {other:?}").into()),
    }
}
