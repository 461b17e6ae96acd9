//! The mode `full`: source and target are read again, side by side.

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{BlockDevice, ByteRange, Error, QueryBudget, Visit};
use blockmirror_image::{self as image, differences};

use super::{Copied, Verification, stopped};

/// Extents of the source that are looked at together.
const BATCH: usize = 4096;

/// Adds to `unequal` where `target` differs from the source of `copied` in what the job has copied; the bytes
/// that were compared. What was added before an error stays.
pub(super) fn compare(
    copied: &Copied<'_>,
    target: &dyn BlockDevice,
    verification: &Verification,
    unequal: &mut DirtyBitmap,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> Result<u64, image::Error> {
    let source = copied.source;
    let mut bytes = 0;
    let lost: Vec<_> = copied.outcome.given_up.iter().map(|given_up| given_up.range).collect();
    let whole = ByteRange::new(0, source.len());
    let wanted: Box<dyn Iterator<Item = ByteRange>> = match &verification.only {
        Some(only) => Box::new(only.runs().map(|run| ByteRange::new(run.start, run.end))),
        None => Box::new(std::iter::once(whole)),
    };
    for part in wanted.flat_map(|range| parts(range, &lost)) {
        let mut at = part.start();
        while at < part.end() {
            let (ranges, end) = copied_ranges(source, ByteRange::new(at, part.end()), verification.layers)?;
            for range in ranges {
                let found = &mut |range: ByteRange| {
                    unequal.set(range.start()..range.end());
                };
                if !differences(source, target, range, progress, found)? {
                    return Err(stopped());
                }
                bytes += range.len();
            }
            at = end;
        }
    }
    Ok(bytes)
}

/// `range` without what was given up.
fn parts(whole: ByteRange, lost: &[ByteRange]) -> Vec<ByteRange> {
    let (mut parts, mut at) = (Vec::new(), whole.start());
    // In order of offset, without overlaps: those before and after it are not looked at.
    let first = lost.partition_point(|lost| lost.end() <= whole.start());
    for range in lost[first..].iter().take_while(|lost| lost.start() < whole.end()) {
        parts.push(ByteRange::new(at, range.start().max(at)));
        at = range.end();
    }
    parts.push(ByteRange::new(at, whole.end().max(at)));
    parts.retain(|part| !part.is_empty());
    parts
}

/// The parts of a prefix of `range` that the job had to copy, and where that ends.
pub(in crate::convert) fn copied_ranges(
    source: &dyn BlockDevice,
    range: ByteRange,
    layers: Option<u32>,
) -> Result<(Vec<ByteRange>, u64), Error> {
    let Some(layers) = layers else { return Ok((vec![range], range.end())) };
    let (mut ranges, mut end) = (Vec::new(), range.start());
    let (mut budget, mut seen) = (QueryBudget::new(), 0);
    source.extents(range, &mut |extent| {
        if extent.depth < layers {
            ranges.push(extent.range);
        }
        end = extent.range.end();
        seen += 1;
        let spent = budget.spend(&extent);
        if seen < BATCH { spent } else { Visit::Break(()) }
    })?;
    // A device that reports nothing has broken its contract: then all of it counts.
    if end == range.start() { Ok((vec![range], range.end())) } else { Ok((ranges, end)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_left_out() {
        let range = ByteRange::new;
        let lost = [range(0, 10), range(40, 50), range(90, 100)];
        assert_eq!(parts(range(0, 100), &[]), [range(0, 100)]);
        assert_eq!(parts(range(0, 100), &lost), [range(10, 40), range(50, 90)]);
        assert_eq!(parts(range(45, 95), &lost), [range(50, 90)]);
        assert_eq!(parts(range(10, 40), &lost), [range(10, 40)]);
        assert!(parts(range(92, 95), &lost).is_empty());
        assert!(parts(range(0, 0), &lost).is_empty());
    }
}
