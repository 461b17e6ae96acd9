//! Plans of memory disks, and their text.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{self as block, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags};
use insta::assert_snapshot;

use super::*;

fn source() -> MemoryDisk {
    let disk = MemoryDisk::new(8 << 40);
    for i in 0..3u64 {
        disk.write_at(&[1; 65536], i << 40, WriteFlags::NONE).unwrap();
    }
    disk
}

#[test]
fn a_plan_needs_no_target() {
    let plan = plan(
        &source(),
        PlanTarget::New { cluster_size: Some(2 << 20), backing: None },
        &MirrorOptions::new(),
    );
    assert_snapshot!(plan.unwrap(), @r"
    granularity: 64 KiB (the target's cluster size is 2 MiB; the default stays between 4 KiB and 64 KiB)
    copy: 192 KiB in 3 runs
    zero: 0 bytes
    skip: 8589934400 KiB
    ");
}

#[test]
fn old_contents_of_the_target_are_zeroed() {
    let target = MemoryDisk::new(8 << 40);
    target.write_at(&[1; 65536], 5 << 40, WriteFlags::NONE).unwrap();
    let existing = |options: &MirrorOptions| plan(&source(), PlanTarget::Existing(&target), options).unwrap();
    let asked = existing(&MirrorOptions::new().granularity(512));
    assert_eq!((asked.copy, asked.zero, asked.copy_runs), (3 * 65536, 65536, 3));
    assert_eq!(asked.copy + asked.zero + asked.skip, asked.len);
    let promised = existing(&MirrorOptions::new().target_is_zero(true));
    assert_eq!(promised.zero, 0);
}

#[test]
fn top_skips_what_lies_below() {
    let overlay = MemoryDisk::new(8 << 40).with_backing(Arc::new(source()));
    overlay.write_at(&[1; 512], 7 << 40, WriteFlags::NONE).unwrap();
    let options = MirrorOptions::new().sync(SyncMode::Top);
    let plan = plan(&overlay, PlanTarget::New { cluster_size: None, backing: None }, &options).unwrap();
    assert_eq!((plan.copy, plan.zero, plan.copy_runs), (512, 0, 1));
}

#[test]
fn what_a_job_would_refuse_is_refused() {
    let refuse = |target: &MemoryDisk, options: MirrorOptions| {
        plan(&source(), PlanTarget::Existing(target), &options).unwrap_err().to_string()
    };
    let small = MemoryDisk::new(512).named("small");
    assert_eq!(
        refuse(&small, MirrorOptions::new()),
        "source memory disk has 8796093022208 bytes, target small has 512: they must be equal"
    );
    assert_eq!(
        refuse(&small, MirrorOptions::new().granularity(511)),
        "granularity 511: must be between 512 and 67108864 (64 MiB)"
    );
}

#[cfg(feature = "serde")]
#[test]
fn json_carries_the_granularity_as_a_number_and_why() {
    let plan =
        plan(&source(), PlanTarget::New { cluster_size: Some(512), backing: None }, &MirrorOptions::new())
            .unwrap();
    assert_snapshot!(serde_json::to_string(&plan).unwrap(), @r#"{"sync":"full","granularity":4096,"granularity-reason":{"kind":"target-cluster","cluster-size":512,"clamped":true},"len":8796093022208,"copy":196608,"zero":0,"skip":8796092825600,"copy-runs":3}"#);
}

/// A disk that ends nowhere, of one sector after the other: a few megabytes of tables that all entries of the
/// table above share describe one.
#[derive(Debug, Default)]
struct Endless {
    queries: AtomicU64,
}

/// More extents than one query of a plan may visit.
const TOO_MANY: u64 = 10 * crate::scan::MAX_EXTENTS as u64;

impl BlockDevice for Endless {
    fn name(&self) -> &str {
        "endless"
    }

    fn len(&self) -> u64 {
        1 << 60
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> block::Result<()> {
        self.queries.fetch_add(1, Ordering::Relaxed);
        for (sector, visited) in range.pieces(512).zip(0..) {
            assert!(visited < TOO_MANY, "one query goes on for ever");
            if visit(Extent::new(sector, ExtentKind::Data)).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> block::Result<()> {
        unreachable!("a plan reads no data")
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> block::Result<()> {
        unreachable!("a plan writes nothing")
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> block::Result<()> {
        unreachable!("a plan writes nothing")
    }

    fn discard(&self, _: ByteRange) -> block::Result<()> {
        unreachable!("a plan writes nothing")
    }

    fn flush(&self) -> block::Result<()> {
        unreachable!("a plan writes nothing")
    }
}

/// A plan of such a disk, or of an empty one over it, could not be stopped: the first query already went on
/// for hours.
#[test]
fn a_plan_stops_between_bounded_queries() {
    let endless = Endless::default();
    let empty = MemoryDisk::new(endless.len());
    let new = PlanTarget::New { cluster_size: None, backing: None };
    let plans: [(&dyn BlockDevice, _); 2] = [(&endless, new), (&empty, PlanTarget::Existing(&endless))];
    for (source, target) in plans {
        let mut ends = Vec::new();
        let stopped = plan_until(source, target, &MirrorOptions::new(), &mut |known| {
            ends.push(known);
            if ends.len() == 3 { Visit::Break(()) } else { Visit::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
        let query = crate::scan::MAX_EXTENTS as u64 * 512;
        assert_eq!(ends, [query, 2 * query, 3 * query]);
    }
    assert_eq!(endless.queries.load(Ordering::Relaxed), 6);
}

/// Three runs of 64 KiB in 8 TiB: what counts in coarser units takes more, and the job does not.
#[test]
fn a_coarse_granularity_costs_a_mirror_that_copies_whole_granules() {
    let target = PlanTarget::New { cluster_size: Some(65536), backing: None };
    let plan = plan(&source(), target, &MirrorOptions::new()).unwrap();
    assert_eq!(plan.allocation(), 3 * 65536);
    let costs: Vec<_> = plan.costs().collect();
    assert_eq!((costs[0].granularity, costs.last().unwrap().granularity), (512, 64 << 20));
    let chosen: Vec<_> = costs.iter().filter(|cost| cost.chosen).collect();
    assert_eq!((chosen.len(), chosen[0].granularity), (1, 65536));
    // Memory makes the units of 8 TiB coarse.
    assert!(costs.iter().all(|cost| (cost.unit, cost.write) == (32 << 10, 32 << 10)), "{costs:?}");
    assert!(costs.iter().all(|cost| cost.memory < 120 << 20), "{costs:?}");
    let megabyte = costs.iter().find(|cost| cost.granularity == 1 << 20).unwrap();
    assert_eq!((megabyte.whole_write, megabyte.whole_allocation), (1 << 20, 3 << 20));
    assert_eq!(costs[0].whole_allocation, 3 * 65536, "clusters are allocated whole");
}
