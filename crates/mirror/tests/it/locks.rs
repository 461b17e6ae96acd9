//! The mutexes that one guest write takes on its own thread, by the counter of `block::sync`.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;

use blockmirror_block::testing::locks_taken;
use blockmirror_block::{
    self as block, BlockDevice, ByteRange, Extent, Geometry, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{CopyMode, Event, MirrorJob, MirrorOptions, SyncMode, Tap};

use crate::tap::until;

const RANGE: ByteRange = ByteRange::new(4096, 8192);

/// A disk that keeps nothing and takes no lock.
#[derive(Debug)]
struct NullDisk;

impl BlockDevice for NullDisk {
    fn len(&self) -> u64 {
        1 << 20
    }

    fn name(&self) -> &str {
        "null"
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> block::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64, _flags: WriteFlags) -> block::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> block::Result<()> {
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> block::Result<()> {
        Ok(())
    }

    fn flush(&self) -> block::Result<()> {
        Ok(())
    }

    fn extents(&self, _range: ByteRange, _visit: &mut dyn FnMut(Extent) -> Visit) -> block::Result<()> {
        Ok(())
    }
}

/// The mutexes that this thread takes in `call`; 0 where nothing counts.
fn locks_of(call: impl FnOnce()) -> u64 {
    let before = locks_taken();
    call();
    locks_taken().unwrap_or(0) - before.unwrap_or(0)
}

/// The mutexes of one write as an NBD server performs it: of the question whether it would wait, and of the
/// write itself. Both sides are disks that take none, and the job has nothing in flight.
fn locks_of_a_write(tap: &Tap) -> (u64, u64) {
    let question = locks_of(|| assert!(!tap.write_would_wait(RANGE)));
    let write = locks_of(|| tap.write_at(&[1; 4096], RANGE.start(), WriteFlags::NONE).unwrap());
    (question, write)
}

#[test]
fn a_guest_write_takes_no_more_mutexes_than_documented() {
    let tap = Tap::new(Arc::new(NullDisk));
    assert_eq!(locks_of_a_write(&tap), (0, 0), "nothing observes it");
    for (mode, limit) in [(CopyMode::WriteBlocking, 5), (CopyMode::Background, 4)] {
        let options = MirrorOptions::new().sync(SyncMode::None).copy_mode(mode);
        let job = MirrorJob::attach(&tap, Arc::new(NullDisk), options).unwrap();
        until(&job, &Event::Ready);
        let (question, write) = locks_of_a_write(&tap);
        println!("{mode}: {question} mutexes before the write, {write} in it");
        assert!(question <= 2 && write <= limit, "{mode}: {question} and {write}");
        job.control().force_cancel().unwrap();
        assert!(job.wait().is_err());
    }
    tap.add_bitmap("b", 65_536).unwrap();
    let (question, write) = locks_of_a_write(&tap);
    assert!(question <= 1 && write <= 2, "a bitmap: {question} and {write}");
}
