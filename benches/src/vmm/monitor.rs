//! A monitor's process, its API, and its guest's console.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::guest::FAILED;

/// How long any one thing may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// So much of a console is kept.
const KEPT: usize = 1 << 20;

/// A program that is measured.
pub struct Program<'a> {
    pub name: &'static str,
    pub path: &'a Path,
    /// Its threads may make any system call.
    pub no_seccomp: bool,
    /// Until when what is measured now may take.
    pub deadline: Instant,
}

/// One of its processes; it ends with its owner.
pub struct Monitor {
    child: Child,
    stdin: Option<ChildStdin>,
    api: BufReader<UnixStream>,
    pub console: Console,
    pub directory: TempDir,
    deadline: Instant,
    /// From before the process was started until its API had answered.
    pub ready: Duration,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    pub fn start(program: &Program<'_>) -> Result<Monitor> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("api");
        let errors = fs::File::create(directory.path().join("errors"))?;
        let mut command = Command::new(program.path);
        command.args(["--id", "measured", "--level", "Off", "--api-sock"]).arg(&socket);
        if program.no_seccomp {
            command.arg("--no-seccomp");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let begun = Instant::now();
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", program.path.display()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("stdout is a pipe")?);
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > PATIENCE => {
                    return Err(error).context("the API does not appear");
                }
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let console = Console::default();
        let mut monitor = Monitor {
            child,
            stdin,
            api: BufReader::new(stream),
            console: console.clone(),
            directory,
            deadline: program.deadline,
            ready: Duration::ZERO,
        };
        monitor.ask("GET", "/", &Value::Null)?;
        monitor.ready = begun.elapsed();
        std::thread::spawn(move || console.read(stdout));
        Ok(monitor)
    }

    /// Has the machine put together that boots `kernel`.
    pub fn configure(
        &mut self,
        kernel: &Path,
        initrd: &Path,
        arguments: &str,
        memory_mib: u64,
    ) -> Result<()> {
        let arguments =
            format!("console=ttyS0 quiet reboot=k panic=-1 mitigations=off rdinit=/init {arguments}");
        let boot = json!({"kernel_image_path": kernel, "initrd_path": initrd, "boot_args": arguments});
        self.ask("PUT", "/boot-source", &boot)?;
        self.ask("PUT", "/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": memory_mib}))
    }

    pub fn begin(&mut self) -> Result<()> {
        self.ask("PUT", "/actions", &json!({"action_type": "InstanceStart"}))
    }

    /// Has one request done.
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        // At once: a server may answer before it has seen the end.
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.api.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.api.read_line(&mut line)?;
        let done = line.contains(" 200 ") || line.contains(" 204 ");
        let (status, mut length) = (line.trim().to_owned(), 0);
        loop {
            line.clear();
            ensure!(
                self.api.read_line(&mut line)? > 0,
                "{method} {path}: the answer ends early; {}",
                self.errors()
            );
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut answer = vec![0; length];
        self.api.read_exact(&mut answer)?;
        ensure!(done, "{method} {path}: {status}: {}", String::from_utf8_lossy(&answer));
        Ok(())
    }

    /// Types a line on the guest's console.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        writeln!(self.stdin.as_mut().context("stdin is a pipe")?, "{line}")
            .context("nobody reads the console's input")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn errors(&self) -> String {
        let text = fs::read_to_string(self.directory.path().join("errors")).unwrap_or_default();
        format!("{text}\nconsole: {}", self.console.text())
    }

    /// Waits for `text` on the console, and says when it was there.
    pub fn wait(&self, text: &str) -> Result<Instant> {
        self.console.wait(text, self.deadline).with_context(|| self.errors())
    }
}

/// A console and when what was printed came.
#[derive(Clone, Default)]
pub struct Console(Arc<(Mutex<Printed>, Condvar)>);

#[derive(Default)]
struct Printed {
    text: Vec<u8>,
    /// Until where the text was there at what time.
    times: Vec<(usize, Instant)>,
}

impl Console {
    fn read(&self, mut from: impl Read) {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let now = Instant::now();
            let mut printed = self.lock();
            if printed.text.len() < KEPT {
                printed.text.extend_from_slice(&buffer[..length]);
                let end = printed.text.len();
                printed.times.push((end, now));
                self.0.1.notify_all();
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Printed> {
        self.0.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().text).into_owned()
    }

    /// When the end of the first `text` was there; the empty text ends with the first byte.
    fn wait(&self, text: &str, deadline: Instant) -> Result<Instant> {
        let deadline = deadline.min(Instant::now() + PATIENCE);
        let mut printed = self.lock();
        loop {
            let at = match text.len() {
                0 => (!printed.text.is_empty()).then_some(1),
                length => find(&printed.text, text).map(|at| at + length),
            };
            if let Some(time) = at.and_then(|at| printed.times.iter().find(|(end, _)| *end >= at)) {
                return Ok(time.1);
            }
            if let Some(at) = find(&printed.text, FAILED) {
                bail!("{}", String::from_utf8_lossy(&printed.text[at..]).trim());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{text:?} does not appear on the console");
            }
            printed =
                self.0.1.wait_timeout(printed, left).map_or_else(|e| e.into_inner().0, |(guard, _)| guard);
        }
    }
}

fn find(printed: &[u8], text: &str) -> Option<usize> {
    printed.windows(text.len()).position(|window| window == text.as_bytes())
}
