//! The metadata service (MMDS): a JSON document that the API changes and the guest reads by HTTP at a link-local address
//! behind its network card ([`kapsel_devices::net::metadata`] has the network). Names, texts and formats are Firecracker's.
//!
//! The document is not part of a snapshot: it may have secrets that are not a clone's. Its configuration is.

mod answer;
mod token;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use kapsel_devices::net::metadata::{Answer, Service};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use token::Authority;
pub use token::InvalidTtl;

/// Where the guest finds the service, if nothing else is said.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Who may read the document, and how.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Whether a token is needed.
    #[serde(default)]
    pub version: Version,
    /// The network cards that lead to the service.
    pub network_interfaces: Vec<String>,
    /// Its address, which has to be link-local; [`DEFAULT_ADDRESS`] when it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answers are always in the format of EC2's service, whatever is asked for.
    #[serde(default)]
    pub imds_compat: bool,
}

/// How the service guards the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub enum Version {
    /// Everybody in the guest may read it.
    #[default]
    V1,
    /// Whoever reads it needs a token, which a forwarded request does not get.
    V2,
}

/// What is wrong with a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nobody could read.
    #[error("The list of network interface IDs that allow forwarding MMDS requests is empty.")]
    NoInterface,
    /// Another network's.
    #[error("The MMDS IPv4 address is not link local.")]
    Address,
    /// No such card.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface."
    )]
    UnknownInterface,
}

impl Config {
    /// Whether it fits a machine with network cards of these names.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn check<'a>(&self, cards: impl Iterator<Item = &'a str> + Clone) -> Result<(), ConfigError> {
        // RFC 3927, section 2.1: the first and the last 256 addresses are reserved.
        let [_, _, third, _] = self.address().octets();
        if !self.address().is_link_local() || matches!(third, 0 | 255) {
            return Err(ConfigError::Address);
        }
        if self.network_interfaces.is_empty() {
            return Err(ConfigError::NoInterface);
        }
        let there = |name: &String| cards.clone().any(|card| card == name);
        if self.network_interfaces.iter().all(there) { Ok(()) } else { Err(ConfigError::UnknownInterface) }
    }

    /// Where the guest finds the service.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(DEFAULT_ADDRESS)
    }
}

/// Why the document cannot be had or changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It would be too long.
    #[error("The MMDS patch request doesn't fit.")]
    TooLarge,
    /// Nothing is there.
    #[error("The MMDS resource does not exist.")]
    NotFound,
    /// There is no document yet, or no service.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// Numbers and lists have no form as text.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedType,
}

/// The document, as the API and the guest share it.
pub type Shared = Arc<Mutex<Store>>;

/// The document and who may read it.
#[derive(Debug)]
pub struct Store {
    version: Version,
    imds_compat: bool,
    document: Option<Value>,
    /// The longest document as JSON, in bytes.
    limit: usize,
    tokens: Authority,
    refusals: Refusals,
}

/// Readers without a good token; those of [`Version::V1`] are served all the same.
#[derive(Debug, Clone, Copy, Default)]
struct Refusals {
    no_token: u64,
    invalid_token: u64,
}

/// A form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    /// EC2's: keys by lines, those of objects with a slash; strings as they are.
    Imds,
}

impl Store {
    /// An empty one for documents of at most `limit` bytes.
    ///
    /// # Errors
    /// When the host gives no random key.
    pub fn new(limit: usize) -> std::io::Result<Self> {
        Ok(Store {
            version: Version::default(),
            imds_compat: false,
            document: None,
            limit,
            tokens: Authority::new()?,
            refusals: Refusals::default(),
        })
    }

    /// Serves as the configuration says.
    pub fn configure(&mut self, config: &Config) {
        (self.version, self.imds_compat) = (config.version, config.imds_compat);
    }

    /// The document; null before there is one.
    pub fn get(&self) -> &Value {
        self.document.as_ref().unwrap_or(&Value::Null)
    }

    /// Whether there is a document.
    pub fn initialized(&self) -> bool {
        self.document.is_some()
    }

    /// Another document.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; the one before stays.
    pub fn put(&mut self, document: Value) -> Result<(), Error> {
        if document.to_string().len() > self.limit {
            return Err(Error::TooLarge);
        }
        self.document = Some(document);
        Ok(())
    }

    /// Changes the document (RFC 7396).
    ///
    /// # Errors
    /// [`Error::NotInitialized`], or as [`Store::put`].
    pub fn patch(&mut self, patch: &Value) -> Result<(), Error> {
        let mut document = self.document.clone().ok_or(Error::NotInitialized)?;
        merge(&mut document, patch);
        self.put(document)
    }

    /// Counters by Firecracker's names.
    pub fn counters(&self) -> [(&'static str, u64); 2] {
        [("rx_no_token", self.refusals.no_token), ("rx_invalid_token", self.refusals.invalid_token)]
    }

    /// The part of the document at a path.
    fn value(&self, path: &str, format: Format) -> Result<String, Error> {
        let value = self.get().pointer(path.strip_suffix('/').unwrap_or(path)).ok_or(Error::NotFound)?;
        if format == Format::Json && !self.imds_compat {
            return Ok(value.to_string());
        }
        match value {
            Value::Object(map) => {
                let line = |(key, value): (&String, &Value)| {
                    if value.is_object() { format!("{key}/") } else { key.clone() }
                };
                Ok(map.iter().map(line).collect::<Vec<_>>().join("\n"))
            }
            Value::String(text) => Ok(text.clone()),
            _ => Err(Error::UnsupportedType),
        }
    }
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

impl Service for Store {
    fn answer(&mut self, received: &[u8]) -> Option<Answer> {
        answer::answer(self, received)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    pub(super) fn store() -> Store {
        let mut store = Store::new(200).unwrap();
        store.put(json!({"name": {"first": "John"}, "age": 43, "phones": {"mobile": "+44"}})).unwrap();
        store
    }

    #[test]
    fn a_patch_merges_and_what_is_too_large_changes_nothing() {
        let mut store = Store::new(200).unwrap();
        assert_eq!(store.patch(&json!({})), Err(Error::NotInitialized));
        assert_eq!(store.get(), &Value::Null);
        store.put(json!({"a": {"b": 1, "c": 2}, "d": "e"})).unwrap();
        store.patch(&json!({"a": {"b": null, "f": {"g": null, "h": 1}}, "d": {"i": 2}})).unwrap();
        let expected = json!({"a": {"c": 2, "f": {"h": 1}}, "d": {"i": 2}});
        assert_eq!(store.get(), &expected);
        assert_eq!(store.put(json!("x".repeat(199))), Err(Error::TooLarge));
        assert_eq!(store.patch(&json!({"x": "y".repeat(200)})), Err(Error::TooLarge));
        assert_eq!(store.get(), &expected);
    }

    #[test]
    fn values_come_as_json_or_as_lines() {
        let mut store = store();
        assert_eq!(store.value("/name", Format::Json).unwrap(), r#"{"first":"John"}"#);
        assert_eq!(store.value("/age", Format::Json).unwrap(), "43");
        assert_eq!(store.value("/", Format::Imds).unwrap(), "age\nname/\nphones/");
        assert_eq!(store.value("/name/", Format::Imds).unwrap(), "first");
        assert_eq!(store.value("/name/first", Format::Imds).unwrap(), "John");
        assert_eq!(store.value("/age", Format::Imds), Err(Error::UnsupportedType));
        assert_eq!(store.value("/nothing", Format::Json), Err(Error::NotFound));
        store.imds_compat = true;
        assert_eq!(store.value("/name", Format::Json).unwrap(), "first");
    }

    #[test]
    fn a_configuration_names_cards_and_an_address_of_the_link() {
        let config = |json: Value| serde_json::from_value::<Config>(json).unwrap();
        let check = |json: Value| config(json).check(["a", "b"].into_iter());
        assert_eq!(check(json!({"network_interfaces": ["a"]})), Ok(()));
        assert_eq!(check(json!({"network_interfaces": []})), Err(ConfigError::NoInterface));
        assert_eq!(check(json!({"network_interfaces": ["a", "c"]})), Err(ConfigError::UnknownInterface));
        for (address, fits) in [("169.254.170.2", true), ("169.254.0.2", false), ("10.0.0.1", false)] {
            let result = check(json!({"network_interfaces": ["a"], "ipv4_address": address}));
            assert_eq!(result.is_ok(), fits, "{address}");
        }
        assert!(serde_json::from_str::<Config>(r#"{"version":"V3","network_interfaces":["a"]}"#).is_err());
    }
}
