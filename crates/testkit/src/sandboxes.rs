//! What the end-to-end suites of the front doors share: one data root for all runs, and a word about what is missing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// No single step of a test takes longer, also on a busy machine without KVM.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where all suites and runs keep kernel, image and template, so that they are made once; short, since sockets are in it.
const ROOT: &str = "/tmp/kapsel-e2e";

/// What a suite has made once for its tests, or `None` after saying why it cannot be made here.
pub fn made_once<W>(
    world: &'static OnceLock<Result<W, String>>,
    make: impl FnOnce() -> Result<W, String>,
) -> Option<&'static W> {
    match world.get_or_init(make) {
        Ok(world) => Some(world),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

/// The data root, held: other suites and runs wait until it is dropped.
#[derive(Debug)]
pub struct DataRoot {
    path: PathBuf,
    _lock: File,
}

impl DataRoot {
    /// Takes it, with an empty configuration: not what this machine's owner has configured.
    ///
    /// # Errors
    /// What of the system's stands against it.
    pub fn take() -> Result<Self, String> {
        let path = PathBuf::from(ROOT);
        let told = |error: std::io::Error| format!("{ROOT}: {error}");
        fs::create_dir_all(&path).map_err(told)?;
        let lock = File::create(path.join("lock")).map_err(told)?;
        lock.lock().map_err(told)?;
        fs::write(path.join("config.toml"), "").map_err(told)?;
        Ok(Self { path, _lock: lock })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }
}

/// Whether this process is root and has what sandboxes need: QEMU, busybox, and these programs in the directory `beside`.
///
/// # Errors
/// The first thing that is missing.
pub fn need(beside: &Path, programs: &[&str]) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root".into());
    }
    for program in programs {
        if !beside.join(program).exists() {
            return Err(format!("{} is not built", beside.join(program).display()));
        }
    }
    for (program, package) in
        [("/usr/bin/qemu-system-x86_64", "qemu-system-x86"), ("/bin/busybox", "busybox-static")]
    {
        if !Path::new(program).exists() {
            return Err(format!("needs {program} ({package})"));
        }
    }
    Ok(())
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
