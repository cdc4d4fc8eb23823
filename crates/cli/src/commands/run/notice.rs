//! Says once, to each user of a machine, that emulation is not what its makers call a security boundary.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use kapsel_sandbox::paths::Bundle;
use kapsel_sandbox::record::Record;

use crate::commands::host::Host;
use crate::output;

/// Prints the notice when this sandbox is emulated and the notice was not printed since the machine was started.
pub fn emulation(host: &Host, bundle: &Bundle) {
    let told = host.paths.state().join("told-emulation");
    if told.exists() {
        return;
    }
    let emulated =
        Record::read(bundle).ok().and_then(|record| record.machine).is_some_and(|m| m.accelerator == "tcg");
    if !emulated {
        return;
    }
    // Whoever makes the file prints: of several at once, one.
    match OpenOptions::new().write(true).create_new(true).open(&told) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        // Not being able to remember is no reason to keep silent.
        _ => {
            let style = output::stderr_style();
            let (yellow, cyan, reset) = (style.yellow(), style.cyan(), style.reset());
            output::complain(&format!(
                "{yellow}kapsel: note: {reset}this machine has no usable KVM, so QEMU emulates (tcg). QEMU does not call \
                 that a security boundary; what holds is the jail around it."
            ));
            output::complain(&format!("{cyan}hint: {reset}'kapsel doctor' says why; this note comes once."));
        }
    }
}
