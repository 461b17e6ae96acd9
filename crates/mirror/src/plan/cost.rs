//! What each granularity costs: memory, bytes copied after a small write, space allocated in the target.
//!
//! Beside the figures of this job stand those of a mirror that copies whole granules. The job keeps what is
//! dirty in units of 4 KiB where the granularity is coarser, and its first pass follows the allocation of the
//! source, so that a coarse granularity does not cost it what it costs such a mirror.

use blockmirror_bitmap::worst_case_bytes;
use blockmirror_block::ByteRange;

use super::Plan;
use crate::granularity::{MAX_GRANULARITY, MIN_GRANULARITY};
use crate::machine::config::detail;
use crate::options::SyncMode;

/// The small write that costs are about: 4 KiB, aligned to its own length.
pub const SMALL_WRITE: u64 = 4096;

/// What a target without clusters allocates in: a block of most file systems.
const BLOCK: u64 = 4096;

/// Granularities that there are.
const ORDERS: usize = (MAX_GRANULARITY / MIN_GRANULARITY).ilog2() as usize + 1;

/// What a granularity costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub struct GranularityCost {
    /// Bytes for each bit, as they are asked for.
    pub granularity: u64,
    /// Bytes for each bit of the job's own bitmap.
    pub unit: u64,
    /// Memory of all bitmaps of the job, at most.
    pub memory: u64,
    /// Bytes that are copied after a write of [`SMALL_WRITE`] bytes.
    pub write: u64,
    /// The same of a mirror that copies whole granules.
    pub whole_write: u64,
    /// Bytes of the target's units that the first pass of such a mirror writes.
    pub whole_allocation: u64,
    /// Whether it is the granularity of the plan.
    pub chosen: bool,
}

impl Plan {
    /// Bytes that the data takes in the target: those of its clusters, or of blocks of 4 KiB, that what is
    /// copied touches. Clusters that the target has allocated already count, too.
    pub fn allocation(&self) -> u64 {
        self.touched.bytes(self.cluster_size.unwrap_or(BLOCK))
    }

    /// What each granularity costs, from the finest to the coarsest.
    pub fn costs(&self) -> impl Iterator<Item = GranularityCost> {
        // One more where layers below are left out.
        let bitmaps = if self.sync == SyncMode::Top { 4 } else { 3 };
        (0..ORDERS).map(move |order| {
            let granularity = MIN_GRANULARITY << order;
            let unit = detail(granularity, self.len);
            GranularityCost {
                granularity,
                unit,
                memory: worst_case_bytes(self.len, unit).saturating_mul(bitmaps),
                write: unit.max(SMALL_WRITE).min(self.len),
                whole_write: granularity.max(SMALL_WRITE).min(self.len),
                whole_allocation: self.touched.bytes(granularity.max(self.cluster_size.unwrap_or(BLOCK))),
                chosen: granularity == self.granularity.bytes,
            }
        })
    }
}

/// Bytes of the aligned units of each size that runs of data touch. Filled in order of offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TouchedUnits {
    /// Of each granularity: bytes, and where the last unit ends.
    orders: [(u64, u64); ORDERS],
}

impl TouchedUnits {
    /// Takes a run of data of a disk of `len` bytes, which ends the last unit early.
    pub(super) fn add(&mut self, run: ByteRange, len: u64) {
        if run.is_empty() {
            return;
        }
        for (order, (bytes, end)) in self.orders.iter_mut().enumerate() {
            let unit = MIN_GRANULARITY << order;
            let from = (run.start() / unit * unit).max(*end);
            let to = run.end().checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(len);
            *bytes += to.saturating_sub(from);
            *end = to.max(*end);
        }
    }

    /// For units of `unit` bytes, which are those of the nearest granularity.
    fn bytes(&self, unit: u64) -> u64 {
        let order = unit.clamp(MIN_GRANULARITY, MAX_GRANULARITY).ilog2() - MIN_GRANULARITY.ilog2();
        self.orders[order as usize].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_counted_once_and_end_with_the_disk() {
        let mut touched = TouchedUnits::default();
        let len = (1 << 20) + 1000;
        for (start, end) in [(0, 1), (512, 1024), (100_000, 100_001), (1 << 20, len)] {
            touched.add(ByteRange::new(start, end), len);
        }
        touched.add(ByteRange::new(len, len), len);
        assert_eq!(touched.bytes(512), 512 + 512 + 512 + 1000);
        assert_eq!(touched.bytes(4096), 4096 + 4096 + 1000);
        assert_eq!(touched.bytes(65536), 2 * 65536 + 1000);
        assert_eq!(touched.bytes(1 << 20), len);
        assert_eq!(touched.bytes(64 << 20), len);
        let mut last = TouchedUnits::default();
        last.add(ByteRange::new(u64::MAX - 1, u64::MAX), u64::MAX);
        assert_eq!(last.bytes(512), 511);
    }
}
