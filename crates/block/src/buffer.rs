//! Buffers aligned for direct I/O.
//!
//! The copy engine's threads and the bouncing paths of files hold one each and use it again and again.
//! Aligned without `unsafe`: a little more is allocated than asked for, and the start is moved to the next
//! border.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};

/// A buffer that begins at a multiple of [`ALIGNMENT`](Self::ALIGNMENT) and is zeroed when made.
///
/// Dereferences to its bytes.
#[derive(Default)]
pub struct AlignedBuf {
    memory: Vec<u8>,
    bytes: Range<usize>,
}

impl AlignedBuf {
    /// What the address of the first byte is a multiple of; no direct I/O that we know wants more.
    pub const ALIGNMENT: usize = 4096;

    /// `len` zero bytes. The system hands pages out when they are first touched, so an unused part costs
    /// nothing.
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let memory = vec![0; len.saturating_add(Self::ALIGNMENT - 1)];
        // The heap block never moves: `memory` is not grown or shrunk.
        let start = memory.as_ptr().addr().wrapping_neg() % Self::ALIGNMENT;
        Self { memory, bytes: start..start + len }
    }

    /// The first `len` bytes, after making room for them. What is in them is unspecified; no byte is zeroed
    /// again, or copied, for nothing.
    pub fn at_least(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len {
            *self = Self::new(len);
        }
        &mut self[..len]
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.bytes.clone()]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.bytes.clone()]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_of_the_length_asked_for() {
        for len in [0, 1, 511, 4096, 4097, 1 << 20] {
            let mut buf = AlignedBuf::new(len);
            assert_eq!(buf.len(), len);
            assert!(len == 0 || buf.as_ptr().addr().is_multiple_of(AlignedBuf::ALIGNMENT));
            assert!(buf.iter().all(|b| *b == 0));
            buf.fill(0xff);
        }
    }

    #[test]
    fn a_smaller_request_reuses_the_memory_and_a_larger_one_stays_aligned() {
        let mut buf = AlignedBuf::new(8192);
        let first = buf.as_ptr();
        assert_eq!(buf.at_least(100).len(), 100);
        assert_eq!(buf.as_ptr(), first);
        assert!(buf.at_least(100_000).as_ptr().addr().is_multiple_of(AlignedBuf::ALIGNMENT));
        assert_eq!(buf.len(), 100_000);
    }
}
