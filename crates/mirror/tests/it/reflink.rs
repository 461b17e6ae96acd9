//! Jobs that share blocks, over files in memory whose clones are writes.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryStorage, OpKind};
use blockmirror_block::{
    self as block, Backing, BlockDevice, ByteRange, CloneUnits, ErrorKind, Extent, ExtentKind, Geometry,
    HostRun, Result, Storage, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{Error, Event, MirrorJob, MirrorOptions, Outcome, Reflink, Tap};

const LEN: u64 = 8 << 20;
const BLOCK: u64 = 4096;

/// A file as a disk.
#[derive(Debug)]
struct FileDisk {
    file: Arc<MemoryStorage>,
    /// What it says of itself.
    geometry: Geometry,
    /// How much farther back the disk's bytes lie in the file than they say.
    shift: u64,
}

impl FileDisk {
    fn new(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self::of(bytes))
    }

    fn of(bytes: &[u8]) -> Self {
        let file = Arc::new(MemoryStorage::with_contents(bytes));
        Self { file, geometry: Geometry::plain(), shift: 0 }
    }
}

impl BlockDevice for FileDisk {
    fn len(&self) -> u64 {
        self.file.len().unwrap()
    }

    fn name(&self) -> &str {
        "file"
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, _: WriteFlags) -> Result<()> {
        self.file.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.file.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.file.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.file.extents(range, &mut |run| {
            let kind = if run.hole { ExtentKind::Zero } else { ExtentKind::Data };
            let storage = Arc::clone(&self.file) as Arc<dyn Storage>;
            visit(
                Extent::new(run.range, kind)
                    .in_host(HostRun { storage, offset: run.range.start() + self.shift }),
            )
        })
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        let block = self.file.clone_block(file)?;
        Some(CloneUnits { device: block, file: block })
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        self.file.clone_range(offset, run, len)
    }
}

/// A disk with data, a hole, and a tail that is no whole block.
fn source() -> Arc<FileDisk> {
    let bytes: Vec<u8> = (0..LEN + 512).map(|at| (at / 512 % 251) as u8 + 1).collect();
    let disk = FileDisk::new(&bytes);
    disk.write_zeroes(ByteRange::new(1 << 20, 2 << 20), ZeroFlags::MAY_UNMAP).unwrap();
    disk
}

fn target() -> Arc<FileDisk> {
    FileDisk::new(&[0; LEN as usize + 512])
}

fn copied(source: &Arc<FileDisk>, target: &Arc<FileDisk>, outcome: &Outcome) {
    assert!(source.file.to_vec() == target.file.to_vec());
    assert_eq!(outcome.copied + outcome.shared + outcome.zeroed + outcome.skipped, LEN + 512);
}

#[test]
fn a_job_shares_what_it_may_and_copies_the_rest() {
    for (reflink, shared) in
        [(Reflink::Never, 0), (Reflink::Auto, LEN - (1 << 20)), (Reflink::Always, LEN - (1 << 20))]
    {
        let (from, to) = (source(), target());
        let options = MirrorOptions::new().reflink(reflink);
        let job = MirrorJob::start(Arc::clone(&from) as _, Arc::clone(&to) as _, options).unwrap();
        let outcome = job.wait().unwrap();
        copied(&from, &to, &outcome);
        assert_eq!(outcome.shared, shared, "{reflink:?}");
        assert_eq!(outcome.clone_calls > 0, shared > 0);
    }
    let (from, to) = (source(), target());
    let options = MirrorOptions::new().reflink(Reflink::Auto).allocate(true).min_zero_run(0);
    let job = MirrorJob::start(Arc::clone(&from) as _, Arc::clone(&to) as _, options).unwrap();
    assert_eq!(job.wait().unwrap().shared, 0, "what is to be allocated is not shared");
}

#[test]
fn a_clone_that_fails_is_a_copy() {
    let (from, to) = (source(), target());
    let faults = Faults::new();
    faults.inject(Fault::on(OpKind::Clone).within(ByteRange::new(3 << 20, 4 << 20)).forever());
    let faulty = Arc::new(FaultDisk::new(Arc::clone(&to) as _, faults.clone()));
    let options = MirrorOptions::new().reflink(Reflink::Always);
    let outcome = MirrorJob::start(Arc::clone(&from) as _, faulty, options).unwrap().wait().unwrap();
    copied(&from, &to, &outcome);
    assert!(faults.failed() > 0 && outcome.copied > 0 && outcome.given_up.is_empty(), "{outcome:?}");
}

#[test]
fn what_cannot_share_at_all_is_refused_if_it_must() {
    // The source's bytes lie nowhere.
    let from = Arc::new(blockmirror_block::testing::MemoryDisk::with_contents(&[7; 65536]));
    let start = |from: &Arc<_>, reflink| {
        let to = FileDisk::new(&[1; 65536]);
        let job = MirrorJob::start(Arc::clone(from) as _, Arc::clone(&to) as _, {
            MirrorOptions::new().reflink(reflink)
        });
        (job, to)
    };
    let (refused, to) = start(&from, Reflink::Always);
    assert!(matches!(refused.unwrap_err(), Error::NothingShared { .. }));
    assert!(to.file.to_vec() == [1; 65536], "nothing was copied");
    assert_eq!(start(&from, Reflink::Auto).0.unwrap().wait().unwrap().shared, 0);
    // Without data there is nothing to refuse.
    let empty = Arc::new(blockmirror_block::testing::MemoryDisk::new(65536));
    start(&empty, Reflink::Always).0.unwrap().wait().unwrap();
}

#[test]
fn under_a_guest_blocks_are_shared_only_if_they_must() {
    for (reflink, shares) in [(Reflink::Auto, false), (Reflink::Always, true)] {
        let (from, to) = (source(), target());
        let tap = Tap::new(Arc::clone(&from) as _);
        let options = MirrorOptions::new().reflink(reflink);
        let job = MirrorJob::attach(&tap, Arc::clone(&to) as _, options).unwrap();
        for at in (0..LEN).step_by(100 * BLOCK as usize) {
            tap.write_at(&[at as u8 | 1; 5000], at + 700, WriteFlags::NONE).unwrap();
        }
        let ready = || job.control().next_event(Some(Duration::from_secs(60))).unwrap() == Event::Ready;
        while !ready() {}
        tap.write_at(&[0xee; 5000], 12_345, WriteFlags::NONE).unwrap();
        job.control().keep_copy().unwrap();
        let outcome = job.wait().unwrap();
        assert!(from.file.to_vec() == to.file.to_vec(), "{reflink:?}");
        assert_eq!(outcome.shared > 0, shares, "{reflink:?}: {outcome:?}");
    }
}

#[test]
fn what_lies_at_no_whole_block_is_refused_if_it_must_be_shared() {
    let from = Arc::new(FileDisk { shift: 512, ..FileDisk::of(&[7; 65536]) });
    let to = FileDisk::new(&[1; 65536]);
    let options = MirrorOptions::new().reflink(Reflink::Always);
    let refused = MirrorJob::start(from, Arc::clone(&to) as _, options);
    assert!(matches!(refused, Err(Error::NothingShared { .. })));
    assert!(to.file.to_vec() == [1; 65536], "nothing was copied");
}

#[test]
fn a_target_whose_clusters_must_be_completed_shares_whole_ones() {
    let mut geometry = Geometry::plain();
    geometry.cluster_size = Some(65536);
    geometry.backing = Backing::Hidden;
    let (from, to) = (source(), Arc::new(FileDisk { geometry, ..FileDisk::of(&[0; LEN as usize + 512]) }));
    let tap = Tap::new(Arc::clone(&from) as _);
    let options = MirrorOptions::new().reflink(Reflink::Always);
    let job = MirrorJob::attach(&tap, Arc::clone(&to) as _, options).unwrap();
    for at in (0..LEN).step_by(100 * BLOCK as usize) {
        tap.write_at(&[at as u8 | 1; 5000], at + 700, WriteFlags::NONE).unwrap();
    }
    while job.control().next_event(Some(Duration::from_secs(60))).unwrap() != Event::Ready {}
    job.control().keep_copy().unwrap();
    let outcome = job.wait().unwrap();
    assert!(from.file.to_vec() == to.file.to_vec());
    assert!(outcome.shared > 0, "{outcome:?}");
}

/// A file whose clones fail half-way, after something has happened.
struct HalfCloned<F>(Arc<FileDisk>, F);

impl<F> std::fmt::Debug for HalfCloned<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl<F: Fn(u64, u64) -> Result<u64> + Send + Sync + 'static> BlockDevice for HalfCloned<F> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.0.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.0.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.0.extents(range, visit)
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.0.clone_units(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        self.0.clone_range(offset, run, len / 2 / BLOCK * BLOCK)?;
        (self.1)(offset, len)
    }
}

#[test]
fn zeros_written_during_a_clone_that_fails_half_way_reach_a_target_that_was_zero() {
    let (from, to) = (FileDisk::new(&[7; 1 << 20]), FileDisk::new(&[0; 1 << 20]));
    let tap = Tap::new(Arc::clone(&from) as _);
    let guest = Arc::clone(&tap);
    let target = HalfCloned(Arc::clone(&to), move |offset, _| {
        guest.write_at(&[0; 65536], offset, WriteFlags::NONE)?;
        Err(block::Error::new(ErrorKind::Unsupported, "clone").refused(true))
    });
    let options = MirrorOptions::new().reflink(Reflink::Always).target_is_zero(true);
    let job = MirrorJob::attach(&tap, Arc::new(target), options).unwrap();
    while job.control().next_event(Some(Duration::from_secs(60))).unwrap() != Event::Ready {}
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    assert!(from.file.to_vec() == to.file.to_vec(), "the guest's zeros are at the target");
}

#[test]
fn a_cancelled_job_ends_a_long_clone() {
    let from = FileDisk::new(&vec![7; 64 << 20]);
    let to = FileDisk::new(&[]);
    to.file.set_len(64 << 20).unwrap();
    let ((begun, has_begun), (go_on, may_go_on)) = (mpsc::channel(), mpsc::channel::<()>());
    let may_go_on = Mutex::new(may_go_on);
    let target = HalfCloned(to, move |_, len| {
        begun.send(len).unwrap();
        // Until the sender is gone.
        let _ = may_go_on.lock().unwrap().recv();
        Ok(1)
    });
    let options = MirrorOptions::new().reflink(Reflink::Auto);
    let job = MirrorJob::start(from, Arc::new(target), options).unwrap();
    let mut cloned = has_begun.recv().unwrap();
    job.control().cancel();
    drop(go_on);
    assert!(job.wait().is_err());
    cloned += has_begun.iter().sum::<u64>();
    assert!(cloned <= 32 << 20, "{cloned} bytes cloned");
}
