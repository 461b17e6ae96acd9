//! Rounded extents beside a naive count of each unit.

use blockmirror_block::Error;
use proptest::prelude::*;

use super::*;
use crate::NullDisk;

/// A disk whose extents are given.
#[derive(Debug)]
struct Given(Vec<Extent>);

impl BlockDevice for Given {
    fn len(&self) -> u64 {
        self.0.last().map_or(0, |extent| extent.range.end())
    }

    fn name(&self) -> &str {
        "given"
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
        for extent in self.0.iter().filter_map(|extent| extent.clip(range)) {
            if visit(extent).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// Those of `range` as (start, end, kind, depth), neighbours with the same answer merged.
fn answers(disk: &dyn BlockDevice, range: ByteRange) -> Vec<(u64, u64, ExtentKind, u32)> {
    let mut out: Vec<(u64, u64, ExtentKind, u32)> = Vec::new();
    disk.extents(range, &mut |extent| {
        let (start, end) = (extent.range.start(), extent.range.end());
        match out.last_mut() {
            Some(last) if (last.2, last.3) == (extent.kind, extent.depth) && last.1 == start => last.1 = end,
            _ => out.push((start, end, extent.kind, extent.depth)),
        }
        Visit::Continue(())
    })
    .unwrap();
    out
}

fn disk(pieces: &[(u64, ExtentKind, u32, bool)]) -> Arc<Given> {
    let mut at = 0;
    let extents = pieces.iter().map(|&(len, kind, depth, partial)| {
        let mut extent = Extent::new(ByteRange::at(at, len), kind).at_depth(depth);
        extent.partial = partial;
        at += len;
        extent
    });
    Arc::new(Given(extents.collect()))
}

#[test]
fn a_unit_with_data_is_data_at_its_topmost_depth() {
    use ExtentKind::{Data, Unallocated, Zero};
    let disk = disk(&[
        (4, Zero, 0, false),
        (2, Data, 1, false),
        (10, Unallocated, 2, false),
        (5, Zero, 1, false),
        (3, Unallocated, 2, false),
        (3, Data, 0, false),
    ]);
    let units = WholeUnits::new(disk, 8);
    let all = answers(&units, ByteRange::new(0, 27));
    assert_eq!(all, [(0, 8, Data, 0), (8, 16, Unallocated, 2), (16, 24, Zero, 1), (24, 27, Data, 0)]);
    assert_eq!(
        answers(&units, ByteRange::new(5, 18)),
        [(5, 8, Data, 0), (8, 16, Unallocated, 2), (16, 18, Zero, 1)]
    );
}

#[test]
fn a_query_past_the_end_is_refused_by_the_disk() {
    let units = WholeUnits::new(Arc::new(NullDisk::new(4096)), 1024);
    let refused: Result<(), Error> = units.extents(ByteRange::new(0, 4097), &mut |_| Visit::Continue(()));
    refused.unwrap_err();
}

proptest! {
    #[test]
    fn each_unit_answers_for_all_of_it(
        pieces in proptest::collection::vec((1u64..20, 0u8..4, 0u32..3, any::<bool>()), 1..30),
        shift in 0u32..5, from in 0u64..100, len in 1u64..200,
    ) {
        let kinds =
            [ExtentKind::Data, ExtentKind::Zero, ExtentKind::Unallocated, ExtentKind::Unknown];
        let pieces: Vec<_> = pieces
            .into_iter()
            .map(|(len, kind, depth, partial)| (len, kinds[usize::from(kind)], depth, partial))
            .collect();
        let disk = disk(&pieces);
        let end = disk.len();
        let unit = 1 << shift;
        let from = from.min(end - 1);
        let range = ByteRange::new(from, (from + len).min(end));
        let byte = |at: u64| {
            let extent = disk.0.iter().find(|e| e.range.end() > at).unwrap();
            Answer { kind: extent.kind, depth: extent.depth }
        };
        let naive = |at: u64| {
            let start = at / unit * unit;
            (start..(start + unit).min(end)).map(byte).reduce(Answer::with).unwrap()
        };
        let mut at = range.start();
        for (start, end, kind, depth) in answers(&WholeUnits::new(disk.clone(), unit), range) {
            prop_assert_eq!(start, at);
            for byte in start..end {
                prop_assert_eq!(Answer { kind, depth }, naive(byte), "at {}", byte);
            }
            at = end;
        }
        prop_assert_eq!(at, range.end());
    }
}
