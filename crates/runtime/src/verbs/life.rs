//! `state`, `kill`, `pause` and `resume`.

use anyhow::bail;
use kapsel_sandbox::{client::Error as ClientError, spec};

use super::{Call, print, wait};
use crate::{args, state::Status};

impl Call<'_> {
    /// `state`.
    pub fn state(&self, id: &str) -> anyhow::Result<()> {
        let container = self.containers.get(id)?;
        let status = container.status(&self.host.paths);
        print::json(&container.shown(status))
    }

    /// `kill`.
    pub fn kill(&self, flags: &args::Kill) -> anyhow::Result<()> {
        let Some(signal) = spec::parse_signal(&flags.signal) else {
            bail!("{:?} is no signal; see signal(7)", flags.signal);
        };
        let container = self.containers.get(&flags.id)?;
        let status = container.status(&self.host.paths);
        if status == Status::Stopped {
            // `--all` of what has ended reaches all that is left. Engines look for these words otherwise.
            return if flags.all { Ok(()) } else { bail!("container {:?} is not running", flags.id) };
        }
        // As runc: what was not started has no handlers, and ends.
        let signal = if status == Status::Created { libc::SIGKILL } else { signal };
        wait(async {
            let client = self.connect(&container).await?;
            if status == Status::Paused && signal == libc::SIGKILL {
                // A frozen process would get it when it thaws, and nobody might thaw it.
                client.resume().await?;
            }
            match client.kill("", signal, flags.all).await {
                Err(ClientError::NotFound(_) | ClientError::Gone { .. }) if flags.all => Ok(()),
                Err(ClientError::NotFound(_)) => bail!("container {:?} is not running", flags.id),
                other => Ok(other?),
            }
        })
    }

    /// `pause`.
    pub fn pause(&self, id: &str) -> anyhow::Result<()> {
        let container = self.container_in(id, &[Status::Running], "pause")?;
        wait(async { Ok(self.connect(&container).await?.pause().await?) })
    }

    /// `resume`.
    pub fn resume(&self, id: &str) -> anyhow::Result<()> {
        let container = self.container_in(id, &[Status::Paused], "resume")?;
        wait(async { Ok(self.connect(&container).await?.resume().await?) })
    }
}
