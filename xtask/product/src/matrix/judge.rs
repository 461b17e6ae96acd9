//! What differs between an image that QEMU has changed and one that was changed here in the same way.
//!
//! Each program judges what the other has made, and reads it: the disk, each snapshot, bitmaps, VM state, and
//! what `info` tells. The images that a command makes or writes besides are judged too.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use serde_json::Value;

use super::shape::{DataFile, Shape, Snapshots};
use super::start::{VM_STATE_BYTE, VM_STATE_OF, copy, vm_state_len};
use super::tools::{DATA, IMAGE, by_qemu_io, open, read};

/// What kind of thing differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Done by QEMU.
    RefusedHere,
    /// Refused by QEMU.
    DoneHere,
    /// What a command prints.
    Output,
    /// The files that there are.
    Files,
    /// QEMU finds damage or leaks in what was made here.
    CheckOfOurs,
    /// QEMU and the check here find some in what QEMU made.
    CheckOfTheirs,
    /// Only the check here does.
    CheckHere,
    /// QEMU reads another disk.
    Disk,
    /// QEMU reads another snapshot.
    Snapshot,
    /// What is read here is not what QEMU reads.
    Reader,
    Info,
    Bitmaps,
    VmState,
    /// A raw data file is not what the guest reads.
    RawDataFile,
}

/// One thing that differs.
#[derive(Debug)]
pub(super) struct Difference {
    pub(super) kind: Kind,
    pub(super) text: String,
}

impl Difference {
    pub(super) fn new(kind: Kind, text: impl ToString) -> Self {
        Self { kind, text: text.to_string().trim_end().replace('\n', " | ") }
    }
}

/// What QEMU finds of the VM state of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum VmState {
    Kept,
    Other,
    /// The snapshot cannot be applied: its references cannot be counted.
    Refused,
}

/// The two images, in folders beside each other.
pub(super) struct Judge<'a> {
    pub(super) qemu: Qemu,
    pub(super) shape: &'a Shape,
    pub(super) ours: &'a Path,
    pub(super) theirs: &'a Path,
    /// For files that are needed for a moment.
    pub(super) scratch: &'a Path,
}

impl Judge<'_> {
    /// Everything that differs. An error is one of the machine.
    pub(super) fn differences(&self) -> Outcome<Vec<Difference>> {
        let mut found = Vec::new();
        let (ours, theirs) = (names(self.ours)?, names(self.theirs)?);
        if ours != theirs {
            found.push(Difference::new(Kind::Files, format!("{ours:?}, QEMU's {theirs:?}")));
        }
        for name in ours.intersection(&theirs).filter(|name| name.ends_with(".qcow2")) {
            if fs::read(self.ours.join(name))? != fs::read(self.theirs.join(name))? {
                self.image(name, &mut found)?;
            }
        }
        Ok(found)
    }

    fn image(&self, name: &str, found: &mut Vec<Difference>) -> Outcome {
        let mut differs = |kind, why: String| found.push(Difference::new(kind, format!("{name}: {why}")));
        if let Err(why) = self.qemu.img_in(self.ours, ["check", "-q", "-f", "qcow2", name]) {
            differs(Kind::CheckOfOurs, why.to_string());
        }
        if let Err(why) = is_clean(&self.theirs.join(name)) {
            let by_qemu = self.qemu.img_in(self.theirs, ["check", "-q", "-f", "qcow2", name]);
            let kind = if by_qemu.is_err() { Kind::CheckOfTheirs } else { Kind::CheckHere };
            differs(kind, why.to_string());
        }
        let info = |dir: &Path| -> Outcome<Value> {
            let text = self.qemu.img_in(dir, ["info", "-f", "qcow2", "--output=json", name])?;
            Ok(comparable(serde_json::from_str(&text)?))
        };
        let (ours, theirs) = (info(self.ours)?, info(self.theirs)?);
        if ours != theirs {
            differs(Kind::Info, first_difference(&ours, &theirs));
        }
        self.content(name, None, found)?;
        let ids = |info: &Value| -> BTreeSet<String> {
            let all = info["snapshots"].as_array().into_iter().flatten();
            all.filter_map(|snapshot| snapshot["id"].as_str().map(str::to_owned)).collect()
        };
        for id in ids(&ours).intersection(&ids(&theirs)) {
            self.content(name, Some(id), found)?;
        }
        if name != IMAGE {
            return Ok(());
        }
        if self.shape.snapshots() == Snapshots::VmState && ids(&ours).contains(VM_STATE_OF) {
            let [ours, theirs] = [self.vm_state(self.ours)?, self.vm_state(self.theirs)?];
            if ours != theirs || ours == VmState::Other {
                found.push(Difference::new(Kind::VmState, format!("{ours:?}, QEMU's {theirs:?}")));
            }
        }
        self.bitmaps(&theirs, found)
    }

    /// Compares what both read of the disk, or of a snapshot, of both images.
    fn content(&self, name: &str, snapshot: Option<&str>, found: &mut Vec<Difference>) -> Outcome {
        let what = snapshot.map_or(name.to_owned(), |id| format!("{name}, snapshot {id}"));
        let by_qemu = |dir: &Path| -> Outcome<Vec<u8>> {
            let raw = self.scratch.join("content.raw");
            let raw_name = raw.display().to_string();
            let mut words = vec!["convert", "-q", "-f", "qcow2", "-O", "raw"];
            let id = snapshot.map(|id| format!("snapshot.id={id}"));
            if let Some(id) = &id {
                words.extend(["-l", id]);
            }
            words.extend([name, &raw_name]);
            self.qemu.img_in(dir, words)?;
            let bytes = fs::read(&raw)?;
            fs::remove_file(&raw)?;
            Ok(bytes)
        };
        let (ours, theirs) = (by_qemu(self.ours)?, by_qemu(self.theirs)?);
        let mut differs = |kind, a: &[u8], b: &[u8], why: &str| {
            if let Some(why) = bytes_differ(a, b).map(|at| format!("{what}: {why}: {at}")) {
                found.push(Difference::new(kind, why));
            }
        };
        let kind = if snapshot.is_some() { Kind::Snapshot } else { Kind::Disk };
        differs(kind, &ours, &theirs, "QEMU reads ours, and its own");
        for (dir, wanted, whose) in [(self.ours, &ours, "ours"), (self.theirs, &theirs, "QEMU's")] {
            let here = read(&dir.join(name), snapshot)?;
            // Of a snapshot QEMU reads as much as the disk has now, and here as much as it had then.
            let common = if snapshot.is_some() { here.len().min(wanted.len()) } else { usize::MAX };
            let start = |bytes: &[u8]| bytes[..common.min(bytes.len())].to_vec();
            differs(Kind::Reader, &start(&here), &start(wanted), &format!("read here and by QEMU, {whose}"));
        }
        if snapshot.is_none() && name == IMAGE && self.shape.data_file() == DataFile::Raw {
            let mut raw = fs::read(self.ours.join(DATA))?;
            raw.resize(ours.len(), 0);
            differs(Kind::RawDataFile, &raw, &ours, "the raw file and the disk of ours");
        }
        Ok(())
    }

    /// Has QEMU apply the snapshot that has VM state to a copy of the image in `dir`, and read it.
    fn vm_state(&self, dir: &Path) -> Outcome<VmState> {
        let copied = self.scratch.join("applied");
        copy(dir, &copied)?;
        for bitmap in list(&copied.join(IMAGE))? {
            self.qemu.img_in(&copied, ["bitmap", "-f", "qcow2", "--remove", IMAGE, &bitmap])?;
        }
        let applied = self.qemu.img_in(&copied, ["snapshot", "-a", VM_STATE_OF, IMAGE]);
        let line = format!("read -q -b -P {VM_STATE_BYTE} 0 {}", vm_state_len(self.shape));
        let state = match applied.map(|_| by_qemu_io(self.qemu, self.shape, &copied, &line)) {
            Err(_) => VmState::Refused,
            Ok(Err(_)) => VmState::Other,
            Ok(Ok(())) => VmState::Kept,
        };
        fs::remove_dir_all(&copied)?;
        Ok(state)
    }

    /// Compares the bits of each bitmap of QEMU's image with those that QEMU stores when it has loaded ours.
    fn bitmaps(&self, info: &Value, found: &mut Vec<Difference>) -> Outcome {
        let all = info["format-specific"]["data"]["bitmaps"].as_array();
        let names: Vec<&str> =
            all.into_iter().flatten().filter_map(|bitmap| bitmap["name"].as_str()).collect();
        if names.is_empty() {
            return Ok(());
        }
        let copied = self.scratch.join("stored");
        copy(self.ours, &copied)?;
        let stored = || -> Outcome<Vec<Difference>> {
            self.qemu.img_in(&copied, ["bitmap", "-f", "qcow2", "--add", IMAGE, "stored again"])?;
            let mut differences = Vec::new();
            for name in names {
                let [ours, theirs] = [&*copied, self.theirs].map(|dir| bits(&dir.join(IMAGE), name));
                let (ours, theirs) = (ours?, theirs?);
                if ours.runs().ne(theirs.runs()) {
                    let runs = |bits: &DirtyBitmap| bits.runs().take(8).collect::<Vec<_>>();
                    let why = format!("{name}: {:?}, QEMU's {:?}", runs(&ours), runs(&theirs));
                    differences.push(Difference::new(Kind::Bitmaps, why));
                }
            }
            Ok(differences)
        };
        let result = stored();
        fs::remove_dir_all(&copied)?;
        found.extend(result?);
        Ok(())
    }
}

fn bits(image: &Path, name: &str) -> Outcome<DirtyBitmap> {
    let image = open(image, false, None)?;
    Ok(image.qcow2().ok_or("not a qcow2 image")?.read_bitmap(name)?)
}

/// The names of the bitmaps of an image.
fn list(image: &Path) -> Outcome<Vec<String>> {
    let image = open(image, false, None)?;
    let bitmaps = image.qcow2().ok_or("not a qcow2 image")?.bitmaps()?;
    Ok(bitmaps.into_iter().map(|entry| entry.name.to_string()).collect())
}

/// Whether our check finds nothing.
fn is_clean(image: &Path) -> Outcome {
    let options = blockmirror_image::OpenOptions::new().format(blockmirror_image::Format::Qcow2);
    let checked = blockmirror_image::check(image, &options, &mut ())?.ok_or("not checked")?;
    let report = &checked.report;
    match (report.corruptions, report.leaks, report.check_errors) {
        (0, 0, 0) => Ok(()),
        (corruptions, leaks, errors) => {
            Err(format!("{corruptions} corruptions, {leaks} leaks, {errors} errors").into())
        }
    }
}

fn names(dir: &Path) -> Outcome<BTreeSet<String>> {
    fs::read_dir(dir)?.map(|file| Ok(file?.file_name().to_string_lossy().into_owned())).collect()
}

/// `info` without what depends on the host's file system and on the time.
pub(super) fn comparable(mut info: Value) -> Value {
    const VOLATILE: [&str; 6] =
        ["actual-size", "children", "date-sec", "date-nsec", "full-backing-filename", "filename"];
    match &mut info {
        Value::Object(members) => {
            members.retain(|name, _| !VOLATILE.contains(&name.as_str()));
            for value in members.values_mut() {
                *value = comparable(value.take());
            }
        }
        Value::Array(all) => all.iter_mut().for_each(|value| *value = comparable(value.take())),
        _ => {}
    }
    info
}

/// Where two JSON values differ first.
pub(super) fn first_difference(ours: &Value, theirs: &Value) -> String {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let names: BTreeSet<_> = a.keys().chain(b.keys()).collect();
            let differs = names.into_iter().find(|name| a.get(*name) != b.get(*name));
            let Some(name) = differs else { return String::new() };
            let below =
                |members: &serde_json::Map<String, Value>| members.get(name).cloned().unwrap_or_default();
            format!("{name}: {}", first_difference(&below(a), &below(b)))
        }
        _ => format!("{ours}, QEMU's {theirs}"),
    }
}

/// How two contents differ.
fn bytes_differ(a: &[u8], b: &[u8]) -> Option<String> {
    if a.len() != b.len() {
        return Some(format!("{} and {} bytes", a.len(), b.len()));
    }
    let at = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(format!("{} and {} at {at}", a[at], b[at]))
}
