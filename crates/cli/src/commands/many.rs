//! Commands that take several names: each is tried, each failure is told, and one failure makes the command fail.

use tokio::task::JoinHandle;

use super::host::{self, Host, Sandbox};
use crate::failure::{Failure, Outcome};

/// Does something for each name, one after the other.
pub fn each(names: &[String], mut act: impl FnMut(&str) -> Result<(), Failure>) -> Outcome {
    let codes = names.iter().map(|name| act(name).map_or_else(|failure| failure.report(), |()| 0));
    Ok(codes.max().unwrap_or(0))
}

/// Does something for each sandbox, for all at the same time; what they print comes in the order of the names.
pub fn each_at_once<F>(host: &Host, names: &[String], act: impl Fn(Sandbox, String) -> F) -> Outcome
where
    F: Future<Output = Result<String, Failure>> + Send + 'static,
{
    let registry = host.sandboxes()?;
    host::runtime()?.block_on(async {
        let tasks = names.iter().map(|name| match Sandbox::find(&registry, name) {
            Ok(sandbox) => tokio::spawn(act(sandbox, name.clone())),
            Err(failure) => tokio::spawn(async { Err(failure) }),
        });
        Ok(print_all(tasks.collect()).await)
    })
}

/// Prints what each task gives, a result or a failure; the exit code is the largest.
pub async fn print_all(tasks: Vec<JoinHandle<Result<String, Failure>>>) -> u8 {
    let mut code = 0;
    for task in tasks {
        match task.await {
            Ok(Ok(line)) => crate::output::print(format!("{line}\n").as_bytes()),
            Ok(Err(failure)) => code = code.max(failure.report()),
            Err(error) => code = code.max(Failure::new(format!("a part of kapsel failed: {error}")).report()),
        }
    }
    code
}
