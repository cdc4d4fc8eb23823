//! Processes that serve disks and shared directories (vhost-user): a disk's is spoken to as soon as the disk is named, so that whoever
//! names it learns what is wrong with it, and a machine that is built takes the session over.

use kapsel_devices::vhost_user::{Error, Model, VhostUser};

use crate::config::{CacheType, Drive, Share};

/// Sessions that no machine has taken over yet, by the names of their disks.
#[derive(Debug, Default)]
pub struct Backends(Vec<(String, VhostUser)>);

impl Backends {
    /// Begins the session of a disk, which ends an earlier one of that name. A disk of a file has none.
    ///
    /// # Errors
    /// [`Error`]; the earlier session goes on.
    pub fn put(&mut self, drive: &Drive) -> Result<(), Error> {
        let session = drive.socket.as_deref().map(|socket| disk(drive, socket)).transpose()?;
        self.0.retain(|(other, _)| *other != drive.drive_id);
        self.0.extend(session.map(|session| (drive.drive_id.clone(), session)));
        Ok(())
    }

    /// Gives the session of a disk away, or a new one.
    ///
    /// # Errors
    /// [`Error`] when there is none to be had.
    pub fn take(&mut self, drive: &Drive, socket: &str) -> Result<VhostUser, Error> {
        match self.0.iter().position(|(other, _)| *other == drive.drive_id) {
            Some(index) => Ok(self.0.swap_remove(index).1),
            None => disk(drive, socket),
        }
    }
}

fn disk(drive: &Drive, socket: &str) -> Result<VhostUser, Error> {
    VhostUser::connect(Model::Disk { flush: drive.cache_type == CacheType::Writeback }, socket)
}

/// The session of a shared directory.
///
/// # Errors
/// [`Error`] when there is none to be had.
pub fn directory(share: &Share) -> Result<VhostUser, Error> {
    VhostUser::connect(Model::Directory { tag: share.tag.clone() }, &share.socket)
}
