//! The digest of several blocks that lie one behind the other, made of theirs.
//!
//! Called by copies that note what they have copied, region by region.

use blake3::Hasher;

use crate::parallel::{BlockDigest, ZERO_DIGEST};

/// Makes the digest of a run of blocks: that of the block if it is one alone, 32 bytes of zero if all blocks
/// are zero, and BLAKE3 of their digests otherwise.
///
/// ```
/// use blockmirror_hash::{RunDigest, block_digest};
///
/// let of = |blocks: &[&[u8]]| {
///     let mut run = RunDigest::new();
///     blocks.iter().for_each(|block| run.block(block_digest(block)));
///     run.finish()
/// };
/// assert_eq!(of(&[b"one"]), block_digest(b"one"));
/// assert_eq!(of(&[&[0; 512], &[0; 512]]), [0; 32]);
/// assert_ne!(of(&[b"one", &[0; 512]]), of(&[&[0; 512], b"one"]));
/// ```
#[derive(Debug, Default)]
pub struct RunDigest {
    hasher: Hasher,
    first: Option<BlockDigest>,
    several: bool,
    any_data: bool,
}

impl RunDigest {
    /// Of no blocks.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next block has this digest.
    pub fn block(&mut self, digest: BlockDigest) {
        self.hasher.update(&digest);
        self.several |= self.first.is_some();
        self.first.get_or_insert(digest);
        self.any_data |= digest != ZERO_DIGEST;
    }

    /// The digest; of no blocks that of zeros.
    pub fn finish(self) -> BlockDigest {
        match self.first {
            Some(digest) if !self.several => digest,
            _ if !self.any_data => ZERO_DIGEST,
            _ => *self.hasher.finalize().as_bytes(),
        }
    }
}
