//! A container's root file system, as a snapshotter of containerd describes it: mounts, one over the other.

use std::{
    ffi::{CString, OsStr},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail};
use containerd_shim_protos::api::Mount;
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
    thread::UnshareFlags,
};

/// The kernel takes a page of options, its last byte a NUL (mount(2)).
const OPTIONS_MAX: usize = 4095;
/// More mounts of one directory are a mistake.
const MOUNTS_MAX: usize = 32;

/// Where in containerd's bundle.
pub fn directory(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// Mounts a root file system in containerd's bundle. On an error nothing stays mounted.
///
/// # Errors
/// What could not be mounted, and why.
pub fn mount(bundle: &Path, mounts: &[Mount]) -> anyhow::Result<()> {
    let target = directory(bundle);
    if !mounts.is_empty() {
        std::fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    }
    for mount in mounts {
        let mounted = Plan::of(mount).and_then(|plan| plan.carry_out(&target));
        if let Err(error) = mounted {
            if let Err(left) = unmount(bundle) {
                return Err(error.context(format!("and something stays mounted: {left:#}")));
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Unmounts all that is mounted there.
///
/// # Errors
/// When something stays.
pub fn unmount(bundle: &Path) -> anyhow::Result<()> {
    let target = directory(bundle);
    for _ in 0..MOUNTS_MAX {
        match rustix::mount::unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("cannot unmount {}", target.display())),
        }
    }
    bail!("{} is mounted over and over again", target.display())
}

/// One mount, its options taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    kind: String,
    source: String,
    flags: MountFlags,
    data: Vec<String>,
}

impl Plan {
    fn of(mount: &Mount) -> anyhow::Result<Self> {
        let mut plan = Self {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            flags: MountFlags::empty(),
            data: Vec::new(),
        };
        for option in &mount.options {
            match option.as_str() {
                "bind" => plan.flags |= MountFlags::BIND,
                "rbind" => plan.flags |= MountFlags::BIND | MountFlags::REC,
                "ro" => plan.flags |= MountFlags::RDONLY,
                "nosuid" => plan.flags |= MountFlags::NOSUID,
                "nodev" => plan.flags |= MountFlags::NODEV,
                "noexec" => plan.flags |= MountFlags::NOEXEC,
                "noatime" => plan.flags |= MountFlags::NOATIME,
                "relatime" => plan.flags |= MountFlags::RELATIME,
                "rw" | "suid" | "dev" | "exec" | "defaults" => {}
                "loop" => bail!(
                    "the snapshotter's {} is an image file to be mounted by a loop device, which this shim does not do; \
                     use the overlayfs or native snapshotter",
                    mount.source
                ),
                data => plan.data.push(data.into()),
            }
        }
        if plan.kind == "bind" {
            plan.flags |= MountFlags::BIND;
        }
        Ok(plan)
    }

    fn carry_out(self, target: &Path) -> anyhow::Result<()> {
        let what = format!("cannot mount {} {} at {}", self.kind, self.source, target.display());
        let mounted =
            if self.flags.contains(MountFlags::BIND) { self.bind(target) } else { self.mount(target) };
        mounted.context(what)
    }

    /// A bind does not take its flags at once.
    fn bind(&self, target: &Path) -> anyhow::Result<()> {
        let how = self.flags & (MountFlags::BIND | MountFlags::REC);
        rustix::mount::mount(self.source.as_str(), target, "", how, None)?;
        let rest = self.flags - how;
        if !rest.is_empty() {
            rustix::mount::mount_remount(target, MountFlags::BIND | rest, c"")?;
        }
        Ok(())
    }

    fn mount(self, target: &Path) -> anyhow::Result<()> {
        let joined = self.data.join(",");
        let (base, data) = match joined.len() > OPTIONS_MAX {
            true => shorten(&self.data).ok_or_else(|| anyhow!("its options have {} bytes", joined.len()))?,
            false => (None, joined),
        };
        let data = CString::new(data)?;
        let mount =
            || rustix::mount::mount(self.source.as_str(), target, self.kind.as_str(), self.flags, &*data);
        match base {
            None => Ok(mount()?),
            Some(base) => Ok(in_directory(&base, mount)?),
        }
    }
}

/// Options with the lower directories of an overlay named from the directory that holds them all: an image may have more layers
/// than a page has room for. That directory, and the options.
fn shorten(options: &[String]) -> Option<(Option<PathBuf>, String)> {
    const LOWER: &str = "lowerdir=";
    let lower = options.iter().find_map(|option| option.strip_prefix(LOWER))?;
    let first = lower.split(':').next()?;
    let base = Path::new(first).ancestors().skip(1).find(|base| {
        base.parent().is_some() && lower.split(':').all(|dir| Path::new(dir).starts_with(base))
    })?;
    let relative = |dir| Path::new(dir).strip_prefix(base).ok().map(Path::as_os_str).and_then(OsStr::to_str);
    let lower: Vec<&str> = lower.split(':').map(relative).collect::<Option<_>>()?;
    let lower = format!("{LOWER}{}", lower.join(":"));
    let all = options.iter().map(|option| if option.starts_with(LOWER) { &lower } else { option });
    let joined = all.map(String::as_str).collect::<Vec<_>>().join(",");
    (joined.len() <= OPTIONS_MAX).then(|| (Some(base.to_owned()), joined))
}

/// Calls with another working directory, which only a thread of its own has for itself.
fn in_directory(dir: &Path, call: impl FnOnce() -> rustix::io::Result<()> + Send) -> io::Result<()> {
    let apart = || {
        // SAFETY: only what CLONE_FS names is taken apart, for this thread alone: no memory, no descriptors.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::process::chdir(dir)?;
        call()
    };
    let done = std::thread::scope(|scope| scope.spawn(apart).join());
    done.map_err(|_| io::Error::other("a thread failed"))?.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|&option| option.into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn options_are_taken_apart() {
        let overlay = mount_of("overlay", "overlay", &["index=off", "ro", "lowerdir=/a:/b"]);
        let plan = Plan::of(&overlay).unwrap();
        assert_eq!(
            (plan.flags, plan.data.join(",")),
            (MountFlags::RDONLY, "index=off,lowerdir=/a:/b".into())
        );
        let bind = Plan::of(&mount_of("bind", "/s", &["rbind", "rw"])).unwrap();
        assert_eq!(bind.flags, MountFlags::BIND | MountFlags::REC);
        let error = Plan::of(&mount_of("ext4", "/img", &["loop"])).unwrap_err().to_string();
        assert!(error.contains("overlayfs"), "{error}");
    }

    #[test]
    fn many_layers_fit_into_a_page() {
        let layers: Vec<String> =
            (0..90).map(|n| format!("/var/lib/containerd/snapshotter/{n}/fs")).collect();
        let options =
            ["workdir=/w".to_owned(), format!("lowerdir={}", layers.join(":")), "upperdir=/u".to_owned()];
        assert!(options.join(",").len() > 3000);
        let (base, data) = shorten(&options).unwrap();
        assert_eq!(base.as_deref(), Some(Path::new("/var/lib/containerd/snapshotter")));
        assert!(data.starts_with("workdir=/w,lowerdir=0/fs:1/fs:") && data.ends_with("89/fs,upperdir=/u"));
        assert!(shorten(&["lowerdir=/a/x:/b/y".into()]).is_none(), "nothing in common but the root");
    }

    #[test]
    fn an_overlay_of_many_layers_is_mounted_and_nothing_stays() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // The upper layer of an overlay must not be an overlay itself, which a container's /tmp may be.
        let memory = mount_of("tmpfs", "tmpfs", &["size=8m"]);
        Plan::of(&memory).unwrap().carry_out(dir.path()).unwrap();
        let bundle = dir.path().join("bundle");
        let long = dir.path().join("x".repeat(60));
        let layers: Vec<PathBuf> = (0..80).map(|n| long.join(n.to_string())).collect();
        for layer in &layers {
            std::fs::create_dir_all(layer).unwrap();
        }
        std::fs::write(layers[79].join("deep"), "x").unwrap();
        for made in ["upper", "work"] {
            std::fs::create_dir(dir.path().join(made)).unwrap();
        }
        let lower = layers.iter().map(|layer| layer.to_str().unwrap()).collect::<Vec<_>>().join(":");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let options = [
            format!("workdir={}", at("work")),
            format!("upperdir={}", at("upper")),
            format!("lowerdir={lower}"),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        mount(&bundle, &[mount_of("overlay", "overlay", &options)]).unwrap();
        assert!(directory(&bundle).join("deep").exists());
        let bad = [mount_of("bind", "/usr", &["rbind", "ro"]), mount_of("bind", "/nowhere", &["rbind"])];
        let error = format!("{:#}", mount(&bundle, &bad).unwrap_err());
        assert!(error.contains("/nowhere"), "{error}");
        assert!(!directory(&bundle).join("bin").exists() && !directory(&bundle).join("deep").exists());
        unmount(&bundle).unwrap();
        rustix::mount::unmount(dir.path(), UnmountFlags::DETACH).unwrap();
    }
}
