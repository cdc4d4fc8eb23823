//! Podman: a file of its own beside `containers.conf`, containers.conf(5).

use super::Wish;

/// Read after `containers.conf`, whose other settings it leaves alone.
pub const FILE: &str = "/etc/containers/containers.conf.d/50-kapsel.conf";

/// The file is kapsel's: it is written anew.
pub fn edit(_old: Option<&str>, wish: &Wish) -> Result<String, String> {
    let default = if wish.default { "[engine]\nruntime = \"kapsel\"\n\n" } else { "" };
    Ok(format!(
        "# Written by `kapsel install podman`, and again by the next one.\n{default}[engine.runtimes]\nkapsel = [{}]\n",
        serde_json::Value::from(wish.runtime.as_str())
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_toml_with_the_runtime() {
        for default in [false, true] {
            let wish = Wish { runtime: "/opt/a \"b\"/kapsel-runtime".into(), shim: String::new(), default };
            let parsed: toml::Table = edit(None, &wish).unwrap().parse().unwrap();
            assert_eq!(parsed["engine"]["runtimes"]["kapsel"][0].as_str(), Some(wish.runtime.as_str()));
            assert_eq!(parsed["engine"].get("runtime").is_some(), default);
        }
    }
}
