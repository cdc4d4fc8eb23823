//! `kapsel install`: tells an engine where kapsel is. Each engine's module turns the text of its file into another; here it is
//! shown, asked for and written.

mod containerd;
mod docker;
mod file;
mod podman;

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};
use crate::flags::system::{Engine, Install};
use crate::output;

/// Where containerd's and everybody's search path leads without anybody's doing.
const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// What an engine is told.
struct Wish {
    /// Absolute path of kapsel-runtime.
    runtime: String,
    /// Absolute path of the shim.
    shim: String,
    /// Make it the runtime of all containers that name none.
    default: bool,
}

/// What becomes of a file's text (`None`: there is no file), or why it is left alone.
type Edit = fn(Option<&str>, &Wish) -> Result<String, String>;

/// What is to be done to one file.
struct Change {
    /// The file.
    path: PathBuf,
    /// What is in it; `None` when it is not there.
    old: Option<String>,
    /// What will be.
    new: String,
}

/// Shows what an engine's configuration becomes, asks, and writes it.
pub fn run(flags: &Install) -> Outcome {
    let wish = Wish {
        runtime: program("kapsel-runtime")?,
        shim: program(kapsel_sandbox::programs::SHIM)?,
        default: flags.default,
    };
    let root = flags.destdir.as_deref().unwrap_or(Path::new("/"));
    let change = plan(flags.engine, &wish, root)?;
    let name = change.path.display();
    if change.old.as_ref() == Some(&change.new) {
        output::print(format!("{name} has it already: nothing to do\n").as_bytes());
        return Ok(0);
    }
    output::print(difference(&change).as_bytes());
    if flags.dry_run {
        return Ok(0);
    }
    if !flags.yes && !confirmed(&change.path)? {
        return Ok(0);
    }
    file::replace(&change.path, &change.new)?;
    output::print(format!("wrote {name}\n{}\n", next(flags.engine, flags.default)).as_bytes());
    Ok(0)
}

/// What the engine's file becomes. Touches nothing.
fn plan(engine: Engine, wish: &Wish, root: &Path) -> Result<Change, Failure> {
    let (path, edit): (_, Edit) = match engine {
        Engine::Podman => (podman::FILE, podman::edit),
        Engine::Docker => (docker::FILE, docker::edit),
        Engine::Containerd => (containerd::FILE, containerd::edit),
    };
    let path = root.join(path.trim_start_matches('/'));
    let old = file::read(&path)?;
    let new = edit(old.as_deref(), wish).map_err(|why| {
        Failure::new(format!("cannot add kapsel to {}: {why}", path.display()))
            .hint("nothing was changed; mend the file, or add the runtime by hand")
    })?;
    Ok(Change { path, old, new })
}

/// What the person does next.
fn next(engine: Engine, default: bool) -> String {
    let (restart, example) = match engine {
        Engine::Podman => ("nothing has to be restarted", "podman --runtime kapsel run"),
        Engine::Docker => (
            "restart Docker's daemon, so that it reads this: systemctl restart docker",
            "docker run --runtime kapsel",
        ),
        Engine::Containerd => (
            "restart containerd, so that it reads this: systemctl restart containerd",
            "ctr run --runtime io.containerd.kapsel.v2, and a RuntimeClass with the handler kapsel",
        ),
    };
    match default {
        true => format!("{restart}; containers are kapsel's from then on"),
        false => format!("{restart}; then: {example}"),
    }
}

/// A program that is installed beside this one, as engines shall call it.
fn program(name: &str) -> Result<String, Failure> {
    let missing =
        |why: String| Failure::new(format!("cannot find {name}: {why}")).hint("install all of kapsel");
    let own = std::env::current_exe().map_err(|error| missing(error.to_string()))?;
    let path = own.with_file_name(name);
    if !path.is_file() {
        return Err(missing(format!("{} is not there", path.display())));
    }
    path.into_os_string().into_string().map_err(|path| missing(format!("{path:?} is not UTF-8")))
}

/// The lines that go and come, with a few around them.
fn difference(change: &Change) -> String {
    const AROUND: usize = 2;
    let old: Vec<&str> = change.old.as_deref().unwrap_or_default().lines().collect();
    let new: Vec<&str> = change.new.lines().collect();
    let same = |a: &mut dyn Iterator<Item = (&&str, &&str)>| a.take_while(|(a, b)| a == b).count();
    let before = same(&mut old.iter().zip(&new));
    let after = same(&mut old[before..].iter().rev().zip(new[before..].iter().rev()));
    let state = if change.old.is_some() { "changes" } else { "new file" };
    let mut text = format!("{} ({state}):\n", change.path.display());
    let mut put =
        |sign: char, lines: &[&str]| lines.iter().for_each(|line| text += &format!("{sign} {line}\n"));
    put(' ', &old[before.saturating_sub(AROUND)..before]);
    put('-', &old[before..old.len() - after]);
    put('+', &new[before..new.len() - after]);
    put(' ', &old[old.len() - after..(old.len() - after + AROUND).min(old.len())]);
    text
}

/// Asks on the terminal; where there is none, nobody can answer, and nothing is changed by accident.
fn confirmed(path: &Path) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new(format!(
            "{} would be changed, and there is no terminal to ask on",
            path.display()
        ))
        .hint("say --yes, or --dry-run to see only"));
    }
    let mut stderr = std::io::stderr();
    let mut answer = String::new();
    write!(stderr, "Write this? [y/N] ")
        .and_then(|()| stderr.flush())
        .and_then(|()| std::io::stdin().lock().read_line(&mut answer))
        .map_err(|error| Failure::new(format!("cannot ask: {error}")))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_what_changes_and_little_around() {
        let change = Change {
            path: "/f".into(),
            old: Some("a\nb\nc\nd\ne\nf\n".into()),
            new: "a\nb\nc\nD\nE\ne\nf\n".into(),
        };
        assert_eq!(difference(&change), "/f (changes):\n  b\n  c\n- d\n+ D\n+ E\n  e\n  f\n");
        let change = Change { old: None, new: "x\n".into(), ..change };
        assert_eq!(difference(&change), "/f (new file):\n+ x\n");
    }
}
