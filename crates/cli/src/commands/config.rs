//! `kapsel config`.

use super::host::Host;
use crate::failure::Outcome;
use crate::flags::system::Config;
use crate::output;
use crate::output::table::Table;

/// Prints each key with its value and where that comes from. `--json` prints an array of
/// `{key, value, origin: {kind, at}, help}`.
pub fn run(host: &Host, flags: &Config) -> Outcome {
    let settings = host.config.effective();
    if flags.json {
        output::json(&settings);
        return Ok(0);
    }
    let mut table = Table::new(&["KEY", "VALUE", "FROM", "MEANING"]);
    for setting in settings {
        let value = if setting.value.is_empty() { "-".into() } else { setting.value };
        table.row([setting.key.to_owned(), value, setting.origin.to_string(), setting.help.to_owned()]);
    }
    table.print();
    Ok(0)
}
