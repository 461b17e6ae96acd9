//! The image that the operations of a shape start from, with the files that they name, made by one program.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;

use super::shape::{Compression, DataFile, Shape, Snapshots};
use super::step::{Extent, Verb};
use super::tools::{DATA, IMAGE, Tools, by_qemu_io};

/// What the VM state of a snapshot holds.
pub(super) const VM_STATE_BYTE: u8 = 17;

/// The identifier of the snapshot that has it.
pub(super) const VM_STATE_OF: &str = "2";

/// Makes everything in `dir`.
pub(super) fn make(qemu: Qemu, shape: &Shape, dir: &Path) -> Outcome {
    let tools = if shape.is_ours() { Tools::Ours } else { Tools::Qemu(qemu) };
    let (options, len) = (shape.options(), shape.len().to_string());
    // One is shorter than the image, one longer.
    for (name, len, byte) in
        [("base.qcow2", (shape.len() * 3 / 4) & !511, 9), ("other.qcow2", shape.len() + 65536, 8)]
    {
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", name, &len.to_string()])?;
        qemu.io("qcow2", &dir.join(name), &[&format!("write -q -P {byte} 0 700k")])?;
    }
    let mut words = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if shape.has_backing() {
        words.extend(["-b", "base.qcow2", "-F", "qcow2"]);
    }
    words.extend([IMAGE, &len]);
    tools.command(&words, dir)?;
    fill(tools, shape, dir)?;
    snapshots(qemu, tools, shape, dir)?;
    if shape.has_bitmaps() {
        tools.command(&["bitmap", "-f", "qcow2", "--add", IMAGE, "one"], dir)?;
        tools.command(&["bitmap", "-f", "qcow2", "--add", "--disable", "-g", "4k", IMAGE, "two"], dir)?;
        tools.request(shape, Verb::Write(3), Extent { at: 1000, len: 90 << 10 }, dir)?;
    }
    // The data file under another name, which an amendment may give it.
    if shape.data_file() != DataFile::None {
        fs::copy(dir.join(DATA), dir.join("other.raw"))?;
    }
    Ok(())
}

/// Data, a cluster of zeros, and a cluster of nothing between them.
fn fill(tools: Tools, shape: &Shape, dir: &Path) -> Outcome {
    let c = shape.cluster();
    let write = |byte| match shape.compression() {
        Compression::None => Verb::Write(byte),
        Compression::Deflate | Compression::Zstd => Verb::Compressed(byte),
    };
    tools.request(shape, write(1), Extent { at: 0, len: 3 * c }, dir)?;
    if c < 2 << 20 {
        tools.request(shape, write(2), Extent { at: 4 * c, len: 256 << 10 }, dir)?;
    }
    tools.request(shape, Verb::Zero, Extent { at: 2 * c, len: c }, dir)?;
    // Up to the end of the disk, which cuts a cluster.
    tools.request(shape, Verb::Write(5), Extent { at: shape.len() - 700, len: 700 }, dir)
}

fn snapshots(qemu: Qemu, tools: Tools, shape: &Shape, dir: &Path) -> Outcome {
    let kind = shape.snapshots();
    if kind == Snapshots::None {
        return Ok(());
    }
    tools.command(&["snapshot", "-c", "one", IMAGE], dir)?;
    tools.request(shape, Verb::Write(3), Extent { at: 1000, len: 90 << 10 }, dir)?;
    if shape.v3() {
        tools.command(&["resize", "-q", "-f", "qcow2", IMAGE, "+100k"], dir)?;
    }
    if kind == Snapshots::VmState {
        let line = format!("write -q -b -P {VM_STATE_BYTE} 0 {}", vm_state_len(shape));
        by_qemu_io(qemu, shape, dir, &line)?;
    }
    tools.command(&["snapshot", "-c", "two", IMAGE], dir)?;
    if kind == Snapshots::VmState {
        declare_vm_state(&dir.join(IMAGE), vm_state_len(shape))?;
    }
    tools.request(shape, Verb::Write(4), Extent { at: 50 << 10, len: 3 << 10 }, dir)
}

/// More than a cluster.
pub(super) fn vm_state_len(shape: &Shape) -> u64 {
    shape.cluster() + 1024
}

/// Makes the second snapshot say that it has `len` bytes of VM state, which only a running QEMU writes.
fn declare_vm_state(image: &Path, len: u64) -> Outcome {
    const TABLE_FIELD: u64 = 64;
    /// The fixed part of an entry.
    const FIXED: u64 = 40;
    let file = OpenOptions::new().read(true).write(true).open(image)?;
    let number = |at: u64, bytes: usize| -> Outcome<u64> {
        let mut word = [0; 8];
        file.read_exact_at(&mut word[8 - bytes..], at)?;
        Ok(u64::from_be_bytes(word))
    };
    let first = number(TABLE_FIELD, 8)?;
    let variable = number(first + 12, 2)? + number(first + 14, 2)? + number(first + 36, 4)?;
    let second = (first + FIXED + variable).next_multiple_of(8);
    if number(second + 36, 4)? < 8 {
        return Err("the snapshot has no place for the size of its VM state".into());
    }
    file.write_all_at(&u32::try_from(len)?.to_be_bytes(), second + 32)?;
    file.write_all_at(&len.to_be_bytes(), second + FIXED)?;
    Ok(())
}

/// Copies the files of one folder into a new one.
pub(super) fn copy(from: &Path, to: &Path) -> Outcome {
    fs::create_dir(to)?;
    for file in fs::read_dir(from)? {
        let file = file?;
        fs::copy(file.path(), to.join(file.file_name()))?;
    }
    Ok(())
}
