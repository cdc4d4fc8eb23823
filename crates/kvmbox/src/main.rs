//! `kapsel-kvmbox`: runs a command on an emulated KVM host, with files of this one inside.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use kapsel_kvmbox::{Kernel, KvmBox};

/// Run a command in an emulated machine that has a working /dev/kvm. Its output is the command's; its exit status too.
#[derive(Parser)]
#[command(version, about)]
struct Options {
    /// A file to put inside
    #[arg(long, value_name = "HOST:INSIDE", value_parser = pair)]
    file: Vec<(PathBuf, PathBuf)>,
    /// A program to put inside, with the shared libraries that it needs
    #[arg(long, value_name = "HOST:INSIDE", value_parser = pair)]
    program: Vec<(PathBuf, PathBuf)>,
    /// Put the box's own kernel inside, as the ELF image /kvmbox/vmlinux, for guests
    #[arg(long)]
    kernel: bool,
    /// The box's memory
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// How long boot and command may take together
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Have the box's clock count instructions instead of time, a nanosecond each
    #[arg(long)]
    counted: bool,
    /// Where the kernel is kept between runs
    #[arg(long, value_name = "DIRECTORY")]
    cache: Option<PathBuf>,
    /// The command and its arguments; busybox is there
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
}

fn pair(text: &str) -> Result<(PathBuf, PathBuf), String> {
    match text.split_once(':') {
        Some((host, inside)) if !host.is_empty() && inside.starts_with('/') => {
            Ok((host.into(), inside.into()))
        }
        _ => Err("write HOST:INSIDE, with an absolute path inside".to_owned()),
    }
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let mut kvm_box = KvmBox::new().memory_mib(options.memory).timeout(Duration::from_secs(options.timeout));
    if options.counted {
        kvm_box = kvm_box.counted();
    }
    if let Some(cache) = &options.cache {
        kvm_box = kvm_box.cache(cache);
    }
    if options.kernel {
        let kernel = Kernel::ensure(kvm_box.cache_directory())?;
        kvm_box = kvm_box.file(kernel.vmlinux, "/kvmbox/vmlinux");
    }
    for (host, inside) in options.file {
        kvm_box = kvm_box.file(host, inside);
    }
    for (host, inside) in options.program {
        kvm_box = kvm_box.program(host, inside)?;
    }
    let command: Vec<&str> = options.command.iter().map(String::as_str).collect();
    let outcome = kvm_box.run_with(&command, &mut std::io::stdout()).context("no result from the box")?;
    Ok(ExitCode::from(u8::try_from(outcome.status).unwrap_or(1)))
}
