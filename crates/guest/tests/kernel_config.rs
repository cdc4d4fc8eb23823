//! The configuration of the kernel that `make kernel` builds: the fragment holds what guests need, and what Kconfig loses is told.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn fragment() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/kernel.config")).unwrap()
}

/// Runs `guest/check-config` as the build does.
fn check(fragment: &str, config: &str) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let (wanted, made) = (dir.path().join("fragment"), dir.path().join("config"));
    fs::write(&wanted, fragment).unwrap();
    fs::write(&made, config).unwrap();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/check-config");
    Command::new(program).arg(wanted).arg(made).output().unwrap()
}

#[test]
fn what_debians_kernel_has_as_modules_is_built_in() {
    let fragment = fragment();
    // The symbols of the modules that a guest with Debian's kernel loads, and what the agent does without any.
    for symbol in [
        "VIRTIO_MMIO",
        "VIRTIO_CONSOLE",
        "VIRTIO_VSOCKETS",
        "VIRTIO_BLK",
        "EROFS_FS",
        "OVERLAY_FS",
        "VIRTIO_FS",
        "HW_RANDOM_VIRTIO",
        "VIRTIO_BALLOON",
        "VIRTIO_NET",
        "EXT4_FS",
        "CGROUP_BPF",
        "SECCOMP_FILTER",
        "ACPI_TABLE_UPGRADE",
        "PVH",
    ] {
        assert!(fragment.lines().any(|line| line == format!("CONFIG_{symbol}=y")), "{symbol}");
    }
}

#[test]
fn a_symbol_that_kconfig_drops_is_told_and_fails() {
    let wanted = "# words\nCONFIG_A=y\nCONFIG_NAME=\"x\"\n# CONFIG_B is not set\n";
    let whole = "CONFIG_A=y\nCONFIG_NAME=\"x\"\n# CONFIG_B is not set\nCONFIG_MORE=y\n";
    assert!(check(wanted, whole).status.success());
    // Kconfig does not mention what cannot be.
    assert!(check(wanted, "CONFIG_A=y\nCONFIG_NAME=\"x\"\n").status.success());
    for (lost, name) in [
        ("CONFIG_NAME=\"x\"\n", "CONFIG_A"),
        ("CONFIG_A=m\nCONFIG_NAME=\"x\"\n", "CONFIG_A"),
        ("CONFIG_A=y\nCONFIG_NAME=\"y\"\n", "CONFIG_NAME"),
        ("CONFIG_A=y\nCONFIG_NAME=\"x\"\nCONFIG_B=y\n", "CONFIG_B"),
    ] {
        let output = check(wanted, lost);
        assert!(!output.status.success(), "{lost:?} passes");
        assert!(String::from_utf8_lossy(&output.stderr).contains(name), "{output:?}");
    }
    // A line that is neither is no reason to check less.
    assert!(!check("CONFIG_A y\n", whole).status.success());
}
