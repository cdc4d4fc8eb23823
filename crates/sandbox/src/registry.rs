//! All sandboxes of one state directory: their names, and finding one by what a person typed.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use crate::{
    paths::{self, Bundle, Id, Paths},
    record::{self, Record},
};

/// Why a sandbox was not found or made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name belongs to another sandbox.
    #[error(
        "the name {name:?} is in use by sandbox {id}; choose another or remove it with `kapsel rm -f {name}`"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// Short id of its owner.
        id: String,
    },
    /// The name has characters that names must not have.
    #[error(
        "{0:?} is no valid name: use letters, digits, '_', '.' and '-', starting with a letter or digit, at most 64"
    )]
    BadName(String),
    /// Nothing matches.
    #[error("there is no sandbox {0:?}; `kapsel ps -a` lists all")]
    NotFound(String),
    /// Several match.
    #[error("{prefix:?} is the beginning of {count} ids; give more digits")]
    Ambiguous {
        /// What was typed.
        prefix: String,
        /// How many match.
        count: usize,
    },
    /// A process that a signal does not end.
    #[error("the shim of {0} does not end, though it was killed; something on this host keeps it")]
    Stuck(PathBuf),
    /// The directories are not usable.
    #[error(transparent)]
    Paths(#[from] paths::Error),
    /// The record is not usable.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The sandboxes below one state directory.
#[derive(Clone, Debug)]
pub struct Registry {
    paths: Paths,
}

impl Registry {
    /// Opens the registry, creating its directories where they are missing.
    ///
    /// # Errors
    /// When the directories are not usable.
    pub fn open(paths: &Paths) -> Result<Self, Error> {
        paths.prepare()?;
        Ok(Self { paths: paths.clone() })
    }

    /// Where things are.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Makes the bundle directory of a new sandbox, claims its name and writes its first record. An empty name is
    /// replaced by a free one that can be remembered.
    ///
    /// # Errors
    /// When the name is in use or not valid, or the directory cannot be written.
    pub fn create(&self, record: &mut Record) -> Result<Bundle, Error> {
        let bundle = self.paths.bundle(&record.id);
        let io = |source| Error::Io { what: "create", path: bundle.dir().into(), source };
        let _lock = self.lock()?;
        fs::DirBuilder::new().mode(0o700).create(bundle.dir()).map_err(io)?;
        let written = self.enter(record, &bundle);
        if written.is_err() {
            let _ = fs::remove_dir_all(bundle.dir());
        }
        written.map(|()| bundle)
    }

    /// Makes the bundle of a machine that stood by a sandbox's, as [`Registry::create`] a new one.
    ///
    /// # Errors
    /// When the name is in use or not valid, or the record cannot be written. The bundle is as it was then.
    pub(crate) fn adopt(&self, record: &mut Record) -> Result<Bundle, Error> {
        let bundle = self.paths.bundle(&record.id);
        let _lock = self.lock()?;
        self.enter(record, &bundle).map(|()| bundle)
    }

    fn enter(&self, record: &mut Record, bundle: &Bundle) -> Result<(), Error> {
        if record.name.is_empty() { self.claim_any(record) } else { self.claim(record) }?;
        Ok(record.write(bundle)?)
    }

    fn claim_any(&self, record: &mut Record) -> Result<(), Error> {
        loop {
            record.name = crate::names::random();
            match self.claim(record) {
                Err(Error::NameInUse { .. }) => {}
                other => return other,
            }
        }
    }

    /// Points the name at the sandbox. A link whose sandbox is gone is nobody's.
    fn claim(&self, record: &Record) -> Result<(), Error> {
        if !crate::names::is_valid(&record.name) {
            return Err(Error::BadName(record.name.clone()));
        }
        let link = self.paths.names().join(&record.name);
        let io = |source| Error::Io { what: "claim name", path: link.clone(), source };
        if let Ok(target) = fs::read_link(&link) {
            let id = target.to_string_lossy().into_owned();
            if self.paths.sandboxes().join(&target).join("sandbox.json").exists() {
                return Err(Error::NameInUse { name: record.name.clone(), id });
            }
            fs::remove_file(&link).map_err(io)?;
        }
        std::os::unix::fs::symlink(record.id.short(), &link).map_err(io)
    }

    /// Removes a bundle and its name. The caller has made sure that no shim owns it any more.
    ///
    /// # Errors
    /// When files cannot be removed.
    pub fn remove(&self, bundle: &Bundle) -> Result<(), Error> {
        let name = Record::read(bundle).ok().map(|record| record.name);
        remove_bundle(&self.paths.names(), bundle, name.as_deref())
    }

    /// Whether a sandbox has ended that goes with its end: its shim gives its name away first, and then clears up.
    pub fn is_leaving(&self, bundle: &Bundle, record: &Record) -> bool {
        record.remove && !has_name(&self.paths.names().join(&record.name), bundle)
    }

    fn lock(&self) -> Result<fs::File, Error> {
        let path = self.paths.state().join("lock");
        let io = |source| Error::Io { what: "lock", path: path.clone(), source };
        let file = fs::OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|e| io(e.into()))?;
        Ok(file)
    }

    /// All bundles, in no particular order; also those whose record is damaged.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn bundles(&self) -> Result<Vec<Bundle>, Error> {
        let dir = self.paths.sandboxes();
        let io = |source| Error::Io { what: "list", path: dir.clone(), source };
        fs::read_dir(&dir).map_err(io)?.map(|entry| entry.map(|e| Bundle::at(e.path())).map_err(io)).collect()
    }

    /// Finds a sandbox by its name, its id, or the beginning of its id. Names win.
    ///
    /// # Errors
    /// When nothing matches, or more than one.
    pub fn resolve(&self, typed: &str) -> Result<Bundle, Error> {
        let not_found = || Error::NotFound(typed.into());
        if crate::names::is_valid(typed)
            && let Ok(target) = fs::read_link(self.paths.names().join(typed))
        {
            let bundle = Bundle::at(self.paths.sandboxes().join(target));
            if bundle.record().exists() {
                return Ok(bundle);
            }
        }
        if typed.is_empty() || !typed.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(not_found());
        }
        let mut matching = self.bundles()?;
        matching.retain(|bundle| bundle.record().exists() && matches_id(bundle, typed));
        match matching.len() {
            0 => Err(not_found()),
            1 => Ok(matching.swap_remove(0)),
            count => Err(Error::Ambiguous { prefix: typed.into(), count }),
        }
    }
}

fn matches_id(bundle: &Bundle, typed: &str) -> bool {
    let dir = bundle.dir().file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if typed.len() <= Id::SHORT {
        return dir.starts_with(typed);
    }
    typed.starts_with(dir) && Record::read(bundle).is_ok_and(|record| record.id.as_str().starts_with(typed))
}

/// Removes the directory first and then the name, so that a crash in between leaves a link that nobody honours.
pub(crate) fn remove_bundle(names: &Path, bundle: &Bundle, name: Option<&str>) -> Result<(), Error> {
    match fs::remove_dir_all(bundle.dir()) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Io { what: "remove", path: bundle.dir().into(), source });
        }
        _ => {}
    }
    if let Some(name) = name {
        release_name(names, bundle, name);
    }
    Ok(())
}

/// Frees a name, if it is still this bundle's: it may belong to a successor already.
pub(crate) fn release_name(names: &Path, bundle: &Bundle, name: &str) {
    let link = names.join(name);
    if has_name(&link, bundle) {
        let _ = fs::remove_file(link);
    }
}

fn has_name(link: &Path, bundle: &Bundle) -> bool {
    fs::read_link(link).is_ok_and(|target| Some(target.as_os_str()) == bundle.dir().file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::discover(Some(dir.path())).unwrap();
        (dir, Registry::open(&paths).unwrap())
    }

    fn new(name: &str) -> Record {
        Record::new(Id::random(), name.into(), vec![])
    }

    #[test]
    fn names_are_unique_until_removed() {
        let (_dir, registry) = registry();
        let mut first = new("web");
        let bundle = registry.create(&mut first).unwrap();
        let error = registry.create(&mut new("web")).unwrap_err();
        assert!(matches!(&error, Error::NameInUse { id, .. } if id == first.id.short()), "{error}");
        assert_eq!(registry.bundles().unwrap().len(), 1, "a refused sandbox leaves no bundle");
        registry.remove(&bundle).unwrap();
        registry.create(&mut new("web")).unwrap();
    }

    #[test]
    fn removing_late_does_not_take_the_successors_name() {
        let (_dir, registry) = registry();
        let old = registry.create(&mut new("web")).unwrap();
        fs::remove_file(old.record()).unwrap();
        let young = registry.create(&mut new("web")).unwrap();
        remove_bundle(&registry.paths.names(), &old, Some("web")).unwrap();
        assert_eq!(registry.resolve("web").unwrap(), young);
    }

    #[test]
    fn one_of_many_racing_for_a_name_wins() {
        let (_dir, registry) = registry();
        let won = std::thread::scope(|scope| {
            let racers: Vec<_> =
                (0..8).map(|_| scope.spawn(|| registry.create(&mut new("race")).is_ok())).collect();
            racers.into_iter().filter(|_| true).map(|r| r.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn names_cannot_leave_their_directory() {
        let (_dir, registry) = registry();
        for bad in ["../x", "a/b", ".hidden", "-flag", "a b", &"x".repeat(65)] {
            assert!(matches!(registry.create(&mut new(bad)), Err(Error::BadName(_))), "{bad}");
        }
    }

    #[test]
    fn resolving_by_name_prefix_and_full_id() {
        let (_dir, registry) = registry();
        let mut record = new("");
        let bundle = registry.create(&mut record).unwrap();
        assert!(!record.name.is_empty());
        for typed in [record.name.as_str(), record.id.as_str(), record.id.short(), &record.id.as_str()[..4]] {
            assert_eq!(registry.resolve(typed).unwrap(), bundle, "{typed}");
        }
        let mut wrong = record.id.short().to_owned();
        wrong.push_str(if record.id.as_str().as_bytes()[12] == b'0' { "1" } else { "0" });
        for typed in ["", "nobody", "../sandboxes", &wrong] {
            assert!(matches!(registry.resolve(typed), Err(Error::NotFound(_))), "{typed}");
        }
        for _ in 0..40 {
            registry.create(&mut new("")).unwrap();
        }
        let typed = &record.id.as_str()[..0];
        assert!(matches!(registry.resolve(typed), Err(Error::NotFound(_))));
        let digits = "0123456789abcdef";
        let ambiguous = digits.chars().map(|d| registry.resolve(&d.to_string()));
        assert!(ambiguous.into_iter().any(|r| matches!(r, Err(Error::Ambiguous { .. }))));
    }
}
