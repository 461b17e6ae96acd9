//! What a clone of blocks between two files has to be aligned to.
//!
//! A device says it of itself and of a file ([`BlockDevice::clone_units`](crate::BlockDevice::clone_units));
//! a job asks it which part of an extent can be cloned.

use crate::{ByteRange, Extent, ExtentKind};

/// The units in which a device can share blocks with a file of the same file system. Both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloneUnits {
    /// Offset and length on the device are multiples of this: a cluster, or the file system's block.
    pub device: u64,
    /// Offset and length in the file are multiples of this: the file system's block.
    pub file: u64,
}

impl CloneUnits {
    /// The part of `extent` that can be cloned: whole units, of data that lies in its file as it is. Empty if
    /// there is none.
    pub fn part_of(self, extent: &Extent) -> ByteRange {
        let nothing = ByteRange::new(extent.range.start(), extent.range.start());
        let Some(host) = extent.host.as_ref().filter(|_| extent.kind == ExtentKind::Data) else {
            return nothing;
        };
        let part = extent.range.align_inward(self.device);
        let skipped = part.start() - extent.range.start();
        match host.offset.checked_add(skipped) {
            Some(at) if !extent.compressed && at.is_multiple_of(self.file) => part,
            _ => nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::HostRun;
    use crate::testing::MemoryStorage;

    fn part(range: (u64, u64), host: u64, units: (u64, u64)) -> Option<(u64, u64)> {
        let run = HostRun { storage: Arc::new(MemoryStorage::new()), offset: host };
        let extent = Extent::new(ByteRange::new(range.0, range.1), ExtentKind::Data).in_host(run);
        let part = CloneUnits { device: units.0, file: units.1 }.part_of(&extent);
        (!part.is_empty()).then_some((part.start(), part.end()))
    }

    #[test]
    fn whole_units_are_cloned_where_both_sides_are_aligned() {
        assert_eq!(part((0, 16384), 4096, (4096, 4096)), Some((0, 16384)));
        assert_eq!(part((512, 16384), 4608, (4096, 4096)), Some((4096, 16384)), "its start is cut");
        assert_eq!(part((0, 10_000), 4096, (4096, 4096)), Some((0, 8192)), "its tail is cut");
        assert_eq!(part((0, 16384), 512, (4096, 4096)), None, "the two never meet");
        assert_eq!(part((4096, 16384), 0, (8192, 4096)), Some((8192, 16384)));
        assert_eq!(part((0, 4095), 0, (4096, 4096)), None);
        assert_eq!(part((0, 8192), u64::MAX - 4095, (4096, 4096)), Some((0, 8192)));
    }

    #[test]
    fn what_is_not_stored_as_it_is_is_not_cloned() {
        let units = CloneUnits { device: 4096, file: 4096 };
        let run = || HostRun { storage: Arc::new(MemoryStorage::new()), offset: 0 };
        let range = ByteRange::new(0, 8192);
        let no_place = Extent::new(range, ExtentKind::Data);
        let compressed = Extent::new(range, ExtentKind::Data).in_host(run()).compressed();
        let zero = Extent::new(range, ExtentKind::Zero).in_host(run());
        for extent in [no_place, compressed, zero] {
            assert!(units.part_of(&extent).is_empty(), "{extent:?}");
        }
    }
}
