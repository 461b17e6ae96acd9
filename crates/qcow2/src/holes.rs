//! Holes of the data storage below mapped clusters.
//!
//! A cluster may be mapped although its storage holds nothing there: the image was preallocated, or its file
//! was made sparse. Used by [`crate::extents`] for one batch of runs at a time. Must hold: the storage is
//! asked in a few passes over the host space, not once for each cluster, and what it does not say anything
//! about is not a hole.

use blockmirror_block::{ByteRange, ErrorKind, RangeMap, Result, Storage, Visit};

use crate::context::ImageContext;
use crate::known_data::KnownData;

/// How far past what is wanted now the storage is asked, so that batches that follow need not ask.
const AHEAD: u64 = 1 << 30;
/// How far before what is wanted the storage is asked, as a multiple of the known data, where that lies
/// behind it: a guest that reads in another order than it has written asks for clusters further down next.
const BEHIND: u64 = 4;
/// After so many runs in a row between two ranges that matter, the storage is asked anew from the second one
/// on.
const MOST_BETWEEN: u32 = 4;

/// Host ranges that are holes.
#[derive(Debug, Default)]
pub(crate) struct Holes {
    ranges: RangeMap<()>,
}

impl Holes {
    /// Asks `storage` about `wanted`.
    pub(crate) fn find(storage: &dyn Storage, mut wanted: Vec<ByteRange>, known: &KnownData) -> Result<Self> {
        wanted.retain(|range| !known.holds(*range));
        wanted.sort_unstable_by_key(|range| range.start());
        let mut holes = Self::default();
        let last = wanted.iter().map(|range| range.end()).max().unwrap_or_default();
        let mut rest = &wanted[..];
        let mut behind = wanted.first().map_or(0, |first| known.len_behind(first.start()));
        while let Some(first) = rest.first() {
            // Not to the start of the file, where metadata lies between holes.
            let behind = std::mem::take(&mut behind).saturating_mul(BEHIND).min(first.start() / 2);
            let start = first.start() - behind;
            let end = last.max(first.start().saturating_add(AHEAD));
            let left = holes.ask(storage, ByteRange::new(start, end), rest, known);
            match left {
                Ok(left) => rest = left,
                // A storage that cannot tell holds data.
                Err(error) if error.kind() == ErrorKind::Unsupported => break,
                Err(error) => return Err(error),
            }
        }
        Ok(holes)
    }

    /// Asks about `range`, which begins where the first of `wanted` does, or before it; returns those that
    /// were not answered.
    fn ask<'a>(
        &mut self,
        storage: &dyn Storage,
        range: ByteRange,
        wanted: &'a [ByteRange],
        known: &KnownData,
    ) -> Result<&'a [ByteRange]> {
        let mut left = wanted;
        let mut between = 0;
        let mut last_data = ByteRange::default();
        storage.extents(range, &mut |run| {
            let found = run.range.intersect(range);
            let met = left.first().is_some_and(|want| want.start() < found.end());
            if run.hole && met {
                self.ranges.set(found, Some(()));
            } else if !run.hole {
                last_data = found;
            }
            while let [first, rest @ ..] = left
                && first.end() <= found.end()
            {
                left = rest;
            }
            between = if met { 0 } else { between + 1 };
            if left.is_empty() || between > MOST_BETWEEN { Visit::Break(()) } else { Visit::Continue(()) }
        })?;
        if !last_data.is_empty() {
            known.set(last_data);
        }
        // Unless it was stopped, what was not answered lies past the end of the storage.
        Ok(if between > MOST_BETWEEN { left } else { &[] })
    }

    /// `range` in pieces, each with whether it is a hole.
    pub(crate) fn split(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, bool)> {
        self.ranges.pieces(range).map(|(piece, hole)| (piece, hole.is_some()))
    }
}

/// The run of the image file that was last asked for, for tables that are walked in order. Kept under one
/// hold of the metadata lock only: a hole may be written.
#[derive(Debug, Default)]
pub(crate) struct HoleCursor {
    last: ByteRange,
    hole: bool,
    /// How often the storage was asked.
    pub(crate) looks: u64,
}

impl HoleCursor {
    /// Whether all of `range` is a hole of the file.
    pub(crate) fn is_hole(&mut self, ctx: &ImageContext, range: ByteRange) -> bool {
        let holds = |last: ByteRange| last.start() <= range.start() && range.end() <= last.end();
        if !holds(self.last) {
            self.looks += 1;
            // What the storage cannot tell is read.
            (self.last, self.hole) = (range, false);
            let rest = ByteRange::new(range.start(), range.end().saturating_add(AHEAD));
            let _ = ctx.storage.extents(rest, &mut |run| {
                (self.last, self.hole) = (run.range, run.hole);
                Visit::Break(())
            });
        }
        self.hole && holds(self.last)
    }

    /// Where the run ends.
    pub(crate) fn end(&self) -> u64 {
        self.last.end()
    }
}

#[cfg(test)]
mod tests;
