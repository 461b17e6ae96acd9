//! Operations that were handed to workers and not reported.

use std::time::Duration;

use blockmirror_block::ByteRange;

use crate::machine::{Action, Work};

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct InFlight {
    pub(in crate::machine) id: u64,
    pub(in crate::machine) work: Work,
    /// How often its range has failed.
    pub(in crate::machine) tries: u32,
    pub(in crate::machine) begun: Duration,
}

impl InFlight {
    /// The bytes that are being moved or zeroed.
    fn moves(&self) -> ByteRange {
        match self.work {
            Work::Copy { range, .. } | Work::Clone { range, .. } | Work::Zero { range, .. } => range,
            Work::Scan { .. } | Work::Flush | Work::PeriodicFlush | Work::End(_) => ByteRange::default(),
        }
    }

    fn zeroes(&self) -> u64 {
        if let Work::Zero { range, .. } = self.work { range.len() } else { 0 }
    }

    fn buffer(&self) -> u64 {
        if let Work::Copy { range, .. } = self.work { range.len() } else { 0 }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(in crate::machine) struct Operations(Vec<InFlight>);

impl Operations {
    pub(super) fn begin(&mut self, action: Action, tries: u32, now: Duration) {
        self.0.push(InFlight { id: action.id, work: action.work, tries, begun: now });
    }

    pub(super) fn finish(&mut self, id: u64) -> Option<InFlight> {
        let index = self.0.iter().position(|op| op.id == id)?;
        Some(self.0.swap_remove(index))
    }

    pub(in crate::machine) fn iter(&self) -> impl Iterator<Item = &InFlight> {
        self.0.iter()
    }

    pub(in crate::machine) fn count(&self) -> usize {
        self.0.len()
    }

    pub(in crate::machine) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges that are being moved or zeroed.
    pub(super) fn moved(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.0.iter().map(InFlight::moves)
    }

    /// Whether an operation moves or zeroes bytes of `range`.
    pub(in crate::machine) fn moves(&self, range: ByteRange) -> bool {
        self.moved().any(|moved| moved.overlaps(range))
    }

    /// Bytes that are being moved or zeroed.
    pub(in crate::machine) fn bytes(&self) -> u64 {
        self.moved().map(|range| range.len()).sum()
    }

    /// Bytes that are being zeroed.
    pub(in crate::machine) fn zeroed_bytes(&self) -> u64 {
        self.0.iter().map(InFlight::zeroes).sum()
    }

    /// The length of a zeroing that overlaps `range`.
    pub(in crate::machine) fn zeroing_of(&self, range: ByteRange) -> Option<u64> {
        let op = self.0.iter().find(|op| op.zeroes() > 0 && op.moves().overlaps(range))?;
        Some(op.zeroes())
    }

    /// Bytes of buffer in use.
    pub(in crate::machine) fn buffered_bytes(&self) -> u64 {
        self.0.iter().map(InFlight::buffer).sum()
    }

    pub(super) fn scans(&self) -> usize {
        self.0.iter().filter(|op| matches!(op.work, Work::Scan { .. })).count()
    }

    /// Bytes of scans that belong to the first pass.
    pub(super) fn first_pass_bytes(&self) -> u64 {
        let bytes = |op: &InFlight| match op.work {
            Work::Scan { range, first_pass: true, .. } => range.len(),
            _ => 0,
        };
        self.0.iter().map(bytes).sum()
    }

    pub(super) fn any_of_first_pass(&self) -> bool {
        self.0.iter().any(|op| matches!(op.work, Work::Scan { first_pass: true, .. }))
    }

    /// Whether the last flush is in flight.
    pub(super) fn is_last_flush(&self) -> bool {
        self.0.iter().any(|op| op.work == Work::Flush)
    }

    /// Whether any flush is.
    pub(in crate::machine) fn is_flushing(&self) -> bool {
        self.0.iter().any(|op| op.work.is_flush())
    }

    /// Whether an operation keeps a device busy.
    pub(in crate::machine) fn moves_data(&self) -> bool {
        let moves = |work: Work| {
            work.is_flush() || matches!(work, Work::Copy { .. } | Work::Clone { .. } | Work::Zero { .. })
        };
        self.0.iter().any(|op| moves(op.work))
    }
}
