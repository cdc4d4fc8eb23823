//! What sandboxes can do for an engine, as the specification's features.md says it.

use serde_json::{Value, json};

/// The oldest specification whose bundles are understood.
pub const OCI_MIN: &str = "1.0.0";
/// The newest.
pub const OCI_MAX: &str = "1.3.0";

/// For `kapsel-runtime features` and the shim's `-info`.
pub fn features() -> Value {
    json!({
        "ociVersionMin": OCI_MIN,
        "ociVersionMax": OCI_MAX,
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "dev", "diratime", "dirsync", "exec", "lazytime", "mand", "noatime", "nodev",
            "nodiratime", "noexec", "nolazytime", "nomand", "norelatime", "nostrictatime", "nosuid", "nosymfollow",
            "private", "rbind", "relatime", "ro", "rprivate", "rro", "rshared", "rslave", "runbindable", "rw",
            "shared", "silent", "slave", "strictatime", "suid", "symfollow", "sync", "unbindable",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": true },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
        },
        "annotations": { "io.kapsel.runtime.version": env!("CARGO_PKG_VERSION") },
        "potentiallyUnsafeConfigAnnotations": ["io.kapsel."],
    })
}
