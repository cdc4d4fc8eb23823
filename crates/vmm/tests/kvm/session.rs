//! A monitor with an API, as its user has it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::guest;
use crate::host::{Files, PATIENCE};

/// Connects as soon as somebody listens.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            stream => {
                let stream = stream?;
                // Who does not answer fails its test, and does not hold up all of them.
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
        }
    }
}

/// A connection to the API.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects as soon as the monitor listens.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Client(BufReader::new(connect(socket)?)))
    }

    /// Status and body of the answer.
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> io::Result<(u16, Value)> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        write!(self.0.get_mut(), "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            if let Some(rest) = line.strip_prefix("HTTP/1.1 ") {
                status = rest.trim().parse().map_err(io::Error::other)?;
            } else if let Some(rest) = line.strip_prefix("Content-Length: ") {
                length = rest.trim().parse().map_err(io::Error::other)?;
            } else if line.trim().is_empty() {
                break;
            }
        }
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok((status, if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes)? }))
    }

    pub fn done(&mut self, method: &str, path: &str, body: &Value) -> Result<(), Failed> {
        match self.ask(method, path, body)? {
            (204, Value::Null) => Ok(()),
            other => Err(format!("{method} {path}: {other:?}").into()),
        }
    }

    pub fn refused(&mut self, method: &str, path: &str, body: &Value, reason: &str) -> Result<(), Failed> {
        match self.ask(method, path, body)? {
            (400, fault) if fault["fault_message"].as_str().is_some_and(|text| text.contains(reason)) => {
                Ok(())
            }
            other => Err(format!("{method} {path}: {other:?} instead of {reason}").into()),
        }
    }

    pub fn state(&mut self) -> io::Result<String> {
        let (_, instance) = self.ask("GET", "/", &Value::Null)?;
        Ok(instance["state"].as_str().unwrap_or_default().to_owned())
    }
}

/// The guest's console, read as it comes.
#[derive(Clone, Default)]
pub struct Console {
    ticks: Arc<AtomicUsize>,
    text: Arc<Mutex<String>>,
}

impl Console {
    pub fn read(&self, from: impl Read) {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            self.ticks.fetch_add(usize::from(line.contains(guest::TICK)), Ordering::SeqCst);
            self.text.lock().expect("no reader panics").push_str(&(line + "\n"));
        }
    }

    /// What was printed so far.
    pub fn text(&self) -> String {
        self.text.lock().expect("no reader panics").clone()
    }

    pub fn ticks(&self) -> usize {
        self.ticks.load(Ordering::SeqCst)
    }

    /// Waits until the guest has ticked more often than `before`.
    pub fn wait(&self, before: usize) -> Result<(), Failed> {
        let deadline = Instant::now() + PATIENCE;
        while self.ticks() <= before {
            if Instant::now() > deadline {
                return Err(
                    format!("the guest does not tick:\n{}", self.text.lock().expect("no panic")).into()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Ends with its test.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A monitor that waits to be told what to do.
pub struct Session {
    monitor: Monitor,
    pub client: Client,
    pub console: Console,
    reader: JoinHandle<()>,
}

impl Session {
    pub fn start(files: &Files, socket: &Path, options: &[&str]) -> Result<Self, Failed> {
        let mut command = Command::new(&files.vmm);
        command.arg("--api-sock").arg(socket).args(options);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let console = Console::default();
        let (copy, stdout) = (console.clone(), child.stdout.take().expect("stdout is a pipe"));
        let monitor = Monitor(child);
        let reader = std::thread::spawn(move || copy.read(stdout));
        Ok(Session { monitor, client: Client::connect(socket)?, console, reader })
    }

    pub fn id(&self) -> u32 {
        self.monitor.0.id()
    }

    /// How it ended, and what its guest printed.
    pub fn finish(mut self) -> Result<(ExitStatus, String), Failed> {
        let deadline = Instant::now() + PATIENCE;
        while self.monitor.0.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.monitor.0.kill()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.reader.join().expect("the reader does not panic");
        Ok((self.monitor.0.wait()?, self.console.text()))
    }

    /// As [`Session::finish`], for a guest that shall be content.
    pub fn finish_content(self) -> Result<String, Failed> {
        let (status, text) = self.finish()?;
        if status.success() && text.contains(guest::DONE) {
            Ok(text)
        } else {
            Err(format!("{status}, console:\n{text}").into())
        }
    }
}
