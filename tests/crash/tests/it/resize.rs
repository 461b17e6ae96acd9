//! Lengths that change: after a crash the disk has the old length or the new one, grown bytes are zeros, and
//! a writer that goes on finds nothing of what was cut off.

use std::sync::Arc;

use blockmirror_block::testing::{CrashPoint, MemoryDisk, MemoryStorage, RecordingStorage};
use blockmirror_block::{BlockDevice, ByteRange, Result, Storage, WriteFlags, ZeroFlags};
use blockmirror_crash::{Allowed, check};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2, Version};

const SECTOR: usize = 512;
/// Longer than the disks before they grow, so that there is something to hide.
const BACKING: usize = 160 << 10;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub(crate) version: Version,
    pub(crate) cluster: u64,
    pub(crate) extended: bool,
    pub(crate) backed: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Resize(u64),
    /// The header names the backing file so.
    Name(&'static str),
    Flush,
}

impl Step {
    /// Does it, to `now` as well. What is written follows from `index`.
    pub(crate) fn apply(self, disk: &Qcow2, index: usize, now: &mut Vec<u8>) -> Result<()> {
        match self {
            Self::Write(at, len) => {
                now[at as usize..(at + len) as usize].fill(index as u8 + 1);
                disk.write_at(&vec![index as u8 + 1; len as usize], at, WriteFlags::NONE)
            }
            Self::Zero(at, len) => {
                now[at as usize..(at + len) as usize].fill(0);
                disk.write_zeroes(ByteRange::at(at, len), ZeroFlags::MAY_UNMAP)
            }
            Self::Resize(len) => {
                now.resize(len as usize, 0);
                disk.resize(len, true)
            }
            Self::Name(name) => disk.set_backing_file(Some(name.as_bytes()), Some("raw")).map_err(Into::into),
            Self::Flush => disk.flush(),
        }
    }

    /// Whether it and all before it is durable once it has been done.
    pub(crate) fn is_durable(self) -> bool {
        matches!(self, Self::Resize(_) | Self::Flush)
    }
}

pub(crate) struct State {
    pub(crate) begun: usize,
    pub(crate) durable: usize,
    pub(crate) contents: Vec<u8>,
}

fn backing(format: Format) -> Option<Arc<dyn BlockDevice>> {
    let device: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&vec![0xbb; BACKING]).read_only());
    format.backed.then_some(device)
}

pub(crate) fn open(format: Format, storage: Arc<dyn Storage>, writable: bool) -> Qcow2 {
    let mut options = OpenOptions::new().writable(writable);
    if let Some(below) = backing(format) {
        options = options.backing(below);
    }
    options.open(storage).unwrap()
}

pub(crate) fn image(format: Format, len: u64) -> Vec<u8> {
    let mut options = CreateOptions::new(len);
    options.version = format.version;
    options.cluster_size = format.cluster;
    options.extended_l2 = format.extended;
    if format.version == Version::V3 && format.cluster == 512 {
        options.refcount_bits = 64;
    }
    options.backing_file = format.backed.then(|| b"base.raw".to_vec());
    let storage = MemoryStorage::new();
    options.create(&storage, None).unwrap();
    storage.to_vec()
}

pub(crate) fn contents(disk: &Qcow2) -> Vec<u8> {
    let mut all = vec![0; disk.len() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

fn play(format: Format, len: u64, steps: &[Step]) -> (Arc<RecordingStorage>, Vec<State>) {
    let recording = Arc::new(RecordingStorage::with_contents(&image(format, len)));
    let disk = open(format, recording.clone(), true);
    let mut now = contents(&disk);
    let mut states = vec![State { begun: 0, durable: 0, contents: now.clone() }];
    for (index, step) in steps.iter().copied().chain([Step::Flush]).enumerate() {
        let begun = recording.position();
        step.apply(&disk, index, &mut now).unwrap();
        let durable = if step.is_durable() { recording.position() } else { usize::MAX };
        assert!(contents(&disk) == now, "{format:?}: wrong without any crash, after {step:?}");
        states.push(State { begun, durable, contents: now.clone() });
    }
    (recording, states)
}

pub(crate) fn verify(
    format: Format,
    states: &[State],
    point: &CrashPoint,
) -> std::result::Result<(), String> {
    let storage = Arc::new(point.storage());
    check(&storage.to_vec(), Allowed::default())?;
    let found = contents(&open(format, storage.clone(), false));
    let durable = states.iter().rposition(|s| s.durable <= point.position()).unwrap_or(0);
    let possible: Vec<&State> = states[durable..]
        .iter()
        .filter(|s| s.begun <= point.position() && s.contents.len() == found.len())
        .collect();
    if possible.is_empty() {
        return Err(format!("a length of {}, which no step made", found.len()));
    }
    for at in (0..found.len()).step_by(SECTOR) {
        let sector = at..at + SECTOR;
        if !possible.iter().any(|s| s.contents[sector.clone()] == found[sector.clone()]) {
            return Err(format!("sector at {at} holds {:#x}", found[at]));
        }
    }
    go_on(format, storage, found)
}

/// Grows what the crash left, over whatever it left past the end.
fn go_on(format: Format, storage: Arc<MemoryStorage>, mut found: Vec<u8>) -> std::result::Result<(), String> {
    let disk = open(format, storage.clone(), true);
    let len = found.len() + 50_688;
    disk.resize(len as u64, false).map_err(|e| e.to_string())?;
    found.resize(len, 0);
    if contents(&disk) != found {
        return Err("grown bytes are not zero".into());
    }
    drop(disk);
    check(&storage.to_vec(), Allowed::default()).map(drop)
}

fn replay(version: Version, cluster: u64, extended: bool) {
    let mut points = 0;
    for backed in [false, true] {
        let format = Format { version, cluster, extended, backed };
        let (c, t) = (cluster, if cluster == 512 { 32_768 } else { cluster * 4 });
        let sequences: &[(u64, &[Step])] = &[
            // Inside the L2 table, with a last cluster that is cut.
            (c * 3 + 512, &[Step::Write(100, c * 3), Step::Resize(c * 5), Step::Write(c * 4, 500)]),
            // Down and up again.
            (
                t + c * 3,
                &[
                    Step::Write(0, t + c * 2),
                    Step::Zero(c, c),
                    Step::Resize(c + 1024),
                    Step::Write(512, c),
                    Step::Resize(t + c * 2),
                ],
            ),
            // To nothing, and from nothing.
            (512, &[Step::Resize(c * 2), Step::Write(0, c + 1), Step::Resize(0), Step::Resize(c)]),
            // Where clusters are small, past what one cluster of L1 table reaches.
            (c * 2, &[Step::Write(0, c), Step::Resize((2 << 20) + 66_048), Step::Write(c, c + 3)]),
        ];
        for (len, steps) in sequences {
            let (recording, states) = play(format, *len, steps);
            for point in recording.crash_points() {
                points += 1;
                if let Err(why) = verify(format, &states, &point) {
                    panic!("{format:?}: {steps:?}: {point:?}: {why}");
                }
            }
        }
    }
    assert!(points >= 100, "only {points} points");
}

#[test]
fn version_2_clusters_of_512() {
    replay(Version::V2, 512, false);
}

#[test]
fn version_3_clusters_of_512() {
    replay(Version::V3, 512, false);
}

#[test]
fn version_3_clusters_of_4k() {
    replay(Version::V3, 4096, false);
}

#[test]
fn extended_l2_clusters_of_16k() {
    replay(Version::V3, 16384, true);
}
