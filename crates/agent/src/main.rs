//! `kapsel-agent`: process 1 in the guest; creates and watches the containers.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kapsel_agent::container::running::IN_CHILD;
use kapsel_agent::phases::Phases;
use kapsel_agent::reaper::Reaper;
use kapsel_agent::sandbox::Sandbox;
use kapsel_agent::{init, program, session, sys};

fn main() -> ExitCode {
    // In its container such a program is process 1, too.
    if let Some(code) = program::run(std::env::args_os().skip(1)) {
        return code;
    }
    if std::process::id() != 1 {
        eprintln!("kapsel-agent is process 1 of a kapsel guest and does nothing elsewhere");
        std::process::exit(1);
    }
    end_guest_on_panic();
    match run() {
        Ok(()) => init::power_off(),
        Err(error) => {
            eprintln!("kapsel-agent: {error}");
            init::power_off()
        }
    }
}

/// Without its agent a guest is of no use, and the host must not wait for one that hangs: say why on the console, and end the
/// machine. A child's panic is that child's end only.
fn end_guest_on_panic() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        if IN_CHILD.load(Ordering::Relaxed) {
            sys::exit_now(127);
        }
        eprintln!("kapsel-agent: panicked; the guest ends");
        init::end_machine()
    }));
}

fn run() -> std::io::Result<()> {
    let mut phases = Phases::start();
    init::prepare(&mut phases)?;
    let signals = sys::child_signals()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    runtime.block_on(async {
        let port = init::port().await?;
        phases.lap("port");
        let reaper = Arc::new(Reaper::default());
        tokio::spawn(reaper.clone().run(signals));
        session::serve(port, Arc::new(Sandbox::new(reaper, phases.into_vec()))).await
    })
}
