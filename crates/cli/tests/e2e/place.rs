//! A data root of one test's own: with the shared image and kernel, and with whatever configuration and helper programs the
//! test wants. What is left of a sandbox can be told exactly, since no other test is here.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::world::{Ran, World, eventually, finish};

/// The data root.
pub struct Place {
    world: &'static World,
    dir: TempDir,
}

impl Place {
    /// A data root with this configuration, and without templates.
    pub fn new(world: &'static World, config: &str) -> Self {
        // Short: sockets are in it.
        let dir = tempfile::Builder::new().prefix("ke").tempdir_in("/tmp").expect("a directory");
        for shared in ["images", "kernels"] {
            symlink(world.root().join(shared), dir.path().join(shared)).expect("a link");
        }
        let place = Place { world, dir };
        fs::write(place.config(), format!("templates = false\n{config}\n")).expect("a configuration");
        place
    }

    /// A data root whose guests have this machine code as their process 1, and so many seconds to start.
    pub fn with_agent(world: &'static World, code: &[u8], timeout: u32) -> Self {
        let place = Self::new(world, "");
        let libexec = place.path().join("libexec");
        fs::create_dir_all(libexec.join("guest")).expect("directories");
        for helper in ["containerd-shim-kapsel-v2", "kapsel-fsd"] {
            symlink(world.helper(helper), libexec.join(helper)).expect("a link");
        }
        fs::write(libexec.join("guest/kapsel-agent"), program(code)).expect("a program");
        let config =
            format!("templates = false\nstart_timeout = {timeout}\nlibexec = \"{}\"\n", libexec.display());
        fs::write(place.config(), config).expect("a configuration");
        place
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn config(&self) -> PathBuf {
        self.path().join("config.toml")
    }

    /// Where sandboxes' directories are.
    pub fn sandboxes(&self) -> PathBuf {
        self.path().join("run/sandboxes")
    }

    /// kapsel here.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.world.command(args);
        self.dress(&mut command);
        command
    }

    /// Makes a command one that runs here.
    pub fn dress(&self, command: &mut Command) {
        command.env("KAPSEL_ROOT", self.path()).env("KAPSEL_CONFIG", self.config());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    /// Runs kapsel to its end.
    pub fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args).spawn().expect("kapsel starts"))
    }

    /// Runs kapsel, which must fail as itself, say these things and what to do, and leave nothing.
    pub fn fails(&self, args: &[&str], said: &[&str]) -> Ran {
        let ran = self.run(args);
        self.failed(&ran, said);
        ran
    }

    /// kapsel must have failed as itself, said these things and what to do, and left nothing.
    pub fn failed(&self, ran: &Ran, said: &[&str]) {
        let told = &ran.stderr;
        assert_eq!(ran.code, 125, "{told}");
        let (message, hint) = told.split_once("hint: ").unwrap_or_else(|| panic!("no hint: {told}"));
        assert!(message.starts_with("kapsel: ") && !hint.trim().is_empty(), "{told}");
        for said in said {
            assert!(told.contains(said), "{said:?} is not in: {told}");
        }
        self.nothing_left();
    }

    /// There is no sandbox any more, and no process that belongs to one.
    pub fn nothing_left(&self) {
        let sandboxes = || fs::read_dir(self.sandboxes()).map_or(0, Iterator::count);
        eventually("no sandbox is left", || sandboxes() == 0);
        eventually("no process is left", || self.processes().is_empty());
    }

    /// Processes that were started with a path below this root.
    fn processes(&self) -> Vec<String> {
        let here = self.path().to_string_lossy();
        let lines = fs::read_dir("/proc").expect("/proc").filter_map(|entry| {
            let line = fs::read(entry.ok()?.path().join("cmdline")).ok()?;
            Some(String::from_utf8_lossy(&line).replace('\0', " "))
        });
        lines.filter(|line| line.contains(&*here)).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Of a test that failed: what still runs must not outlive the root.
        let ids = self.run(&["ps", "-aq"]).text();
        let args: Vec<&str> = ["rm", "-f"].into_iter().chain(ids.lines()).collect();
        if args.len() > 2 {
            let _ = self.run(&args);
        }
    }
}

/// A static program for x86-64 of this code, which may use bytes after its instructions as data.
fn program(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // An executable for x86-64, version 1.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry; the program header follows; no sections.
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    // Flags; sizes and counts of the headers.
    elf.extend([0; 4]);
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // One segment, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}
