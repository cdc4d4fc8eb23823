//! `kapsel prune`.

use std::io::{BufRead, IsTerminal, Write};

use kapsel_image::{PruneOptions, Pruned};
use kapsel_sandbox::listing::Entry;
use kapsel_sandbox::record::Status;
use kapsel_sandbox::template;
use serde::Serialize;

use super::host::{self, Host};
use super::rm;
use crate::failure::{Failure, Outcome};
use crate::flags::system::Prune;
use crate::output::{self, size};

/// What was removed, as `--json` prints it.
#[derive(Serialize)]
struct Removed {
    /// Ids.
    containers: Vec<String>,
    /// Keys.
    templates: Vec<String>,
    /// `{images, files, bytes}`.
    images: Pruned,
}

/// Removes what is not in use.
pub fn run(host: &Host, flags: &Prune) -> Outcome {
    if !flags.force && !confirmed(flags.all)? {
        return Ok(0);
    }
    // Listing clears away what killed sandboxes left.
    let ended: Vec<Entry> =
        host.list()?.into_iter().filter(|entry| entry.status() == Some(Status::Exited)).collect();
    let mut containers = Vec::new();
    let mut code = 0;
    for entry in &ended {
        let Ok(record) = &entry.record else { continue };
        match host::runtime()?.block_on(rm::end(host, &entry.bundle, &record.id)) {
            Ok(()) => containers.push(record.id.to_string()),
            Err(failure) => code = code.max(failure.report()),
        }
    }
    super::template::dismiss_standbys(host)?;
    // Those that nothing can use any more went when their successor was made.
    let templates = if flags.all { template::remove_all(&host.paths)? } else { Vec::new() };
    let options = PruneOptions { all: flags.all, in_use: host.rootfs_in_use()? };
    let images = host.images()?.prune(&options)?;
    let removed = Removed { containers, templates, images };
    if flags.json {
        output::json(&removed);
    } else {
        let Removed { containers, templates, images } = removed;
        let lines = [("container", containers), ("template", templates), ("image", images.images.clone())];
        for (kind, names) in lines {
            names.iter().for_each(|name| output::print(format!("{kind} {name}\n").as_bytes()));
        }
        output::print(format!("freed {} of images\n", size::bytes(images.bytes)).as_bytes());
    }
    Ok(code)
}

/// Asks on the terminal; where there is none, nobody can answer, and nothing is removed by accident.
fn confirmed(all: bool) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(
            Failure::new("prune removes things, and there is no terminal to ask on").hint("say --force")
        );
    }
    let images = if all { ", all templates, and all images that no container uses" } else { "" };
    let mut stderr = std::io::stderr();
    let asked =
        write!(stderr, "Remove all ended containers with their logs, loose image parts{images}? [y/N] ");
    let mut answer = String::new();
    asked
        .and_then(|()| stderr.flush())
        .and_then(|()| std::io::stdin().lock().read_line(&mut answer))
        .map_err(|error| Failure::new(format!("cannot ask: {error}")))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
