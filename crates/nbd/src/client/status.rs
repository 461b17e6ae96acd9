//! What a server says lies where, and what that means in extents.
//!
//! Read by the connection, one chunk per context; turned into extents by the client once the whole reply is
//! there.

use blockmirror_block::{ByteRange, Extent, ExtentKind};

use super::error::ClientError;
use super::handshake::{ALLOCATION_DEPTH, NegotiatedExport};
use super::link::{Incoming, stream_error};
use crate::proto::{BlockStatus, Descriptor, allocation};

/// Most descriptors of one context that are kept of a reply; the rest is asked for again.
const MAX_DESCRIPTORS: u64 = 64 << 10;

/// Longest payload of one context. QEMU sends at most 1 MiB, nbdkit 8 MiB.
const MAX_PAYLOAD: u64 = 64 << 20;

/// How flags are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// As the protocol's own context has them.
    Allocation,
    /// As they are, for a context that says something else.
    Flags,
    /// As a depth.
    Depth,
}

impl Reading {
    /// Of the context that takes the place of the protocol's own.
    pub(crate) fn of(context: Option<&str>) -> Self {
        match context {
            None => Self::Allocation,
            Some(ALLOCATION_DEPTH) => Self::Depth,
            Some(_) => Self::Flags,
        }
    }

    /// The extent of `range` with `flags`; at `depth`, if that is known.
    fn extent(self, range: ByteRange, flags: u64, depth: Option<u64>) -> Extent {
        let state = if self == Self::Depth { flags.min(2) } else { flags };
        let zero = state & allocation::ZERO != 0;
        match (self, depth) {
            (Self::Allocation, Some(0)) if zero => Extent::new(range, ExtentKind::Unallocated),
            (Self::Allocation, _) if zero => Extent::new(range, ExtentKind::Zero),
            (Self::Allocation, _) => Extent::new(range, ExtentKind::Data),
            _ if state & allocation::HOLE != 0 => Extent::new(range, ExtentKind::Unknown),
            _ if zero => Extent::new(range, ExtentKind::Data).in_hole(),
            _ => Extent::new(range, ExtentKind::Data),
        }
    }
}

/// The answer to one block status request.
#[derive(Debug, Default)]
pub(crate) struct Status {
    base: Vec<Descriptor>,
    depth: Vec<Descriptor>,
}

impl Status {
    /// Reads a chunk of `length` bytes.
    pub(crate) fn read(
        &mut self,
        incoming: &mut Incoming,
        extended: bool,
        length: u64,
        negotiated: &NegotiatedExport,
    ) -> Result<(), ClientError> {
        let (head, each) = if extended { (8, 16) } else { (4, 8) };
        let descriptors = match length.checked_sub(head) {
            Some(bytes) if length <= MAX_PAYLOAD && bytes > 0 && bytes.is_multiple_of(each) => bytes / each,
            _ => return Err(ClientError::Violation(format!("a block status chunk of {length} bytes"))),
        };
        let kept = descriptors.min(MAX_DESCRIPTORS);
        // At most a MiB and a few bytes.
        let mut payload = vec![0; (head + kept * each) as usize];
        incoming.read_exact(&mut payload).map_err(stream_error)?;
        incoming.skip((descriptors - kept) * each).map_err(stream_error)?;
        let status = if extended {
            // The decoder compares the count with what it gets.
            let count: &mut [u8] = &mut payload[4..8];
            if count != u32::try_from(descriptors).unwrap_or(u32::MAX).to_be_bytes() {
                return Err(ClientError::Violation("a block status chunk with another count".into()));
            }
            count.copy_from_slice(&u32::try_from(kept).unwrap_or(u32::MAX).to_be_bytes());
            BlockStatus::decode_extended(&payload)?
        } else {
            BlockStatus::decode_compact(&payload)?
        };
        let slot = match Some(status.id) {
            id if id == negotiated.base => &mut self.base,
            id if id == negotiated.depth => &mut self.depth,
            _ => return Err(ClientError::Violation(format!("status of context {}", status.id))),
        };
        if !slot.is_empty() {
            return Err(ClientError::Violation(format!("status of context {} twice", status.id)));
        }
        *slot = status.descriptors;
        Ok(())
    }

    /// Whether every context that was agreed on has answered.
    pub(crate) fn is_complete(&self, negotiated: &NegotiatedExport) -> bool {
        negotiated.base.is_some() != self.base.is_empty()
            && negotiated.depth.is_some() != self.depth.is_empty()
    }

    /// Hands on what it says about `range`, which it answers from the start; how far it reaches: to the end
    /// of `range`, or to a multiple of `unit` after its start.
    ///
    /// Servers should answer in whole blocks, and some (nbdkit with a block size policy) do not. Such an
    /// answer is cut to whole blocks, where the next request may begin. A first block that is answered only
    /// in part counts as data.
    pub(crate) fn extents(
        &self,
        range: ByteRange,
        unit: u64,
        reading: Reading,
        found: &mut dyn FnMut(Extent),
    ) -> u64 {
        let mut reach = reach(&self.base, range);
        if !self.depth.is_empty() {
            reach = reach.min(self::reach(&self.depth, range));
        }
        if reach < range.end() {
            reach -= reach % unit;
        }
        if reach <= range.start() {
            let first = ByteRange::at(range.start(), unit).intersect(range);
            found(Extent::new(first, ExtentKind::Data));
            return first.end();
        }
        let mut base = Runs::new(&self.base, range.start());
        let mut depth = Runs::new(&self.depth, range.start());
        let mut at = range.start();
        while at < reach {
            let Some((end, flags)) = base.at(at) else { break };
            let (end, depth) = match depth.at(at) {
                Some((depth_end, depth)) => (end.min(depth_end), Some(depth)),
                None => (end, None),
            };
            // Layer 1 of the server's is the export's own image.
            let layer = depth.map_or(0, |depth| u32::try_from(depth.saturating_sub(1)).unwrap_or(u32::MAX));
            let part = ByteRange::new(at, end.min(reach));
            found(reading.extent(part, flags, depth).at_depth(layer));
            at = end;
        }
        reach
    }
}

/// How far `descriptors` answer for `range`. The last may reach past what was asked for.
fn reach(descriptors: &[Descriptor], range: ByteRange) -> u64 {
    descriptors.iter().fold(range.start(), |at, d| at.saturating_add(d.length).min(range.end()))
}

/// Walks along the descriptors of one context.
struct Runs<'a> {
    descriptors: std::slice::Iter<'a, Descriptor>,
    /// Where the present descriptor ends, and what it says.
    end: u64,
    flags: u64,
}

impl<'a> Runs<'a> {
    fn new(descriptors: &'a [Descriptor], start: u64) -> Self {
        Self { descriptors: descriptors.iter(), end: start, flags: 0 }
    }

    /// What lies at `at`, and where that ends; `None` where it says no more.
    fn at(&mut self, at: u64) -> Option<(u64, u64)> {
        while self.end <= at {
            let next = self.descriptors.next()?;
            self.end = self.end.saturating_add(next.length);
            self.flags = next.flags;
        }
        Some((self.end, self.flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(lengths: &[(u64, u64)]) -> Vec<Descriptor> {
        lengths.iter().map(|&(length, flags)| Descriptor { length, flags }).collect()
    }

    type Found = Vec<(u64, ExtentKind, u32)>;

    fn extents(status: &Status, range: ByteRange) -> (u64, Found) {
        let (mut found, mut at) = (Vec::new(), range.start());
        let end = status.extents(range, 512, Reading::Allocation, &mut |extent| {
            assert_eq!(extent.range.start(), at);
            at = extent.range.end();
            found.push((extent.range.len(), extent.kind, extent.depth));
        });
        assert_eq!(end, at);
        (end, found)
    }

    #[test]
    fn what_reads_as_zero_is_zero_and_all_else_data() {
        let status = Status { base: runs(&[(512, 0), (512, 1), (512, 2), (9999, 3)]), depth: Vec::new() };
        let (end, found) = extents(&status, ByteRange::at(1024, 2048));
        assert_eq!(end, 3072);
        use ExtentKind::{Data, Zero};
        assert_eq!(found, [(512, Data, 0), (512, Data, 0), (512, Zero, 0), (512, Zero, 0)]);
    }

    #[test]
    fn two_contexts_are_laid_over_each_other() {
        let status =
            Status { base: runs(&[(1024, 0), (3072, 3)]), depth: runs(&[(512, 1), (1536, 3), (1024, 0)]) };
        let (end, found) = extents(&status, ByteRange::at(0, 4096));
        assert_eq!(end, 3072, "the second context says no more");
        use ExtentKind::{Data, Unallocated, Zero};
        assert_eq!(found, [(512, Data, 0), (512, Data, 2), (1024, Zero, 2), (1024, Unallocated, 0)]);
    }

    #[test]
    fn another_context_shows_its_flags() {
        use ExtentKind::{Data, Unknown, Zero};
        let all = runs(&[(512, 0), (512, 1), (512, 2), (512, 3), (512, 7)]);
        let status = Status { base: all, depth: Vec::new() };
        for (context, want) in [
            ("qemu:dirty-bitmap:b", [Data, Unknown, Zero, Unknown, Unknown]),
            (ALLOCATION_DEPTH, [Data, Unknown, Zero, Zero, Zero]),
        ] {
            let mut found = Vec::new();
            status.extents(ByteRange::at(0, 2560), 512, Reading::of(Some(context)), &mut |extent| {
                assert_eq!(extent.mapped_hole, extent.kind == Zero);
                found.push(extent.kind);
            });
            assert_eq!(found, want, "{context}");
        }
    }

    /// nbdkit's block size policy announces a minimum and passes on the extents below as they are.
    #[test]
    fn status_that_ends_inside_a_block_is_taken_up_to_the_block() {
        let status = Status { base: runs(&[(100, 0), (600, 3), (400, 0)]), depth: Vec::new() };
        let (end, found) = extents(&status, ByteRange::at(0, 4096));
        use ExtentKind::{Data, Zero};
        assert_eq!((end, found), (1024, vec![(100, Data, 0), (600, Zero, 0), (324, Data, 0)]));
        let status = Status { base: runs(&[(100, 3)]), depth: Vec::new() };
        assert_eq!(extents(&status, ByteRange::at(512, 4096)), (1024, vec![(512, Data, 0)]));
        assert_eq!(extents(&status, ByteRange::at(512, 100)), (612, vec![(100, Zero, 0)]));
    }

    #[test]
    fn lengths_that_overflow_end_with_the_range() {
        let status = Status { base: runs(&[(u64::MAX, 0), (u64::MAX, 3)]), depth: Vec::new() };
        let (end, found) = extents(&status, ByteRange::at(1 << 40, 512));
        assert_eq!((end, found.len()), ((1 << 40) + 512, 1));
    }
}
