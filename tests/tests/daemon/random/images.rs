//! The images that a run begins with, and the targets of its mirrors: of all layouts, and of unequal lengths.

use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_block::testing::Rng;
use blockmirror_testing::qemu::Qemu;
use serde_json::{Value, json};

/// Length of the disk: it ends inside of a cluster of every size but 512.
pub(crate) const LEN: u64 = (1 << 20) + 2560;

/// Options of a qcow2 image.
pub(crate) fn layout(rng: &mut Rng) -> &'static str {
    rng.pick(&[
        "compat=1.1",
        "compat=0.10",
        "compat=1.1,cluster_size=4k",
        "compat=0.10,cluster_size=512",
        "compat=1.1,cluster_size=512k",
        "compat=1.1,extended_l2=on",
        "compat=1.1,extended_l2=on,cluster_size=16k",
    ])
}

/// An image of a chain: its file and its format.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) format: String,
}

/// Makes a qcow2 image whose header names `backing`, which is not opened for it.
pub(crate) fn create(qemu: Qemu, path: &Path, len: u64, backing: Option<&Layer>, rng: &mut Rng) {
    let len = len.to_string();
    let mut words = vec!["create", "-q", "-u", "-f", "qcow2", "-o", layout(rng)];
    if let Some(layer) = backing {
        words.extend(["-F", &layer.format, "-b", layer.path.to_str().unwrap()]);
    }
    words.extend([path.to_str().unwrap(), &len]);
    qemu.img(words).unwrap();
}

/// A chain of one to three images, shorter and longer than each other, of which `disk.qcow2` is the last.
/// Returns the node of the daemon and what the disk holds.
pub(crate) fn chain(qemu: Qemu, dir: &Path, rng: &mut Rng) -> (Value, Vec<u8>) {
    let depth = rng.pick(&[1, 2, 3, 3, 3]);
    let mut below: Option<(Layer, Value)> = None;
    for level in 0..depth {
        let is_top = level + 1 == depth;
        let len = match level {
            _ if is_top => LEN,
            0 => rng.pick(&[2 << 20, 2 << 20, LEN, 1 << 20, 700_416]),
            _ => rng.pick(&[320 << 10, LEN / 2 / 512 * 512, 700_416, LEN, 2 << 20]),
        };
        let is_raw = level == 0 && !is_top && rng.chance(50);
        let name = if is_top { "disk".to_owned() } else { format!("l{level}") };
        let format = if is_raw { "raw" } else { "qcow2" };
        let path = dir.join(format!("{name}.{format}"));
        if is_raw {
            fs::write(&path, vec![0xbb; len as usize]).unwrap();
        } else {
            create(qemu, &path, len, below.as_ref().map(|(layer, _)| layer), rng);
        }
        let mut script = Vec::new();
        if level == 0 && !is_raw && rng.chance(50) {
            script.push(format!("write -q -P 0xbb 0 {len}"));
        }
        for _ in 0..rng.below(4) {
            let start = rng.below(len / 512) * 512;
            let run = rng.range(1, 300).min((len - start) / 512) * 512;
            script.push(match rng.below(3) {
                0 => format!("write -q -z {start} {run}"),
                _ => format!("write -q -P {} {start} {run}", rng.range(1, 255)),
            });
        }
        let script: Vec<_> = script.iter().map(String::as_str).collect();
        qemu.io(format, &path, &script).unwrap();
        let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
        let mut node = json!({"driver": format, "node-name": name, "file": file, "discard": "unmap"});
        if let Some((_, below)) = below.take() {
            node["backing"] = below;
        }
        below = Some((Layer { path, format: format.to_owned() }, node));
    }
    let (layer, node) = below.unwrap();
    (node, contents(qemu, &layer.path))
}

/// What a qcow2 image shows over the chain that its header names, read by QEMU, also while it is in use.
pub(crate) fn contents(qemu: Qemu, image: &Path) -> Vec<u8> {
    let raw = image.with_extension("read");
    let words = ["convert", "-U", "-f", "qcow2", "-O", "raw"].map(std::ffi::OsStr::new);
    qemu.img(words.into_iter().chain([image.as_os_str(), raw.as_os_str()])).unwrap();
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}
