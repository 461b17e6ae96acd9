//! An OCI image layout of one layer: the static program.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::Outcome;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::deb::VERSION;
use super::program::build_static;
use super::tree::Tree;

pub(super) fn build(out: &Path) -> Outcome<PathBuf> {
    let program = build_static(out)?;
    let tree = Tree::new(out.join("oci-root"))?;
    tree.file("usr/bin/blockmirror", &fs::read(program)?, 0o755)?;
    let layer = tar(tree.root())?;
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
    gzip.write_all(&layer)?;
    let packed = gzip.finish()?;

    let layout = out.join("oci");
    if layout.exists() {
        fs::remove_dir_all(&layout)?;
    }
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let layer_blob = blob(&layout, "application/vnd.oci.image.layer.v1.tar+gzip", &packed)?;
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": ["/usr/bin/blockmirror"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
    });
    let config = blob(&layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer_blob] });
    let mut manifest = blob(&layout, kind, manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": VERSION });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(layout.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    Ok(layout)
}

/// An archive of all below `root`, the same bytes each time.
fn tar(root: &Path) -> Outcome<Vec<u8>> {
    let same = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--format=ustar"];
    let output = Command::new("tar").args(same).arg("-C").arg(root).args(["-cf", "-", "."]).output()?;
    if !output.status.success() {
        return Err(format!("tar: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(output.stdout)
}

/// Stores `bytes` by their digest, and describes them.
fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Outcome<Value> {
    let digest = digest(bytes);
    fs::write(layout.join("blobs").join(digest.replace(':', "/")), bytes)?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
