//! Hashes of what a virtual disk holds, the same for every image format.
//!
//! [`DiskHash`] (`bm1:` and 64 hexadecimal digits) is made of the digests of the disk's blocks of 1 MiB, so
//! that threads share the work and blocks of zeros are not read: a sparse disk of 8 TiB takes seconds.
//! [`ContentHash`] is plain BLAKE3 of all bytes, as `b3sum` prints it of a raw image. [`BlockDigests`] keeps
//! the digests and tells which blocks differ; [`DigestRecorder`] records them while a disk is copied.
//!
//! # Format of a disk hash
//!
//! | | |
//! |---|---|
//! | block | 1 MiB of the disk; the last one may be shorter |
//! | digest of a block | BLAKE3 of its bytes, 32 bytes; 32 bytes of zero if all of its bytes are zero |
//! | hash | BLAKE3 in its mode *derive key*, with the context [`CONTEXT`], of the disk's length in bytes (64 bits, little endian) and then the digests of all blocks in order |
//!
//! ```
//! use blockmirror_block::testing::MemoryDisk;
//! use blockmirror_block::{BlockDevice, Visit, WriteFlags};
//! use blockmirror_hash::{DiskHash, HashOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (a, b) = (MemoryDisk::new(3 << 20), MemoryDisk::new(3 << 20));
//! b.write_at(&[0; 512], 0, WriteFlags::NONE)?;
//! let options = HashOptions::new();
//! let hash = DiskHash::of(&a, &options, &mut |_| Visit::Continue(()))?;
//! assert_eq!(hash, DiskHash::of(&b, &options, &mut |_| Visit::Continue(()))?);
//! assert_eq!(hash.map(|hash| hash.to_string().parse()), hash.map(Ok));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod blocks;
mod content;
mod digests;
mod disk;
mod options;
mod parallel;
mod text;
mod walk;

pub use blocks::RunDigest;
pub use content::ContentHash;
pub use digests::{BlockDigests, DigestRecorder};
pub use disk::{CONTEXT, DiskHash};
pub use options::HashOptions;
pub use parallel::{BlockDigest, ZERO_DIGEST, block_digest};
pub use text::ParseHashError;
pub use walk::BLOCK;
