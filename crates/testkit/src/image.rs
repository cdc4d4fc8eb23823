//! Tiny images in every form that images come in.

use std::path::Path;

use serde_json::json;
use sha2::Digest as _;

use crate::tar::TarBuilder;

/// A layer: its tar, and how it is compressed.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The uncompressed tar.
    pub tar: Vec<u8>,
    /// The blob as it is stored.
    pub blob: Vec<u8>,
    media_type: &'static str,
}

impl Layer {
    /// An uncompressed layer.
    pub fn plain(tar: Vec<u8>) -> Layer {
        Layer { blob: tar.clone(), tar, media_type: "application/vnd.oci.image.layer.v1.tar" }
    }

    /// A gzip layer.
    pub fn gzip(tar: Vec<u8>) -> Layer {
        Layer { blob: gzip(&tar), tar, media_type: "application/vnd.oci.image.layer.v1.tar+gzip" }
    }

    /// A zstd layer.
    pub fn zstd(tar: Vec<u8>) -> Layer {
        let blob = zstd::encode_all(&tar[..], 3).unwrap();
        Layer { blob, tar, media_type: "application/vnd.oci.image.layer.v1.tar+zstd" }
    }
}

/// Compresses with gzip.
pub fn gzip(data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// `sha256:` and the hex digits of the data's digest.
pub fn digest(data: &[u8]) -> String {
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(data)))
}

/// Builds an image of layers and a configuration.
#[derive(Clone, Debug, Default)]
pub struct ImageBuilder {
    layers: Vec<Layer>,
    config: serde_json::Value,
    diff_ids: Option<Vec<String>>,
}

/// A built image: its documents and blobs.
#[derive(Clone, Debug)]
pub struct BuiltImage {
    /// The manifest's JSON.
    pub manifest: Vec<u8>,
    /// The configuration's JSON.
    pub config: Vec<u8>,
    /// The layers.
    pub layers: Vec<Layer>,
}

impl ImageBuilder {
    /// An image without layers that runs `/bin/sh`.
    pub fn new() -> ImageBuilder {
        ImageBuilder { config: json!({ "Cmd": ["/bin/sh"] }), ..ImageBuilder::default() }
    }

    /// Adds a layer on top.
    pub fn layer(mut self, layer: Layer) -> ImageBuilder {
        self.layers.push(layer);
        self
    }

    /// Sets the `config` object of the configuration: `{"Cmd": […], "Env": […]}`.
    pub fn config(mut self, config: serde_json::Value) -> ImageBuilder {
        self.config = config;
        self
    }

    /// Lies about the layers' diff_ids.
    pub fn diff_ids(mut self, diff_ids: Vec<String>) -> ImageBuilder {
        self.diff_ids = Some(diff_ids);
        self
    }

    /// Builds it.
    pub fn build(self) -> BuiltImage {
        let diff_ids =
            self.diff_ids.unwrap_or_else(|| self.layers.iter().map(|layer| digest(&layer.tar)).collect());
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = serde_json::to_vec(&config).unwrap();
        let layers: Vec<_> =
            self.layers.iter().map(|layer| descriptor(layer.media_type, &layer.blob)).collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers,
        });
        BuiltImage { manifest: serde_json::to_vec(&manifest).unwrap(), config, layers: self.layers }
    }
}

/// A descriptor of the data.
pub fn descriptor(media_type: &str, data: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": digest(data), "size": data.len() })
}

impl BuiltImage {
    /// The manifest's digest.
    pub fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// Everything that is addressed by digest, the manifest included.
    pub fn blobs(&self) -> Vec<Vec<u8>> {
        let mut blobs = vec![self.manifest.clone(), self.config.clone()];
        blobs.extend(self.layers.iter().map(|layer| layer.blob.clone()));
        blobs
    }

    /// The manifest's descriptor for linux/amd64.
    pub fn descriptor(&self) -> serde_json::Value {
        let mut descriptor = descriptor("application/vnd.oci.image.manifest.v1+json", &self.manifest);
        descriptor["platform"] = json!({ "os": "linux", "architecture": "amd64" });
        descriptor
    }

    /// The files of an OCI layout with this image, `name` in its annotation.
    pub fn oci_files(&self, name: &str) -> Vec<(String, Vec<u8>)> {
        let mut descriptor = self.descriptor();
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
        let mut files = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), serde_json::to_vec(&index).unwrap()),
        ];
        let blobs = self.blobs();
        files.extend(blobs.into_iter().map(|blob| (format!("blobs/sha256/{}", &digest(&blob)[7..]), blob)));
        files
    }

    /// An OCI archive.
    pub fn oci_archive(&self, name: &str) -> Vec<u8> {
        archive(&self.oci_files(name))
    }

    /// An OCI layout in `dir`.
    pub fn oci_dir(&self, dir: &Path, name: &str) {
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        for (path, data) in self.oci_files(name) {
            std::fs::write(dir.join(path), data).unwrap();
        }
    }

    /// An archive as `docker save` before version 25 wrote it.
    pub fn docker_archive(&self, tags: &[&str]) -> Vec<u8> {
        let config = format!("{}.json", &digest(&self.config)[7..]);
        let mut files = vec![(config.clone(), self.config.clone())];
        let mut names = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let name = format!("{i:064}/layer.tar");
            files.push((name.clone(), layer.blob.clone()));
            names.push(name);
        }
        let manifest = json!([{ "Config": config, "RepoTags": tags, "Layers": names }]);
        files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifest).unwrap()));
        archive(&files)
    }
}

/// A tar of the files.
pub fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    files.iter().fold(TarBuilder::new(), |tar, (path, data)| tar.file(path, data)).build()
}

/// The files of an image with Debian's static busybox and a shell, as a rootfs tar; `None` where it is not installed
/// (`/bin/busybox` of package `busybox-static`).
pub fn busybox_rootfs() -> Option<Vec<u8>> {
    let busybox = std::fs::read("/bin/busybox").ok()?;
    let mut tar = TarBuilder::new();
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"] {
        tar = tar.dir(dir);
    }
    tar = tar.executable("bin/busybox", busybox);
    for applet in ["sh", "ls", "cat", "echo", "true", "false", "sleep", "id", "uname", "mount", "env"] {
        tar = tar.symlink(format!("bin/{applet}"), "busybox");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    Some(tar.file("etc/passwd", passwd).file("etc/group", "root:x:0:\nnogroup:x:65534:\n").build())
}
