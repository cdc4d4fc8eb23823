//! The real agent in a real guest under QEMU's translator: what a container's specification promises, seen from inside it.
//!
//! One guest serves all the checks, one after the other, as booting takes seconds; hence no harness of the usual kind. A check that
//! fails is named, and the others still run.

mod checks;
mod machine;
mod process;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use kapsel_machine::ExitReason;
use kapsel_protocol::api;
use machine::{Machine, context};

fn main() -> Result<()> {
    if let Some(why) = machine::missing() {
        println!("skipped: {why}");
        return Ok(());
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}

async fn configure(machine: &Machine, hostname: &str) -> Result<()> {
    let mut entropy = vec![0; 64];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let request = api::ConfigureRequest {
        entropy,
        unix_time_ns: now.as_nanos() as u64,
        hostname: hostname.into(),
        ..Default::default()
    };
    machine.agent.configure(context(), &request).await?;
    Ok(())
}

/// Runs one check and says how it went.
macro_rules! check {
    ($machine:expr, $failed:ident, $($name:ident),+ $(,)?) => {$(
        let begun = Instant::now();
        match checks::$name(&$machine).await {
            Ok(()) => println!("test {} ... ok ({} ms)", stringify!($name), begun.elapsed().as_millis()),
            Err(error) => {
                println!("test {} ... FAILED: {error:#}", stringify!($name));
                $failed += 1;
            }
        }
    )+};
}

async fn run() -> Result<()> {
    let begun = Instant::now();
    let machine = Machine::boot().await?;
    println!("booted in {:?}", begun.elapsed());
    let mut failed = 0;
    check!(machine, failed, nothing_runs_before_configure);
    configure(&machine, "guest").await?;
    check!(
        machine,
        failed,
        a_guest_is_given_to_another_sandbox,
        the_agent_is_a_program_too,
        a_process_comes_later,
        phases_are_told,
        exit_codes_and_signals,
        namespaces_are_its_own,
        capabilities_are_the_named_ones,
        users_by_name,
        the_root_is_hardened,
        sysctls_and_limits,
        a_seccomp_filter_holds,
        pids_are_limited,
        memory_is_limited,
        input_ends_and_output_is_whole,
        a_megabyte_of_arguments,
        programs_that_cannot_run,
        an_exec_joins_its_container,
        a_stuck_reader_blocks_only_itself,
        a_terminal_is_one,
        pause_holds_everything,
        copies_stay_in_the_root,
        bad_specifications_are_refused,
    );
    let _ = machine.agent.shutdown(context(), &api::ShutdownRequest::default()).await?;
    let end = machine.ended(Duration::from_secs(20)).await?;
    if failed > 0 {
        let console = std::fs::read_to_string(&machine.console).unwrap_or_default();
        bail!("{failed} checks failed; the guest's console:\n{console}");
    }
    ensure!(matches!(end, ExitReason::Shutdown), "the guest ended by {end:?}, not by shutting down");
    Ok(())
}
