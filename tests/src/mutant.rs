//! A damaged image is refused, or read byte for byte as QEMU reads it. Called by `tests/tests/hostile.rs`
//! with each field of real images changed, and by `cargo xtask fuzz mutants` with several changes at once.

use std::fs;
use std::path::Path;

use blockmirror_block::{ByteRange, Visit};
use blockmirror_image::{Format, OpenOptions, ReferencePolicy};
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;

/// How much of a disk is compared. Damaged headers declare disks of exabytes.
const COMPARED: u64 = 6 << 20;
/// Runs of a map that are looked at.
const RUNS: u64 = 100_000;

/// What reading a damaged image gave.
#[derive(Debug)]
pub enum Reading {
    /// It was refused.
    Refused(String),
    /// The first bytes of the disk.
    Content(Vec<u8>),
}

/// Reads the image at `path`, and asks for its map.
///
/// # Errors
/// The folder of the image cannot be looked at.
pub fn read(path: &Path) -> Outcome<Reading> {
    let options = OpenOptions::new().format(Format::Qcow2).policy(ReferencePolicy::beside(path)?);
    let image = match options.open(path) {
        Ok(image) => image,
        Err(e) => return Ok(Reading::Refused(e.to_string())),
    };
    let device = image.device();
    let mut content = vec![0; usize::try_from(device.len().min(COMPARED))?];
    if let Err(e) = device.read_at(&mut content, 0) {
        return Ok(Reading::Refused(e.to_string()));
    }
    // The far end and the map of a disk of any length: an error is fine, a hang is not.
    let mut tail = [0; 512];
    let _ = device.read_at(&mut tail, device.len().saturating_sub(512));
    let mut seen = 0;
    let _ = device.extents(ByteRange::new(0, device.len()), &mut |_| {
        seen += 1;
        if seen < RUNS { Visit::Continue(()) } else { Visit::Break(()) }
    });
    Ok(Reading::Content(content))
}

/// What QEMU reads of the first `len` bytes of the same image, by way of the file `out`.
///
/// # Errors
/// QEMU refuses the image.
pub fn read_by_qemu(qemu: Qemu, path: &Path, len: usize, out: &Path) -> Outcome<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let node = format!("driver=raw,size={len},file.driver=qcow2,file.file.filename={name}");
    let out_name = out.to_string_lossy();
    let words = ["convert", "-O", "raw", "--image-opts", &node, &out_name];
    // In the image's folder: QEMU takes the names of data files as relative to where it runs.
    qemu.img_in(path.parent().unwrap_or(Path::new(".")), words)?;
    Ok(fs::read(out)?)
}
