//! `kapsel doctor`: what this machine offers, measured where that is possible.

mod checks;

use serde::Serialize;

use super::host::Host;
use crate::failure::Outcome;
use crate::flags::system::Doctor;
use crate::output;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Something is worse than it could be, and containers run.
    Warn,
    /// Containers cannot run.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// Short and stable.
    pub name: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do; null when there is nothing to do.
    pub hint: Option<String>,
}

impl Check {
    /// All is well.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Check { name, state: State::Ok, detail: detail.into(), hint: None }
    }

    /// It works, but.
    pub fn warn(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Check { name, state: State::Warn, detail: detail.into(), hint: Some(hint.into()) }
    }

    /// It does not work.
    pub fn fail(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Check { name, state: State::Fail, detail: detail.into(), hint: Some(hint.into()) }
    }
}

/// The whole, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    /// The worst of all checks.
    state: State,
    /// `kapsel-vmm`, `qemu-kvm` or `tcg`; null when nothing works.
    isolation: Option<String>,
    /// Why that one.
    reason: String,
    /// The guest's kernel in use; null before one was fetched.
    kernel: Option<String>,
    checks: Vec<Check>,
}

/// Looks at everything and says what it found.
pub fn run(host: &Host, flags: &Doctor) -> Outcome {
    let (kernel_check, kernel) = checks::kernel(host);
    let choice = checks::choice(host);
    let mut checks = choice.checks;
    checks.extend([kernel_check, checks::programs(host)]);
    checks.extend([checks::cgroup(), checks::user_namespaces(), checks::landlock(), checks::seccomp()]);
    checks.extend(checks::space(host));
    let state = checks.iter().map(|check| check.state).max().unwrap_or(State::Ok);
    let report = Report { state, isolation: choice.isolation, reason: choice.reason, kernel, checks };
    if flags.json {
        output::json(&report);
    } else {
        output::print(render(&report).as_bytes());
    }
    Ok(u8::from(report.state == State::Fail))
}

fn render(report: &Report) -> String {
    let style = output::stdout_style();
    let reset = style.reset();
    let mut text = String::new();
    for check in &report.checks {
        let (colour, word) = match check.state {
            State::Ok => (style.green(), "ok"),
            State::Warn => (style.yellow(), "warn"),
            State::Fail => (style.red(), "fail"),
        };
        text += &format!("{colour}{word:<5}{reset}{:<18}{}\n", check.name, check.detail);
        if let Some(hint) = &check.hint {
            text += &format!("{:23}{}hint: {reset}{hint}\n", "", style.cyan());
        }
    }
    let isolation = report.isolation.as_deref().unwrap_or("none");
    text + &format!("\n{}isolation: {isolation}{reset}\n{}\n", style.bold(), report.reason)
}
