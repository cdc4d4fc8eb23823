//! What containerd's CRI plug-in says of a pod by the Sandbox API.
//!
//! Names and numbers are those of Kubernetes' `cri-api` (`pkg/apis/runtime/v1/api.proto`, Apache-2.0); what says nothing to a machine is left
//! out.

use std::collections::HashMap;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use kapsel_sandbox::life::Error;
use prost::Message;

/// How it names its messages.
const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// PodSandboxConfig.
#[derive(Clone, PartialEq, Message)]
pub struct PodConfig {
    #[prost(string, tag = "2")]
    pub hostname: String,
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<Linux>,
}

/// DNSConfig.
#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// LinuxPodSandboxConfig.
#[derive(Clone, PartialEq, Message)]
pub struct Linux {
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
    #[prost(map = "string, string", tag = "3")]
    pub sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    pub resources: Option<Resources>,
}

/// LinuxContainerResources: what all containers of the pod may use together.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Resources {
    #[prost(int64, tag = "1")]
    pub cpu_period: i64,
    #[prost(int64, tag = "2")]
    pub cpu_quota: i64,
    #[prost(int64, tag = "3")]
    pub cpu_shares: i64,
    #[prost(int64, tag = "4")]
    pub memory_limit: i64,
}

impl PodConfig {
    /// Of a request; `None` when somebody else than the plug-in has made it.
    ///
    /// # Errors
    /// When its options are not understood.
    pub fn of(request: &CreateSandboxRequest) -> Result<Option<Self>, Error> {
        let Some(options) = request.options.as_ref() else { return Ok(None) };
        if options.type_url.rsplit('/').next() != Some(POD_CONFIG) {
            return Err(Error::Invalid(format!(
                "the sandbox's options are a {}, and {POD_CONFIG} is understood",
                options.type_url
            )));
        }
        let config = Self::decode(&*options.value);
        config
            .map(Some)
            .map_err(|e| Error::Invalid(format!("the sandbox's options are no {POD_CONFIG}: {e}")))
    }
}

impl Dns {
    /// As resolv.conf(5); empty when it says nothing.
    pub fn resolv_conf(&self) -> String {
        let line = |name: &str, words: &[String]| match words {
            [] => String::new(),
            words => format!("{name} {}\n", words.join(" ")),
        };
        let servers = self.servers.iter().map(|server| format!("nameserver {server}\n"));
        line("search", &self.searches) + &servers.collect::<String>() + &line("options", &self.options)
    }
}

impl Linux {
    /// The pod's cgroup on the host, as the plug-in names that of a container which anchors one.
    pub fn cgroups_path(&self, id: &str) -> Option<String> {
        let parent = Some(self.cgroup_parent.as_str()).filter(|parent| !parent.is_empty())?;
        let last = parent.rsplit('/').next().unwrap_or(parent);
        Some(match last.ends_with(".slice") {
            true => format!("{last}:cri-containerd:{id}"),
            false => format!("{}/{id}", parent.trim_end_matches('/')),
        })
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::{MessageField, well_known_types::any::Any};

    use super::*;

    #[test]
    fn options_are_the_plug_ins_or_refused() {
        let of = |type_url: &str, value: &[u8]| {
            let options = Any { type_url: type_url.into(), value: value.into(), ..Default::default() };
            PodConfig::of(&CreateSandboxRequest {
                options: MessageField::some(options),
                ..Default::default()
            })
        };
        // Field 1, a message; field 2, the name; field 9, a number.
        let config = b"\x0a\x03\x0a\x01x\x12\x03web\x48\x05";
        assert_eq!(of(POD_CONFIG, config).unwrap().unwrap().hostname, "web");
        let typed = "type.googleapis.com/runtime.v1.PodSandboxConfig";
        assert_eq!(of(typed, config).unwrap().unwrap().hostname, "web");
        assert!(of("other", config).unwrap_err().to_string().contains("other"));
        assert!(of(POD_CONFIG, b"\x12\x7fx").is_err());
        assert_eq!(PodConfig::of(&CreateSandboxRequest::default()).unwrap(), None);
    }

    #[test]
    fn names_are_resolved_as_the_pod_says() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let dns = Dns {
            servers: words(&["10.0.0.1", "10.0.0.2"]),
            searches: words(&["a.b", "b"]),
            options: words(&["ndots:5"]),
        };
        assert_eq!(
            dns.resolv_conf(),
            "search a.b b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert_eq!(Dns::default().resolv_conf(), "");
    }

    #[test]
    fn cgroups_are_named_as_by_the_plug_in() {
        let path =
            |parent: &str| Linux { cgroup_parent: parent.into(), ..Default::default() }.cgroups_path("p");
        assert_eq!(path(""), None);
        assert_eq!(path("/kubepods/pod1").as_deref(), Some("/kubepods/pod1/p"));
        assert_eq!(
            path("/kubepods.slice/kubepods-pod1.slice").as_deref(),
            Some("kubepods-pod1.slice:cri-containerd:p")
        );
    }
}
