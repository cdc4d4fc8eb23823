//! What a jailed child sees and may do, from its own reports. Needs root and Debian's busybox-static.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is an assertion")]

use kapsel_jail::{Exit, Identity, Jail};
use std::io::Read;

fn output(jail: Jail) -> (Exit, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut child = jail.stdout(writer.try_clone().unwrap().into()).stderr(writer.into()).spawn().unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (child.wait().unwrap(), text)
}

fn busybox(script: &str) -> Jail {
    Jail::new("sh").program("/bin/busybox").bind_exec("/bin/busybox", "/bin/busybox").arg("-c").arg(script)
}

#[test]
fn runs() {
    let (exit, text) = output(
        busybox("/bin/busybox id; /bin/busybox find / -xdev; /bin/busybox ps; exit 3")
            .identity(Identity::of_sandbox("x")),
    );
    eprintln!("{text}");
    assert_eq!(exit, Exit::Code(3));
}

#[test]
fn qemu_starts_with_only_its_own_libraries() {
    for program in ["/usr/bin/qemu-system-x86_64-microvm", "/usr/bin/qemu-system-x86_64"] {
        let jail = kapsel_jail::profiles::qemu(std::path::Path::new(program)).unwrap();
        let (exit, text) = output(jail.identity(Identity::of_sandbox("x")).arg("--version"));
        assert_eq!(exit, Exit::Code(0), "{text}");
    }
}
