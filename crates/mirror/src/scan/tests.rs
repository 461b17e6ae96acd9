//! Scans of memory disks.

use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{ErrorKind, ExtentKind, Geometry, Result, WriteFlags, ZeroFlags};

use super::*;
use crate::SyncMode;

const K: u64 = 1024;

fn rules(sync: SyncMode) -> Rules {
    let top_layers = (sync == SyncMode::Top).then_some(1);
    Rules { top_layers, seek_zeros: true, allocate: false, target: TargetContent::Asked }
}

fn filled(len: u64, data: &[(u64, u64)]) -> MemoryDisk {
    let disk = MemoryDisk::new(len);
    fill(&disk, data);
    disk
}

fn fill(disk: &MemoryDisk, data: &[(u64, u64)]) {
    for &(start, end) in data {
        disk.write_at(&vec![7; (end - start) as usize], start, WriteFlags::NONE).unwrap();
    }
}

fn show(extents: &[CopyExtent]) -> Vec<String> {
    let name = |s: &CopyExtent| match s.action {
        _ if s.below => "below",
        CopyAction::Copy { target_zero: true } => "copy-on-zero",
        CopyAction::Copy { target_zero: false } => "copy",
        CopyAction::Clone { target_zero: true } => "clone-on-zero",
        CopyAction::Clone { target_zero: false } => "clone",
        CopyAction::Zero => "zero",
        CopyAction::Skip => "nothing",
    };
    extents.iter().map(|s| format!("{} {}", s.range, name(s))).collect()
}

fn whole(source: &dyn BlockDevice, target: &dyn BlockDevice, rules: Rules) -> Vec<String> {
    show(&scan(source, Some(target), ByteRange::new(0, source.len()), rules).unwrap())
}

#[test]
fn zeros_are_written_only_where_the_target_does_not_read_as_zero() {
    let source = filled(16 * K, &[(4 * K, 8 * K)]);
    let target = filled(16 * K, &[(0, 2 * K), (6 * K, 10 * K)]);
    assert_eq!(
        whole(&source, &target, rules(SyncMode::Full)),
        [
            "0..2048 zero",
            "2048..4096 nothing",
            "4096..6144 copy-on-zero",
            "6144..8192 copy",
            "8192..10240 zero",
            "10240..16384 nothing"
        ]
    );
}

#[test]
fn a_target_that_is_promised_to_be_zero_is_not_asked() {
    let source = filled(8 * K, &[(0, 4 * K)]);
    let target = filled(8 * K, &[(0, 8 * K)]).logged();
    let mut rules = rules(SyncMode::Full);
    rules.target = TargetContent::Zero;
    assert_eq!(whole(&source, &target, rules), ["0..4096 copy-on-zero", "4096..8192 nothing"]);
    assert_eq!(target.take_log(), []);
}

#[test]
fn a_target_is_not_asked_where_the_answer_does_not_matter() {
    let source = filled(8 * K, &[(0, 8 * K)]);
    let target = MemoryDisk::new(8 * K).logged();
    let mut rules = rules(SyncMode::Full);
    rules.seek_zeros = false;
    assert_eq!(whole(&source, &target, rules), ["0..8192 copy"]);
    assert_eq!(target.take_log(), []);
}

#[test]
fn what_can_be_shared_is_cloned_and_its_edges_are_copied() {
    let source = filled(32 * K, &[(K, 18 * K), (20 * K, 32 * K)]);
    let target = filled(32 * K, &[(8 * K, 10 * K)]);
    let shared = |extent: &Extent| {
        let part = extent.range.align_inward(4 * K).intersect(ByteRange::new(0, 28 * K));
        (!part.is_empty()).then_some(part)
    };
    let all = ByteRange::new(0, 32 * K);
    let found = scan_sharing(&source, Some(&target), all, rules(SyncMode::Full), &shared).unwrap();
    assert_eq!(
        show(&found),
        [
            "0..1024 nothing",
            "1024..4096 copy-on-zero",
            "4096..16384 clone",
            "16384..18432 copy-on-zero",
            "18432..20480 nothing",
            "20480..28672 clone",
            "28672..32768 copy-on-zero"
        ]
    );
}

#[test]
fn top_leaves_alone_what_lies_below_and_copies_the_tops_own_zeros() {
    let base: Arc<dyn BlockDevice> = Arc::new(filled(16 * K, &[(0, 16 * K)]));
    let source = MemoryDisk::new(16 * K).with_backing(Arc::clone(&base));
    fill(&source, &[(4 * K, 8 * K)]);
    source.write_zeroes(ByteRange::new(12 * K, 14 * K), ZeroFlags::NONE).unwrap();
    let target = MemoryDisk::new(16 * K).with_backing(base);
    assert_eq!(
        whole(&source, &target, rules(SyncMode::Top)),
        ["0..4096 below", "4096..8192 copy", "8192..12288 below", "12288..14336 zero", "14336..16384 below"]
    );
    assert_eq!(
        whole(&source, &target, rules(SyncMode::Full)),
        ["0..12288 copy", "12288..14336 zero", "14336..16384 copy"]
    );
}

#[test]
fn top_without_a_backing_file_is_full() {
    let source = filled(8 * K, &[(0, 4 * K)]);
    let target = filled(8 * K, &[(0, 8 * K)]);
    assert_eq!(whole(&source, &target, rules(SyncMode::Top)), ["0..4096 copy", "4096..8192 zero"]);
}

#[test]
fn several_layers_may_count_as_top() {
    let base: Arc<dyn BlockDevice> = Arc::new(filled(8 * K, &[(0, 8 * K)]));
    let middle = MemoryDisk::new(8 * K).with_backing(base);
    fill(&middle, &[(2 * K, 4 * K)]);
    let source = MemoryDisk::new(8 * K).with_backing(Arc::new(middle));
    fill(&source, &[(5 * K, 6 * K)]);
    let mut two = rules(SyncMode::Top);
    two.top_layers = Some(2);
    let target = filled(8 * K, &[(0, 8 * K)]);
    assert_eq!(
        whole(&source, &target, two),
        ["0..2048 below", "2048..4096 copy", "4096..5120 below", "5120..6144 copy", "6144..8192 below"]
    );
}

#[test]
fn one_scan_is_one_query_to_each_side_and_capped() {
    let runs: Vec<_> = (0..5000).map(|i| (i * 2 * K, i * 2 * K + K)).collect();
    let watched = |disk| {
        let faults = Faults::new();
        (FaultDisk::new(Arc::new(disk), faults.clone()), faults)
    };
    let (source, asked_source) = watched(filled(10_000 * K, &runs));
    let (target, asked_target) = watched(MemoryDisk::new(10_000 * K));
    let range = ByteRange::new(0, source.len());
    let extents = scan(&source, Some(&target), range, rules(SyncMode::Full)).unwrap();
    assert_eq!(extents.len(), MAX_SOURCE_RUNS);
    assert_eq!((asked_source.seen(OpKind::Extents), asked_target.seen(OpKind::Extents)), (1, 1));

    // A target in splinters cuts one long run; then its extents are what is capped.
    let source = MemoryDisk::new(10_000 * K);
    let target = filled(10_000 * K, &runs);
    let extents = scan(&source, Some(&target), range, rules(SyncMode::Full)).unwrap();
    assert!((MAX_COPY_EXTENTS..MAX_COPY_EXTENTS + 2).contains(&extents.len()), "{}", extents.len());
}

#[test]
fn scans_in_a_row_cover_the_disk_without_gaps() {
    let runs: Vec<_> = (0..5000).map(|i| (i * 3 * K, i * 3 * K + K)).collect();
    let source = filled(15_000 * K, &runs);
    let target = filled(15_000 * K, &[(0, 9_000 * K)]);
    let (mut at, mut copied, mut rounds) = (0, 0, 0);
    while at < source.len() {
        let range = ByteRange::new(at, source.len());
        for s in scan(&source, Some(&target), range, rules(SyncMode::Full)).unwrap() {
            assert_eq!(s.range.start(), at);
            at = s.range.end();
            copied += if matches!(s.action, CopyAction::Copy { .. }) { s.range.len() } else { 0 };
        }
        rounds += 1;
    }
    assert_eq!(copied, 5000 * K);
    assert!(rounds > 5);
}

#[test]
fn a_target_that_cannot_tell_may_hold_anything_and_a_failing_one_fails_as_target() {
    let source = filled(8 * K, &[(0, 4 * K)]);
    let faults = Faults::new();
    let target = FaultDisk::new(Arc::new(MemoryDisk::new(8 * K)), faults.clone());
    faults.inject(Fault::on(OpKind::Extents).with(ErrorKind::Unsupported));
    assert_eq!(whole(&source, &target, rules(SyncMode::Full)), ["0..4096 copy", "4096..8192 zero"]);

    faults.inject(Fault::on(OpKind::Extents));
    let range = ByteRange::new(0, 8 * K);
    let failure = scan(&source, Some(&target), range, rules(SyncMode::Full)).unwrap_err();
    assert_eq!(failure.operation, Operation::Write);
}

/// Answers extent queries with whatever it is given, against the contract.
#[derive(Debug)]
struct Liar(Vec<(u64, u64, ExtentKind)>);

/// Hands out one run in pieces, as a device that has to look at much does.
#[derive(Debug)]
struct Slow(ExtentKind);

impl BlockDevice for Slow {
    fn len(&self) -> u64 {
        1 << 40
    }
    fn name(&self) -> &str {
        "slow"
    }
    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        Ok(())
    }
    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        for piece in range.pieces(1 << 20) {
            let mut extent = Extent::new(piece, self.0);
            extent.partial = piece.end() < range.end();
            if visit(extent).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// One run of a terabyte was looked at to its end, however long that took.
#[test]
fn a_scan_ends_when_its_budget_is_spent_on_either_side() {
    use ExtentKind::{Data, Zero};
    let disk = MemoryDisk::new(1 << 40);
    for (source, target) in [
        (&Slow(Zero) as &dyn BlockDevice, &disk as &dyn BlockDevice),
        (&disk, &Slow(Zero)),
        (&disk, &Slow(Data)),
    ] {
        let extents = scan(source, Some(target), ByteRange::new(0, 1 << 40), rules(SyncMode::Full)).unwrap();
        let end = extents.last().unwrap().range.end();
        assert!(extents[0].range.start() == 0 && (1 << 20..=64 << 20).contains(&end), "{extents:?}");
    }
}

impl BlockDevice for Liar {
    fn len(&self) -> u64 {
        8 * K
    }
    fn name(&self) -> &str {
        "liar"
    }
    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        Ok(())
    }
    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn extents(&self, _: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        for &(start, end, kind) in &self.0 {
            if visit(Extent::new(ByteRange::new(start, end), kind)).is_break() {
                break;
            }
        }
        Ok(())
    }
}

#[test]
fn gaps_overlaps_and_strays_in_an_answer_lose_nothing() {
    use ExtentKind::{Data, Zero};
    let target = MemoryDisk::new(8 * K);
    for (answer, expected) in [
        (vec![], "0..8192 copy-on-zero"),
        (vec![(0, 100, Zero), (50, 8192, Data)], "0..100 nothing, 100..8192 copy-on-zero"),
        (vec![(4096, 8192, Zero)], "0..4096 copy-on-zero, 4096..8192 nothing"),
        (vec![(0, 4096, Zero)], "0..4096 nothing, 4096..8192 copy-on-zero"),
        (vec![(0, 1 << 40, Zero), (9000, 9100, Data)], "0..8192 nothing"),
        (vec![(9000, 9100, Zero), (5, 5, Zero)], "0..8192 copy-on-zero"),
        (vec![(4096, 8192, Zero), (0, 4096, Zero)], "0..4096 copy-on-zero, 4096..8192 nothing"),
    ] {
        let liar = Liar(answer.clone());
        assert_eq!(whole(&liar, &target, rules(SyncMode::Full)).join(", "), expected, "{answer:?}");
    }
    // As a target: zeros only where it said so, in order.
    let source = filled(8 * K, &[(0, 8 * K)]);
    let liar = Liar(vec![(4096, 6000, Zero), (0, 4096, Zero), (6000, 1 << 40, Data)]);
    assert_eq!(
        whole(&source, &liar, rules(SyncMode::Full)),
        ["0..4096 copy", "4096..6000 copy-on-zero", "6000..8192 copy"]
    );
}
