//! Dirty bitmaps as bytes: one bit per granule, the first one the lowest bit of the first byte.
//!
//! The form in which qcow2 keeps persistent bitmaps and in which QEMU migrates them. Any part can be stored
//! or loaded by itself, so that a table of clusters needs no buffer for the whole.

use crate::DirtyBitmap;

impl DirtyBitmap {
    /// Bytes that the whole bitmap takes when stored.
    pub fn stored_len(&self) -> u64 {
        self.granules().div_ceil(8)
    }

    /// Fills `out` with the stored form from byte `at` of it. Bytes and bits past the end are zero.
    pub fn store(&self, mut at: u64, out: &mut [u8]) {
        let mut rest = out;
        while !rest.is_empty() && at < self.stored_len() {
            let skip = at % 8;
            let (head, tail) = rest.split_at_mut(rest.len().min(8 - skip as usize));
            let mut word = self.granules.word(at / 8) >> (8 * skip);
            for byte in head.iter_mut() {
                *byte = (word & 0xff) as u8;
                word >>= 8;
            }
            at = at.saturating_add(head.len() as u64);
            rest = tail;
        }
        rest.fill(0);
    }

    /// Replaces the granules whose bits lie at byte `at` and on of the stored form. Bits past the end are
    /// ignored.
    pub fn load(&mut self, mut at: u64, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() && at < self.stored_len() {
            let skip = at % 8;
            let (head, tail) = rest.split_at(rest.len().min(8 - skip as usize));
            let mut word = if head.len() == 8 { 0 } else { self.granules.word(at / 8) };
            for (shift, &byte) in (8 * skip..).step_by(8).zip(head) {
                word = word & !(0xff << shift) | u64::from(byte) << shift;
            }
            self.granules.set_word(at / 8, word);
            at = at.saturating_add(head.len() as u64);
            rest = tail;
        }
    }
}
