//! kapsel-vmm beside Firecracker: the same kernel, initramfs and requests, in turn, in one run on one host.
//!
//! The host is this one where its processor runs guests, and otherwise the KVM host in a box. The program has three parts:
//! outside it puts files in the box and keeps the results ([`outside`]), inside it starts monitors and takes the time
//! ([`inside`]), and in a guest it moves the bytes ([`guest`]).

mod guest;
mod inside;
mod memory;
mod monitor;
mod outside;
mod results;
mod snapshots;
mod throughput;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Measure kapsel-vmm side by side with Firecracker")]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// The monitor to measure; `make monitor` builds it
    #[arg(long, env = "KAPSEL_VMM", default_value = "target/release/static/kapsel-vmm")]
    vmm: PathBuf,
    /// Firecracker, to compare with
    #[arg(long, env = "FIRECRACKER")]
    firecracker: Option<PathBuf>,
    /// Counted runs of each monitor
    #[arg(short = 'n', long, default_value_t = 9)]
    runs: usize,
    /// How many machines shall run at once from one snapshot
    #[arg(long, default_value_t = 100)]
    machines: usize,
    /// The box's memory
    #[arg(long, value_name = "MIB", default_value_t = 8192)]
    memory: u32,
    /// Count instructions instead of time: exact on a busy machine too. Needs the box
    #[arg(long)]
    counted: bool,
    /// Measure both without filters of system calls; Firecracker has none where it is not built for musl
    #[arg(long)]
    no_seccomp: bool,
    /// Measure only this, and write no JSON; may be given several times
    #[arg(long, value_name = "PHASE")]
    only: Vec<inside::Phase>,
    /// Folder for the JSON
    #[arg(long, default_value = "benches/results")]
    out: PathBuf,
}

#[derive(Subcommand)]
enum Part {
    /// The part on the host with KVM
    #[command(hide = true)]
    Inside(inside::Order),
    /// The part in a guest
    #[command(hide = true)]
    Guest,
    /// The part in a guest that is saved
    #[command(hide = true)]
    Flood,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.part {
        Some(Part::Guest) => guest::main(),
        Some(Part::Flood) => guest::flood(),
        Some(Part::Inside(order)) => inside::main(order),
        None => outside::main(&args),
    }
}
