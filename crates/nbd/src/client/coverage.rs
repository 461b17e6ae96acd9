//! Which bytes of a read have arrived.
//!
//! A structured reply may bring them in pieces and in any order, but each byte exactly once. Called by the
//! connection for every piece, before a byte of it is stored.

use blockmirror_block::ByteRange;

use super::error::ClientError;

/// Most separate pieces that are kept apart: a reply of 32 MiB in 512-byte sectors from both ends inwards
/// would need fewer.
const MAX_PIECES: usize = 64 << 10;

#[derive(Debug)]
pub(crate) struct Coverage {
    whole: ByteRange,
    /// Sorted; neither overlapping nor touching.
    pieces: Vec<ByteRange>,
}

impl Coverage {
    /// Nothing of `whole` yet.
    pub(crate) fn new(whole: ByteRange) -> Self {
        Self { whole, pieces: Vec::new() }
    }

    /// `len` bytes at `offset` have arrived.
    pub(crate) fn add(&mut self, offset: u64, len: u64) -> Result<ByteRange, ClientError> {
        let violation = |what: &str| {
            ClientError::Violation(format!("{what}: {len} bytes at {offset}, asked for {:?}", self.whole))
        };
        if len == 0 {
            return Err(violation("a piece without bytes"));
        }
        let piece = match offset.checked_add(len) {
            Some(end) if self.whole.contains_range(ByteRange::new(offset, end)) => {
                ByteRange::new(offset, end)
            }
            _ => return Err(violation("bytes that were not asked for")),
        };
        // Servers send pieces in order, so the place is nearly always the end.
        let at = match self.pieces.last() {
            Some(last) if last.end() > piece.start() => {
                self.pieces.partition_point(|p| p.end() <= piece.start())
            }
            _ => self.pieces.len(),
        };
        if self.pieces.get(at).is_some_and(|next| next.overlaps(piece)) {
            return Err(violation("the same bytes twice"));
        }
        let joins_before = at > 0 && self.pieces[at - 1].end() == piece.start();
        let joins_after = self.pieces.get(at).is_some_and(|next| next.start() == piece.end());
        match (joins_before, joins_after) {
            (true, true) => {
                let next = self.pieces.remove(at);
                self.pieces[at - 1] = ByteRange::new(self.pieces[at - 1].start(), next.end());
            }
            (true, false) => {
                self.pieces[at - 1] = ByteRange::new(self.pieces[at - 1].start(), piece.end());
            }
            (false, true) => self.pieces[at] = ByteRange::new(piece.start(), self.pieces[at].end()),
            (false, false) if self.pieces.len() >= MAX_PIECES => {
                return Err(violation("too many pieces"));
            }
            (false, false) => self.pieces.insert(at, piece),
        }
        Ok(piece)
    }

    /// All of it has arrived at once.
    pub(crate) fn add_all(&mut self) -> Result<ByteRange, ClientError> {
        self.add(self.whole.start(), self.whole.len())
    }

    /// The place of `piece`, which was added, in a buffer for the whole.
    pub(crate) fn slice<'a>(&self, buf: &'a mut [u8], piece: ByteRange) -> &'a mut [u8] {
        let start = (piece.start() - self.whole.start()) as usize;
        &mut buf[start..start + piece.len() as usize]
    }

    /// Whether all of it is there.
    pub(crate) fn is_complete(&self) -> bool {
        self.whole.is_empty() || self.pieces == [self.whole]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pieces_in_any_order_make_a_whole() {
        let mut coverage = Coverage::new(ByteRange::new(10, 40));
        for (offset, len) in [(30, 10), (10, 5), (20, 10)] {
            coverage.add(offset, len).unwrap();
            assert!(!coverage.is_complete());
        }
        coverage.add(15, 5).unwrap();
        assert!(coverage.is_complete());
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        let mut coverage = Coverage::new(ByteRange::new(10, 40));
        coverage.add(20, 5).unwrap();
        for (offset, len) in [(9, 1), (39, 2), (24, 1), (15, 6), (10, 30), (12, 0), (u64::MAX, 2)] {
            assert!(matches!(coverage.add(offset, len), Err(ClientError::Violation(_))), "{offset} {len}");
        }
    }

    #[test]
    fn the_number_of_pieces_is_bounded() {
        let mut coverage = Coverage::new(ByteRange::new(0, 1 << 20));
        let refused = (0..1 << 19).find(|i| coverage.add(i * 2, 1).is_err());
        assert_eq!(refused, Some(MAX_PIECES as u64));
    }

    proptest! {
        #[test]
        fn agrees_with_a_bit_per_byte(
            pieces in proptest::collection::vec((0u64..64, 1u64..20), 1..40),
        ) {
            let mut coverage = Coverage::new(ByteRange::new(0, 64));
            let mut bits = [false; 64];
            for (offset, len) in pieces {
                let free = offset + len <= 64
                    && !bits[offset as usize..(offset + len) as usize].contains(&true);
                prop_assert_eq!(coverage.add(offset, len).is_ok(), free);
                if free {
                    bits[offset as usize..(offset + len) as usize].fill(true);
                }
                prop_assert_eq!(coverage.is_complete(), !bits.contains(&false));
            }
        }
    }
}
