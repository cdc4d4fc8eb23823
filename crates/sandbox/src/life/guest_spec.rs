//! The specification as the guest gets it: paths of the host become paths of the guest, and what must be mounted for
//! that becomes a list of shares and storages.
//!
//! Pure: touches no file. What cannot be had in a guest is refused here, before anything starts.

use std::path::{Path, PathBuf};

use kapsel_protocol::{STORAGE_ROOT, api};
use oci_spec::runtime::{Hooks, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccomp, Mount, Spec};

pub use places::{Place, Places};

mod places;

/// The serial of the root file system's disk.
pub const ROOTFS_DISK: &str = "rootfs";
/// The serial of the scratch disk.
pub const SCRATCH_DISK: &str = "scratch";

/// Where the guest has a pod's directory.
const POD: &str = "/run/kapsel/main/pod";
/// Where the guest has a pod's shared memory.
const POD_MEMORY: &str = "/run/kapsel/main/shm";
/// Where containers have it.
const SHM: &str = "/dev/shm";

/// What a specification asks for that a guest of its own cannot give.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A part of the specification.
    #[error(
        "the container's specification asks for {what}, which a sandbox with its own kernel cannot give: {why}"
    )]
    Unsupported {
        /// The part.
        what: String,
        /// The reason.
        why: &'static str,
    },
    /// The specification is not complete.
    #[error("the container's specification has no {0}")]
    Missing(&'static str),
    /// More directories than devices.
    #[error(
        "{0} directories of the host are shared, at most {MAX_SHARES} can be; share a directory that holds them"
    )]
    TooManyShares(usize),
}

/// The most directories that one sandbox shares: each takes a process and a device.
pub const MAX_SHARES: usize = 16;

/// A directory of the host that the guest mounts by its tag; or files, as one directory: each share takes a process on the host, and
/// a device that the guest must find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPath {
    /// `share0`, `share1`, …
    pub tag: String,
    /// On the host: the directory, or the files, which appear by their places in this list.
    pub sources: Vec<PathBuf>,
    /// The host refuses writes.
    pub read_only: bool,
    /// Whether it is files.
    pub files: bool,
    /// Whether what is mounted in the directory later is served too.
    pub follow: bool,
}

impl SharedPath {
    /// A file's place, which it gets if it has none yet.
    fn place(&mut self, file: &Path) -> usize {
        let found = self.sources.iter().position(|source| source == file);
        found.unwrap_or_else(|| {
            self.sources.push(file.into());
            self.sources.len() - 1
        })
    }

    /// For messages.
    pub fn shown(&self) -> String {
        self.sources.iter().map(|source| source.display().to_string()).collect::<Vec<_>>().join(", ")
    }
}

/// Where the container's root comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rootfs {
    /// A read-only disk beneath an overlay.
    Disk,
    /// A directory of the host beneath an overlay: never written.
    Below(PathBuf),
    /// A directory of the host, written to.
    Directory(PathBuf),
}

/// How paths of the host come to the guest.
#[derive(Debug)]
pub enum Sharing<'a> {
    /// Each directory by a server and a device of its own.
    Each,
    /// All in the pod's directory, where those of later containers appear too.
    Pod(&'a mut Places),
}

/// What the agent gets, and what must be there for it.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestSpec {
    /// The specification for the guest.
    pub spec: Spec,
    /// Compiled separately.
    pub seccomp: Option<LinuxSeccomp>,
    /// In the order in which the guest mounts them.
    pub storages: Vec<api::Storage>,
    /// To be served by fsd.
    pub shares: Vec<SharedPath>,
    /// What it uses of the pod's directory.
    pub places: Vec<u32>,
}

/// Translates a specification for container `id`. `is_file` tells whether a path of the host is a file.
///
/// # Errors
/// When it asks for something that a guest cannot give.
pub fn translate(
    spec: &Spec,
    id: &str,
    rootfs: &Rootfs,
    scratch_disk: bool,
    mut sharing: Sharing<'_>,
    is_file: impl Fn(&Path) -> bool,
) -> Result<GuestSpec, Error> {
    refuse_impossible(spec)?;
    // Nothing runs in a pod but what is added to it.
    if spec.process().is_none() && matches!(sharing, Sharing::Each) {
        return Err(Error::Missing("process"));
    }
    let base = PathBuf::from(STORAGE_ROOT).join(id);
    let mut guest = GuestSpec {
        spec: spec.clone(),
        seccomp: None,
        storages: Vec::new(),
        shares: Vec::new(),
        places: Vec::new(),
    };
    if let Sharing::Pod(places) = &mut sharing
        && let Some(dir) = places.begin()
    {
        guest.share_pod(dir);
    }
    let path = guest.root(rootfs, &base, scratch_disk, &mut sharing);

    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if let Sharing::Pod(places) = &mut sharing {
        mounts.iter_mut().for_each(|mount| guest.share_memory(mount, places));
    }
    for mount in mounts.iter_mut().filter(|mount| is_host_bind(mount)) {
        let source = mount.source().clone().ok_or(Error::Missing("source of a bind mount"))?;
        let read_only = has_option(mount, "ro");
        let file = is_file(&source);
        let inside = guest.share(&source, read_only, file, &base, &mut sharing);
        mount.set_typ(Some("bind".into())).set_source(Some(inside));
    }
    if guest.shares.len() > MAX_SHARES {
        return Err(Error::TooManyShares(guest.shares.len()));
    }
    let mut root = spec.root().clone().ok_or(Error::Missing("root"))?;
    root.set_path(path);
    guest.seccomp = take_seccomp(&mut guest.spec, matches!(sharing, Sharing::Pod(_)));
    guest.spec.set_mounts(Some(mounts)).set_root(Some(root)).set_annotations(None);
    Ok(guest)
}

impl GuestSpec {
    /// Has the container made in the pid namespace of that process of the guest's.
    pub fn join_pids(&mut self, pid: u32) {
        let mut linux = self.spec.linux().clone().unwrap_or_default();
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
        let joined = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid);
        // All that is asked of it is set.
        namespaces.extend(joined.path(format!("/proc/{pid}/ns/pid")).build());
        linux.set_namespaces(Some(namespaces));
        self.spec.set_linux(Some(linux));
    }

    /// Prepares the container's root file system, and says where in the guest it is.
    fn root(
        &mut self,
        rootfs: &Rootfs,
        base: &Path,
        scratch_disk: bool,
        sharing: &mut Sharing<'_>,
    ) -> PathBuf {
        let mut lower = base.join("lower");
        match rootfs {
            Rootfs::Below(dir) if matches!(sharing, Sharing::Pod(_)) => {
                lower = self.share(dir, true, false, base, sharing);
            }
            Rootfs::Directory(dir) if matches!(sharing, Sharing::Pod(_)) => {
                return self.share(dir, false, false, base, sharing);
            }
            Rootfs::Disk => {
                let source = format!("blk:{ROOTFS_DISK}");
                self.storages.push(storage(&source, "erofs", &["ro"], &lower));
            }
            Rootfs::Below(dir) => drop(self.share_at(dir, true, false, lower.clone())),
            Rootfs::Directory(dir) => {
                return self.share_at(dir, false, false, base.join("rootfs"));
            }
        }
        let writable = base.join("rw");
        self.storages.push(match scratch_disk {
            true => storage(&format!("blk:{SCRATCH_DISK}"), "ext4", &[], &writable),
            false => storage("tmpfs", "tmpfs", &["mode=0755"], &writable),
        });
        let option = |name: &str, dir: PathBuf| format!("{name}={}", dir.display());
        let options = [
            option("lowerdir", lower),
            option("upperdir", writable.join("upper")),
            option("workdir", writable.join("work")),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let root = base.join("rootfs");
        self.storages.push(storage("overlay", "overlay", &options, &root));
        root
    }

    /// The pod's directory, which is there for all of the pod's life: its first container's.
    fn share_pod(&mut self, dir: PathBuf) {
        self.share_at(&dir, false, false, POD.into());
        self.shares.iter_mut().for_each(|share| share.follow = true);
    }

    /// The memory that an engine prepares for all processes of a pod to share is the guest's: they are all in there. The first
    /// container's is made, as large as the engine's; others name the engine's as their source.
    fn share_memory(&mut self, mount: &mut Mount, places: &mut Places) {
        let Some(source) = mount.source().clone().filter(|source| source.is_absolute()) else { return };
        let tmpfs = mount.typ().as_deref() == Some("tmpfs");
        if tmpfs && mount.destination() == Path::new(SHM) && places.memory.is_none() {
            let sized = |option: &&String| option.starts_with("size=") || option.starts_with("mode=");
            let options: Vec<&str> =
                mount.options().iter().flatten().filter(sized).map(String::as_str).collect();
            self.storages.push(storage("tmpfs", "tmpfs", &options, Path::new(POD_MEMORY)));
            let mut options = mount.options().clone().unwrap_or_default();
            options.retain(|option| !sized(&option));
            options.push("bind".into());
            mount.set_typ(Some("bind".into())).set_options(Some(options));
            places.memory = Some(source);
        }
    }

    /// The path in the guest of a host's path, sharing it unless the same is shared already.
    fn share(
        &mut self,
        source: &Path,
        read_only: bool,
        file: bool,
        base: &Path,
        sharing: &mut Sharing<'_>,
    ) -> PathBuf {
        if let Sharing::Pod(places) = sharing {
            if places.memory.as_deref() == Some(source) {
                return POD_MEMORY.into();
            }
            let number = places.take(source, read_only, file);
            self.places.push(number);
            return Path::new(POD).join(number.to_string());
        }
        let fits = |share: &SharedPath| {
            share.read_only == read_only && share.files == file && (file || share.sources == [source])
        };
        let found = self.shares.iter().position(fits);
        let n = found.unwrap_or(self.shares.len());
        let tagged = format!("fs:share{n}");
        // Where the root is shared its directory is the share's mount point.
        let at = match self.storages.iter().find(|storage| storage.source == tagged) {
            Some(storage) => PathBuf::from(&storage.mount_point),
            None => self.share_at(source, read_only, file, base.join(format!("share{n}"))),
        };
        match self.shares.get_mut(n) {
            Some(share) if file => at.join(share.place(source).to_string()),
            _ => at,
        }
    }

    fn share_at(&mut self, source: &Path, read_only: bool, files: bool, at: PathBuf) -> PathBuf {
        let tag = format!("share{}", self.shares.len());
        let options: &[&str] = if read_only { &["ro"] } else { &[] };
        self.storages.push(storage(&format!("fs:{tag}"), "virtiofs", options, &at));
        self.shares.push(SharedPath { tag, sources: vec![source.into()], read_only, files, follow: false });
        at
    }
}

fn storage(source: &str, fstype: &str, options: &[&str], mount_point: &Path) -> api::Storage {
    api::Storage {
        source: source.into(),
        fstype: fstype.into(),
        options: options.iter().map(|&o| o.into()).collect(),
        mount_point: mount_point.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

fn has_option(mount: &Mount, option: &str) -> bool {
    mount.options().iter().flatten().any(|o| o == option)
}

fn is_host_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, "bind") || has_option(mount, "rbind")
}

/// Takes out what is compiled separately, and what belongs to the sandbox rather than to one of its containers.
fn take_seccomp(spec: &mut Spec, pod: bool) -> Option<LinuxSeccomp> {
    let mut linux = spec.linux().clone()?;
    let seccomp = linux.seccomp().clone();
    // The cgroup's place on the host means nothing in the guest.
    linux.set_seccomp(None).set_cgroups_path(None);
    if let Some(mut resources) = linux.resources().clone() {
        crate::cgroup::take_hosts(&mut resources);
        linux.set_resources(Some(resources));
    }
    // Network, IPC and host name are the sandbox's, as in a pod, and the sandbox has a whole kernel for itself: what a process
    // could see outside of such namespaces is nothing. Parameters of a namespace need that namespace.
    let parameters = linux.sysctl().as_ref().is_some_and(|sysctl| !sysctl.is_empty());
    let named = spec.domainname().as_ref().is_some_and(|name| !name.is_empty());
    let sandbox_wide = |typ| match typ {
        LinuxNamespaceType::Network => true,
        LinuxNamespaceType::Ipc => pod || !parameters,
        LinuxNamespaceType::Uts => pod || !parameters && !named,
        _ => false,
    };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| !sandbox_wide(namespace.typ()));
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts) {
        // The guest is given it before it is given the container.
        spec.set_hostname(None);
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    seccomp
}

/// Whether there are hooks besides those that the container's own side runs, with its own programs.
fn has_host_hooks(hooks: &Hooks) -> bool {
    let lists = [hooks.create_runtime(), hooks.create_container(), hooks.poststart(), hooks.poststop()];
    #[allow(deprecated, reason = "engines still use it")]
    let prestart = hooks.prestart();
    lists.into_iter().chain([prestart]).any(|list| list.as_ref().is_some_and(|hooks| !hooks.is_empty()))
}

fn refuse_impossible(spec: &Spec) -> Result<(), Error> {
    let refuse = |what: String, why| Err(Error::Unsupported { what, why });
    if spec.hooks().as_ref().is_some_and(has_host_hooks) {
        return refuse("hooks".into(), "they would have to run on the host and reach into the guest");
    }
    if spec.vm().is_some() {
        return refuse("a machine of its own (vm)".into(), "kapsel chooses machine, kernel and image itself");
    }
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    for namespace in namespaces {
        if let Some(path) = namespace.path()
            && namespace.typ() != LinuxNamespaceType::Network
        {
            let what = format!("the {} namespace of {}", namespace.typ(), path.display());
            return refuse(what, "namespaces of the host's kernel cannot be joined from the guest's");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{HookBuilder, HooksBuilder};

    use super::*;
    use crate::spec::{ImageDefaults, RunOptions, Volume, build};

    fn spec(volumes: &[(&str, &str, bool)]) -> Spec {
        let volumes = volumes
            .iter()
            .map(|&(source, destination, read_only)| Volume {
                source: source.into(),
                destination: destination.into(),
                read_only,
            })
            .collect();
        let options = RunOptions { args: vec!["x".into()], volumes, ..Default::default() };
        build(&ImageDefaults::default(), &options).unwrap()
    }

    fn describe(guest: &GuestSpec) -> Vec<String> {
        let storages = guest
            .storages
            .iter()
            .map(|s| format!("{} {} {} {}", s.source, s.fstype, s.options.join(","), s.mount_point));
        let shares = guest
            .shares
            .iter()
            .map(|s| format!("{} = {} ro={} files={}", s.tag, s.shown(), s.read_only, s.files));
        let binds =
            guest.spec.mounts().iter().flatten().filter(|m| m.typ().as_deref() == Some("bind")).map(|m| {
                format!("bind {} on {}", m.source().clone().unwrap().display(), m.destination().display())
            });
        storages.chain(shares).chain(binds).collect()
    }

    #[test]
    fn an_image_lies_beneath_a_scratch_overlay() {
        let guest = translate(&spec(&[]), "c1", &Rootfs::Disk, false, Sharing::Each, |_| false).unwrap();
        assert_eq!(
            describe(&guest),
            [
                "blk:rootfs erofs ro /run/kapsel/c1/lower",
                "tmpfs tmpfs mode=0755 /run/kapsel/c1/rw",
                "overlay overlay lowerdir=/run/kapsel/c1/lower,upperdir=/run/kapsel/c1/rw/upper,workdir=/run/kapsel/c1/rw/work /run/kapsel/c1/rootfs",
            ]
        );
        assert_eq!(guest.spec.root().clone().unwrap().path(), Path::new("/run/kapsel/c1/rootfs"));
        assert!(guest.seccomp.is_some() && guest.spec.linux().clone().unwrap().seccomp().is_none());
        assert!(guest.spec.annotations().is_none());
    }

    #[test]
    fn one_share_for_each_distinct_source_and_right() {
        let volumes = [
            ("/usr", "/a", true),
            ("/usr", "/b", true),
            ("/usr", "/c", false),
            ("/etc/hosts", "/h", false),
            ("/etc/hostname", "/i", false),
            ("/etc/hosts", "/j", false),
            ("/etc/hosts", "/k", true),
        ];
        let guest = translate(&spec(&volumes), "c1", &Rootfs::Below("/".into()), true, Sharing::Each, |p| {
            p.is_file()
        })
        .unwrap();
        assert_eq!(
            describe(&guest),
            [
                "fs:share0 virtiofs ro /run/kapsel/c1/lower",
                "blk:scratch ext4  /run/kapsel/c1/rw",
                "overlay overlay lowerdir=/run/kapsel/c1/lower,upperdir=/run/kapsel/c1/rw/upper,workdir=/run/kapsel/c1/rw/work /run/kapsel/c1/rootfs",
                "fs:share1 virtiofs ro /run/kapsel/c1/share1",
                "fs:share2 virtiofs  /run/kapsel/c1/share2",
                "fs:share3 virtiofs  /run/kapsel/c1/share3",
                "fs:share4 virtiofs ro /run/kapsel/c1/share4",
                "share0 = / ro=true files=false",
                "share1 = /usr ro=true files=false",
                "share2 = /usr ro=false files=false",
                "share3 = /etc/hosts, /etc/hostname ro=false files=true",
                "share4 = /etc/hosts ro=true files=true",
                "bind /run/kapsel/c1/share1 on /a",
                "bind /run/kapsel/c1/share1 on /b",
                "bind /run/kapsel/c1/share2 on /c",
                "bind /run/kapsel/c1/share3/0 on /h",
                "bind /run/kapsel/c1/share3/1 on /i",
                "bind /run/kapsel/c1/share3/0 on /j",
                "bind /run/kapsel/c1/share4/0 on /k",
            ]
        );
    }

    #[test]
    fn a_writable_directory_is_the_root_itself() {
        let guest =
            translate(&spec(&[]), "c1", &Rootfs::Directory("/srv".into()), false, Sharing::Each, |_| false)
                .unwrap();
        assert_eq!(
            describe(&guest),
            ["fs:share0 virtiofs  /run/kapsel/c1/rootfs", "share0 = /srv ro=false files=false"]
        );
    }

    #[test]
    fn a_pods_containers_have_places_in_one_directory() {
        let mut places = Places::new("/b/pod".into());
        let with_memory = |kind: &str, options: Vec<String>| {
            let mut spec = spec(&[("/etc/hosts", "/etc/hosts", false), ("/usr", "/v", false)]);
            let mut shm = crate::spec::mount(kind, "/e/shm".into(), Path::new(SHM), options);
            shm.set_typ(Some(kind.into()));
            let mut mounts = spec.mounts().clone().unwrap_or_default();
            mounts.push(shm);
            spec.set_mounts(Some(mounts));
            spec
        };
        let is_file = |path: &Path| path.starts_with("/etc");
        let first = with_memory("tmpfs", vec!["nosuid".into(), "mode=1777".into(), "size=9".into()]);
        let root = Rootfs::Directory("/r0".into());
        let first = translate(&first, "main", &root, false, Sharing::Pod(&mut places), is_file).unwrap();
        assert_eq!(
            describe(&first),
            [
                "fs:share0 virtiofs  /run/kapsel/main/pod",
                "tmpfs tmpfs mode=1777,size=9 /run/kapsel/main/shm",
                "share0 = /b/pod ro=false files=false",
                "bind /run/kapsel/main/pod/1 on /v",
                "bind /run/kapsel/main/pod/2 on /etc/hosts",
                "bind /run/kapsel/main/shm on /dev/shm",
            ]
        );
        assert_eq!(first.spec.root().clone().unwrap().path(), Path::new("/run/kapsel/main/pod/0"));
        let member = with_memory("bind", vec!["rbind".into()]);
        let root = Rootfs::Below("/r1".into());
        let mut member = translate(&member, "c", &root, false, Sharing::Pod(&mut places), is_file).unwrap();
        assert_eq!(
            describe(&member),
            [
                "tmpfs tmpfs mode=0755 /run/kapsel/c/rw",
                "overlay overlay lowerdir=/run/kapsel/main/pod/3,upperdir=/run/kapsel/c/rw/upper,workdir=/run/kapsel/c/rw/work /run/kapsel/c/rootfs",
                "bind /run/kapsel/main/pod/1 on /v",
                "bind /run/kapsel/main/pod/2 on /etc/hosts",
                "bind /run/kapsel/main/shm on /dev/shm",
            ]
        );
        assert_eq!((first.places, member.places.clone()), (vec![0, 1, 2], vec![3, 1, 2]));
        member.join_pids(7);
        let linux = member.spec.linux().clone().unwrap();
        let joined = linux.namespaces().iter().flatten().filter_map(|namespace| namespace.path().clone());
        assert_eq!(joined.collect::<Vec<_>>(), [Path::new("/proc/7/ns/pid")]);
        assert_eq!(places.release(&[3, 1, 2]).len(), 1, "the first one's are still used");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let mut hooks = spec(&[]);
        let hook = HookBuilder::default().path("/bin/true").build().unwrap();
        hooks.set_hooks(Some(HooksBuilder::default().poststop(vec![hook]).build().unwrap()));
        let error = translate(&hooks, "c", &Rootfs::Disk, false, Sharing::Each, |_| false).unwrap_err();
        assert!(error.to_string().contains("hooks"), "{error}");

        let mut joined = spec(&[]);
        let mut linux = joined.linux().clone().unwrap();
        let mut namespaces = linux.namespaces().clone().unwrap();
        namespaces[0].set_path(Some("/proc/1/ns/pid".into()));
        linux.set_namespaces(Some(namespaces));
        joined.set_linux(Some(linux));
        let error = translate(&joined, "c", &Rootfs::Disk, false, Sharing::Each, |_| false).unwrap_err();
        assert!(error.to_string().contains("/proc/1/ns/pid"), "{error}");

        let mut many = spec(&[]);
        let mounts = (0..17)
            .map(|n| {
                crate::spec::mount("bind", format!("/s{n}").into(), Path::new(&format!("/d{n}")), vec![])
            })
            .collect();
        many.set_mounts(Some(mounts));
        assert_eq!(
            translate(&many, "c", &Rootfs::Disk, false, Sharing::Each, |_| false),
            Err(Error::TooManyShares(17))
        );
    }
}
