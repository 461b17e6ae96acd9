//! One of the two disks that are compared: its extents, fetched in batches, and a buffer.

use std::collections::VecDeque;

use blockmirror_block::{BlockDevice, ByteRange, Error, Extent, ExtentKind, QueryBudget, Visit};

/// Extents fetched at once: bounds memory however fragmented an image is.
const BATCH: usize = 4096;

/// What is known about a disk from some offset on.
#[derive(Clone, Copy)]
pub(super) struct Known {
    pub(super) end: u64,
    kind: ExtentKind,
}

impl Known {
    /// Whether it is known to be zero without being read.
    pub(super) fn is_zero(self) -> bool {
        self.kind != ExtentKind::Data
    }
}

/// A disk, followed by zeros, and what is known of it.
pub(super) struct Side<'a> {
    device: &'a dyn BlockDevice,
    /// How far anything is asked.
    end: u64,
    fetched: VecDeque<Extent>,
    buffer: Vec<u8>,
}

impl<'a> Side<'a> {
    /// For bytes below `end`.
    pub(super) fn new(device: &'a dyn BlockDevice, end: u64) -> Self {
        Self { device, end, fetched: VecDeque::new(), buffer: Vec::new() }
    }

    /// The extent that holds `at`. Offsets only grow from call to call.
    pub(super) fn extent_at(&mut self, at: u64) -> Result<Known, Error> {
        let end = self.device.len().min(self.end);
        if at >= end {
            return Ok(Known { end: self.end, kind: ExtentKind::Unallocated });
        }
        while self.fetched.front().is_some_and(|extent| extent.range.end() <= at) {
            self.fetched.pop_front();
        }
        if self.fetched.is_empty() {
            let fetched = &mut self.fetched;
            let mut budget = QueryBudget::new();
            self.device.extents(ByteRange::new(at, end), &mut |extent| {
                let spent = budget.spend(&extent);
                fetched.push_back(extent);
                if fetched.len() < BATCH { spent } else { Visit::Break(()) }
            })?;
        }
        // A device that reports nothing has broken its contract; reading tells the truth.
        let nothing = Known { end, kind: ExtentKind::Data };
        Ok(self
            .fetched
            .front()
            .map_or(nothing, |extent| Known { end: extent.range.end(), kind: extent.kind }))
    }

    /// Reads `piece`, which is short enough for a buffer and inside the disk.
    pub(super) fn read(&mut self, piece: ByteRange) -> Result<&[u8], Error> {
        self.buffer.resize(piece.len() as usize, 0);
        self.device.read_at(&mut self.buffer, piece.start())?;
        Ok(&self.buffer)
    }
}
