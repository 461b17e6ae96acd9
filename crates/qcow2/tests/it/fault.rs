//! Every single storage operation fails in turn, once and for ever, done by nothing, half or all: no panic, a
//! typed error, and what is left opens with every byte old or new.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::{backing_disk, qemu_check_finds_no_corruption, qemu_check_finds_nothing};
use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, Header, OpenOptions, Qcow2, Version};

const SIZE: u64 = 24 * 1024;

/// What each byte may read as after a failure: its flushed value, and everything written since.
struct Candidates {
    bytes: Vec<Vec<u8>>,
}

impl Candidates {
    fn new(now: &[u8]) -> Self {
        Self { bytes: now.iter().map(|b| vec![*b]).collect() }
    }

    fn may_be(&mut self, range: ByteRange, value: u8, only: bool) {
        for slot in &mut self.bytes[range.start() as usize..range.end() as usize] {
            if only {
                // The last in the list is what the guest reads; earlier ones may still be on disk.
                slot.retain(|v| *v != value);
            }
            slot.push(value);
        }
    }

    fn flushed(&mut self) {
        for slot in &mut self.bytes {
            let last = *slot.last().unwrap();
            *slot = vec![last];
        }
    }

    fn check(&self, found: &[u8], what: &str) {
        for (at, (value, allowed)) in found.iter().zip(&self.bytes).enumerate() {
            assert!(allowed.contains(value), "{what}: byte {at} is {value:#x}, allowed {allowed:#x?}");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

const OPS: [Op; 12] = [
    Op::Write(700, 3000, 1),
    Op::Flush,
    Op::Write(4096, 4096, 2),
    Op::Zero(512, 2048),
    Op::Write(12 << 10, 9000, 3),
    Op::Discard(4096, 2048),
    Op::Flush,
    Op::Write(4096, 1024, 4),
    Op::Write(0, 512, 5),
    Op::Zero(13 << 10, 1000),
    Op::Discard(16 << 10, 4096),
    Op::Flush,
];

/// Runs the operations, going on after failures as a guest would; notes what may be on disk.
fn run(disk: &Qcow2, candidates: &mut Candidates) -> u64 {
    let mut failures = 0;
    for op in OPS {
        let result = match op {
            Op::Write(at, len, value) => {
                let result = disk.write_at(&vec![value; len as usize], at, WriteFlags::NONE);
                candidates.may_be(ByteRange::at(at, len), value, result.is_ok());
                result
            }
            Op::Zero(at, len) => {
                let result = disk.write_zeroes(ByteRange::at(at, len), ZeroFlags::MAY_UNMAP);
                candidates.may_be(ByteRange::at(at, len), 0, result.is_ok());
                result
            }
            Op::Discard(at, len) => {
                let result = disk.discard(ByteRange::at(at, len));
                candidates.may_be(ByteRange::at(at, len), 0, false);
                // A discarded byte may be old or zero: only a read tells which counts from now on.
                let mut now = vec![0; len as usize];
                if disk.read_at(&mut now, at).is_err() {
                    failures += 1;
                } else {
                    for (i, value) in now.into_iter().enumerate() {
                        candidates.may_be(ByteRange::at(at + i as u64, 1), value, true);
                    }
                }
                result
            }
            Op::Flush => {
                let result = disk.flush();
                // Failed writes since may have left any candidate, so only a clean run narrows them down.
                if result.is_ok() && failures == 0 {
                    candidates.flushed();
                }
                result
            }
        };
        if let Err(error) = result {
            failures += 1;
            let expected = [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Poisoned];
            assert!(expected.contains(&error.kind()), "{op:?}: unexpected {error:?}");
        }
    }
    failures
}

fn fails_everywhere(version: Version, cluster_size: u64, backed: bool) {
    let mut options = CreateOptions::new(SIZE);
    options.version = version;
    options.cluster_size = cluster_size;
    let empty = MemoryStorage::new();
    options.create(&empty, None).unwrap();
    let template = empty.to_vec();
    let backing = backed.then(|| backing_disk(SIZE));
    let mut start = vec![0; SIZE as usize];
    if let Some(backing) = &backing {
        backing.read_at(&mut start, 0).unwrap();
    }

    let plans = [
        (ErrorKind::Io, Done::Nothing, false),
        (ErrorKind::Io, Done::Nothing, true),
        (ErrorKind::Io, Done::Half, true),
        (ErrorKind::Io, Done::Everything, false),
        (ErrorKind::NoSpace, Done::Nothing, false),
        (ErrorKind::NoSpace, Done::Half, true),
    ];
    for (kind, done, forever) in plans {
        for n in 0.. {
            let inner = Arc::new(MemoryStorage::with_contents(&template));
            let faults = Faults::new();
            let open = |storage: Arc<dyn Storage>| {
                let mut options = OpenOptions::new().writable(true).cache_bytes(0);
                if let Some(backing) = &backing {
                    options = options.backing(Arc::clone(backing));
                }
                options.open(storage)
            };
            let mut fault = Fault::on(OpKind::Any).after(n).with(kind).having_done(done);
            if forever {
                fault = fault.forever();
            }
            let mut candidates = Candidates::new(&start);
            let storage: Arc<dyn Storage> = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
            let disk = open(storage).unwrap();
            faults.inject(fault);
            run(&disk, &mut candidates);
            let reached = faults.failed() > 0;
            drop(disk);

            let what = format!(
                "{version:?} {cluster_size} backed={backed} {kind:?} {done:?} forever={forever} n={n}"
            );
            let after = open(inner.clone()).unwrap_or_else(|e| panic!("{what}: {e}"));
            let mut found = vec![0; SIZE as usize];
            after.read_at(&mut found, 0).unwrap_or_else(|e| panic!("{what}: {e}"));
            candidates.check(&found, &what);
            drop(after);
            if n % 7 == 3 {
                qemu_check_finds_no_corruption(&inner.to_vec(), &what);
            }
            if !reached {
                break;
            }
        }
    }
}

#[test]
fn every_operation_fails_small_clusters() {
    fails_everywhere(Version::V3, 512, false);
}

#[test]
fn every_operation_fails_small_clusters_backed() {
    fails_everywhere(Version::V3, 512, true);
}

#[test]
fn every_operation_fails_version_2_backed() {
    fails_everywhere(Version::V2, 4096, true);
}

/// A target that runs out of space is given more and goes on: a write that failed with `NoSpace` poisons
/// nothing.
#[test]
fn no_space_is_not_the_end() {
    let inner = Arc::new(MemoryStorage::new());
    CreateOptions::new(SIZE).create(&*inner, None).unwrap();
    let faults = Faults::new();
    let storage = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
    let disk = OpenOptions::new().writable(true).open(storage).unwrap();
    faults.inject(Fault::on(OpKind::Write).with(ErrorKind::NoSpace).forever());
    assert_eq!(disk.write_at(&[7; 4096], 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::NoSpace);
    faults.heal();
    disk.write_at(&[7; 4096], 0, WriteFlags::NONE).unwrap();
    faults.inject(Fault::on(OpKind::Write).with(ErrorKind::NoSpace).forever());
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::NoSpace);
    faults.heal();
    disk.flush().unwrap();
    drop(disk);
    let disk = OpenOptions::new().open(inner.clone()).unwrap();
    let mut found = [0; 4096];
    disk.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [7; 4096]);
    qemu_check_finds_no_corruption(&inner.to_vec(), "after no space");
}

/// The kernel reports a lost write once: after a failed flush nothing may be believed any more.
#[test]
fn a_failed_flush_poisons() {
    for kind in [ErrorKind::Io, ErrorKind::NoSpace] {
        // A write-back of fresh data flushes after the refcounts, after the L2 tables and after the L1 table.
        for n in 0..3 {
            let inner = Arc::new(MemoryStorage::new());
            CreateOptions::new(SIZE).create(&*inner, None).unwrap();
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(inner, faults.clone()));
            let disk = OpenOptions::new().writable(true).open(storage).unwrap();
            disk.write_at(&[7; 4096], 0, WriteFlags::NONE).unwrap();
            faults.inject(Fault::on(OpKind::Flush).after(n).with(kind));
            assert_eq!(disk.flush().unwrap_err().kind(), kind);
            assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned);
            let again = disk.write_at(&[7; 4096], 0, WriteFlags::NONE);
            assert_eq!(again.unwrap_err().kind(), ErrorKind::Poisoned);
            let mut found = [0; 4096];
            disk.read_at(&mut found, 0).unwrap();
            assert_eq!(found, [7; 4096], "reads go on");
        }
    }
}

/// The header may name the new backing file or the old one once a write of it, or its flush, has failed, for
/// want of space too.
#[test]
fn a_failed_change_of_the_header_poisons() {
    for (ops, kind) in [
        (OpKind::Write, ErrorKind::NoSpace),
        (OpKind::Flush, ErrorKind::NoSpace),
        (OpKind::Write, ErrorKind::Io),
        (OpKind::Flush, ErrorKind::Io),
    ] {
        for n in 0.. {
            let inner = Arc::new(MemoryStorage::new());
            let mut options = CreateOptions::new(SIZE);
            options.backing_file = Some(b"old".to_vec());
            options.create(&*inner, None).unwrap();
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
            let disk = OpenOptions::new().writable(true).open(storage).unwrap();
            faults.inject(Fault::on(ops).after(n).with(kind).having_done(Done::Everything));
            let result = disk.set_backing_file(Some(b"new"), Some("raw"));
            let what = format!("{ops:?} {n} {kind:?}: {result:?}");
            let failed = faults.failed() > 0;
            assert_eq!(result.is_err(), failed, "{what}");
            faults.heal();
            let goes_on = disk.write_at(&[1; 512], 0, WriteFlags::NONE).and_then(|()| disk.flush());
            assert_eq!(goes_on.is_err(), failed, "{what}: {goes_on:?}");
            let header = Header::read(&*inner).unwrap();
            let name = header.backing.unwrap().name;
            assert!([&b"old"[..], b"new"].contains(&name.as_bytes()), "{what}");
            if !failed {
                break;
            }
        }
    }
}

/// Guest data in an external file is durable when a flush has been answered, and before any entry in the
/// image says that it is there: the data file loses what it was not asked to flush, and the image keeps all
/// that it was given.
#[test]
fn a_crash_with_an_external_data_file() {
    for raw in [false, true] {
        let (image, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = 4096;
        (options.data_file, options.data_file_raw) = (Some(b"data".to_vec()), raw);
        options.create(&*image, Some(&*data)).unwrap();
        let recording = Arc::new(RecordingStorage::with_contents(&data.to_vec()));
        let open = |data: Arc<dyn Storage>, writable| {
            OpenOptions::new().writable(writable).data_file(data).open(image.clone()).unwrap()
        };
        let disk = open(recording.clone(), true);
        let mut now = vec![0; SIZE as usize];
        // In each cluster from the first on, so that entries are new, and over them again.
        for (round, at) in [0, 5000, 12_000, 300].into_iter().enumerate() {
            let byte = round as u8 + 1;
            disk.write_at(&vec![byte; 5000], at, WriteFlags::NONE).unwrap();
            now[at as usize..at as usize + 5000].fill(byte);
            disk.flush().unwrap();
            let answered = recording.position();
            let mut points = 0;
            for point in recording.crash_points().filter(|point| point.position() >= answered) {
                points += 1;
                let after = open(Arc::new(point.storage()), false);
                let mut found = vec![0; SIZE as usize];
                after.read_at(&mut found, 0).unwrap();
                let differs = found.iter().zip(&now).position(|(found, now)| found != now);
                assert_eq!(differs, None, "raw {raw}, round {round}: flushed data is lost, {point:?}");
            }
            assert!(points > 0, "raw {raw}, round {round}");
        }
        drop(disk);

        // Where the data cannot be flushed no entry for it is written.
        let before = image.to_vec();
        let faults = Faults::new();
        let disk = open(Arc::new(FaultStorage::new(recording.clone(), faults.clone())), true);
        disk.write_at(&[9; 4096], 20_480, WriteFlags::NONE).unwrap();
        faults.inject(Fault::on(OpKind::Flush).with(ErrorKind::NoSpace));
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned);
        drop(disk);
        let l1 = Header::parse(&before).unwrap().l1_offset as usize;
        let l2 = u64::from_be_bytes(before[l1..l1 + 8].try_into().unwrap()) as usize & 0x00ff_ffff_ffff_fe00;
        assert!(image.to_vec()[l2..l2 + 4096] == before[l2..l2 + 4096], "raw {raw}: an entry came first");
    }
}

/// A write that was given up had written to clusters that were never written before. They are not fresh any
/// more: what the next write does not cover of them must be filled.
#[test]
fn clusters_of_a_write_that_was_given_up_are_not_fresh() {
    for (cluster_size, extended) in [(4096, false), (16_384, true)] {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(1 << 20);
        (options.cluster_size, options.extended_l2) = (cluster_size, extended);
        options.create(&*storage, None).unwrap();
        let disk = OpenOptions::new().writable(true).open(storage).unwrap();
        let range = ByteRange::at(0, 4 * cluster_size);
        let guard = disk.resolve_write(range).unwrap();
        let hosts: Vec<_> = guard.runs().to_vec();
        guard.write(&vec![9; range.len() as usize]).unwrap();
        drop(guard);
        let mut again = Vec::new();
        for at in [0, cluster_size, 2 * cluster_size + 100] {
            let guard = disk.resolve_write(ByteRange::at(at, 10)).unwrap();
            again.extend_from_slice(guard.runs());
            guard.fill_edges().unwrap();
            guard.write(&[1; 10]).unwrap();
            guard.commit().unwrap();
        }
        let inside =
            |host: u64| hosts.iter().any(|run| (run.host.0..run.host.0 + run.range.len()).contains(&host));
        assert!(again.iter().any(|run| inside(run.host.0)), "no cluster was used again");
        let mut found = vec![0; range.len() as usize];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found.iter().all(|byte| [0, 1].contains(byte)), "clusters of {cluster_size}: old bytes show");
    }
}

/// A file in a page cache whose `fail`-th flush finds no space: of what was written since the last good
/// flush, each page reaches the disk or not, by chance, and what did not is gone.
#[derive(Debug)]
struct Forgetful {
    now: MemoryStorage,
    disk: Mutex<Vec<u8>>,
    flushes: AtomicU64,
    fail: u64,
    seed: u64,
}

impl Forgetful {
    fn new(bytes: &[u8], fail: u64, seed: u64) -> Self {
        let now = MemoryStorage::with_contents(bytes);
        Self { now, disk: Mutex::new(bytes.to_vec()), flushes: AtomicU64::new(0), fail, seed }
    }
}

impl Storage for Forgetful {
    fn name(&self) -> &str {
        "forgetful"
    }

    fn len(&self) -> blockmirror_block::Result<u64> {
        self.now.len()
    }

    fn info(&self) -> blockmirror_block::StorageInfo {
        self.now.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> blockmirror_block::Result<()> {
        self.now.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> blockmirror_block::Result<()> {
        self.now.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> blockmirror_block::Result<()> {
        self.now.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> blockmirror_block::Result<()> {
        self.now.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> blockmirror_block::Result<()> {
        self.now.allocate(range)
    }

    fn set_len(&self, len: u64) -> blockmirror_block::Result<()> {
        self.now.set_len(len)
    }

    fn extents(
        &self,
        range: ByteRange,
        visit: &mut dyn FnMut(blockmirror_block::StorageExtent) -> blockmirror_block::Visit,
    ) -> blockmirror_block::Result<()> {
        self.now.extents(range, visit)
    }

    fn flush(&self) -> blockmirror_block::Result<()> {
        let number = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        let now = self.now.to_vec();
        let mut disk = self.disk.lock().unwrap();
        if number != self.fail {
            *disk = now;
            return Ok(());
        }
        disk.resize(now.len(), 0);
        for (page, new) in now.chunks(512).enumerate() {
            let mixed = (page as u64 + 1).wrapping_mul(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            if (mixed >> 40).is_multiple_of(2) {
                disk[page * 512..page * 512 + new.len()].copy_from_slice(new);
            }
        }
        self.now.write_at(&disk, 0).unwrap();
        Err(blockmirror_block::Error::new(ErrorKind::NoSpace, "flush"))
    }
}

/// Does all of [`OPS`] on `disk`, and notes in `wanted` what it then holds. Once a flush has failed the image
/// is opened anew, and all that was written since the last good flush is written again. Returns whether one
/// failed.
fn write_all(mut disk: Qcow2, wanted: &mut [u8], case: &str) -> (Qcow2, bool) {
    let mut since_flush: Vec<Op> = Vec::new();
    let mut ops: std::collections::VecDeque<Op> = OPS.into();
    let mut lost = false;
    while let Some(op) = ops.pop_front() {
        let result = match op {
            Op::Write(at, len, value) => disk.write_at(&vec![value; len as usize], at, WriteFlags::NONE),
            Op::Zero(at, len) => disk.write_zeroes(ByteRange::at(at, len), ZeroFlags::NONE),
            // What a discarded range reads as may change with what is lost.
            Op::Discard(at, len) => disk.write_zeroes(ByteRange::at(at, len), ZeroFlags::MAY_UNMAP),
            Op::Flush => disk.flush(),
        };
        match (op, result) {
            (Op::Flush, Ok(())) => since_flush.clear(),
            (Op::Write(at, len, value), Ok(())) => {
                wanted[at as usize..(at + len) as usize].fill(value);
                since_flush.push(op);
            }
            (Op::Zero(at, len) | Op::Discard(at, len), Ok(())) => {
                wanted[at as usize..(at + len) as usize].fill(0);
                since_flush.push(op);
            }
            (op, Err(error)) => {
                assert!(!lost, "{case}: {error}");
                assert!(disk.is_poisoned(), "{case}: {error}");
                lost = true;
                disk = disk.reopen().unwrap_or_else(|error| panic!("{case}: {error}"));
                assert!(!disk.is_poisoned());
                // Again, in order, and then what failed.
                ops.push_front(op);
                since_flush.drain(..).rev().for_each(|op| ops.push_front(op));
            }
        }
    }
    (disk, lost)
}

/// After a flush that failed for want of space an image goes on when it is opened anew: what good flushes
/// covered is there, the rest is written again, and nothing leaks. (It could not be written any more until
/// the process ended.)
#[test]
fn an_image_goes_on_after_a_failed_flush() {
    let mut failed = 0;
    for (version, cluster_size, backed) in [
        (Version::V3, 512, false),
        (Version::V3, 2048, true),
        (Version::V2, 512, true),
        (Version::V3, 65536, false),
    ] {
        let backing = backed.then(|| backing_disk(SIZE));
        for (fail, seed) in (1..60).flat_map(|fail| (1..4).map(move |seed| (fail, seed))) {
            let case = format!(
                "{version:?}, clusters of {cluster_size}, backed {backed}, flush {fail}, seed {seed}"
            );
            let memory = MemoryStorage::new();
            let mut options = CreateOptions::new(SIZE);
            (options.version, options.cluster_size) = (version, cluster_size);
            options.create(&memory, None).unwrap();
            let storage = Arc::new(Forgetful::new(&memory.to_vec(), fail, seed));
            // With the smallest cache, metadata is written back in the middle of writes.
            let mut open = OpenOptions::new().writable(true);
            if seed == 2 {
                open = open.cache_bytes(0);
            }
            if let Some(device) = &backing {
                open = open.backing(Arc::clone(device));
            }
            let mut disk = open.open(Arc::clone(&storage) as _).unwrap();
            let mut wanted = vec![0; SIZE as usize];
            if let Some(device) = &backing {
                device.read_at(&mut wanted, 0).unwrap();
            }
            let lost;
            (disk, lost) = write_all(disk, &mut wanted, &case);
            failed += u32::from(lost);
            let mut found = vec![0; SIZE as usize];
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == wanted, "{case}");
            drop(disk);
            let durable = storage.disk.lock().unwrap().clone();
            if lost && seed == 1 {
                // Lowered refcounts wait for no flush.
                qemu_check_finds_nothing(&storage.now.to_vec(), &case);
            }
            let mut open = OpenOptions::new();
            if let Some(device) = &backing {
                open = open.backing(Arc::clone(device));
            }
            let disk = open.open(Arc::new(MemoryStorage::with_contents(&durable))).unwrap();
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == wanted, "{case}: opened once more");
        }
    }
    assert!(failed > 60, "{failed} runs met a failing flush");
}
