//! The images under `testdata/`: the manifest that says what each holds, and unpacking them.
//!
//! `cargo xtask testdata` writes them; the read tests need nothing else, least of all QEMU.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Outcome;

use crate::workspace_root;

/// Name of the manifest inside the folder.
pub const MANIFEST: &str = "MANIFEST.json";

/// Everything that is known of the stored images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Which `qemu-img` made the images.
    pub made_by: String,
    /// The images, by name.
    pub images: Vec<Entry>,
}

/// One image, with the files that it needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// What to open. The name tells version, cluster size and features.
    pub file: String,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Length of the disk in bytes.
    pub virtual_size: u64,
    /// blake3 of every byte of the disk, as `qemu-img convert -O raw` reads it; none where QEMU needs a
    /// secret to read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_blake3: Option<String>,
    /// Why the image cannot be opened for writing, if it cannot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub read_only_because: Option<String>,
    /// The stored files, the one to open last. Those that end in `.zst` are packed.
    pub stored: Vec<Stored>,
    /// The commands that made it, run in one folder that holds `stamps.bin`.
    pub commands: Vec<String>,
}

/// One file as it lies in the folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stored {
    /// Its name under `testdata/`.
    pub name: String,
    /// blake3 of the stored bytes.
    pub blake3: String,
}

/// The folder of the images.
pub fn folder() -> PathBuf {
    workspace_root().join("testdata")
}

impl Manifest {
    /// Reads the manifest in `folder`.
    pub fn load(folder: &Path) -> Outcome<Self> {
        let path = folder.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?)
    }

    /// The image whose file name is `file`.
    pub fn entry(&self, file: &str) -> Outcome<&Entry> {
        let found = self.images.iter().find(|e| e.file == file);
        found.ok_or_else(|| format!("{MANIFEST} has no image {file}").into())
    }
}

impl Entry {
    /// Unpacks the image and all that it needs from `folder` into `to`; returns the path to open.
    pub fn unpack(&self, folder: &Path, to: &Path) -> Outcome<PathBuf> {
        for stored in &self.stored {
            unpack_file(&folder.join(&stored.name), to)?;
        }
        Ok(to.join(&self.file))
    }
}

/// Unpacks one stored file into `to`, under its name without `.zst`. Holes of a disk stay holes. An image of
/// a format has none: where a mapped cluster is a hole depends on the file system, and the map of the image
/// with it.
fn unpack_file(stored: &Path, to: &Path) -> Outcome {
    let name = stored.file_name().unwrap_or_default().to_string_lossy();
    let bytes = fs::read(stored).map_err(|e| format!("{}: {e}", stored.display()))?;
    let Some(plain) = name.strip_suffix(".zst") else {
        return Ok(fs::write(to.join(&*name), bytes)?);
    };
    let image = zstd::decode_all(&bytes[..]).map_err(|e| format!("{}: {e}", stored.display()))?;
    if image.starts_with(b"QFI\xfb") {
        return Ok(fs::write(to.join(plain), image)?);
    }
    let out = File::create(to.join(plain))?;
    out.set_len(image.len() as u64)?;
    const PIECE: usize = 4096;
    for (i, piece) in image.chunks(PIECE).enumerate() {
        if piece.iter().any(|&b| b != 0) {
            std::os::unix::fs::FileExt::write_all_at(&out, piece, (i * PIECE) as u64)?;
        }
    }
    Ok(())
}
