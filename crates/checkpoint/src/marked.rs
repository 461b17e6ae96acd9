//! The marked regions of a log, as runs of numbers and as bytes of the disk. Used by both kinds of logs.

use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::ByteRange;

use crate::header::Header;

/// The runs of marked regions, in order.
pub(crate) fn runs(regions: &ChunkBitmap) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let run = regions.next_run(at)?;
        at = run.end;
        Some(run)
    })
}

/// The bytes of the disk in marked regions, in order. The last region of a disk may be shorter.
pub(crate) fn bytes<'a>(
    header: &Header,
    regions: &'a ChunkBitmap,
) -> impl Iterator<Item = ByteRange> + use<'a> {
    let (region, len) = (header.region, header.len);
    runs(regions).map(move |run| ByteRange::new(run.start * region, run.end.saturating_mul(region).min(len)))
}
