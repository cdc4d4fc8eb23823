//! Containers of a pod share namespaces, which the engine names by a process of the host's: the pod's machine.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::refusal::{Refusal, refuse};

/// What a container is to its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The only one.
    Alone,
    /// The first of a pod's.
    PodSandbox,
    /// None: it is the pod itself, in which nothing runs, and to which containers are added.
    Pod,
    /// A further one of a pod's.
    PodMember {
        /// The process that the engine was told of as the first one's: the monitor.
        monitor: u32,
    },
}

/// Takes the paths away from those namespaces that are the pod's: its containers are in one machine and share them anyway. Returns whether
/// the pid namespace is one of them.
pub fn leave_shared_namespaces(spec: &mut Spec, role: Role) -> Result<bool, Refusal> {
    use LinuxNamespaceType as T;
    let Role::PodMember { monitor } = role else { return Ok(false) };
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut pids = false;
    for namespace in &mut namespaces {
        let name = match namespace.typ() {
            T::Network => "net",
            T::Ipc => "ipc",
            T::Uts => "uts",
            T::Pid => "pid",
            _ => continue,
        };
        let Some(path) = namespace.path().clone() else { continue };
        if path != Path::new(&format!("/proc/{monitor}/ns/{name}")) {
            refuse!(
                "it asks for the {} namespace at {}, which is not its pod's, and so not in its machine",
                namespace.typ(),
                path.display()
            );
        }
        pids |= namespace.typ() == T::Pid;
        namespace.set_path(None);
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(paths: &[(&str, &str)]) -> Spec {
        let namespaces: Vec<_> =
            paths.iter().map(|(typ, path)| json!({ "type": typ, "path": path })).collect();
        let spec = json!({ "ociVersion": "1.0.2", "linux": { "namespaces": namespaces } });
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn only_the_pods_own_namespaces_are_shared() {
        let role = Role::PodMember { monitor: 7 };
        let mut ours =
            spec(&[("network", "/proc/7/ns/net"), ("ipc", "/proc/7/ns/ipc"), ("pid", "/proc/7/ns/pid")]);
        assert!(leave_shared_namespaces(&mut ours, role).unwrap());
        let linux = ours.linux().clone().unwrap();
        assert!(linux.namespaces().iter().flatten().all(|namespace| namespace.path().is_none()));
        for other in ["/proc/8/ns/net", "/proc/1/ns/net", "/proc/7/ns/../../1/ns/net"] {
            let refused = leave_shared_namespaces(&mut spec(&[("network", other)]), role).unwrap_err();
            assert!(refused.to_string().contains(other), "{refused}");
        }
        let mut alone = spec(&[("pid", "/proc/7/ns/pid")]);
        assert!(!leave_shared_namespaces(&mut alone, Role::Alone).unwrap());
        assert_eq!(alone, spec(&[("pid", "/proc/7/ns/pid")]), "refused elsewhere");
    }
}
