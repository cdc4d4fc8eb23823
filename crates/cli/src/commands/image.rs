//! Commands about images: `pull`, `images`, `import`, `rmi`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use kapsel_image::{
    Image, ImportOptions, Inspection, Progress, PullOptions, PullPolicy, Reference, Source, Store,
};
use serde::Serialize;

use super::host::Host;
use crate::failure::{Failure, Outcome};
use crate::flags::image::{Images, Import, Pull, Rmi};
use crate::flags::value::EnvVar;
use crate::output::table::Table;
use crate::output::{self, size};
use crate::progress::Bars;

/// One image, as `images --json` lists it.
#[derive(Serialize)]
struct Listed {
    /// All names; none when its name has moved on to another image.
    names: Vec<String>,
    /// Of the manifest.
    digest: String,
    /// Bytes of its blobs as stored.
    size: u64,
    /// Bytes that its root file system takes on the disk; null before it is made.
    rootfs_size: Option<u64>,
    /// As the image says.
    architecture: String,
    /// When it was made, as the image says: RFC 3339, or null.
    created: Option<String>,
}

impl Listed {
    fn new(inspection: &Inspection) -> Self {
        Listed {
            names: inspection.references.iter().map(Reference::familiar).collect(),
            digest: inspection.image.digest.to_string(),
            size: inspection.size,
            rootfs_size: inspection.rootfs.as_ref().map(|rootfs| rootfs.allocated),
            architecture: inspection.config.architecture().to_string(),
            created: inspection.config.created().clone(),
        }
    }
}

/// `kapsel images`.
pub fn list(host: &Host, flags: &Images) -> Outcome {
    let store = host.images()?;
    // A name per entry; an image with two names comes twice.
    let images: BTreeMap<String, Image> =
        store.list()?.into_iter().map(|image| (image.digest.to_string(), image)).collect();
    let mut listed = Vec::new();
    for image in images.values() {
        match store.inspect(image) {
            Ok(inspection) => listed.push(Listed::new(&inspection)),
            // One damaged image must not hide the others.
            Err(error) => Failure::from(error).warn(),
        }
    }
    listed.sort_by(|a, b| (a.names.is_empty(), &a.names).cmp(&(b.names.is_empty(), &b.names)));
    if flags.json {
        output::json(&listed);
    } else if flags.quiet {
        listed.iter().for_each(|image| output::print(format!("{}\n", image.digest).as_bytes()));
    } else {
        table(&listed).print();
    }
    Ok(0)
}

fn table(listed: &[Listed]) -> Table {
    let mut table = Table::new(&["NAME", "DIGEST", "PLATFORM", "SIZE", "ON DISK"]);
    for image in listed {
        let unnamed = ["<none>".to_owned()];
        let names = if image.names.is_empty() { &unnamed[..] } else { &image.names };
        for name in names {
            table.row([
                name.clone(),
                image.digest.chars().take("sha256:".len() + 12).collect(),
                image.architecture.clone(),
                size::bytes(image.size),
                image.rootfs_size.map_or("-".into(), size::bytes),
            ]);
        }
    }
    table
}

/// `kapsel pull`.
pub fn pull(host: &Host, flags: &Pull) -> Outcome {
    let reference: Reference = flags.image.parse()?;
    let platform = flags.platform.clone().unwrap_or_default();
    let options = PullOptions { platform, policy: PullPolicy::Always, ..Default::default() };
    let bars = if flags.quiet { Bars::hidden() } else { Bars::new() };
    let store = host.images()?;
    let image = fetch(&store, &reference, &options, &bars)?;
    if flags.json {
        output::json(&Listed::new(&store.inspect(&image)?));
    } else if flags.quiet {
        output::print(format!("{}\n", image.digest).as_bytes());
    } else {
        output::print(format!("{} {}\n", reference.familiar(), image.digest).as_bytes());
    }
    Ok(0)
}

/// Brings an image here. Downloading is the one thing that runs in parallel, so it gets the runtime for it.
pub fn fetch(
    store: &Store,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Image, Failure> {
    Ok(super::host::runtime()?.block_on(store.pull(reference, options, progress))?)
}

/// `kapsel import`.
pub fn import(host: &Host, flags: &Import) -> Outcome {
    let words = |text: &Option<String>| -> Vec<String> {
        text.iter().flat_map(|text| text.split_whitespace()).map(str::to_owned).collect()
    };
    let options = ImportOptions {
        reference: flags.name.clone(),
        cmd: words(&flags.cmd),
        entrypoint: words(&flags.entrypoint),
        env: flags.env.iter().filter_map(EnvVar::resolve).collect(),
        ..Default::default()
    };
    let store = host.images()?;
    let bars = Bars::new();
    let images = if flags.file == Path::new("-") {
        let mut stdin = std::io::stdin();
        if stdin.is_terminal() {
            return Err(Failure::new("standard input is a terminal, not an archive")
                .hint("pipe one in, or name a file"));
        }
        store.import(Source::Reader(&mut stdin), &options, &bars)?
    } else {
        store.import(Source::Path(&flags.file), &options, &bars)?
    };
    if flags.json {
        // One with several names is there several times.
        let images: BTreeMap<String, &Image> =
            images.iter().map(|image| (image.digest.to_string(), image)).collect();
        let inspected = images.values().map(|image| store.inspect(image));
        let listed =
            inspected.map(|inspection| Ok(Listed::new(&inspection?))).collect::<Result<Vec<_>, Failure>>()?;
        output::json(&listed);
        return Ok(0);
    }
    for image in images {
        let name = image.reference.map_or("<none>".into(), |reference| reference.familiar());
        output::print(format!("{name} {}\n", image.digest).as_bytes());
    }
    Ok(0)
}

/// `kapsel rmi`.
pub fn remove(host: &Host, flags: &Rmi) -> Outcome {
    let store = host.images()?;
    let in_use: Vec<PathBuf> = host.rootfs_in_use()?;
    // They hold files of images open, which would keep their space.
    super::template::dismiss_standbys(host)?;
    super::many::each(&flags.images, |name| match store.remove(name, &in_use, flags.force) {
        Ok(pruned) => {
            pruned.images.iter().for_each(|image| output::print(format!("{image}\n").as_bytes()));
            Ok(())
        }
        Err(kapsel_image::Error::NotFound { .. }) if flags.force => Ok(()),
        Err(error) => Err(error.into()),
    })
}
