//! Reads files of the host into a tar stream.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Writes `path`, with all below it when it is a directory, as a tar archive to `stream`. The names in it begin with
/// `name`. Links are archived as links, but for `path` itself when `follow` is set.
///
/// Gives how many sockets were left out: no archive can hold one.
///
/// # Errors
/// When something cannot be read or the stream takes no more.
pub fn pack(path: &Path, name: &OsStr, follow: bool, stream: impl Write) -> io::Result<u64> {
    let mut builder = tar::Builder::new(stream);
    builder.follow_symlinks(false);
    // Plain entries only: every tar reader understands them.
    builder.sparse(false);
    let resolved;
    let path = match follow {
        true => {
            resolved = fs::canonicalize(path)?;
            &resolved
        }
        false => path,
    };
    let mut skipped = 0;
    append(&mut builder, path, Path::new(name), &mut skipped)?;
    builder.into_inner()?.flush()?;
    Ok(skipped)
}

fn append(
    builder: &mut tar::Builder<impl Write>,
    path: &Path,
    name: &Path,
    skipped: &mut u64,
) -> io::Result<()> {
    let about = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let meta = fs::symlink_metadata(path).map_err(about)?;
    if meta.file_type().is_socket() {
        *skipped += 1;
        return Ok(());
    }
    if !meta.is_dir() {
        // The stream breaking is not the file's fault: do not name the file then.
        return builder.append_path_with_name(path, name).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => error,
            _ => about(error),
        });
    }
    builder.append_dir(name, path).map_err(about)?;
    let mut children: Vec<_> = fs::read_dir(path)
        .and_then(|entries| entries.map(|e| Ok(e?.file_name())).collect::<io::Result<_>>())
        .map_err(about)?;
    children.sort();
    children.iter().try_for_each(|child| append(builder, &path.join(child), &name.join(child), skipped))
}

#[cfg(test)]
mod tests {
    use super::super::name::Top;
    use super::super::unpack;
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    #[test]
    fn what_is_packed_can_be_unpacked() {
        let from = tempfile::tempdir().unwrap();
        let tree = from.path().join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/file"), vec![7; 100_000]).unwrap();
        symlink("sub/file", tree.join("link")).unwrap();
        let _socket = UnixListener::bind(tree.join("socket")).unwrap();
        let mut stream = Vec::new();
        assert_eq!(pack(&tree, OsStr::new("top"), false, &mut stream).unwrap(), 1);
        let to = tempfile::tempdir().unwrap();
        let options = unpack::Options { top: Top::Rename("copy".into()), keep_owner: false };
        unpack::unpack(&stream[..], to.path(), &options).unwrap();
        assert_eq!(fs::read(to.path().join("copy/sub/file")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read_link(to.path().join("copy/link")).unwrap(), Path::new("sub/file"));
    }

    #[test]
    fn a_link_is_followed_only_when_asked_for() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("file"), "x").unwrap();
        symlink("file", from.path().join("link")).unwrap();
        for (follow, kind) in [(false, tar::EntryType::Symlink), (true, tar::EntryType::Regular)] {
            let mut stream = Vec::new();
            pack(&from.path().join("link"), OsStr::new("n"), follow, &mut stream).unwrap();
            let mut archive = tar::Archive::new(&stream[..]);
            let entry = archive.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(entry.header().entry_type(), kind);
        }
    }
}
