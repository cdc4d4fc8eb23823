//! Debian's kernel package, by way of apt.
//!
//! apt downloads and verifies; nothing is installed, and no root is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{Error, Progress, Result};

/// Metapackages to ask for, best first.
const METAPACKAGES: &[&str] = &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];

/// A kernel package that apt could download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name, such as `linux-image-6.12.117+deb12-cloud-amd64`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its size in bytes, 0 when unknown.
    pub size: u64,
}

impl Package {
    /// The newest package that apt knows.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn newest() -> Result<Package> {
        let mut tried = Vec::new();
        for meta in METAPACKAGES {
            let control = run(Command::new("apt-cache").args(["show", "--no-all-versions", meta]))?;
            let Some(name) = dependency(&control) else {
                tried.push(*meta);
                continue;
            };
            let control = run(Command::new("apt-cache").args(["show", "--no-all-versions", &name]))?;
            if let Some(version) = field(&control, "Version") {
                let size = field(&control, "Size").and_then(|size| size.parse().ok()).unwrap_or(0);
                return Ok(Package { name, version: version.to_owned(), size });
            }
            tried.push(*meta);
        }
        Err(Error::NoKernel { what: format!("apt knows none of {} (run apt-get update?)", tried.join(", ")) })
    }

    /// Downloads the package into `dir`, where nothing else may be, and gives its file.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn download(&self, dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        let mut apt = Command::new("apt-get")
            .args(["download", "-q", "-o", "APT::Sandbox::User="])
            .arg(format!("{}={}", self.name, self.version))
            .current_dir(dir)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| no_apt("apt-get", error))?;
        let told = || Progress::Downloading {
            package: format!("{} {}", self.name, self.version),
            done: present(dir),
            total: self.size,
        };
        let status = loop {
            progress(told());
            match apt.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(100)),
                Ok(Some(status)) => break status,
                Err(error) => return Err(no_apt("apt-get", error)),
            }
        };
        let package = files(dir).find(|path| path.extension().is_some_and(|extension| extension == "deb"));
        match package {
            Some(package) if status.success() => {
                progress(told());
                Ok(package)
            }
            _ => {
                let mut said = String::new();
                if let Some(mut stderr) = apt.stderr.take() {
                    let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
                }
                Err(Error::NoKernel {
                    what: format!("apt-get download {} failed: {}", self.name, said.trim()),
                })
            }
        }
    }

    /// Unpacks a downloaded package into `dir`.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn unpack(package: &Path, dir: &Path) -> Result<()> {
        run(Command::new("dpkg-deb").arg("-x").arg(package).arg(dir)).map(drop)
    }
}

fn files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Bytes downloaded so far; apt writes into the directory itself or into `partial` below it.
fn present(dir: &Path) -> u64 {
    files(dir)
        .filter_map(|path| path.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|meta| meta.len())
        .sum()
}

fn no_apt(program: &str, error: std::io::Error) -> Error {
    Error::NoKernel { what: format!("{program} cannot be run: {error}") }
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|error| no_apt(&program, error))?;
    if !output.status.success() && program != "apt-cache" {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::NoKernel { what: format!("{program} failed: {}", said.trim()) });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A field of a control paragraph.
fn field<'a>(control: &'a str, name: &str) -> Option<&'a str> {
    control.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The kernel image that a metapackage depends on.
fn dependency(control: &str) -> Option<String> {
    let depends = field(control, "Depends")?;
    let image = depends.split(',').map(str::trim).find(|name| name.starts_with("linux-image-"))?;
    Some(image.split(' ').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "Package: linux-image-6.12-cloud-amd64\nVersion: 6.12.1-1\nDepends: foo, linux-image-6.12.1-cloud-amd64 (= 6.12.1-1)\n";

    #[test]
    fn a_metapackage_names_its_kernel() {
        assert_eq!(dependency(META).as_deref(), Some("linux-image-6.12.1-cloud-amd64"));
        assert_eq!(field(META, "Version"), Some("6.12.1-1"));
        assert_eq!(dependency(""), None);
    }
}
