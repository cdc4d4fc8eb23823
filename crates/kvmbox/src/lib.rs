//! The KVM host in a box: tests of KVM on machines that have none, or only a slow imitation of it.
//!
//! QEMU emulates AMD's SVM well enough for real KVM. [`KvmBox`] boots a Debian kernel with `kvm_amd` in such an emulated
//! machine, puts programs and files inside, runs a command and gives its output and exit status. The boot takes a few
//! seconds, so the tests of one binary share one box: [`test_main`] runs them here where KVM is native, and otherwise puts
//! the test binary itself in a box and runs it there.

pub mod cpio;
pub mod guest;
mod kernel;
mod qemu;
mod tests_inside;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use kernel::Kernel;
pub use tests_inside::{inside, keep_awake, native_kvm, test_main};

/// Modules in the order of their dependencies.
const MODULES: [&str; 4] =
    ["virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd", "drivers/net/tun"];
const INIT: &str = include_str!("init.sh");
/// Debian's busybox, statically linked.
pub const BUSYBOX: &str = "/usr/bin/busybox";

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong around the command; the command's own failure is an [`Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the host.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel cannot be fetched or unpacked.
    #[error(transparent)]
    Kernel(#[from] kapsel_guest::Error),
    /// The kernel's package is not as it was, or the cache is damaged.
    #[error("the box's kernel has no {0}; remove the cache to fetch it again")]
    Incomplete(PathBuf),
    /// The box did not start or ended before the command did.
    #[error("the box failed: {reason}\nits console ended with:\n{console}")]
    Box {
        /// What happened.
        reason: String,
        /// The last lines of the console.
        console: String,
    },
    /// The command ran longer than [`KvmBox::timeout`].
    #[error("the command in the box did not end within {after:?}\nthe box's console ended with:\n{console}")]
    Timeout {
        /// The limit.
        after: Duration,
        /// The last lines of the console.
        console: String,
    },
}

impl Error {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Error::Io { action, path: path.to_owned(), source }
    }
}

/// How the command ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// stdout and stderr together.
    pub output: Vec<u8>,
    /// The exit status as a shell gives it: 128 + n for signal n.
    pub status: i32,
    /// From the start of the emulator until the command's first byte of output, or its end when it wrote nothing.
    pub overhead: Duration,
}

/// An emulated machine with `/dev/kvm`, described before it runs.
#[derive(Debug)]
pub struct KvmBox {
    machine: qemu::Machine,
    timeout: Duration,
    cache: PathBuf,
    files: Vec<(PathBuf, PathBuf)>,
    environment: Vec<(String, String)>,
    modules: Vec<&'static str>,
}

impl Default for KvmBox {
    fn default() -> Self {
        Self::new()
    }
}

impl KvmBox {
    /// A box with one CPU, 2 GiB of memory and nothing but busybox inside.
    pub fn new() -> Self {
        KvmBox {
            machine: qemu::Machine { memory_mib: 2048, counted: false, cleared: false },
            timeout: Duration::from_secs(300),
            cache: default_cache(),
            files: Vec::new(),
            environment: Vec::new(),
            modules: MODULES.to_vec(),
        }
    }

    /// The box's memory. What is put inside lives in it.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.machine.memory_mib = mib;
        self
    }

    /// Has the box's clock count instructions instead of time, a nanosecond each. What is measured in it is then the same on a
    /// busy machine and a quiet one, and without what the emulator spends on translating code that it has not seen before.
    pub fn counted(mut self) -> Self {
        self.machine.counted = true;
        self
    }

    /// Has the end of a process clear its memory. The emulator is slow to write to pages from which it has translated code, as an ended
    /// guest's kernel leaves them: otherwise it is the next guest that waits for that, up to a second for each 2 MiB that it is
    /// given.
    pub fn cleared(mut self) -> Self {
        self.machine.cleared = true;
        self
    }

    /// The longest that boot and command may take together.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Where the kernel is kept between runs.
    pub fn cache(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cache = directory.into();
        self
    }

    /// The directory of [`KvmBox::cache`], or the default: `/var/cache/kapsel/kvmbox` for root.
    pub fn cache_directory(&self) -> &Path {
        &self.cache
    }

    /// Puts a file of the host at `inside`, with its permission bits.
    pub fn file(mut self, host: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> Self {
        self.files.push((host.into(), inside.into()));
        self
    }

    /// Puts a program at `inside`, and the shared libraries that it needs at the places where it looks for them.
    ///
    /// # Errors
    /// When the dynamic loader cannot resolve a library.
    pub fn program(mut self, host: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> Result<Self> {
        let host = host.into();
        for library in shared_libraries(&host)? {
            if !self.files.iter().any(|(_, inside)| *inside == library) {
                self.files.push((library.clone(), library));
            }
        }
        self.files.push((host, inside.into()));
        Ok(self)
    }

    /// Loads one more of the kernel's modules, by its path under `kernel/` without the suffixes. Those that it needs come
    /// first.
    pub fn module(mut self, name: &'static str) -> Self {
        self.modules.push(name);
        self
    }

    /// Sets a variable in the command's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Boots the box, runs the command in it and waits for its end. Output is also written to `live` as it comes.
    ///
    /// # Errors
    /// [`Error`] when the box, not the command, fails.
    pub fn run_with(&self, command: &[&str], live: &mut dyn Write) -> Result<Outcome> {
        let kernel = Kernel::ensure(&self.cache)?;
        let work =
            tempfile::tempdir().map_err(|e| Error::io("create a directory in", &std::env::temp_dir(), e))?;
        let initramfs = work.path().join("initramfs");
        self.build(&kernel, command, &initramfs).map_err(|e| Error::io("build", &initramfs, e))?;
        qemu::run(&kernel.bzimage, &initramfs, work.path(), self.machine, self.timeout, live)
    }

    /// As [`KvmBox::run_with`], with the output only in the outcome.
    ///
    /// # Errors
    /// [`Error`] when the box, not the command, fails.
    pub fn run(&self, command: &[&str]) -> Result<Outcome> {
        self.run_with(command, &mut io::sink())
    }

    fn build(&self, kernel: &Kernel, command: &[&str], path: &Path) -> io::Result<()> {
        let mut archive = cpio::Archive::new(io::BufWriter::new(fs::File::create(path)?));
        archive.file(Path::new("init"), 0o755, INIT.as_bytes())?;
        archive.host_file(Path::new(BUSYBOX), Path::new("bin/busybox"))?;
        let mut order = String::new();
        for module in &self.modules {
            let file = kernel.module(module);
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            archive.host_file(&file, &Path::new("lib/modules").join(&name))?;
            order.push_str(&name);
            order.push('\n');
        }
        archive.file(Path::new("lib/modules/order"), 0o644, order.as_bytes())?;
        archive.file(Path::new("kvmbox/command"), 0o644, self.script(command).as_bytes())?;
        for (host, inside) in &self.files {
            archive.host_file(host, inside)?;
        }
        archive.finish().map(drop)
    }

    fn script(&self, command: &[&str]) -> String {
        let variables =
            self.environment.iter().map(|(name, value)| format!("export {name}={}\n", quote(value)));
        let words: Vec<_> = command.iter().map(|word| quote(word)).collect();
        variables.collect::<String>() + &words.join(" ") + "\n"
    }
}

/// One word of a shell command.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Paths of the shared libraries and the loader of a program; none for a static one.
///
/// # Errors
/// When the dynamic loader cannot resolve a library.
pub fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = std::process::Command::new("ldd")
        .arg(program)
        .output()
        .map_err(|e| Error::io("run ldd on", program, e))?;
    if !output.status.success() {
        return Ok(Vec::new());
    }
    // Lines such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        let reason = io::Error::new(io::ErrorKind::NotFound, line.trim().to_owned());
        return Err(Error::io("find a library of", program, reason));
    }
    Ok(text
        .lines()
        .filter_map(|l| l.split_whitespace().find(|w| w.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

fn default_cache() -> PathBuf {
    if let Some(directory) = std::env::var_os("KAPSEL_KVMBOX_CACHE") {
        return directory.into();
    }
    if rustix::process::geteuid().is_root() {
        return "/var/cache/kapsel/kvmbox".into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    cache
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"))
        .join("kapsel/kvmbox")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_survives_the_shell() {
        for word in ["plain", "two words", "it's", "$HOME `x` \"y\" \\", ""] {
            let output = std::process::Command::new("sh")
                .arg("-c")
                .arg(format!("printf %s {}", quote(word)))
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }

    #[test]
    fn libraries_of_a_dynamic_program_are_found_and_a_static_one_has_none() {
        let libraries = shared_libraries(Path::new("/bin/sh")).unwrap();
        assert!(libraries.iter().any(|l| l.to_string_lossy().contains("libc.so")), "{libraries:?}");
        assert_eq!(shared_libraries(Path::new(BUSYBOX)).unwrap(), Vec::<PathBuf>::new());
    }
}
