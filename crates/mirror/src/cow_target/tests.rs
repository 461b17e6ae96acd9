//! Targets in memory that are completed from a source in memory.

use std::thread;

use blockmirror_block::testing::{DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind};

use super::*;
use crate::options::SyncMode;
use crate::progress::Operation;
use crate::scan::Failure;

const LEN: u64 = 20_000;

fn source_bytes() -> Vec<u8> {
    (0..LEN).map(|at| (at / 100) as u8 | 1).collect()
}

fn over(target: Arc<dyn BlockDevice>, source: Arc<dyn BlockDevice>, unit: u64) -> CowTarget {
    CowTarget::new(target, source, unit, TargetContent::Asked, true)
}

fn pair() -> (Arc<MemoryDisk>, CowTarget) {
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(4096));
    let source = Arc::new(MemoryDisk::with_contents(&source_bytes()));
    (target.clone(), over(target, source, 4096))
}

#[test]
fn the_first_write_completes_its_clusters_the_second_does_not() {
    let (target, cow) = pair();
    cow.write_at(&[0xee; 512], 4096 + 100, WriteFlags::NONE).unwrap();
    let now = target.contents().unwrap();
    assert_eq!(now[4096 + 99], (4195 / 100) as u8 | 1);
    assert_eq!(now[4096 + 100..4096 + 612], [0xee; 512]);
    assert_eq!(now[8191], (8191 / 100) as u8 | 1);
    assert_eq!(now[8192], 0, "the next cluster was not touched");
    // What has been written to the cluster since must not be replaced by the source's bytes.
    cow.write_at(&[0xdd; 5000], 8000, WriteFlags::NONE).unwrap();
    cow.write_at(&[0xdd; 10], 4096, WriteFlags::NONE).unwrap();
    assert_eq!(target.contents().unwrap()[4096 + 100..4096 + 612], [0xee; 512]);
}

#[test]
fn a_write_over_several_clusters_completes_both_ends() {
    let (target, cow) = pair();
    cow.write_at(&[0xee; 9000], 4000, WriteFlags::NONE).unwrap();
    let (mut wanted, now) = (source_bytes(), target.contents().unwrap());
    wanted[4000..13_000].fill(0xee);
    assert!(now[..16_384] == wanted[..16_384]);
    assert!(now[16_384..].iter().all(|byte| *byte == 0), "the next cluster was not touched");
}

#[test]
fn the_last_cluster_ends_with_the_disk() {
    let (target, cow) = pair();
    cow.write_at(&[0xee; 1], 19_999, WriteFlags::NONE).unwrap();
    let now = target.contents().unwrap();
    assert_eq!((now[19_998], now[19_999]), ((19_998 / 100) as u8 | 1, 0xee));
    let (target, cow) = pair();
    cow.write_zeroes(ByteRange::new(16_384, LEN), ZeroFlags::NO_FALLBACK).unwrap();
    assert_eq!(target.contents().unwrap()[16_384..], [0; 20_000 - 16_384]);
}

#[test]
fn zeros_over_part_of_a_cluster_keep_the_rest_of_the_source() {
    let (target, cow) = pair();
    let range = ByteRange::new(4000, 9000);
    let refused = cow.write_zeroes(range, ZeroFlags::NO_FALLBACK).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(target.contents().unwrap().iter().all(|b| *b == 0), "nothing was written");
    cow.write_zeroes(range, ZeroFlags::NONE).unwrap();
    let now = target.contents().unwrap();
    assert_eq!((now[3999], now[9000]), ((3999 / 100) as u8 | 1, (9000 / 100) as u8 | 1));
    assert!(now[4000..9000].iter().all(|b| *b == 0));
}

/// A coarse granularity over NBD: the unit is completed in pieces, of which zeros are zeroed.
#[test]
fn a_large_unit_is_completed_in_pieces() {
    let len = 3 * PIECE + 512;
    let source = Arc::new(MemoryDisk::new(len));
    source.write_at(&[7; 1000], 2 * PIECE, WriteFlags::NONE).unwrap();
    let target = Arc::new(MemoryDisk::with_contents(&vec![0xbb; len as usize]).logged());
    let cow = over(target.clone(), source.clone(), 64 << 20);
    source.write_at(&[9; 10], PIECE + 5, WriteFlags::NONE).unwrap();
    cow.write_at(&[9; 10], PIECE + 5, WriteFlags::NONE).unwrap();
    assert!(target.contents().unwrap() == source.contents().unwrap());
    let flags = ZeroFlags::MAY_UNMAP | ZeroFlags::EXPLICIT;
    let zeroed = [ByteRange::at(0, PIECE), ByteRange::new(3 * PIECE, len)];
    let log = target.take_log();
    assert!(zeroed.iter().all(|range| log.contains(&DiskOp::WriteZeroes(*range, flags))), "{log:?}");
    cow.write_zeroes(ByteRange::new(100, len - 100), ZeroFlags::NONE).unwrap();
    assert_eq!(cow.target.geometry().cluster_size, None);
    assert!(target.contents().unwrap().iter().all(|byte| *byte == 0));
}

/// The second of two writes to one cluster wrote the source's old bytes over the first: it completed the
/// cluster as well.
#[test]
fn writes_to_one_cluster_take_turns() {
    let source = Arc::new(MemoryDisk::with_contents(&source_bytes()));
    let faults = Faults::new();
    // Only the one that writes the start of the cluster reads its end.
    let gate = faults.hold(OpKind::Read, Some(ByteRange::new(3584, 4096)));
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(4096));
    let cow = over(target.clone(), Arc::new(FaultDisk::new(source, faults)), 4096);
    thread::scope(|scope| {
        scope.spawn(|| cow.write_at(&[0xaa; 512], 0, WriteFlags::NONE).unwrap());
        gate.wait_held(1);
        let second = scope.spawn(|| cow.write_at(&[0xcc; 512], 3584, WriteFlags::NONE).unwrap());
        while cow.order.waiters() == 0 && !second.is_finished() {
            thread::yield_now();
        }
        gate.open();
    });
    let now = target.contents().unwrap();
    assert_eq!(now[..512], [0xaa; 512]);
    assert_eq!(now[3584..4096], [0xcc; 512], "the second write was lost");
    assert_eq!(now[512..3584], source_bytes()[512..3584]);
}

/// A server that was lost may have forgotten that a unit was written whole.
#[test]
fn nothing_is_complete_after_a_failed_flush() {
    let source = Arc::new(MemoryDisk::with_contents(&source_bytes()));
    let faults = Faults::new();
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(4096));
    let cow = over(Arc::new(FaultDisk::new(target.clone(), faults.clone())), source, 4096);
    cow.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    faults.inject(Fault::on(OpKind::Flush).with(ErrorKind::WritesLost));
    assert_eq!(cow.flush().unwrap_err().kind(), ErrorKind::WritesLost);
    target.write_zeroes(ByteRange::at(0, 4096), ZeroFlags::NONE).unwrap();
    cow.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    assert_eq!(target.contents().unwrap()[512..4096], source_bytes()[512..4096]);

    // Nor does one count whose write was under way.
    let gate = faults.hold(OpKind::Write, None);
    thread::scope(|scope| {
        let write = scope.spawn(|| cow.write_at(&[2; 512], 8192, WriteFlags::NONE).unwrap());
        gate.wait_held(1);
        faults.inject(Fault::on(OpKind::Flush));
        assert!(cow.flush().is_err());
        gate.open();
        write.join().unwrap();
    });
    assert!(!cow.is_complete(ByteRange::at(8192, 4096)));
}

#[test]
fn a_source_that_cannot_be_read_is_the_sources_failure() {
    let faults = Faults::new();
    faults.inject(Fault::on(OpKind::Read));
    let source = FaultDisk::new(Arc::new(MemoryDisk::with_contents(&source_bytes())), faults);
    let target = Arc::new(MemoryDisk::new(LEN));
    let cow = over(target, Arc::new(source), 4096);
    let failure = Failure::at_target(cow.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap_err());
    assert_eq!(failure.operation, Operation::Read);
    assert!(failure.error.to_string().starts_with("complete a cluster of the target: read"));
    let past = cow.write_at(&[1; 512], LEN, WriteFlags::NONE).unwrap_err();
    assert_eq!(Failure::at_target(past).operation, Operation::Write);
}

/// Which targets are written as they are.
#[test]
fn only_targets_that_hide_something_are_completed() {
    let unit = |backing, cluster, source, sync| {
        let disk = |backing, cluster| {
            let mut geometry = Geometry::plain();
            (geometry.backing, geometry.cluster_size) = (backing, cluster);
            Arc::new(MemoryDisk::new(LEN).with_geometry(geometry)) as Arc<dyn BlockDevice>
        };
        let (target, source) = (disk(backing, cluster), disk(source, None));
        let options = MirrorOptions::new().sync(sync);
        let through = CowTarget::in_front_of(&target, &source, &options, 1 << 20);
        through.map(|cow| cow.geometry().subcluster_size.unwrap())
    };
    use SyncMode::{Full, None as Nothing, Top};
    let cluster = Some(65_536);
    assert_eq!(unit(Backing::Hidden, cluster, Backing::None, Full), cluster);
    assert_eq!(unit(Backing::Attached, cluster, Backing::Attached, Top), None);
    assert_eq!(unit(Backing::Possible, cluster, Backing::Attached, Full), None);
    assert_eq!(unit(Backing::Possible, cluster, Backing::Attached, Top), cluster);
    assert_eq!(unit(Backing::Possible, cluster, Backing::Possible, Top), None, "all of it is copied");
    assert_eq!(unit(Backing::Possible, cluster, Backing::Possible, Nothing), cluster);
    assert_eq!(unit(Backing::None, None, Backing::Attached, Top), None);
    assert_eq!(unit(Backing::Remote { can_zero: false }, None, Backing::None, Full), Some(1 << 20));
}

fn kinds(cow: &CowTarget) -> Vec<(u64, u64, ExtentKind)> {
    let mut found = Vec::new();
    let mut visit = |extent: Extent| {
        found.push((extent.range.start(), extent.range.end(), extent.kind));
        Visit::Continue(())
    };
    cow.extents(ByteRange::new(0, LEN), &mut visit).unwrap();
    found
}

/// What was known of a unit as zero was still trusted after the source's bytes had been written to it.
#[test]
fn zeros_are_left_out_where_nothing_was_written_only() {
    let (target, cow) = pair();
    cow.write_at(&[0xee; 512], 4096, WriteFlags::NONE).unwrap();
    assert_eq!(cow.leave_zeros(ByteRange::new(0, 4096)).unwrap(), 0);
    assert_eq!(cow.leave_zeros(ByteRange::new(6000, 9000)).unwrap(), 8192 - 6000);
    let now = target.contents().unwrap();
    assert!(now[..4096].iter().all(|byte| *byte == 0));
    assert_eq!((now[5999], &now[6000..8192]), ((5999 / 100) as u8 | 1, &[0; 2192][..]));
    assert!(now[8192..].iter().all(|byte| *byte == 0));

    // After a failed flush the unit is not complete, but it was written.
    cow.state.lock().complete.clear_all();
    cow.write_at(&[0xee; 512], 4096, WriteFlags::NONE).unwrap();
    cow.state.lock().complete.clear_all();
    assert_eq!(cow.leave_zeros(ByteRange::new(6000, 8192)).unwrap(), 2192);
    assert_eq!(target.contents().unwrap()[6000..8192], [0; 2192]);
}

#[test]
fn units_that_were_written_are_of_unknown_content() {
    let (_, mut cow) = pair();
    cow.write_at(&[0xee; 512], 4096, WriteFlags::NONE).unwrap();
    use ExtentKind::{Unallocated, Unknown, Zero};
    let asked = [(0, 4096, Unallocated), (4096, 8192, Unknown), (8192, LEN, Unallocated)];
    assert_eq!(kinds(&cow), asked);
    cow.is_zero = true;
    assert_eq!(kinds(&cow), [(0, 4096, Zero), (4096, 8192, Unknown), (8192, LEN, Zero)]);
    cow.content = TargetContent::Unknown;
    assert_eq!(kinds(&cow), [(0, 4096, Zero), (4096, 8192, Unknown), (8192, LEN, Zero)]);
    cow.is_zero = false;
    assert!(kinds(&cow).iter().all(|(_, _, kind)| *kind == Unknown));
}

/// A scan that came between the reading of the source's bytes and their writing found zeros there.
#[test]
fn a_unit_that_is_being_completed_is_of_unknown_content() {
    let source = Arc::new(MemoryDisk::with_contents(&source_bytes()));
    let faults = Faults::new();
    let gate = faults.hold(OpKind::Write, None);
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(4096));
    let cow = over(Arc::new(FaultDisk::new(target, faults)), source, 4096);
    thread::scope(|scope| {
        scope.spawn(|| cow.write_at(&[0xaa; 512], 4096, WriteFlags::NONE).unwrap());
        gate.wait_held(1);
        let now = kinds(&cow);
        gate.open();
        assert_eq!(now[1], (4096, 8192, ExtentKind::Unknown));
    });
}

#[test]
fn a_longer_target_keeps_what_lies_behind_the_source() {
    let source = Arc::new(MemoryDisk::with_contents(&source_bytes()[..5000]));
    let target = Arc::new(MemoryDisk::with_contents(&[0xbb; LEN as usize]));
    let cow = over(target.clone(), source, 4096);
    cow.write_at(&[0xee; 10], 4990, WriteFlags::NONE).unwrap();
    cow.write_zeroes(ByteRange::new(4500, 4600), ZeroFlags::NONE).unwrap();
    let now = target.contents().unwrap();
    assert_eq!((now[4095], now[4096], now[4500], now[4999]), (0xbb, (4096 / 100) as u8 | 1, 0, 0xee));
    assert!(now[5000..].iter().all(|byte| *byte == 0xbb));
    cow.write_zeroes(ByteRange::new(4096, 5000), ZeroFlags::NONE).unwrap();
    assert!(target.contents().unwrap()[5000..].iter().all(|byte| *byte == 0xbb));
}

/// One bad sector cost the whole unit around it.
#[test]
fn what_cannot_be_read_around_a_salvaged_block_costs_nothing_else() {
    let bad = ByteRange::at(4096 + 1024, 512);
    for backing in [Backing::Hidden, Backing::Remote { can_zero: true }] {
        let faults = Faults::new();
        faults.inject(Fault::on(OpKind::Read).within(bad).forever());
        let source = FaultDisk::new(Arc::new(MemoryDisk::with_contents(&source_bytes())), faults);
        let mut geometry = Geometry::plain();
        geometry.backing = backing;
        let target = Arc::new(MemoryDisk::with_contents(&[0xbb; LEN as usize]).with_geometry(geometry));
        let cow = over(target.clone(), Arc::new(source), 4096);
        let mut lost = Vec::new();
        cow.write_salvaged(&[0xee; 512], 4096, 512, &mut lost).unwrap();
        let now = target.contents().unwrap();
        assert_eq!((now[4095], now[4096], now[4607], now[8192]), (0xbb, 0xee, 0xee, 0xbb));
        // A server completes the unit by itself.
        let is_remote = backing != Backing::Hidden;
        assert_eq!(now[8191], if is_remote { 0xbb } else { (8191 / 100) as u8 | 1 });
        let lost: Vec<_> = lost.into_iter().map(|(range, _)| range).collect();
        assert_eq!(lost, if is_remote { vec![] } else { vec![bad] });
        cow.write_salvaged(&[0xdd; 512], 8192 - 512, 512, &mut Vec::new()).unwrap();
        assert_eq!(target.contents().unwrap()[4096], 0xee);
    }
}
