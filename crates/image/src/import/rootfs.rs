//! A rootfs tar as an image of one layer.

use std::io::Seek;
use std::path::Path;

use oci_spec::image::{
    Arch, ConfigBuilder, HistoryBuilder, ImageConfigurationBuilder, MediaType, Os, RootFsBuilder,
};

use super::docker::{descriptor, write_manifest};
use super::{Import, Result, Tar, file_label};
use crate::error::IoContext;
use crate::progress::Phase;
use crate::store::Image;
use crate::{Digest, Error};

pub(super) fn import(import: &Import<'_>, tar: Tar, what: &str) -> Result<Image> {
    let Some(reference) = &import.options.reference else {
        let what = format!("importing the rootfs {what} without a name");
        return Err(Error::Unsupported { what, advice: "give the image a name" });
    };
    let blobs = import.store.blobs();
    let (digest, size) = match tar {
        Tar::File(mut file) => {
            let path = Path::new(what);
            let size = file.metadata().context("inspect", path)?.len();
            file.rewind().context("read", path)?;
            let mut item = import.progress.start(Phase::Import, &file_label(what), Some(size));
            let stored = blobs.put_stream(&mut file, what, None, &mut |bytes| item.advance(bytes))?;
            item.done();
            stored
        }
        Tar::Copy(temporary, digest, size) => {
            blobs.adopt(temporary, &digest)?;
            (digest, size)
        }
    };
    let json = configuration(import, &digest)?;
    let config = descriptor(MediaType::ImageConfig, json.len() as u64, &blobs.put(&json)?)?;
    let layer = descriptor(MediaType::ImageLayer, size, &digest)?;
    import.store.add(write_manifest(import.store, config, vec![layer])?, Some(reference))
}

/// The configuration. It has no time of creation, so that the same rootfs gives the same image.
fn configuration(import: &Import<'_>, diff_id: &Digest) -> Result<Vec<u8>> {
    let options = import.options;
    let mut config = ConfigBuilder::default();
    if !options.cmd.is_empty() {
        config = config.cmd(options.cmd.clone());
    }
    if !options.entrypoint.is_empty() {
        config = config.entrypoint(options.entrypoint.clone());
    }
    if !options.env.is_empty() {
        config = config.env(options.env.clone());
    }
    let failed = |error: oci_spec::OciSpecError| Error::malformed("the new image configuration", error);
    let rootfs = RootFsBuilder::default().typ("layers").diff_ids(vec![diff_id.to_string()]);
    let history = HistoryBuilder::default().created_by("kapsel import");
    let configuration = ImageConfigurationBuilder::default()
        .os(Os::from(options.platform.os.as_str()))
        .architecture(Arch::from(options.platform.architecture.as_str()))
        .config(config.build().map_err(failed)?)
        .rootfs(rootfs.build().map_err(failed)?)
        .history(vec![history.build().map_err(failed)?])
        .build()
        .map_err(failed)?;
    serde_json::to_vec(&configuration).map_err(|error| Error::malformed("the new image configuration", error))
}
