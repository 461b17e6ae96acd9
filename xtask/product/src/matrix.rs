//! `cargo xtask matrix`: features of qcow2 images times operations, beside QEMU.
//!
//! QEMU makes each image twice. One is changed by QEMU, one by us, in the same words. What QEMU accepts ours
//! accepts, and what it refuses ours refuses. Then `qemu-img check` finds nothing in ours, ours finds nothing
//! in QEMU's, and both read the same, snapshots included.

mod cell;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use blockmirror_block::testing::Rng;
use blockmirror_block::{ByteRange, WriteFlags, ZeroFlags};
use blockmirror_image::{Format, OpenOptions, ReferencePolicy};
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

use crate::Task;
use cell::{Action, Cell, IMAGE, cells};

/// Try operations on images with every feature, beside QEMU
#[derive(clap::Args)]
pub(crate) struct Matrix {
    /// One cell of so many, which the seed chooses
    #[arg(long, default_value_t = 1)]
    one_in: u64,
    /// What is chosen depends on it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only cells whose description contains this
    #[arg(long, default_value = "")]
    only: String,
}

impl Task for Matrix {
    fn run(self) -> Outcome<ExitCode> {
        let qemu = Qemu::find("cargo xtask matrix").ok_or("the peer is qemu-img, which cannot be run")?;
        let mut rng = Rng::new(self.seed, 0);
        let (mut same, mut refused, mut wrong) = (0, 0, 0);
        for cell in cells() {
            if !rng.one_in(self.one_in) || !cell.to_string().contains(&self.only) {
                continue;
            }
            match try_cell(qemu, &cell) {
                Ok(true) => same += 1,
                Ok(false) => refused += 1,
                Err(why) => {
                    wrong += 1;
                    println!("{cell}: {}", why.to_string().trim_end());
                }
            }
        }
        println!(
            "seed {}: {} cells: {same} the same, {refused} refused by both, {wrong} wrong",
            self.seed,
            same + refused + wrong
        );
        Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Whether both did it; an error says what differs.
fn try_cell(qemu: Qemu, cell: &Cell) -> Outcome<bool> {
    let dir = scratch()?;
    let [ours, theirs] = ["ours", "theirs"].map(|name| dir.path().join(name));
    fs::create_dir(&ours)?;
    fs::create_dir(&theirs)?;
    cell.make(qemu, &ours)?;
    for file in fs::read_dir(&ours)? {
        let file = file?;
        fs::copy(file.path(), theirs.join(file.file_name()))?;
    }
    let peer = by_qemu(qemu, cell, &theirs);
    match (by_us(cell, &ours), peer) {
        (Ok(()), Ok(())) => {}
        (Err(_), Err(_)) => return Ok(false),
        (Ok(()), Err(why)) => return Err(format!("done, and refused by QEMU: {why}").into()),
        (Err(why), Ok(())) => return Err(format!("refused, and done by QEMU: {why}").into()),
    }
    qemu.img_in(&ours, ["check", "-q", IMAGE]).map_err(|e| format!("QEMU checks ours: {e}"))?;
    command(&["check", "-q", "-f", "qcow2", "IMAGE"], &theirs)
        .map_err(|e| format!("ours checks QEMU's: {e}"))?;
    let [raw, peer] = [(&ours, "ours.raw"), (&theirs, "theirs.raw")].map(|(dir, raw)| (dir, dir.join(raw)));
    for (dir, raw) in [&raw, &peer] {
        qemu.to_raw("qcow2", &dir.join(IMAGE), raw)?;
    }
    if fs::read(&raw.1)? != fs::read(&peer.1)? {
        return Err("QEMU reads something else than after its own".into());
    }
    let read = dir.path().join("read.raw");
    let words = ["convert", "-q", "-f", "qcow2", "-O", "raw", "IMAGE"];
    run_ours(&words, &theirs, &[read.as_os_str().to_owned()])?;
    if fs::read(&read)? != fs::read(&peer.1)? {
        return Err("ours reads something else than QEMU".into());
    }
    let list = |dir: &Path| -> Outcome<String> {
        let json: serde_json::Value =
            serde_json::from_str(&qemu.img_in(dir, ["info", "--output=json", IMAGE])?)?;
        let names = json["snapshots"].as_array().into_iter().flatten();
        Ok(names.map(|snapshot| format!("{} {};", snapshot["id"], snapshot["name"])).collect())
    };
    let (found, wanted) = (list(&ours)?, list(&theirs)?);
    if found == wanted { Ok(true) } else { Err(format!("snapshots {found}, QEMU's {wanted}").into()) }
}

fn by_qemu(qemu: Qemu, cell: &Cell, dir: &Path) -> Outcome {
    let ((at, len), (start, whole)) = (cell.request(), cell.aligned());
    let request = match cell.action {
        Action::Command(words) => {
            let words = words.iter().map(|word| if *word == "IMAGE" { IMAGE } else { word });
            return qemu.img_in(dir, words).map(drop);
        }
        Action::Write => format!("write -q -P 7 {at} {len}"),
        Action::Zero => format!("write -q -z {at} {len}"),
        Action::Unmap => format!("write -q -z -u {at} {len}"),
        Action::Discard => format!("discard -q {start} {whole}"),
    };
    cell.io(qemu, dir, &[&request])
}

fn by_us(cell: &Cell, dir: &Path) -> Outcome {
    if let Action::Command(words) = cell.action {
        return command(words, dir);
    }
    let path = dir.join(IMAGE);
    let options = OpenOptions::new().format(Format::Qcow2).policy(ReferencePolicy::beside(&path)?);
    let image = options.writable(true).open(&path)?;
    let device = image.device();
    let ((at, len), (start, whole)) = (cell.request(), cell.aligned());
    match cell.action {
        Action::Write => device.write_at(&vec![7; usize::try_from(len)?], at, WriteFlags::NONE)?,
        Action::Zero => device.write_zeroes(ByteRange::at(at, len), ZeroFlags::NONE)?,
        Action::Unmap => device.write_zeroes(ByteRange::at(at, len), ZeroFlags::MAY_UNMAP)?,
        Action::Discard | Action::Command(_) => device.discard(ByteRange::at(start, whole))?,
    }
    device.flush()?;
    Ok(())
}

/// Runs our command on the image in `dir`.
fn command(words: &[&str], dir: &Path) -> Outcome {
    run_ours(words, dir, &[])
}

fn run_ours(words: &[&str], dir: &Path, more: &[OsString]) -> Outcome {
    let image = dir.join(IMAGE);
    let words = words.iter().map(|word| if *word == "IMAGE" { image.clone().into() } else { word.into() });
    let words = [OsString::from("blockmirror")].into_iter().chain(words).chain(more.iter().cloned());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    match blockmirror_cli::run(words, &mut out, &mut err) {
        0 => Ok(()),
        code => {
            let text = [err, out].concat();
            Err(format!("exit code {code}: {}", String::from_utf8_lossy(&text).trim_end()).into())
        }
    }
}
