//! `kapsel version`.

use serde::Serialize;

use crate::failure::Outcome;
use crate::flags::system::Version;
use crate::output;

/// What `--json` prints.
#[derive(Serialize)]
struct About {
    version: &'static str,
    architecture: &'static str,
}

/// Prints the version.
pub fn run(flags: &Version) -> Outcome {
    let about = About { version: env!("CARGO_PKG_VERSION"), architecture: std::env::consts::ARCH };
    if flags.json {
        output::json(&about);
    } else {
        output::print(format!("kapsel {}\n", about.version).as_bytes());
    }
    Ok(0)
}
