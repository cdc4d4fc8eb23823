//! Users and groups by name, from the image's own `/etc/passwd` and `/etc/group`.
//!
//! The files are the image's, so hostile: their size is bounded, a broken line is passed over, and they are opened only once
//! the container's root is this process's root, where no symbolic link leads out of it.

use std::fs::File;
use std::io::Read;

use rustix::fs::{FileType, Mode, OFlags};

/// Bytes of each file that are read; what follows is not seen.
const FILE_MAX: u64 = 1 << 20;

/// Supplementary groups (the kernel's NGROUPS_MAX).
const GROUPS_MAX: usize = 65_536;

/// The largest id that a name may stand for (as Docker's).
const ID_MAX: u32 = i32::MAX as u32;

/// Who a process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups that the files name.
    pub groups: Vec<u32>,
    /// Home directory; `/` when the files know none.
    pub home: String,
}

/// Why a user cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// No such name.
    #[error("unable to find user {0}: no matching entries in the image's passwd file")]
    NoUser(String),
    /// No such name.
    #[error("unable to find group {0}: no matching entries in the image's group file")]
    NoGroup(String),
    /// Above 2^31 - 1.
    #[error("id {0} is out of range")]
    Range(String),
}

/// What the image's files say of users.
#[derive(Debug)]
pub struct Accounts {
    /// `/etc/passwd`.
    pub passwd: Vec<u8>,
    /// `/etc/group`.
    pub group: Vec<u8>,
}

impl Accounts {
    /// Reads both files of the container whose root is this process's.
    pub fn read() -> Self {
        Self { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|&b| b == b'\n').filter_map(|line| {
        let line = std::str::from_utf8(line).ok()?.trim();
        (!line.is_empty() && !line.starts_with('#')).then_some(line)
    })
}

fn users(passwd: &[u8]) -> impl Iterator<Item = Passwd<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let _password = fields.next()?;
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let _comment = fields.next();
        Some(Passwd { name, uid, gid, home: fields.next().unwrap_or_default() })
    })
}

/// Name, id and members.
fn groups(group: &[u8]) -> impl Iterator<Item = (&str, u32, &str)> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let _password = fields.next()?;
        let gid = fields.next()?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn numeric(text: &str) -> Result<Option<u32>, UserError> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse() {
        Ok(id) if id <= ID_MAX => Ok(Some(id)),
        _ => Err(UserError::Range(text.to_owned())),
    }
}

/// Resolves `user`, `uid`, `user:group` or `uid:gid` (any mixture) as Docker does: a name wins over a number; a number
/// need not be in the files; supplementary groups are those that list the user, and only when no group is asked for.
///
/// # Errors
/// When a name is not in the files or a number is out of range.
pub fn resolve(request: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, UserError> {
    let (user, wanted_group) = request.split_once(':').unwrap_or((request, ""));
    let uid = numeric(user)?;
    let entry = users(passwd)
        .find(|e| !e.name.is_empty() && e.name == user)
        .or_else(|| users(passwd).find(|e| if user.is_empty() { e.uid == 0 } else { Some(e.uid) == uid }));
    let mut identity = match (&entry, uid) {
        (Some(entry), _) => {
            Identity { uid: entry.uid, gid: entry.gid, home: entry.home.to_owned(), groups: vec![] }
        }
        (None, Some(uid)) => Identity { uid, ..Identity::default() },
        (None, None) if user.is_empty() => Identity::default(),
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    if wanted_group.is_empty() {
        if let Some(entry) = entry {
            let member = |members: &str| members.split(',').any(|m| m == entry.name);
            let of = groups(group).filter(|(_, _, members)| member(members));
            identity.groups = of.map(|(_, gid, _)| gid).take(GROUPS_MAX).collect();
        }
    } else {
        let gid = numeric(wanted_group)?;
        let found = groups(group).find(|(name, _, _)| *name == wanted_group).map(|(_, gid, _)| gid);
        identity.gid = found.or(gid).ok_or_else(|| UserError::NoGroup(wanted_group.to_owned()))?;
    }
    if !identity.home.starts_with('/') {
        identity.home = "/".to_owned();
    }
    Ok(identity)
}

/// The home directory of a user, `/` when the file knows none.
pub fn home(uid: u32, passwd: &[u8]) -> String {
    let found = users(passwd).find(|e| e.uid == uid && e.home.starts_with('/'));
    found.map_or_else(|| "/".to_owned(), |e| e.home.to_owned())
}

/// Reads `/etc/passwd` or `/etc/group` of the container whose root is this process's. A file that is missing, special or
/// unreadable is empty.
fn read(path: &str) -> Vec<u8> {
    // Non-blocking: the image may have put a FIFO there.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut content = Vec::new();
    if let Ok(fd) = rustix::fs::open(path, flags, Mode::empty())
        && let Ok(stat) = rustix::fs::fstat(&fd)
        && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
    {
        // What was read before an error is as good as a shorter file.
        let _ = File::from(fd).take(FILE_MAX).read_to_end(&mut content);
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\nworse:x:many:0::/:\n\
        www:x:33:34:Web,,,:/var/www:/bin/false\n1000:x:7:8::/numeric:\nrel:x:9:9::relative:\nwww:x:1:1::/second:\n";
    const GROUP: &[u8] =
        b"root:x:0:\nwww:x:34:\nadm:x:4:root,www\nshadow:x:42:www,other\nbad:x:z:www\n12:x:77:\n";

    fn id(uid: u32, gid: u32, groups: &[u32], home: &str) -> Result<Identity, UserError> {
        Ok(Identity { uid, gid, groups: groups.to_vec(), home: home.into() })
    }

    #[test]
    fn resolves_as_docker_does() {
        let cases = [
            ("www", id(33, 34, &[4, 42], "/var/www")),
            ("33", id(33, 34, &[4, 42], "/var/www")),
            ("www:adm", id(33, 4, &[], "/var/www")),
            ("www:99", id(33, 99, &[], "/var/www")),
            ("www:12", id(33, 77, &[], "/var/www")),
            ("1000", id(7, 8, &[], "/numeric")),
            ("55", id(55, 0, &[], "/")),
            ("55:66", id(55, 66, &[], "/")),
            ("", id(0, 0, &[4], "/root")),
            (":34", id(0, 34, &[], "/root")),
            ("rel", id(9, 9, &[], "/")),
            ("nobody", Err(UserError::NoUser("nobody".into()))),
            ("www:none", Err(UserError::NoGroup("none".into()))),
            ("-1", Err(UserError::NoUser("-1".into()))),
            ("4294967295", Err(UserError::Range("4294967295".into()))),
            ("99999999999999999999", Err(UserError::Range("99999999999999999999".into()))),
        ];
        for (request, expected) in cases {
            assert_eq!(resolve(request, PASSWD, GROUP), expected, "{request}");
        }
        assert_eq!(home(33, PASSWD), "/var/www");
        assert_eq!(home(9, PASSWD), "/");
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(
            request in "[a-z0-9:]{0,10}",
            passwd in proptest::collection::vec(any::<u8>(), 0..200),
            group in "([a-z]{0,3}:x?:[0-9]{0,12}:[a-z,]{0,9}\n?){0,5}",
        ) {
            if let Ok(identity) = resolve(&request, &passwd, group.as_bytes()) {
                prop_assert!(identity.home.starts_with('/'));
            }
        }
    }
}
