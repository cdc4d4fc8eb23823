//! containerd: a runtime of the CRI plug-in in `config.toml`. `ctr` and nerdctl need none, they find the shim by its name.

use std::path::Path;

use toml::{Table, Value};

use super::{PATH, Wish};

/// containerd's configuration.
pub const FILE: &str = "/etc/containerd/config.toml";

/// What finds the shim by its name.
const RUNTIME_TYPE: &str = "io.containerd.kapsel.v2";

/// Adds the runtime at the end: what is there stays as it is, with its comments.
pub fn edit(old: Option<&str>, wish: &Wish) -> Result<String, String> {
    let old_text = old.unwrap_or_default();
    let before: Table = old_text.parse().map_err(|error| format!("it is not TOML: {error}"))?;
    let version = match before.get("version") {
        None if before.is_empty() => 2,
        // containerd's own reading of a file that says nothing.
        None => 1,
        Some(version) => version.as_integer().ok_or("its version is not a number")?,
    };
    let plugin = match version {
        2 => "io.containerd.grpc.v1.cri",
        3 => "io.containerd.cri.v1.runtime",
        other => {
            return Err(format!(
                "it has version {other}, and this knows 2 and 3 (`containerd config migrate` writes a newer one)"
            ));
        }
    };
    let path = ["plugins", plugin, "containerd", "runtimes", "kapsel"];
    let wanted = runtime(wish);
    let mut text = old_text.to_owned();
    match look(&before, &path) {
        Some(found) if *found == Value::Table(wanted.clone()) => {}
        Some(_) => return Err("it has another runtime that is called kapsel; remove that first".to_owned()),
        None => {
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            if before.is_empty() {
                text += "version = 2\n";
            }
            text += &format!(
                "\n# Written by `kapsel install containerd`.\n[plugins.\"{plugin}\".containerd.runtimes.kapsel]\n"
            );
            for (key, value) in &wanted {
                text += &format!("  {key} = {value}\n");
            }
        }
    }
    if wish.default {
        let set = look(&before, &["plugins", plugin, "containerd", "default_runtime_name"]);
        if set.and_then(Value::as_str) != Some("kapsel") {
            return Err(format!(
                "the default is a key among others there, which is not changed: set default_runtime_name = \"kapsel\" \
                 in [plugins.\"{plugin}\".containerd] by hand, and leave out --default"
            ));
        }
    }
    check(&text, &before, &path, &wanted)?;
    Ok(text)
}

fn runtime(wish: &Wish) -> Table {
    let mut table = Table::new();
    table.insert("runtime_type".to_owned(), RUNTIME_TYPE.into());
    let dir = Path::new(&wish.shim).parent().unwrap_or(Path::new("/"));
    if !PATH.iter().any(|known| Path::new(known) == dir) {
        // containerd would not find it by its name.
        table.insert("runtime_path".to_owned(), wish.shim.as_str().into());
    }
    table
}

fn look<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(table.get(*first)?, |value, key| value.get(key))
}

/// Text that is appended could mean something else than it says, if the tables above it were written in another manner.
fn check(text: &str, before: &Table, path: &[&str; 5], wanted: &Table) -> Result<(), String> {
    let after: Table = text
        .parse()
        .map_err(|error| format!("its tables are written so that none can be added at the end: {error}"))?;
    let mut expected = before.clone();
    if expected.is_empty() {
        expected.insert("version".to_owned(), 2.into());
    }
    let mut table = &mut expected;
    for key in path {
        let next = table.entry((*key).to_owned()).or_insert_with(|| Table::new().into());
        table = next.as_table_mut().ok_or(format!("its {key} is not a table"))?;
    }
    *table = wanted.clone();
    match after == expected {
        true => Ok(()),
        false => Err("its tables are written so that none can be added at the end".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(shim: &str) -> Wish {
        Wish { runtime: String::new(), shim: shim.into(), default: false }
    }

    /// As Debian's package writes it.
    const DEBIAN: &str = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
        [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\" # a comment\n";

    #[test]
    fn it_is_added_at_the_end_and_once() {
        let wish = wish("/usr/bin/containerd-shim-kapsel-v2");
        let new = edit(Some(DEBIAN), &wish).unwrap();
        assert!(new.starts_with(DEBIAN), "{new}");
        let parsed: Table = new.parse().unwrap();
        let runtime =
            look(&parsed, &["plugins", "io.containerd.grpc.v1.cri", "containerd", "runtimes", "kapsel"]);
        assert_eq!(runtime.unwrap()["runtime_type"].as_str(), Some(RUNTIME_TYPE));
        assert!(runtime.unwrap().get("runtime_path").is_none());
        assert_eq!(edit(Some(&new), &wish).unwrap(), new);
        for old in [None, Some(""), Some("# nothing\n")] {
            let parsed: Table = edit(old, &wish).unwrap().parse().unwrap();
            assert_eq!(parsed["version"].as_integer(), Some(2));
        }
        let three = edit(Some("version = 3\n"), &wish).unwrap();
        assert!(three.contains("io.containerd.cri.v1.runtime"), "{three}");
    }

    #[test]
    fn a_shim_elsewhere_is_named_by_its_path() {
        let new = edit(Some(DEBIAN), &wish("/opt/kapsel/containerd-shim-kapsel-v2")).unwrap();
        assert!(new.contains("runtime_path = \"/opt/kapsel/containerd-shim-kapsel-v2\""), "{new}");
    }

    #[test]
    fn what_cannot_be_added_to_is_not_touched() {
        let kapsel = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kapsel]\nruntime_type = \"x\"\n";
        for (bad, word) in [
            ("version = 2\n[", "not TOML"),
            ("version = 1\n", "version 1"),
            ("root = \"/x\"\n", "version 1"),
            ("version = 9\n", "version 9"),
            ("version = 2\nplugins = {}\n", "at the end"),
            ("version = 2\nplugins = 3\n", "at the end"),
            (kapsel, "another runtime"),
        ] {
            let error = edit(Some(bad), &wish("/usr/bin/x")).expect_err(bad);
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
