//! What a server says lies where, and what that means in extents.
//!
//! Read by the connection, one chunk per context; turned into extents by the client once the whole reply is there.

use blockmirror_block::{ByteRange, Extent, ExtentKind};

use super::connection::stream_error;
use super::error::ClientError;
use super::handshake::Negotiated;
use super::link::Incoming;
use crate::proto::{BlockStatus, Descriptor, allocation};

/// Most descriptors of one context that are kept of a reply; the rest is asked for again.
const MAX_DESCRIPTORS: u64 = 64 << 10;

/// Longest payload of one context. QEMU sends at most 1 MiB, nbdkit 8 MiB.
const MAX_PAYLOAD: u64 = 64 << 20;

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
        negotiated: &Negotiated,
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
        let mut scrap = [0; 4096];
        let mut left = (descriptors - kept) * each;
        while left > 0 {
            let n = left.min(scrap.len() as u64);
            incoming.read_exact(&mut scrap[..n as usize]).map_err(stream_error)?;
            left -= n;
        }
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
    pub(crate) fn is_complete(&self, negotiated: &Negotiated) -> bool {
        negotiated.base.is_some() != self.base.is_empty()
            && negotiated.depth.is_some() != self.depth.is_empty()
    }

    /// Hands on what it says about `range`, which it answers from the start; how far it reaches. Descriptors must end at
    /// multiples of `unit`, unless it is where `range` ends.
    pub(crate) fn extents(
        &self,
        range: ByteRange,
        unit: u64,
        found: &mut dyn FnMut(Extent),
    ) -> Result<u64, ClientError> {
        let mut base = Runs::new(&self.base, range, unit);
        let mut depth = Runs::new(&self.depth, range, unit);
        let mut at = range.start();
        while at < range.end() {
            let Some((end, flags)) = base.at(at)? else { break };
            let (end, depth) = if self.depth.is_empty() {
                (end, None)
            } else {
                let Some((depth_end, depth)) = depth.at(at)? else { break };
                (end.min(depth_end), Some(depth))
            };
            let part = ByteRange::new(at, end);
            let zero = flags & allocation::ZERO != 0;
            let kind = match depth {
                Some(0) if zero => ExtentKind::Unallocated,
                _ if zero => ExtentKind::Zero,
                _ => ExtentKind::Data,
            };
            // Layer 1 of the server's is the export's own image.
            let layer = depth.map_or(0, |depth| u32::try_from(depth.saturating_sub(1)).unwrap_or(u32::MAX));
            found(Extent::new(part, kind).at_depth(layer));
            at = end;
        }
        Ok(at)
    }
}

/// Walks along the descriptors of one context.
struct Runs<'a> {
    descriptors: std::slice::Iter<'a, Descriptor>,
    range: ByteRange,
    unit: u64,
    /// Where the present descriptor ends, and what it says.
    end: u64,
    flags: u64,
}

impl<'a> Runs<'a> {
    fn new(descriptors: &'a [Descriptor], range: ByteRange, unit: u64) -> Self {
        Self { descriptors: descriptors.iter(), range, unit, end: range.start(), flags: 0 }
    }

    /// What lies at `at`, and where that ends; `None` where it says no more.
    fn at(&mut self, at: u64) -> Result<Option<(u64, u64)>, ClientError> {
        while self.end <= at {
            let Some(next) = self.descriptors.next() else { return Ok(None) };
            // A last descriptor may reach past what was asked for.
            self.end = self.end.saturating_add(next.length).min(self.range.end());
            self.flags = next.flags;
            if self.end < self.range.end() && !self.end.is_multiple_of(self.unit) {
                return Err(ClientError::Violation(format!(
                    "block status that ends at {}, inside a block of {} bytes",
                    self.end, self.unit
                )));
            }
        }
        Ok(Some((self.end, self.flags)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(lengths: &[(u64, u64)]) -> Vec<Descriptor> {
        lengths.iter().map(|&(length, flags)| Descriptor { length, flags }).collect()
    }

    type Found = Vec<(u64, ExtentKind, u32)>;

    fn extents(status: &Status, range: ByteRange) -> Result<(u64, Found), ClientError> {
        let mut found = Vec::new();
        let end = status.extents(range, 512, &mut |e| found.push((e.range.len(), e.kind, e.depth)))?;
        Ok((end, found))
    }

    #[test]
    fn what_reads_as_zero_is_zero_and_all_else_data() {
        let status = Status { base: runs(&[(512, 0), (512, 1), (512, 2), (9999, 3)]), depth: Vec::new() };
        let (end, found) = extents(&status, ByteRange::at(1024, 2048)).unwrap();
        assert_eq!(end, 3072);
        use ExtentKind::{Data, Zero};
        assert_eq!(found, [(512, Data, 0), (512, Data, 0), (512, Zero, 0), (512, Zero, 0)]);
    }

    #[test]
    fn two_contexts_are_laid_over_each_other() {
        let status =
            Status { base: runs(&[(1024, 0), (3072, 3)]), depth: runs(&[(512, 1), (1536, 3), (1024, 0)]) };
        let (end, found) = extents(&status, ByteRange::at(0, 4096)).unwrap();
        assert_eq!(end, 3072, "the second context says no more");
        use ExtentKind::{Data, Unallocated, Zero};
        assert_eq!(found, [(512, Data, 0), (512, Data, 2), (1024, Zero, 2), (1024, Unallocated, 0)]);
    }

    #[test]
    fn status_inside_a_block_is_refused() {
        let status = Status { base: runs(&[(100, 0)]), depth: Vec::new() };
        assert!(matches!(extents(&status, ByteRange::at(0, 4096)), Err(ClientError::Violation(_))));
    }

    #[test]
    fn lengths_that_overflow_end_with_the_range() {
        let status = Status { base: runs(&[(u64::MAX, 0), (u64::MAX, 3)]), depth: Vec::new() };
        let (end, found) = extents(&status, ByteRange::at(1 << 40, 512)).unwrap();
        assert_eq!((end, found.len()), ((1 << 40) + 512, 1));
    }
}
