//! Which units of a disk a format has an answer for: the allocation map of `memory_disk`.

use crate::{ByteRange, ExtentKind, RangeMap};

/// Runs of [`ExtentKind::Data`] and [`ExtentKind::Zero`]; what has no value is unallocated.
#[derive(Clone, Debug, Default)]
pub(crate) struct AllocationMap(RangeMap<ExtentKind>);

impl AllocationMap {
    /// Says that `range` is of `kind` from now on.
    pub(crate) fn set(&mut self, range: ByteRange, kind: ExtentKind) {
        self.0.set(range, Some(kind).filter(|kind| *kind != ExtentKind::Unallocated));
    }

    /// The maximal runs of `range`, in order, without gaps.
    pub(crate) fn runs(&self, range: ByteRange) -> Vec<(ByteRange, ExtentKind)> {
        self.0.pieces(range).map(|(piece, kind)| (piece, kind.unwrap_or(ExtentKind::Unallocated))).collect()
    }
}
