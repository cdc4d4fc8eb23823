//! Docker: `runtimes` in `daemon.json`. All else in the file stays, in its order.

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::Wish;

/// The daemon's configuration.
pub const FILE: &str = "/etc/docker/daemon.json";

/// Adds the runtime, or changes where it is.
pub fn edit(old: Option<&str>, wish: &Wish) -> Result<String, String> {
    // The daemon takes an empty file for none.
    let text = old.filter(|text| !text.trim().is_empty()).unwrap_or("{}");
    let mut settings: Json =
        serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let mut changed = settings.entry("runtimes")?.entry("kapsel")?.entry("path")?.set(&wish.runtime);
    if wish.default {
        changed |= settings.entry("default-runtime")?.set("kapsel");
    }
    match old {
        Some(old) if !changed => Ok(old.to_owned()),
        _ => {
            serde_json::to_string_pretty(&settings).map(|text| text + "\n").map_err(|error| error.to_string())
        }
    }
}

/// JSON with the keys of its objects in their order.
#[derive(Debug, PartialEq)]
enum Json {
    Object(Vec<(String, Json)>),
    Array(Vec<Json>),
    /// Neither of the two.
    Plain(Value),
}

impl Json {
    /// The value of a key, null where there is none yet. What is null becomes an object.
    fn entry(&mut self, key: &str) -> Result<&mut Json, String> {
        if *self == Json::Plain(Value::Null) {
            *self = Json::Object(Vec::new());
        }
        let Json::Object(entries) = self else {
            return Err(format!("what should hold {key:?} is not an object"));
        };
        let at = entries.iter().position(|(name, _)| name == key).unwrap_or(entries.len());
        if at == entries.len() {
            entries.push((key.to_owned(), Json::Plain(Value::Null)));
        }
        Ok(&mut entries[at].1)
    }

    /// Makes it this text; false when it was that already.
    fn set(&mut self, text: &str) -> bool {
        let new = Json::Plain(text.into());
        let changed = *self != new;
        *self = new;
        changed
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Json::Object(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                entries.iter().try_for_each(|(key, value)| map.serialize_entry(key, value))?;
                map.end()
            }
            Json::Array(items) => items.serialize(serializer),
            Json::Plain(value) => value.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Json;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut entries: Vec<(String, Json)> = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, Json>()? {
            // Which one counts is everybody's guess.
            if entries.iter().any(|(name, _)| *name == key) {
                return Err(serde::de::Error::custom(format!("it has {key:?} twice")));
            }
            entries.push((key, value));
        }
        Ok(Json::Object(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element()? {
            array.push(item);
        }
        Ok(Json::Array(array))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Plain(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Plain(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Plain(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Plain(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Plain(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Plain(Value::Null))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wish(default: bool) -> Wish {
        Wish { runtime: "/usr/bin/kapsel-runtime".into(), shim: String::new(), default }
    }

    #[test]
    fn what_is_there_stays_and_the_second_time_there_is_nothing_to_do() {
        let old = "{\n \"log-opts\": { \"z\": \"1\", \"a\": 2.5 },\n \"runtimes\": {\"runsc\": {\"path\": \"/x\"}},\n \
                    \"hosts\": [\"unix:///é\", -1, null],\n \"debug\": true\n}\n";
        let new = edit(Some(old), &wish(false)).unwrap();
        assert!(new.find("\"z\"") < new.find("\"a\""), "{new}");
        let (before, mut after): (Value, Value) =
            (serde_json::from_str(old).unwrap(), serde_json::from_str(&new).unwrap());
        assert_eq!(after["runtimes"]["kapsel"]["path"], "/usr/bin/kapsel-runtime");
        after["runtimes"].as_object_mut().unwrap().remove("kapsel");
        assert_eq!(before, after);
        assert!(
            new.find("log-opts") < new.find("runtimes") && new.find("runtimes") < new.find("debug"),
            "{new}"
        );
        assert_eq!(edit(Some(&new), &wish(false)).unwrap(), new);
    }

    #[test]
    fn a_file_that_is_not_there_or_empty_is_made() {
        for old in [None, Some(""), Some("{}\n")] {
            let new: Value = serde_json::from_str(&edit(old, &wish(true)).unwrap()).unwrap();
            assert_eq!(
                new,
                json!({
                    "runtimes": { "kapsel": { "path": "/usr/bin/kapsel-runtime" } },
                    "default-runtime": "kapsel",
                })
            );
        }
    }

    #[test]
    fn another_place_of_kapsels_is_changed_and_nothing_else() {
        let old = "{ \"runtimes\": { \"kapsel\": { \"path\": \"/old\" }, \"x\": {} } }";
        let new: Value = serde_json::from_str(&edit(Some(old), &wish(false)).unwrap()).unwrap();
        assert_eq!(new, json!({ "runtimes": { "kapsel": { "path": "/usr/bin/kapsel-runtime" }, "x": {} } }));
    }

    #[test]
    fn what_is_no_configuration_is_not_touched() {
        for bad in [
            "{",
            "[]",
            "{\"a\": 1, \"a\": 2}",
            "{\"runtimes\": []}",
            "{\"runtimes\": {\"kapsel\": 3}}",
            "{} trailing",
            "// comment\n{}",
        ] {
            assert!(edit(Some(bad), &wish(false)).is_err(), "{bad}");
        }
    }
}
