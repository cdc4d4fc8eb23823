//! What commands share: where things are on this machine, and the configuration in force.

use std::path::PathBuf;

use kapsel_guest::{Kernel, KernelSource};
use kapsel_image::Store;
use kapsel_sandbox::client::Client;
use kapsel_sandbox::config::Config;
use kapsel_sandbox::listing::Entry;
use kapsel_sandbox::paths::{Bundle, Paths};
use kapsel_sandbox::record::{Record, Status};
use kapsel_sandbox::registry::Registry;
use kapsel_sandbox::{cleanup, launch, listing};
use oci_spec::runtime::Spec;

use crate::failure::Failure;
use crate::progress::Bars;

/// This machine, as the global flags and the configuration describe it.
#[derive(Clone)]
pub struct Host {
    /// Where things are.
    pub paths: Paths,
    /// The configuration in force.
    pub config: Config,
    /// What `--root` gave.
    root: Option<PathBuf>,
    /// What `--config` gave.
    config_file: Option<PathBuf>,
}

impl Host {
    /// Reads the configuration and finds the directories. Touches nothing.
    pub fn new(root: Option<PathBuf>, config_file: Option<PathBuf>) -> Result<Self, Failure> {
        let paths = Paths::discover(root.as_deref())?;
        let config = Config::load(config_file.as_deref())?;
        Ok(Host { paths, config, root, config_file })
    }

    /// How shims are launched, so that they see the same machine.
    pub fn launch_options(&self) -> launch::Options<'_> {
        let (config_file, root) = (self.config_file.as_deref(), self.root.as_deref());
        launch::Options { config_file, root, ..launch::Options::default() }
    }

    /// The image store.
    pub fn images(&self) -> Result<Store, Failure> {
        self.paths.prepare()?;
        Ok(Store::open(&self.paths.images())?)
    }

    /// The sandboxes, as they are.
    pub fn registry(&self) -> Result<Registry, Failure> {
        Ok(Registry::open(&self.paths)?)
    }

    /// The sandboxes, after what killed ones left behind was cleared away.
    pub fn sandboxes(&self) -> Result<Registry, Failure> {
        let registry = self.registry()?;
        cleanup::sweep(&registry)?;
        Ok(registry)
    }

    /// All sandboxes, each asked how it does.
    pub fn list(&self) -> Result<Vec<Entry>, Failure> {
        let registry = self.sandboxes()?;
        Ok(runtime()?.block_on(listing::list(&registry, listing::DEADLINE))?)
    }

    /// The sandbox that a person named.
    pub fn find(&self, name: &str) -> Result<Sandbox, Failure> {
        Sandbox::find(&self.sandboxes()?, name)
    }

    /// The root file systems that sandboxes use: their images must stay.
    pub fn rootfs_in_use(&self) -> Result<Vec<PathBuf>, Failure> {
        let records =
            self.sandboxes()?.bundles()?.into_iter().filter_map(|bundle| Record::read(&bundle).ok());
        Ok(records.filter_map(|record| record.rootfs).collect())
    }
}

/// A sandbox that exists.
pub struct Sandbox {
    /// Where it is.
    pub bundle: Bundle,
    /// What is known of it.
    pub record: Record,
}

impl Sandbox {
    /// By its name or the beginning of its id.
    pub fn find(registry: &Registry, name: &str) -> Result<Self, Failure> {
        let bundle = registry.resolve(name)?;
        let record = Record::read(&bundle)?;
        Ok(Sandbox { bundle, record })
    }

    /// Speaks to its shim.
    pub async fn connect(&self) -> Result<Client, Failure> {
        if self.record.status == Status::Exited {
            return Err(Failure::new(format!("container {} has ended", self.record.name))
                .hint("'kapsel ps' lists those that run"));
        }
        Ok(Client::connect(&self.bundle, &self.record.id).await?)
    }

    /// Its OCI specification.
    pub fn spec(&self) -> Result<Spec, Failure> {
        let path = self.bundle.spec();
        let cannot = |reason: String| Failure::new(format!("cannot read {}: {reason}", path.display()));
        let text = std::fs::read(&path).map_err(|error| cannot(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| cannot(error.to_string()))
    }
}

/// The guest's kernel, fetched now when it is not here.
pub fn ensure_kernel(host: &Host) -> Result<Kernel, Failure> {
    let source = host.config.kernel().map_or(KernelSource::Debian, KernelSource::Path);
    let bars = Bars::new();
    let mut bar = None;
    let kernel = Kernel::ensure(host.paths.data(), &source, &mut |progress| bars.kernel(&mut bar, progress))?;
    Ok(kernel)
}

/// One thread is enough for talking to shims; a second one would only cost start-up time.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("cannot set up event handling: {error}")))
}
