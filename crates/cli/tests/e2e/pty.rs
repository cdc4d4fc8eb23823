//! A terminal for kapsel: the tests are its keyboard and its screen.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::Winsize;

use crate::world::{Watchdog, eventually};

/// A program on a terminal of its own.
pub struct Terminal {
    keyboard: File,
    screen: Arc<Mutex<Vec<u8>>>,
    child: Child,
    slave: OwnedFd,
    _watchdog: Watchdog,
}

impl Terminal {
    /// Starts a program on a terminal of 80 columns and 24 rows.
    pub fn start(mut command: Command) -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let name = ptsname(&master, Vec::new()).expect("a name");
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).expect("opened");
        let side = || slave.try_clone().expect("a copy");
        command.stdin(side()).stdout(side()).stderr(side());
        let take_terminal = || {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        };
        // SAFETY: between fork and exec only two system calls are made; nothing is allocated and no lock is taken.
        unsafe { command.pre_exec(take_terminal) };
        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone().expect("a copy");
        let screen = Arc::new(Mutex::new(Vec::new()));
        let shown = screen.clone();
        let child = command.spawn().expect("it starts");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                shown.lock().expect("the screen").extend_from_slice(&buffer[..count]);
            }
        });
        let _watchdog = Watchdog::of(&child);
        let terminal = Terminal { keyboard, screen, child, slave, _watchdog };
        terminal.resize(80, 24);
        terminal
    }

    /// Types.
    pub fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("typed");
    }

    /// Gives the terminal another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.keyboard, size).expect("resized");
    }

    /// Everything that was shown so far.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("the screen")).into_owned()
    }

    /// Waits until something is shown.
    pub fn shows(&self, text: &str) {
        let mut last = String::new();
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(text, || {
                last = self.shown();
                last.contains(text)
            });
        }));
        assert!(found.is_ok(), "{text:?} is not in {last:?}");
    }

    /// Waits for the end; gives the exit code, and whether the terminal echoes as it did at the start.
    pub fn end(mut self) -> (Option<i32>, bool) {
        let code = self.child.wait().expect("it ends").code();
        let settings = rustix::termios::tcgetattr(&self.slave).expect("settings");
        (
            code,
            settings
                .local_modes
                .contains(rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ICANON),
        )
    }

    /// Sends the program a signal; false when it has ended.
    pub fn signal(&mut self, signal: rustix::process::Signal) -> bool {
        let runs = self.child.try_wait().expect("it is a child").is_none();
        if runs {
            crate::world::kill(self.child.id(), signal);
        }
        runs
    }
}
