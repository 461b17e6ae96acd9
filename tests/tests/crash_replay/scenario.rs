//! Scenarios: an image, a sequence of guest operations, and what each crash point of it may show.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::testing::{CrashPoint, MemoryDisk, MemoryStorage, RecordingStorage};
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2, Version};

use crate::checker;

const SECTOR: usize = 512;

/// One guest operation. Where it goes depends on the step it is, so that operations overlap in various ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// 4 KiB of data, at a multiple of 1 KiB.
    Write4K,
    /// Data across cluster borders, cutting sectors and clusters at both ends.
    WriteAcross,
    /// Zeros over whole and cut clusters.
    Zero,
    /// A discard of whole clusters.
    Discard,
    /// A flush.
    Flush,
}

/// All of them.
pub(crate) const OPS: [Op; 5] = [Op::Write4K, Op::WriteAcross, Op::Zero, Op::Discard, Op::Flush];

/// The image that a scenario starts from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) version: Version,
    pub(crate) cluster: u64,
    pub(crate) extended: bool,
    pub(crate) backed: bool,
    pub(crate) contents: Contents,
}

/// What is in the image to begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Nothing.
    Empty,
    /// Data to overwrite, and freed clusters to use again.
    Populated,
    /// So much data that a few clusters more need a larger refcount table. For clusters of 512 bytes.
    TableFull,
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compat {}, clusters of {}", self.version.as_str(), self.cluster)?;
        for (set, word) in [(self.extended, "extended L2"), (self.backed, "backed")] {
            if set {
                write!(f, ", {word}")?;
            }
        }
        write!(f, ", {:?}", self.contents)
    }
}

impl Start {
    /// Length of the disk. Ends inside a cluster where clusters are larger than a sector; has more than one
    /// L2 table where they are small.
    pub(crate) fn len(self) -> u64 {
        self.base() + if self.cluster == 512 { 80 << 10 } else { self.cluster * 9 + 512 }
    }

    /// Where the operations go; all before it is data.
    fn base(self) -> u64 {
        if self.contents == Contents::TableFull { 2_029_568 } else { 0 }
    }

    pub(crate) fn options(self) -> CreateOptions {
        let mut options = CreateOptions::new(self.len());
        options.version = self.version;
        options.cluster_size = self.cluster;
        // Wide entries make many refcount blocks, narrow ones share bytes.
        options.refcount_bits = match (self.version, self.cluster) {
            (Version::V3, 512) => 64,
            (Version::V3, 4096) => 1,
            _ => 16,
        };
        options.extended_l2 = self.extended;
        options.backing_file = self.backed.then(|| b"base.raw".to_vec());
        options.backing_format = self.backed.then(|| "raw".to_owned());
        options
    }

    /// The disk below, a little shorter than the one above.
    pub(crate) fn backing_contents(self) -> Option<Vec<u8>> {
        self.backed.then(|| pattern(0xb0, 0, self.len() - self.cluster))
    }

    pub(crate) fn backing(self) -> Option<Arc<dyn BlockDevice>> {
        let contents = self.backing_contents()?;
        Some(Arc::new(MemoryDisk::with_contents(&contents).read_only()))
    }

    fn open(
        self,
        storage: Arc<dyn Storage>,
        backing: Option<&Arc<dyn BlockDevice>>,
        writable: bool,
    ) -> Qcow2 {
        let mut options = OpenOptions::new().writable(writable);
        if let Some(backing) = backing {
            options = options.backing(Arc::clone(backing));
        }
        options.open(storage).unwrap()
    }

    /// The file to begin with.
    fn image(self) -> Vec<u8> {
        let storage = Arc::new(MemoryStorage::new());
        self.options().create(&*storage, None).unwrap();
        if self.contents != Contents::Empty {
            self.populate(&self.open(storage.clone(), self.backing().as_ref(), true));
        }
        storage.to_vec()
    }

    /// Writes what is in the image to begin with, if that is anything.
    pub(crate) fn populate(self, disk: &Qcow2) {
        let written = if self.contents == Contents::TableFull { self.base() } else { 6 * self.cluster };
        disk.write_at(&pattern(0x50, 0, written), 0, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        if self.contents == Contents::TableFull {
            return;
        }
        let range = |n: u64| ByteRange::at(self.cluster * n, self.cluster);
        disk.write_zeroes(range(1), ZeroFlags::MAY_UNMAP).unwrap();
        disk.discard(range(4)).unwrap();
        disk.flush().unwrap();
    }

    pub(crate) fn range(self, op: Op, step: u64) -> ByteRange {
        let cluster = self.cluster;
        // Just below the border between two L2 tables, where they are small.
        let across =
            if cluster == 512 && step == 1 { 32_068 } else { cluster + cluster / 2 * (step + 1) + 100 };
        let (start, len) = match op {
            Op::Write4K => (cluster.max(4096) + step * 1024, 4096),
            Op::WriteAcross => (across, 2 * cluster + 300),
            Op::Zero => (cluster / 2 + step * cluster, 3 * cluster),
            Op::Discard => (cluster * (1 + step), 3 * cluster),
            Op::Flush => (0, 0),
        };
        ByteRange::at(self.base() + start, len)
    }
}

/// What the disk reads as from some moment on.
struct State {
    /// Log position at which the operation began.
    begun: usize,
    /// Log position at which a flush was answered, after which this state is durable.
    durable: usize,
    contents: Vec<u8>,
}

/// A sequence that was played, with its log.
pub(crate) struct Played {
    pub(crate) start: Start,
    pub(crate) ops: Vec<Op>,
    backing: Option<Arc<dyn BlockDevice>>,
    recording: Arc<RecordingStorage>,
    states: Vec<State>,
}

/// Plays `ops` and a last flush on an image that begins as `start`.
pub(crate) fn play(start: Start, ops: &[Op]) -> Played {
    let recording = Arc::new(RecordingStorage::with_contents(&start.image()));
    let backing = start.backing();
    let disk = start.open(recording.clone(), backing.as_ref(), true);
    let mut now = read(&disk);
    let mut states = vec![State { begun: 0, durable: 0, contents: now.clone() }];
    for (step, op) in ops.iter().copied().chain([Op::Flush]).enumerate() {
        let begun = recording.position();
        let range = start.range(op, step as u64);
        let bytes = range.start() as usize..range.end() as usize;
        let mut durable = usize::MAX;
        match op {
            Op::Write4K | Op::WriteAcross => {
                let data = pattern(step as u8 + 1, range.start(), range.len());
                disk.write_at(&data, range.start(), WriteFlags::NONE).unwrap();
                now[bytes].copy_from_slice(&data);
            }
            Op::Zero => {
                let flags = if step % 2 == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE };
                disk.write_zeroes(range, flags).unwrap();
                now[bytes].fill(0);
            }
            Op::Discard => {
                // Either answer is right, also after a crash.
                let mut zeros = now.clone();
                zeros[bytes.clone()].fill(0);
                states.push(State { begun, durable, contents: zeros.clone() });
                disk.discard(range).unwrap();
                disk.read_at(&mut now[bytes.clone()], range.start()).unwrap();
                let before = &states[states.len() - 2].contents;
                assert!(bytes.into_iter().all(|i| now[i] == before[i] || now[i] == 0), "{start}: {ops:?}");
            }
            Op::Flush => {
                disk.flush().unwrap();
                durable = recording.position();
            }
        }
        assert!(read(&disk) == now, "{start}: {ops:?}: wrong without any crash, after step {step}");
        states.push(State { begun, durable, contents: now.clone() });
    }
    Played { start, ops: ops.to_vec(), backing, recording, states }
}

impl Played {
    pub(crate) fn points(&self) -> impl Iterator<Item = CrashPoint> {
        self.recording.crash_points()
    }

    /// The disk as it was last written.
    pub(crate) fn final_contents(&self) -> &[u8] {
        &self.states[self.states.len() - 1].contents
    }

    /// Checks what `point` left: sound metadata, and in each sector something that may be there. Returns what
    /// the disk reads as.
    pub(crate) fn verify(&self, point: &CrashPoint) -> Result<Vec<u8>, String> {
        let storage = Arc::new(point.storage());
        checker::check(&storage.to_vec())?;
        let contents = read(&self.start.open(storage, self.backing.as_ref(), false));
        let durable = self.states.iter().rposition(|s| s.durable <= point.position()).unwrap_or(0);
        let possible: Vec<&State> =
            self.states[durable..].iter().filter(|s| s.begun <= point.position()).collect();
        for (index, sector) in contents.chunks(SECTOR).enumerate() {
            let bytes = index * SECTOR..index * SECTOR + sector.len();
            if !possible.iter().any(|state| state.contents[bytes.clone()] == *sector) {
                return Err(format!(
                    "guest sector {index} holds {:02x?}.., none of {} possible states ({:02x?}.. is durable)",
                    &sector[..8],
                    possible.len(),
                    &self.states[durable].contents[bytes][..8]
                ));
            }
        }
        Ok(contents)
    }

    /// Goes on with the image that `point` left as a guest would, and checks it again.
    pub(crate) fn go_on(&self, point: &CrashPoint, contents: &[u8]) -> Result<(), String> {
        let storage = Arc::new(point.storage());
        let disk = self.start.open(storage.clone(), self.backing.as_ref(), true);
        let range = ByteRange::at(self.start.base() + self.start.cluster / 2, self.start.cluster * 5);
        let data = pattern(0xee, range.start(), range.len());
        disk.write_at(&data, range.start(), WriteFlags::NONE).map_err(|e| e.to_string())?;
        disk.flush().map_err(|e| e.to_string())?;
        drop(disk);
        checker::check(&storage.to_vec())?;
        let mut expected = contents.to_vec();
        expected[range.start() as usize..range.end() as usize].copy_from_slice(&data);
        let disk = self.start.open(storage, self.backing.as_ref(), false);
        if read(&disk) == expected { Ok(()) } else { Err("a write after the crash went wrong".into()) }
    }
}

pub(crate) fn read(disk: &Qcow2) -> Vec<u8> {
    let mut contents = vec![0; disk.len() as usize];
    disk.read_at(&mut contents, 0).unwrap();
    contents
}

/// Bytes that tell who wrote them and where they belong.
pub(crate) fn pattern(who: u8, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|i| who ^ (i / 512 * 37 + i % 7) as u8 | 1).collect()
}
