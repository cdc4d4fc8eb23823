//! Which path of the host has which place in a pod's directory, and how many use it. Pure: nothing is mounted here.

use std::path::{Path, PathBuf};

/// The places of one pod.
#[derive(Clone, Debug, Default)]
pub struct Places {
    dir: Option<PathBuf>,
    made: u32,
    list: Vec<Place>,
    /// What of the host stands for the memory that the pod's processes share.
    pub(super) memory: Option<PathBuf>,
}

/// A path of the host in a pod's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name there.
    pub number: u32,
    /// On the host.
    pub source: PathBuf,
    /// The host refuses writes.
    pub read_only: bool,
    /// A file, not a directory.
    pub file: bool,
    /// It is mounted.
    pub there: bool,
    users: usize,
}

impl Places {
    /// Those of the pod whose directory is `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir: Some(dir), ..Self::default() }
    }

    /// The directory, once: for whoever has it mounted in the guest.
    pub(super) fn begin(&mut self) -> Option<PathBuf> {
        self.dir.take()
    }

    /// The place of a path, for one more user. All who may write see the same place, and whoever may only read does too if there is
    /// such a one: a socket in it is then one for both.
    pub fn take(&mut self, source: &Path, read_only: bool, file: bool) -> u32 {
        let fits = |place: &&mut Place| place.source == source && (read_only || !place.read_only);
        if let Some(place) = self.list.iter_mut().filter(fits).min_by_key(|place| place.read_only) {
            place.users += 1;
            return place.number;
        }
        let number = self.made;
        self.made += 1;
        let source = source.to_owned();
        self.list.push(Place { number, source, read_only, file, there: false, users: 1 });
        number
    }

    /// Does something for each place that is not there yet: it is then.
    ///
    /// # Errors
    /// The first of `make`.
    pub fn each_new<E>(&mut self, mut make: impl FnMut(&Place) -> Result<(), E>) -> Result<(), E> {
        for place in self.list.iter_mut().filter(|place| !place.there) {
            make(place)?;
            place.there = true;
        }
        Ok(())
    }

    /// Takes users away, and returns those places that have none any more.
    pub fn release(&mut self, numbers: &[u32]) -> Vec<Place> {
        for number in numbers {
            let place = self.list.iter_mut().find(|place| place.number == *number);
            place.into_iter().for_each(|place| place.users = place.users.saturating_sub(1));
        }
        self.list.extract_if(.., |place| place.users == 0).collect()
    }
}
