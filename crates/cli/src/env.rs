//! Variables for a container: from files, from flags, from kapsel's own environment.

use std::fs;

use crate::failure::Failure;
use crate::flags::run::ProcessFlags;
use crate::flags::value::EnvVar;
use crate::output::size;

/// The largest file of variables.
const LARGEST: u64 = 4 << 20;

/// All variables that the flags ask for, as `KEY=VALUE`: those of files first, so that flags win.
///
/// # Errors
/// When a file cannot be read or a line of it is no variable.
pub fn collect(flags: &ProcessFlags) -> Result<Vec<String>, Failure> {
    let mut variables = Vec::new();
    for path in &flags.env_files {
        let cannot =
            |error| Failure::new(format!("cannot read the variables in {}: {error}", path.display()));
        let size = fs::metadata(path).map_err(cannot)?.len();
        if size > LARGEST {
            return Err(Failure::new(format!("{} is too large for a file of variables", path.display()))
                .hint(format!("at most {} can be given", size::bytes(LARGEST))));
        }
        let text = fs::read_to_string(path).map_err(cannot)?;
        for (index, line) in text.lines().enumerate() {
            let variable = line_of(line).map_err(|reason| {
                Failure::new(format!("{}, line {}: {reason}", path.display(), index + 1))
                    .hint("write KEY=VALUE or KEY on each line; '#' begins a comment")
            })?;
            variables.extend(variable.and_then(|variable| variable.resolve()));
        }
    }
    variables.extend(flags.env.iter().filter_map(EnvVar::resolve));
    Ok(variables)
}

/// One line: values are taken as they are, quotes and trailing blanks too, as Docker does.
fn line_of(line: &str) -> Result<Option<EnvVar>, String> {
    let line = line.trim_start();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let variable: EnvVar = line.parse()?;
    match variable.key.contains(char::is_whitespace) {
        true => Err(format!("'{}' is no name of a variable", variable.key)),
        false => Ok(Some(variable)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_as_docker_reads_them() {
        let value = |line| line_of(line).unwrap().map(|variable| (variable.key, variable.value));
        assert_eq!(value(""), None);
        assert_eq!(value("  # comment"), None);
        assert_eq!(value("A=b c"), Some(("A".into(), Some("b c".into()))));
        assert_eq!(value("A=\"b\" "), Some(("A".into(), Some("\"b\" ".into()))));
        assert_eq!(value("A"), Some(("A".into(), None)));
        assert!(line_of("A B=c").is_err());
        assert!(line_of("=c").is_err());
    }
}
