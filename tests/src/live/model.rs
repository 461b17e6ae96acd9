//! What a writer knows of its part of the disk, and its last operations. Filled by the writers, read where
//! disks are compared with it.

use std::collections::VecDeque;

use blockmirror_block::ByteRange;

use super::layout::Layout;

/// Operations that can be taken back at any time.
const ALWAYS_KEPT: usize = 64;
/// What a writer knows of its part of the disk.
#[derive(Debug)]
pub(super) struct Model {
    /// The two marks, then the rest.
    pub(super) stripes: Vec<Stripe>,
    /// Its last operation.
    pub(super) n: u64,
    /// Its last operations, oldest first.
    pub(super) undo: VecDeque<Done>,
    pub(super) kept: usize,
}

#[derive(Debug)]
pub(super) struct Stripe {
    pub(super) range: ByteRange,
    pub(super) bytes: Vec<u8>,
}

/// An operation, and what was there before; `None` if that is noted elsewhere.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) n: u64,
    pub(super) begin: u64,
    pub(super) end: u64,
    pub(super) change: Option<(ByteRange, Vec<u8>)>,
}

impl Model {
    pub(super) fn new(writer: usize, layout: &Layout, disk: &[u8]) -> Self {
        let marks = [layout.mark(writer, false), layout.mark(writer, true)];
        let stripe = |range: ByteRange| {
            let bytes = disk[range.start() as usize..range.end() as usize].to_vec();
            Stripe { range, bytes }
        };
        let stripes = marks.into_iter().chain(layout.stripes(writer)).map(stripe).collect();
        Self { stripes, n: 0, undo: VecDeque::new(), kept: 0 }
    }

    /// Writes what the writer knows over `disk`.
    pub(super) fn lay_over(&self, disk: &mut [u8]) {
        for stripe in &self.stripes {
            disk[stripe.range.start() as usize..stripe.range.end() as usize].copy_from_slice(&stripe.bytes);
        }
    }

    /// Nothing of what was done has to be taken back any more.
    pub(super) fn forget(&mut self) {
        self.undo.clear();
        self.kept = 0;
    }

    pub(super) fn push(&mut self, done: Done, keep_all: bool) {
        let size = |done: &Done| done.change.as_ref().map_or(0, |(_, old)| old.len());
        self.kept += size(&done);
        self.undo.push_back(done);
        while !keep_all && self.undo.len() > ALWAYS_KEPT {
            self.kept -= self.undo.pop_front().as_ref().map_or(0, size);
        }
    }
}
