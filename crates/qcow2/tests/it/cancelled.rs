//! Callers that are cancelled. Writes whose data is written are published, or given back, as a whole; the
//! caches are small there, so that both have to read metadata again. Waits for other callers end.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use crate::common::qemu_check_finds_nothing;
use blockmirror_block::cancel::{self, CancelSource};
use blockmirror_block::testing::{FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Result, Storage, StorageExtent, StorageInfo, Visit, WriteFlags,
    ZeroFlags,
};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

const CLUSTER: u64 = 512;
/// What one L2 table maps.
const TABLE: u64 = CLUSTER / 8 * CLUSTER;
const SIZE: u64 = 64 * TABLE;

/// Reads of it are cancelled with their caller, as those of a server are.
#[derive(Debug)]
struct Remote(MemoryStorage, AtomicUsize);

impl Storage for Remote {
    fn name(&self) -> &str {
        "remote"
    }

    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn info(&self) -> StorageInfo {
        self.0.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.1.fetch_add(1, Ordering::SeqCst);
        if cancel::is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "read").at(offset));
        }
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.0.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.0.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.0.extents(range, visit)
    }
}

/// An image with the smallest caches, in which each L2 table maps something.
fn image() -> (Arc<Remote>, Qcow2) {
    let remote = Arc::new(Remote(MemoryStorage::new(), AtomicUsize::new(0)));
    let mut options = CreateOptions::new(SIZE);
    (options.cluster_size, options.refcount_bits) = (CLUSTER, 64);
    options.create(&*remote, None).unwrap();
    let disk = OpenOptions::new().writable(true).cache_bytes(0).open(Arc::clone(&remote) as _).unwrap();
    each_table(|at| disk.write_at(&[1; CLUSTER as usize], at, WriteFlags::NONE).unwrap());
    disk.flush().unwrap();
    (remote, disk)
}

fn each_table(visit: impl FnMut(u64)) {
    (0..SIZE).step_by(TABLE as usize).for_each(visit);
}

/// Half of the range was published.
#[test]
fn what_was_written_is_published() {
    let (remote, disk) = image();
    // The end of one table and the beginning of the next.
    let range = ByteRange::at(TABLE - CLUSTER, 2 * CLUSTER);
    let guard = disk.resolve_write(range).unwrap();
    guard.fill_edges().unwrap();
    guard.write(&[2; 2 * CLUSTER as usize]).unwrap();
    // Puts other tables in the place of these.
    each_table(|at| disk.read_at(&mut [0; 1], at + 5 * CLUSTER).unwrap());
    let source = CancelSource::new();
    {
        let _calls = source.enter();
        source.cancel();
        guard.commit().unwrap();
    }
    let mut seen = [0; 2 * CLUSTER as usize];
    disk.read_at(&mut seen, range.start()).unwrap();
    assert_eq!(seen, [2; 2 * CLUSTER as usize]);
    disk.flush().unwrap();
    qemu_check_finds_nothing(&remote.0.to_vec(), "the caller of a write was cancelled");
}

/// Its clusters leaked.
#[test]
fn what_was_not_published_is_given_back() {
    let (remote, disk) = image();
    // Its refcount lies among those of clusters of three tables that are not looked at any more.
    let rest = SIZE - 3 * TABLE;
    let fill = |table: u64, clusters: usize| {
        let data = vec![3; clusters * CLUSTER as usize];
        disk.write_at(&data, rest + table * TABLE + CLUSTER, WriteFlags::NONE).unwrap();
    };
    fill(0, 60);
    fill(1, 20);
    let guard = disk.resolve_write(ByteRange::at(rest + TABLE + 40 * CLUSTER, CLUSTER)).unwrap();
    fill(2, 60);
    // The raised refcount reaches the disk, and its slice makes room for others.
    disk.flush().unwrap();
    for at in (0..rest).step_by(TABLE as usize) {
        disk.write_at(&[3; 20 * CLUSTER as usize], at + 20 * CLUSTER, WriteFlags::NONE).unwrap();
    }
    disk.flush().unwrap();
    let source = CancelSource::new();
    let reads = remote.1.load(Ordering::SeqCst);
    {
        let _calls = source.enter();
        source.cancel();
        drop(guard);
    }
    assert!(remote.1.load(Ordering::SeqCst) > reads, "it has to read");
    disk.flush().unwrap();
    qemu_check_finds_nothing(&remote.0.to_vec(), "the caller of a write was cancelled");
}

/// What a caller that is cancelled does while another waits for a storage that does not answer.
fn leaves(kind: OpKind, first: fn(&Qcow2) -> Result<()>, second: fn(&Qcow2) -> Result<()>) {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(1 << 20).create(&*storage, None).unwrap();
    let faults = Faults::new();
    let storage = FaultStorage::new(storage, faults.clone());
    let disk = Arc::new(OpenOptions::new().writable(true).open(Arc::new(storage)).unwrap());
    disk.write_at(&[1; 512], 0, WriteFlags::FUA).unwrap();
    disk.read_at(&mut [0; 512], 0).unwrap();
    let gate = faults.hold(kind, None);
    let waits = {
        let disk = Arc::clone(&disk);
        thread::spawn(move || first(&disk))
    };
    gate.wait_held(1);
    let source = CancelSource::new();
    let (entered, has_entered) = mpsc::channel();
    let (left, has_left) = mpsc::channel();
    let calls = source.clone();
    thread::spawn(move || {
        let _calls = calls.enter();
        entered.send(()).unwrap();
        left.send(second(&disk)).unwrap();
    });
    has_entered.recv().unwrap();
    source.cancel();
    let result = has_left.recv_timeout(Duration::from_secs(60)).expect("it waits");
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(gate.held(), 1);
    gate.open();
    waits.join().unwrap().unwrap();
}

#[test]
fn a_wait_for_a_range_that_a_reader_holds_ends() {
    let read = |disk: &Qcow2| disk.read_at(&mut [0; 512], 0);
    leaves(OpKind::Read, read, |disk| disk.discard(ByteRange::at(0, 65_536)));
    leaves(OpKind::Read, read, |disk| disk.store_bitmaps().map_err(Error::from));
}

#[test]
fn a_wait_for_the_flush_of_another_ends() {
    let flush = |disk: &Qcow2| disk.write_at(&[2; 512], 0, WriteFlags::NONE).and_then(|()| disk.flush());
    leaves(OpKind::Flush, flush, |disk| disk.flush());
}
