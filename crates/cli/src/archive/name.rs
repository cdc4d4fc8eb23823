//! Where an entry of an archive goes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What becomes of the first component of each name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Top {
    /// It stays.
    Keep,
    /// It becomes this: the copy gets another name.
    Rename(OsString),
    /// It goes: what is in the directory is copied, not the directory.
    Strip,
}

/// Names longer than this are refused: no path of Linux is.
const LONGEST: usize = 4096;

/// The path for an entry's name, relative to where the archive is unpacked; empty for that place itself.
///
/// # Errors
/// Says what is wrong with a name that would lead elsewhere.
pub fn place(name: &[u8], top: &Top) -> Result<PathBuf, &'static str> {
    if name.len() > LONGEST {
        return Err("its name is too long");
    }
    if name.contains(&0) {
        return Err("its name has a NUL in it");
    }
    let mut path = PathBuf::new();
    let components = name.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    for (index, part) in components.enumerate() {
        if part == b".." {
            return Err("its name leads out of the directory");
        }
        match top {
            Top::Strip if index == 0 => {}
            Top::Rename(other) if index == 0 => path.push(other),
            _ => path.push(OsStr::from_bytes(part)),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    #[test]
    fn names_are_kept_renamed_or_stripped() {
        let rename = Top::Rename("new".into());
        for (name, top, path) in [
            ("a/b", &Top::Keep, "a/b"),
            ("./a//b/", &Top::Keep, "a/b"),
            ("/etc/passwd", &Top::Keep, "etc/passwd"),
            ("a/b", &rename, "new/b"),
            ("a", &rename, "new"),
            ("a/b", &Top::Strip, "b"),
            ("a/", &Top::Strip, ""),
        ] {
            assert_eq!(place(name.as_bytes(), top), Ok(PathBuf::from(path)), "{name} {top:?}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["..", "a/../../b", "../a", "a/.."] {
            assert!(place(name.as_bytes(), &Top::Strip).is_err(), "{name}");
        }
        assert!(place(b"a\0b", &Top::Keep).is_err());
        assert!(place(&[b'a'; 5000], &Top::Keep).is_err());
    }

    proptest! {
        #[test]
        fn a_place_never_leaves_the_directory(name in proptest::collection::vec(prop_oneof![
            Just(b'/'), Just(b'.'), any::<u8>()], 0..40)) {
            if let Ok(path) = place(&name, &Top::Keep) {
                prop_assert!(Path::new(&path).components().all(|c| matches!(c, Component::Normal(_))));
            }
        }
    }
}
