//! Reading and replacing a file of somebody else's, so that it is never damaged.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::failure::Failure;

/// No configuration is larger.
const MAX: u64 = 1 << 20;

/// Reads a file; `None` when it is not there.
pub fn read(path: &Path) -> Result<Option<String>, Failure> {
    let cannot = |why: String| {
        Failure::new(format!("cannot read {}: {why}", path.display()))
            .hint("nothing was changed; kapsel changes only what it can read")
    };
    // Without waiting, should it be a FIFO.
    let file = OpenOptions::new().read(true).custom_flags(libc_nonblock()).open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(error.to_string())),
    };
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err(cannot("it is no file".to_owned()));
    }
    let mut text = String::new();
    file.take(MAX + 1).read_to_string(&mut text).map_err(|error| cannot(error.to_string()))?;
    if text.len() as u64 > MAX {
        return Err(cannot("it is larger than 1 MiB".to_owned()));
    }
    Ok(Some(text))
}

fn libc_nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

/// Gives a file another content, in one step, and leaves it its owner and its rights. Where it is a link, the file that it leads to.
pub fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let cannot = |error: io::Error| {
        Failure::new(format!("cannot write {}: {error}", target.display())).hint(match error.kind() {
            io::ErrorKind::PermissionDenied => "run it as root",
            _ => "nothing was changed",
        })
    };
    let dir = target.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).map_err(cannot)?;
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let new = dir.join(format!(".{name}.kapsel-{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
        if let Ok(old) = target.metadata() {
            std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
            file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &target)?;
        File::open(dir)?.sync_all()
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&new);
        cannot(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_keeps_its_rights_and_a_link_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        replace(&link, "new").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(link.is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
        replace(&dir.path().join("a/b/c"), "made").unwrap();
        assert_eq!(read(&dir.path().join("a/b/c")).unwrap().as_deref(), Some("made"));
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(&dir.path().join("none")).unwrap().is_none());
        assert!(read(dir.path()).is_err());
        let binary = dir.path().join("binary");
        fs::write(&binary, [0xff, 0xfe]).unwrap();
        assert!(read(&binary).is_err());
        let large = dir.path().join("large");
        fs::write(&large, "x".repeat((1 << 20) + 1)).unwrap();
        assert!(read(&large).is_err());
    }
}
