//! Files of a container, as tar streams.

use kapsel_channel::Stream;
use kapsel_protocol::{
    STDIO_PORT,
    api::{self, copy_request::Direction},
    stdio::{Header, Kind},
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::{Container, Error, agent::Agent};
use crate::{attach::FileStat, stdio::token};

/// A copy out of a container that was asked for.
pub struct CopyOut {
    agent: Agent,
    request: api::CopyRequest,
    stream: Stream,
}

/// A copy into a container that was asked for.
pub struct CopyIn {
    agent: Agent,
    request: api::CopyRequest,
    stream: Stream,
}

impl CopyOut {
    /// Carries it out.
    ///
    /// # Errors
    /// When the guest cannot, or the receiver goes.
    pub async fn run(mut self, mut to: impl AsyncWrite + Unpin) -> Result<(), Error> {
        let moved = async {
            tokio::io::copy(&mut self.stream, &mut to).await?;
            to.shutdown().await
        };
        let (copied, moved) = tokio::join!(self.agent.copy(&self.request), moved);
        copied?;
        moved.map_err(|e| Error::Invalid(format!("the copy was not received: {e}")))
    }
}

impl CopyIn {
    /// Carries it out; returns how many entries and bytes the archive had.
    ///
    /// # Errors
    /// When the guest cannot, or does not accept the archive.
    pub async fn run(mut self, mut from: impl AsyncRead + Unpin) -> Result<(u64, u64), Error> {
        let moved = async {
            // The guest gives up on a bad archive: its answer then says why.
            let _ = tokio::io::copy(&mut from, &mut self.stream).await;
            let _ = self.stream.shutdown().await;
        };
        let copying = self.agent.copy(&self.request);
        tokio::pin!(moved, copying);
        let reply = tokio::select! {
            reply = &mut copying => reply?,
            () = &mut moved => copying.await?,
        };
        Ok((reply.entries, reply.bytes))
    }
}

impl Container {
    /// Looks at a path of the container.
    ///
    /// # Errors
    /// When there is nothing.
    pub async fn stat(&self, path: &str, follow: bool) -> Result<FileStat, Error> {
        let stat = self.sandbox()?.guest()?.agent.stat(&self.name, path, follow).await?;
        Ok(FileStat { mode: stat.mode, size: stat.size, link_target: stat.link_target })
    }

    /// Prepares a copy of `path` out of the container.
    ///
    /// # Errors
    /// When there is nothing at `path`.
    pub async fn copy_out(&self, path: &str, follow: bool) -> Result<CopyOut, Error> {
        self.stat(path, follow).await?;
        let (agent, request, stream) = self
            .copy(path, Kind::Stdout, |request| {
                request.direction = Direction::OUT.into();
                request.follow = follow;
            })
            .await?;
        Ok(CopyOut { agent, request, stream })
    }

    /// Prepares a copy into directory `path` of the container.
    ///
    /// # Errors
    /// When there is no such directory.
    pub async fn copy_in(&self, path: &str, keep_owner: bool) -> Result<CopyIn, Error> {
        const S_IFMT: u32 = 0o170_000;
        const S_IFDIR: u32 = 0o040_000;
        if self.stat(path, true).await?.mode & S_IFMT != S_IFDIR {
            return Err(Error::Invalid(format!("{path} is not a directory in the container")));
        }
        let (agent, request, stream) = self
            .copy(path, Kind::Stdin, |request| {
                request.direction = Direction::IN.into();
                request.keep_owner = keep_owner;
            })
            .await?;
        Ok(CopyIn { agent, request, stream })
    }

    async fn copy(
        &self,
        path: &str,
        kind: Kind,
        set: impl FnOnce(&mut api::CopyRequest),
    ) -> Result<(Agent, api::CopyRequest, Stream), Error> {
        let sandbox = self.sandbox()?;
        let guest = sandbox.guest()?;
        let token = token();
        let mut request = api::CopyRequest {
            id: self.name.clone(),
            path: path.into(),
            token: token.to_string(),
            ..Default::default()
        };
        set(&mut request);
        let broken = |e: std::io::Error| Error::Ended(e.to_string());
        let mut stream = guest.channel.open(STDIO_PORT).await.map_err(|e| Error::Ended(e.to_string()))?;
        stream.write_all(Header { token, kind }.to_string().as_bytes()).await.map_err(broken)?;
        stream.flush().await.map_err(broken)?;
        Ok((guest.agent.clone(), request, stream))
    }
}
