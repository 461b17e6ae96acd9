//! The two programs that do the steps: QEMU's tools, and ours under the name `qemu-img` for commands, by the
//! library for guest requests. Both run in the folder of the image, since QEMU takes the name of a data file
//! as relative to where it runs.

use std::path::Path;
use std::process::Command;

use blockmirror_block::{ByteRange, WriteFlags, ZeroFlags};
use blockmirror_image::{Format, Image, OpenOptions, ReferencePolicy, SnapshotRef};
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;

use super::shape::{DataFile, Shape};
use super::step::{Extent, Step, Verb};

/// The image that is changed, in the folder of each program.
pub(super) const IMAGE: &str = "image.qcow2";
/// Its data file.
pub(super) const DATA: &str = "data.raw";

/// Who does the steps.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tools {
    Qemu(Qemu),
    Ours,
}

impl Tools {
    /// Does `step` to the image of this shape in `dir`; returns what a command prints.
    pub(super) fn perform(self, shape: &Shape, step: Step, dir: &Path) -> Outcome<String> {
        match step {
            Step::Guest(verb, place) => {
                self.request(shape, verb, shape.extent(place), dir).map(|()| String::new())
            }
            Step::Command(words) | Step::Look(words) => self.command(&split(words), dir),
        }
    }

    /// Runs `qemu-img` with these words.
    pub(super) fn command(self, words: &[&str], dir: &Path) -> Outcome<String> {
        match self {
            Self::Qemu(qemu) => qemu.img_in(dir, words),
            Self::Ours => {
                let mut ours = Command::new(std::env::current_exe()?);
                ours.arg("qemu-img").args(words).current_dir(dir).env_remove("BLOCKMIRROR_ALLOW_BACKING");
                let output = ours.output()?;
                let out = String::from_utf8_lossy(&output.stdout).into_owned();
                if output.status.success() {
                    return Ok(out);
                }
                let err = String::from_utf8_lossy(&output.stderr);
                Err(format!("{words:?}: {}: {}", output.status, (out + &err).trim_end()).into())
            }
        }
    }

    /// A guest request, durable when it returns.
    pub(super) fn request(self, shape: &Shape, verb: Verb, extent: Extent, dir: &Path) -> Outcome {
        match self {
            Self::Qemu(qemu) => {
                let Extent { at, len } = extent;
                let line = match verb {
                    Verb::Write(byte) => format!("write -q -P {byte} {at} {len}"),
                    Verb::Compressed(byte) => format!("write -q -c -P {byte} {at} {len}"),
                    Verb::Zero => format!("write -q -z {at} {len}"),
                    Verb::Unmap => format!("write -q -z -u {at} {len}"),
                    Verb::Discard => format!("discard -q {at} {len}"),
                };
                by_qemu_io(qemu, shape, dir, &line)
            }
            Self::Ours => by_library(verb, extent, dir),
        }
    }
}

/// The words of a command line.
fn split(line: &str) -> Vec<&str> {
    line.split(' ').map(|word| if word == "''" { "" } else { word }).collect()
}

/// One line of `qemu-io`, which obeys discards only where `discard=unmap` is set.
pub(super) fn by_qemu_io(qemu: Qemu, shape: &Shape, dir: &Path, line: &str) -> Outcome {
    let file = |prefix: &str, name: &str| {
        let path = dir.join(name);
        format!("{prefix}.driver=file,{prefix}.discard=unmap,{prefix}.filename={}", path.display())
    };
    let mut node = format!("driver=qcow2,discard=unmap,{}", file("file", IMAGE));
    if shape.data_file() != DataFile::None {
        node += &format!(",{}", file("data-file", DATA));
    }
    qemu.io_on(&node, &[line]).map(drop)
}

fn by_library(verb: Verb, Extent { at, len }: Extent, dir: &Path) -> Outcome {
    let image = open(&dir.join(IMAGE), true, None)?;
    let device = image.device();
    let range = ByteRange::at(at, len);
    match verb {
        Verb::Write(byte) => device.write_at(&vec![byte; usize::try_from(len)?], at, WriteFlags::NONE)?,
        Verb::Compressed(byte) => {
            let qcow2 = image.qcow2().ok_or("not a qcow2 image")?;
            qcow2.write_compressed(&vec![byte; usize::try_from(len)?], at)?;
        }
        Verb::Zero => device.write_zeroes(range, ZeroFlags::NONE)?,
        Verb::Unmap => device.write_zeroes(range, ZeroFlags::MAY_UNMAP)?,
        Verb::Discard => device.discard(range)?,
    }
    image.close()?;
    Ok(())
}

/// Opens a qcow2 image, or a snapshot of it, here. The folder is this task's: any name in it may be followed.
pub(super) fn open(path: &Path, writable: bool, snapshot: Option<&str>) -> Outcome<Image> {
    let options = OpenOptions::new().format(Format::Qcow2).policy(ReferencePolicy::any()).writable(writable);
    let snapshot = snapshot.map(|id| SnapshotRef::Id(id.into()));
    Ok(options.snapshot(snapshot).open(path)?)
}

/// All that the guest reads of an image, or of a snapshot of it, here.
pub(super) fn read(path: &Path, snapshot: Option<&str>) -> Outcome<Vec<u8>> {
    let image = open(path, false, snapshot)?;
    let device = image.device();
    let mut bytes = vec![0; usize::try_from(device.len())?];
    device.read_at(&mut bytes, 0)?;
    Ok(bytes)
}
