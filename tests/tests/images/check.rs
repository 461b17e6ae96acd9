//! `check` finds in damaged images what `qemu-img check` finds, and repairs what it repairs, or more.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

mod damages;
mod image;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_image::{OpenOptions, ReferencePolicy};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;
use serde_json::{Map, Value};
use tempfile::TempDir;

use self::damages::{Damage, NOT_FOR_QEMU, SAME, SAME_VERDICT};
use self::image::{Bytes, Kind};
use crate::common::ours;

/// What is read at once to see what a guest can read.
const BLOCK: usize = 16384;

/// QEMU's repair of this one makes a file of 256 TiB, fails, and takes more than a minute.
const LONG_REPAIR: &str = "refcount table too long";

struct Bench {
    qemu: Qemu,
    dir: TempDir,
    bases: HashMap<Kind, (TempDir, PathBuf)>,
}

/// Exit code and figures of a check.
type Verdict = (i32, Map<String, Value>);

impl Bench {
    fn new() -> Option<Self> {
        let qemu = Qemu::find("check")?;
        Some(Self { qemu, dir: scratch().unwrap(), bases: HashMap::new() })
    }

    /// The damaged image, beside its data file if it has one.
    fn damaged(&mut self, (_, kind, damage): &Damage) -> PathBuf {
        let qemu = self.qemu;
        let (base_dir, base) = self.bases.entry(*kind).or_insert_with(|| {
            let dir = scratch().unwrap();
            let path = kind.make(qemu, dir.path());
            (dir, path)
        });
        if *kind == Kind::DataFile {
            fs::copy(base_dir.path().join("data.raw"), self.dir.path().join("data.raw")).unwrap();
        }
        let mut bytes = Bytes::read(base);
        damage(&mut bytes);
        let path = self.dir.path().join("damaged.qcow2");
        fs::write(&path, bytes.0).unwrap();
        path
    }

    fn copy(&self, path: &Path, name: &str) -> PathBuf {
        let copy = self.dir.path().join(name);
        fs::copy(path, &copy).unwrap();
        copy
    }

    /// Has QEMU write where the disk has no place in the file, and so to what is free. What could be read is
    /// there afterwards, and the image is sound if it was.
    fn keeps_once_filled(
        &self,
        before: &[Option<Vec<u8>>],
        path: &Path,
        kind: Kind,
        what: &str,
        is_sound: bool,
    ) {
        let (start, len) = kind.unallocated();
        let line = format!("write -q -P 0xab {start} {len}");
        let mut command = Command::new("qemu-io");
        command.current_dir(self.dir.path()).args(["-f", "qcow2", "-c", &line]).arg(path);
        let has_written = command.output().unwrap().status.success();
        assert!(has_written || !is_sound, "{what}: QEMU does not write to the repaired image");
        // What a block was that is written now is not asked for.
        let written = (start / BLOCK as u64) as usize..(start + len).div_ceil(BLOCK as u64) as usize;
        let mut before = before.to_vec();
        let all = before.len();
        before[written.start.min(all)..written.end.min(all)].fill(None);
        keeps(&before, path, &format!("{what}, filled"));
        if is_sound {
            self.is_sound_once_filled(path, what);
        }
    }

    /// What two entries mapped is left to one of them without the COPIED flag, when the other is written.
    fn is_sound_once_filled(&self, path: &Path, what: &str) {
        let mut command = Command::new("qemu-img");
        let out = command.current_dir(self.dir.path()).arg("check").arg(path).output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let mut found = text.lines().filter(|line| line.starts_with("ERROR") || line.starts_with("Leaked"));
        let is_harmless = |line: &str| line.contains("OFLAG_COPIED") && line.ends_with("refcount=1");
        assert!(found.all(is_harmless), "{what}, filled: {text}");
        assert!(matches!(out.status.code(), Some(0 | 2)), "{what}, filled: {text}");
    }

    fn theirs(&self, path: &Path, repair: &[&str]) -> Verdict {
        let path = path.to_str().unwrap();
        let words = ["check", "--output=json"].into_iter().chain(repair.iter().copied()).chain([path]);
        let mut command = Command::new("qemu-img");
        // QEMU looks for a data file in the folder where it runs.
        let out = command.current_dir(self.dir.path()).args(words).output().unwrap();
        (out.status.code().unwrap_or(-1), figures(&String::from_utf8_lossy(&out.stdout)))
    }
}

fn ours_of(path: &Path, repair: &[&str]) -> Verdict {
    let path = path.to_str().unwrap();
    let words = ["check", "--output=json"].into_iter().chain(repair.iter().copied()).chain([path]);
    let ran = ours(words);
    (ran.code.into(), figures(&ran.stdout))
}

fn figures(text: &str) -> Map<String, Value> {
    let mut all: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
    all.remove("filename");
    all
}

/// What a guest can read of the image: the blocks, and those that cannot be read.
fn readable(path: &Path) -> Vec<Option<Vec<u8>>> {
    let options = OpenOptions::new().policy(ReferencePolicy::beside(path).unwrap());
    let Ok(image) = options.format(blockmirror_image::Format::Qcow2).open(path) else { return Vec::new() };
    let device = image.device();
    let read = |at| {
        let mut block = vec![0; BLOCK];
        device.read_at(&mut block, at).ok().map(|()| block)
    };
    (0..device.len().min(8 << 20)).step_by(BLOCK).map(read).collect()
}

/// Nothing that could be read in `before` is lost in `path`.
fn keeps(before: &[Option<Vec<u8>>], path: &Path, what: &str) {
    let after = readable(path);
    for (index, (was, is)) in before.iter().zip(&after).enumerate() {
        let is_kept = was.is_none() || was == is;
        assert!(is_kept, "{what}: the block at {} reads differently", index * BLOCK);
    }
    assert!(after.len() >= before.len(), "{what}: it does not open any more");
}

#[test]
fn a_check_finds_what_qemu_finds() {
    let Some(mut bench) = Bench::new() else { return };
    let mut wrong = Vec::new();
    for damage in SAME {
        let path = bench.damaged(damage);
        let (theirs, ours) = (bench.theirs(&path, &[]), ours_of(&path, &[]));
        if theirs != ours {
            wrong.push(format!("{} ({:?}): qemu {theirs:?}, ours {ours:?}", damage.0, damage.1));
        }
    }
    for damage in SAME_VERDICT {
        let path = bench.damaged(damage);
        let (theirs, ours) = (bench.theirs(&path, &[]).0, ours_of(&path, &[]).0);
        if theirs != ours {
            wrong.push(format!("{} ({:?}): qemu exits with {theirs}, ours with {ours}", damage.0, damage.1));
        }
    }
    for damage in NOT_FOR_QEMU {
        let path = bench.damaged(damage);
        let (theirs, ours) = (bench.theirs(&path, &[]).0, ours_of(&path, &[]).0);
        if (theirs, ours) != (1, 2) {
            wrong.push(format!("{} ({:?}): qemu exits with {theirs}, ours with {ours}", damage.0, damage.1));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let (same, verdict, not) = (SAME.len(), SAME_VERDICT.len(), NOT_FOR_QEMU.len());
    report(format_args!(
        "check: {same} images as qemu-img finds them, {verdict} by verdict, {not} only ours"
    ));
}

#[test]
fn a_repair_mends_what_qemu_mends_and_loses_nothing() {
    let Some(mut bench) = Bench::new() else { return };
    let (mut by_qemu, mut by_us, mut wrong) = (0, 0, Vec::new());
    for damage in SAME.iter().chain(SAME_VERDICT).chain(NOT_FOR_QEMU) {
        let what = format!("{} ({:?})", damage.0, damage.1);
        let path = bench.damaged(damage);
        let before = readable(&path);
        let (theirs, ours) = (bench.copy(&path, "theirs.qcow2"), bench.copy(&path, "ours.qcow2"));
        if damage.0 != LONG_REPAIR {
            bench.theirs(&theirs, &["-r", "all"]);
        }
        let verdict = ours_of(&ours, &["-r", "all"]).0;
        keeps(&before, &ours, &what);
        let (their_judgement, judgement) = (bench.theirs(&theirs, &[]).0, bench.theirs(&ours, &[]).0);
        by_qemu += u32::from(their_judgement == 0);
        by_us += u32::from(judgement == 0);
        let is_agreed = (verdict == 0) == (judgement == 0) && ours_of(&ours, &[]).0 == verdict;
        if !is_agreed || (their_judgement == 0 && judgement != 0) {
            let judged = format!("qemu's repair {their_judgement}, ours {judgement}, by our word {verdict}");
            wrong.push(format!("{what}: {judged}"));
        }
        bench.keeps_once_filled(&before, &ours, damage.1, &what, judgement == 0);
        // Lower refcounts alone lose nothing either.
        let leaks = bench.copy(&path, "leaks.qcow2");
        ours_of(&leaks, &["-r", "leaks"]);
        keeps(&before, &leaks, &what);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    report(format_args!("repair: {by_us} images clean by qemu-img's judgement; by its own repair {by_qemu}"));
}
