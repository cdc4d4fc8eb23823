//! `kapsel cp`: with the meaning that Docker gives to directories and trailing slashes.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use kapsel_sandbox::attach;

use super::host::{Host, Sandbox};
use crate::archive::name::Top;
use crate::archive::{pack, unpack};
use crate::failure::{Failure, Outcome};
use crate::flags::container::Cp;
use crate::flags::value::CopyPath;
use crate::output;
use kapsel_sandbox::pump::{self, End};

/// File type bits of `st_mode`, and a directory's.
const TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;

/// Copies.
pub fn run(host: &Host, flags: &Cp) -> Outcome {
    match (&flags.source, &flags.destination) {
        (CopyPath::Container { name, path }, CopyPath::Host(to)) => {
            copy_out(&host.find(name)?, path, to, flags)
        }
        (CopyPath::Container { name, path }, CopyPath::Stream) => stream_out(&host.find(name)?, path, flags),
        (CopyPath::Host(from), CopyPath::Container { name, path }) => {
            copy_in(&host.find(name)?, from, path, flags)
        }
        (CopyPath::Stream, CopyPath::Container { name, path }) => stream_in(&host.find(name)?, path, flags),
        (CopyPath::Container { .. }, CopyPath::Container { .. }) => {
            Err(Failure::new("cannot copy from one container to another")
                .hint("copy to this machine first, or by '-' and a pipe"))
        }
        _ => {
            Err(Failure::new("neither SRC nor DST is in a container")
                .hint("write one of them as CONTAINER:PATH"))
        }
    }
}

/// What the way of writing a path says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// `dir/.`: what is in it.
    Content,
    /// `dir/`: must be a directory.
    Slash,
    /// Neither.
    Plain,
}

fn ending(path: &str) -> Ending {
    match path {
        "." => Ending::Content,
        _ if path.ends_with("/.") => Ending::Content,
        _ if path.ends_with('/') => Ending::Slash,
        _ => Ending::Plain,
    }
}

/// What is at a path, as far as copying to it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Directory,
    File,
    Nothing,
}

/// In which directory to unpack, and what becomes of the top of the archive.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directory: PathBuf,
    top: Top,
}

/// Docker's rules: a directory takes the source in, a name that does not exist becomes the source's.
fn place(from_directory: bool, from: Ending, to: &str, at: At) -> Result<Place, Failure> {
    let path = PathBuf::from(to);
    match at {
        At::Directory if from_directory && from == Ending::Content => {
            Ok(Place { directory: path, top: Top::Strip })
        }
        At::Directory => Ok(Place { directory: path, top: Top::Keep }),
        At::File if from_directory => {
            Err(Failure::new(format!("cannot copy a directory to {to}, which is a file"))
                .hint("give a directory"))
        }
        At::Nothing if !from_directory && ending(to) != Ending::Plain => {
            Err(Failure::new(format!("the directory {to} does not exist"))
                .hint("make it first, or leave the slash out"))
        }
        At::File | At::Nothing => {
            let name = path.file_name().map(OsStr::to_owned);
            let name = name.ok_or_else(|| Failure::new(format!("{to} is no name for a file")))?;
            let directory =
                path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok(Place { directory: directory.to_owned(), top: Top::Rename(name) })
        }
    }
}

fn copy_out(sandbox: &Sandbox, from: &str, to: &str, flags: &Cp) -> Outcome {
    let is_directory = stat_source(sandbox, from, flags)?;
    let (to, at) = target(to)?;
    let Place { directory, top } = place(is_directory, ending(from), &to, at)?;
    let directory = directory
        .canonicalize()
        .map_err(|error| Failure::new(format!("cannot copy to {}: {error}", directory.display())))?;
    let stream = attach::copy_out(&sandbox.bundle, without_dot(from), follow(from, flags))?;
    // The root of a container has no name that could be the top of the archive.
    let top = if without_dot(from) == "/" && top == Top::Keep { Top::Strip } else { top };
    let options = unpack::Options { top, keep_owner: flags.archive };
    let unpacked = unpack::unpack(io::BufReader::with_capacity(256 << 10, stream), &directory, &options)
        .map_err(|error| Failure::new(format!("cannot copy {from} to {}: {error}", directory.display())))?;
    warn_skipped(unpacked.skipped, "devices, pipes and sockets");
    Ok(0)
}

/// What is at a path of the host's: a file that a link leads to, under its own name. What is neither file nor directory must stay what
/// it is: as root this could replace /dev/null.
fn target(to: &str) -> Result<(Cow<'_, str>, At), Failure> {
    let meta = match std::fs::metadata(to) {
        Ok(meta) => meta,
        Err(_) => return Ok((to.into(), At::Nothing)),
    };
    if meta.is_dir() {
        return Ok((to.into(), At::Directory));
    }
    if !meta.is_file() {
        return Err(Failure::new(format!("cannot copy to {to}, which is neither a file nor a directory"))
            .hint("'-' instead of it writes a tar archive to standard output"));
    }
    let found = std::fs::canonicalize(to).ok().and_then(|path| path.into_os_string().into_string().ok());
    Ok((found.map_or_else(|| to.into(), Cow::from), At::File))
}

fn stream_out(sandbox: &Sandbox, from: &str, flags: &Cp) -> Outcome {
    if io::stdout().is_terminal() {
        return Err(Failure::new("a tar archive would go to the terminal").hint("redirect standard output"));
    }
    stat_source(sandbox, from, flags)?;
    let stream = attach::copy_out(&sandbox.bundle, without_dot(from), follow(from, flags))?;
    match pump::pump(stream.as_fd(), rustix::stdio::stdout(), &AtomicBool::new(false)) {
        Ok(End::Eof) => Ok(0),
        Ok(End::ReaderGone) => output::die_of_broken_pipe(),
        Err(error) => Err(Failure::new(format!("cannot write the archive: {error}"))),
    }
}

/// Whether the source in a container is a directory.
fn stat_source(sandbox: &Sandbox, from: &str, flags: &Cp) -> Result<bool, Failure> {
    let stat = attach::stat(&sandbox.bundle, from, follow(from, flags))?;
    let is_directory = stat.mode & TYPE == DIRECTORY;
    if !is_directory && ending(from) != Ending::Plain {
        return Err(Failure::new(format!("{from} is no directory")).hint("leave the slash out"));
    }
    Ok(is_directory)
}

/// A path that ends in a slash means the directory, also when a link leads there.
fn follow(path: &str, flags: &Cp) -> bool {
    flags.follow_link || ending(path) != Ending::Plain
}

fn without_dot(path: &str) -> &str {
    match path.strip_suffix("/.") {
        Some("") => "/",
        Some(path) => path,
        None => path,
    }
}

fn copy_in(sandbox: &Sandbox, from: &str, to: &str, flags: &Cp) -> Outcome {
    let cannot = |error: io::Error| Failure::new(format!("cannot copy {from}: {error}"));
    let follow = follow(from, flags);
    let meta =
        if follow { std::fs::metadata(from) } else { std::fs::symlink_metadata(from) }.map_err(cannot)?;
    if !meta.is_dir() && ending(from) != Ending::Plain {
        return Err(Failure::new(format!("{from} is no directory")).hint("leave the slash out"));
    }
    let at = match attach::stat(&sandbox.bundle, to, true) {
        Ok(stat) if stat.mode & TYPE == DIRECTORY => At::Directory,
        Ok(_) => At::File,
        Err(attach::Error::Refused(_)) => At::Nothing,
        Err(error) => return Err(error.into()),
    };
    let Place { directory, top } = place(meta.is_dir(), ending(from), to, at)?;
    let name = match top {
        Top::Rename(name) => name,
        // The archive's top is named '.': its content lands in the directory itself.
        Top::Strip => OsString::from("."),
        Top::Keep => source_name(from)?,
    };
    let directory =
        directory.to_str().ok_or_else(|| Failure::new("the path in the container is not UTF-8"))?;
    let skipped =
        send(sandbox, directory, flags.archive, |writer| pack::pack(Path::new(from), &name, follow, writer))
            .map_err(|failure| failure.about(&format!("cannot copy {from} to {to}")))?;
    warn_skipped(skipped, "sockets");
    Ok(0)
}

/// The name of a source: `..` and the like have one only after looking.
fn source_name(from: &str) -> Result<OsString, Failure> {
    let path = Path::new(from);
    let named = path.file_name().map(OsStr::to_owned);
    let found = || path.canonicalize().ok().and_then(|path| path.file_name().map(OsStr::to_owned));
    named.or_else(found).ok_or_else(|| {
        Failure::new(format!("{from} has no name to copy it as"))
            .hint(format!("'{from}/.' copies what is in it"))
    })
}

/// Lets `make` write an archive that the container unpacks.
fn send(
    sandbox: &Sandbox,
    directory: &str,
    keep_owner: bool,
    make: impl FnOnce(io::BufWriter<io::PipeWriter>) -> io::Result<u64> + Send,
) -> Result<u64, Failure> {
    let (mut reader, writer) =
        io::pipe().map_err(|error| Failure::new(format!("cannot make a pipe: {error}")))?;
    std::thread::scope(|scope| {
        let packing = scope.spawn(move || make(io::BufWriter::with_capacity(64 << 10, writer)));
        let unpacked = attach::copy_in(&sandbox.bundle, directory, keep_owner, &mut reader);
        drop(reader);
        let packed = packing.join().map_err(|_| Failure::new("packing failed"))?;
        match (unpacked, packed) {
            // What went wrong on this side came first, unless it is only that the other side stopped listening.
            (_, Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(error)),
            (Err(error), _) => Err(error.into()),
            (Ok(_), packed) => Ok(packed.unwrap_or(0)),
        }
    })
}

fn stream_in(sandbox: &Sandbox, to: &str, flags: &Cp) -> Outcome {
    let mut stdin = io::stdin().lock();
    if stdin.is_terminal() {
        return Err(Failure::new("standard input is a terminal, not a tar archive").hint("pipe one in"));
    }
    attach::copy_in(&sandbox.bundle, to, flags.archive, &mut stdin)?;
    Ok(0)
}

fn warn_skipped(count: u64, what: &str) {
    if count > 0 {
        let _ = writeln!(io::stderr(), "kapsel: left out: {count} {what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(from_directory: bool, from: &str, to: &str, at: At) -> Option<(String, Top)> {
        let place = place(from_directory, ending(from), to, at).ok()?;
        Some((place.directory.display().to_string(), place.top))
    }

    /// The table in Docker's documentation of `docker cp`.
    #[test]
    fn dockers_rules() {
        let rename = |name: &str| Top::Rename(name.into());
        // A file.
        assert_eq!(placed(false, "f", "/d/new", At::Nothing), Some(("/d".into(), rename("new"))));
        assert_eq!(placed(false, "f", "/d/new/", At::Nothing), None);
        assert_eq!(placed(false, "f", "/d/old", At::File), Some(("/d".into(), rename("old"))));
        assert_eq!(placed(false, "f", "/d", At::Directory), Some(("/d".into(), Top::Keep)));
        assert_eq!(placed(false, "f", "new", At::Nothing), Some((".".into(), rename("new"))));
        // A directory.
        assert_eq!(placed(true, "s", "/d/new", At::Nothing), Some(("/d".into(), rename("new"))));
        assert_eq!(placed(true, "s", "/d/new/", At::Nothing), Some(("/d".into(), rename("new"))));
        assert_eq!(placed(true, "s/.", "/d/new", At::Nothing), Some(("/d".into(), rename("new"))));
        assert_eq!(placed(true, "s", "/d/old", At::File), None);
        assert_eq!(placed(true, "s", "/d", At::Directory), Some(("/d".into(), Top::Keep)));
        assert_eq!(placed(true, "s/", "/d", At::Directory), Some(("/d".into(), Top::Keep)));
        assert_eq!(placed(true, "s/.", "/d", At::Directory), Some(("/d".into(), Top::Strip)));
    }

    #[test]
    fn what_is_no_file_stays_what_it_is() {
        assert!(target("/dev/null").is_err());
        let dir = tempfile::tempdir().unwrap();
        let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(name("file"), "").unwrap();
        std::os::unix::fs::symlink("file", name("link")).unwrap();
        std::os::unix::fs::symlink("/dev/null", name("device")).unwrap();
        let real = dir.path().canonicalize().unwrap().join("file");
        assert_eq!(target(&name("link")).unwrap(), (real.to_str().unwrap().into(), At::File));
        assert!(target(&name("device")).is_err());
        assert_eq!(target(&name("none")).unwrap().1, At::Nothing);
        assert_eq!(target(&name("")).unwrap().1, At::Directory);
    }

    #[test]
    fn the_dot_at_the_end() {
        assert_eq!(without_dot("/a/."), "/a");
        assert_eq!(without_dot("/."), "/");
        assert_eq!(without_dot("/a"), "/a");
        assert_eq!(source_name("/a/b/").unwrap(), "b");
        assert_eq!(source_name("/etc/..").ok(), None);
    }
}
