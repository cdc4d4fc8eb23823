//! Bounds that host and guest both hold to. A peer that goes past one gets an error, never more memory or time.

use std::time::Duration;

/// The largest ttrpc message, in bytes. ttrpc itself refuses larger ones. One megabyte of arguments and an equally large
/// environment fit.
pub const MESSAGE_MAX: usize = 4 << 20;

/// The largest OCI specification or process as JSON, in bytes: a message without its other fields.
pub const SPEC_MAX: usize = MESSAGE_MAX - (512 << 10);

/// The most instructions a seccomp filter may have (the kernel's BPF_MAXINSNS).
pub const SECCOMP_INSTRUCTIONS_MAX: usize = 4096;

/// Containers in one sandbox at a time.
pub const CONTAINERS_MAX: usize = 64;

/// Processes known by name (containers and execs, running or ended and not yet deleted) in one sandbox.
pub const PROCESSES_MAX: usize = 1024;

/// Storages of one container.
pub const STORAGES_MAX: usize = 128;

/// Bytes of one storage's source, type, mount point or single option.
pub const STORAGE_FIELD_MAX: usize = 4096;

/// Bytes of a container or exec id.
pub const ID_MAX: usize = 128;

/// Bytes of a host name (the kernel's __NEW_UTS_LEN).
pub const HOSTNAME_MAX: usize = 64;

/// Paths at which a container's program is looked for, to be in a template's memory.
pub const PROGRAMS_MAX: usize = 16;

/// Network interfaces of a sandbox.
pub const INTERFACES_MAX: usize = 8;

/// Addresses, routes and neighbours of one network interface, each.
pub const INTERFACE_ENTRIES_MAX: usize = 1024;

/// Bytes of a network interface's name (the kernel's IFNAMSIZ without the NUL).
pub const INTERFACE_NAME_MAX: usize = 15;

/// Bytes of `/etc/hosts` or `/etc/resolv.conf` for containers.
pub const NAMES_FILE_MAX: usize = 256 << 10;

/// Bytes of entropy that Configure needs at least.
pub const ENTROPY_MIN: usize = 64;

/// Bytes of entropy that Configure takes at most.
pub const ENTROPY_MAX: usize = 4096;

/// Bytes of a path (the kernel's PATH_MAX).
pub const PATH_MAX: usize = 4096;

/// Bytes of an error message that the host shows or stores; it cuts longer ones.
pub const ERROR_MESSAGE_MAX: usize = 4096;

/// Process ids that one Pids reply lists.
pub const PIDS_MAX: usize = 32_768;

/// Steps that the host takes note of in one reply.
pub const PHASES_MAX: usize = 64;

/// Streams to [`crate::STDIO_PORT`] whose header names a token that no request has announced yet.
pub const WAITING_STREAMS_MAX: usize = 256;

/// How long a stream may wait for the request that announces its token, and a started process for a stream.
pub const STREAM_DEADLINE: Duration = Duration::from_secs(30);

/// How long the header line of a stream may take.
pub const HEADER_DEADLINE: Duration = Duration::from_secs(10);

/// How long the host waits for Hello. A guest on a loaded machine without KVM is slow.
pub const HELLO_DEADLINE: Duration = Duration::from_secs(30);

/// How long the host waits for any other call that does not wait for a process or a copy.
pub const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// How long the host waits for the guest to power off after Shutdown before it ends the machine itself.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// Whether `id` may name a container or an exec: 1 to [`ID_MAX`] of `A-Z a-z 0-9 _ . + -`, the first one a letter or a
/// digit. It is then safe as one path component.
pub fn valid_id(id: &str) -> bool {
    let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'+' | b'-');
    id.len() <= ID_MAX && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric()) && id.bytes().all(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_path_components() {
        for good in ["a", "0", "Ab_9.x+y-z", &"a".repeat(ID_MAX)] {
            assert!(valid_id(good), "{good}");
        }
        for bad in ["", ".", "..", ".a", "-a", "a/b", "a b", "a\0", "é", &"a".repeat(ID_MAX + 1)] {
            assert!(!valid_id(bad), "{bad:?}");
        }
    }
}
