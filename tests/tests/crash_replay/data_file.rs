//! An image and its external data file: of each, a crash takes any part of what was not flushed to it.
//!
//! Both are recorded, and so is the order of the entries in both logs: at each moment the crash points of the
//! one are combined with those of the other.

use std::io::Write as _;
use std::sync::{Arc, Mutex};

use blockmirror_block::testing::{CrashPoint, Logged, MemoryStorage, RecordingStorage};
use blockmirror_block::{
    BlockDevice, ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_qcow2::{OpenOptions, Qcow2, Version};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

use crate::scenario::{Contents, Op, Start, pattern, read};
use crate::{checker, sequences};

const SECTOR: usize = 512;
/// So many images of the one file are combined with each new image of the other.
const PARTNERS: usize = 10;
/// QEMU reads at every so-manieth point, a process each time.
const QEMU_EVERY: u64 = 1009;

const IMAGE: usize = 0;
const DATA: usize = 1;

/// The two files.
#[derive(Debug)]
struct Pair {
    files: [RecordingStorage; 2],
    /// How long both logs were after each entry of either.
    moments: Mutex<Vec<[usize; 2]>>,
}

impl Pair {
    fn note(&self) {
        let mut moments = self.moments.lock().unwrap();
        let mut last = moments[moments.len() - 1];
        for (which, file) in self.files.iter().enumerate() {
            while last[which] < file.position() {
                last[which] += 1;
                moments.push(last);
            }
        }
    }

    /// The present moment.
    fn now(&self) -> usize {
        self.moments.lock().unwrap().len() - 1
    }
}

/// One of the two, as a storage.
#[derive(Debug)]
struct Side(Arc<Pair>, usize);

impl Side {
    fn file(&self) -> &RecordingStorage {
        &self.0.files[self.1]
    }

    fn noted(&self, result: Result<()>) -> Result<()> {
        self.0.note();
        result
    }
}

impl Storage for Side {
    fn name(&self) -> &str {
        self.file().name()
    }

    fn len(&self) -> Result<u64> {
        self.file().len()
    }

    fn info(&self) -> StorageInfo {
        self.file().info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.noted(self.file().write_at(buf, offset))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.noted(self.file().write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.noted(self.file().discard(range))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.noted(self.file().allocate(range))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.noted(self.file().set_len(len))
    }

    fn flush(&self) -> Result<()> {
        self.noted(self.file().flush())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.file().extents(range, visit)
    }
}

struct State {
    begun: usize,
    durable: usize,
    contents: Vec<u8>,
}

struct Played {
    start: Start,
    raw: bool,
    ops: Vec<Op>,
    pair: Arc<Pair>,
    states: Vec<State>,
}

fn open(start: Start, files: [Arc<dyn Storage>; 2], writable: bool) -> Qcow2 {
    let [image, data] = files;
    let mut options = OpenOptions::new().writable(writable).data_file(data);
    if let Some(backing) = start.backing() {
        options = options.backing(backing);
    }
    options.open(image).unwrap()
}

fn play(start: Start, raw: bool, ops: &[Op]) -> Played {
    let files = [Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new())];
    let mut options = start.options();
    (options.data_file, options.data_file_raw) = (Some(b"data.raw".to_vec()), raw);
    options.create(&*files[IMAGE], Some(&*files[DATA])).unwrap();
    if start.contents == Contents::Populated {
        start.populate(&open(start, files.clone().map(|file| file as _), true));
    }
    let files = files.map(|file| RecordingStorage::with_contents(&file.to_vec()));
    let pair = Arc::new(Pair { files, moments: Mutex::new(vec![[0, 0]]) });
    let disk = open(start, [IMAGE, DATA].map(|which| Arc::new(Side(Arc::clone(&pair), which)) as _), true);
    let mut now = read(&disk);
    let mut states = vec![State { begun: 0, durable: 0, contents: now.clone() }];
    for (step, op) in ops.iter().copied().chain([Op::Flush]).enumerate() {
        let (begun, mut durable) = (pair.now(), usize::MAX);
        let range = start.range(op, step as u64);
        let bytes = range.start() as usize..range.end() as usize;
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
                states.push(State { begun, durable, contents: zeros });
                disk.discard(range).unwrap();
                disk.read_at(&mut now[bytes], range.start()).unwrap();
            }
            Op::Flush => {
                disk.flush().unwrap();
                durable = pair.now();
            }
        }
        assert!(read(&disk) == now, "{start}, raw {raw}: {ops:?}: wrong without any crash, step {step}");
        states.push(State { begun, durable, contents: now.clone() });
    }
    Played { start, raw, ops: ops.to_vec(), pair, states }
}

/// The crash points of one file, by position in its log.
struct Points {
    at: Vec<Vec<CrashPoint>>,
    /// First position from which on nothing is durable yet, for each position.
    epoch: Vec<usize>,
}

impl Points {
    fn new(file: &RecordingStorage) -> Self {
        let log = file.log();
        let mut at = vec![Vec::new(); log.len() + 1];
        for point in file.crash_points() {
            at[point.position()].push(point);
        }
        let mut epoch = vec![0; log.len() + 1];
        for (index, entry) in log.iter().enumerate() {
            epoch[index + 1] = if *entry == Logged::Flush { index + 1 } else { epoch[index] };
        }
        Self { at, epoch }
    }

    /// All that the file may be when `position` entries are in its log; some of it, where that is much. All
    /// and nothing of what is not flushed are among them.
    fn partners(&self, position: usize) -> Vec<&CrashPoint> {
        let all: Vec<_> = self.at[self.epoch[position]..=position].iter().flatten().collect();
        let mut some: Vec<_> = all.iter().copied().step_by(all.len().div_ceil(PARTNERS)).collect();
        // Nothing is missing in the first of those that are not torn.
        some.extend(self.at[position].iter().find(|point| point.to_string().ends_with("dropped []")));
        some
    }
}

impl Played {
    fn replay(&self, qemu: Option<Qemu>, tally: &mut u64) {
        let points = [IMAGE, DATA].map(|which| Points::new(&self.pair.files[which]));
        let moments = self.pair.moments.lock().unwrap().clone();
        let mut before = [usize::MAX; 2];
        let mut last = Vec::new();
        for (moment, position) in moments.iter().enumerate() {
            let moved = usize::from(before[IMAGE] == position[IMAGE]);
            before = *position;
            let other = 1 - moved;
            for new in &points[moved].at[position[moved]] {
                for partner in points[other].partners(position[other]) {
                    let pair = if moved == IMAGE { [new, partner] } else { [partner, new] };
                    let fail = |why: String| -> ! {
                        let Self { start, raw, ops, .. } = self;
                        panic!(
                            "{start}, raw {raw}: {ops:?}: {why}; image: {:?}; data: {:?}",
                            pair[0], pair[1]
                        )
                    };
                    let contents = self.verify(moment, pair).unwrap_or_else(|why| fail(why));
                    *tally += 1;
                    if let Some(qemu) = qemu
                        && tally.is_multiple_of(QEMU_EVERY)
                    {
                        self.judge(qemu, pair, &contents).unwrap_or_else(|why| fail(why));
                    }
                    last = contents;
                }
            }
        }
        let written = &self.states[self.states.len() - 1].contents;
        assert!(last == *written, "{}: {:?}: the last flush did not last", self.start, self.ops);
    }

    /// Sound metadata, and in each sector something that may be there. Returns what the disk reads as.
    fn verify(&self, moment: usize, pair: [&CrashPoint; 2]) -> std::result::Result<Vec<u8>, String> {
        let [image, data] = pair.map(|point| Arc::new(point.storage()));
        checker::check(&image.to_vec())?;
        let durable = self.states.iter().rposition(|state| state.durable <= moment).unwrap_or(0);
        let states: Vec<_> = self.states[durable..].iter().filter(|state| state.begun <= moment).collect();
        let possible = |what: &str, found: &[u8]| {
            for (index, sector) in found.chunks(SECTOR).enumerate() {
                let bytes = index * SECTOR..index * SECTOR + sector.len();
                if !states.iter().any(|state| state.contents[bytes.clone()] == *sector) {
                    let durable = &states[0].contents[bytes][..8];
                    return Err(format!(
                        "sector {index} of {what} holds {:02x?}.., durable is {durable:02x?}..",
                        &sector[..8]
                    ));
                }
            }
            Ok(())
        };
        if self.raw {
            let mut found = data.to_vec();
            found.resize(self.start.len() as usize, 0);
            possible("the data file", &found)?;
        }
        let contents = read(&open(self.start, [image, data], false));
        possible("the disk", &contents)?;
        Ok(contents)
    }

    /// QEMU must read what we read.
    fn judge(&self, qemu: Qemu, pair: [&CrashPoint; 2], contents: &[u8]) -> std::result::Result<(), String> {
        let dir = scratch().map_err(|e| e.to_string())?;
        let path = |name: &str| dir.path().join(name);
        for (name, point) in ["crashed.qcow2", "data.raw"].into_iter().zip(pair) {
            std::fs::write(path(name), point.storage().to_vec()).map_err(|e| e.to_string())?;
        }
        if let Some(base) = self.start.backing_contents() {
            std::fs::write(path("base.raw"), base).map_err(|e| e.to_string())?;
        }
        qemu.to_raw("qcow2", &path("crashed.qcow2"), &path("read")).map_err(|e| e.to_string())?;
        let found = std::fs::read(path("read")).map_err(|e| e.to_string())?;
        if found == contents { Ok(()) } else { Err("QEMU reads something else".into()) }
    }
}

fn replay(cluster: u64, backed: bool, raw: bool) {
    let qemu = Qemu::find("crash_replay");
    let mut points = 0;
    for contents in [Contents::Empty, Contents::Populated] {
        let start = Start { version: Version::V3, cluster, extended: false, backed, contents };
        for ops in sequences(1).into_iter().chain(sequences(2)) {
            play(start, raw, &ops).replay(qemu, &mut points);
        }
    }
    // Past the capture of the test runner: the count is part of what is claimed.
    let _ = writeln!(
        std::io::stderr(),
        "crash replay of image and data file, clusters of {cluster}, backed {backed}, raw {raw}: {points} points"
    );
    assert!(points >= 1000, "only {points} points");
}

#[test]
fn a_data_file_under_clusters_of_512() {
    replay(512, false, false);
}

#[test]
fn a_data_file_over_a_backing_file() {
    replay(4096, true, false);
}

#[test]
fn a_raw_data_file() {
    replay(4096, false, true);
}
