//! What this program says on standard output, and the verbs that do nothing else.

use std::{io::Write, os::unix::fs::OpenOptionsExt};

use anyhow::Context;
use kapsel_sandbox::engine::{self, OCI_MAX};
use serde::Serialize;

use crate::{args, state::Shown};

/// Prints text as it is.
pub fn text(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// Prints something as indented JSON.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    text(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Prints something as JSON on one line.
pub fn line(value: &impl Serialize) -> anyhow::Result<()> {
    text(&format!("{}\n", serde_json::to_string(value)?))
}

/// `list`, for people.
pub fn table(shown: &[Shown<'_>]) -> String {
    let rows: Vec<[String; 5]> = shown.iter().map(Shown::row).collect();
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED"].map(str::to_owned);
    let all = || std::iter::once(&head).chain(&rows);
    let width = |column: usize| all().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |row: &[String; 5]| -> String {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}   "));
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    all().map(line).collect()
}

/// `--version`, in runc's form.
pub fn version() {
    println!("kapsel-runtime version {}\nspec: {OCI_MAX}", env!("CARGO_PKG_VERSION"));
}

/// `features`.
pub fn features() -> anyhow::Result<()> {
    json(&engine::features())
}

/// `spec`.
pub fn spec(flags: &args::Spec) -> anyhow::Result<()> {
    let path = flags.bundle.join("config.json");
    let mut spec = oci_spec::runtime::Spec::default();
    // The crate's own sample asks for nothing else that a sandbox could not give.
    spec.set_hostname(Some("kapsel".into()));
    let failed = || format!("cannot write {}; an existing one is not overwritten", path.display());
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path);
    let mut file = file.with_context(failed)?;
    file.write_all(serde_json::to_string_pretty(&spec)?.as_bytes()).with_context(failed)
}
