//! Writes long runs of table entries through one small buffer, so that creating an image takes the same
//! memory whatever its size.

use blockmirror_block::Storage;

use crate::error::Result;

/// Bytes that go to the storage at once. A multiple of every entry's size.
const CHUNK: usize = 256 << 10;

/// Writes `count` entries from `offset` on; entry `i` has the big-endian words `entry(i)`.
pub(super) fn entries<const WORDS: usize>(
    storage: &dyn Storage,
    offset: u64,
    count: u64,
    entry: impl Fn(u64) -> [u64; WORDS],
) -> Result<()> {
    let mut chunk = Vec::with_capacity(CHUNK.min(usize::try_from(count).unwrap_or(CHUNK) * WORDS * 8));
    let mut at = offset;
    for index in 0..count {
        for word in entry(index) {
            chunk.extend(word.to_be_bytes());
        }
        if chunk.len() >= CHUNK || index + 1 == count {
            storage.write_at(&chunk, at)?;
            at += chunk.len() as u64;
            chunk.clear();
        }
    }
    Ok(())
}

/// Writes `count` refcounts of one, each `1 << order` bits wide, from `offset` on.
pub(super) fn refcounts_of_one(storage: &dyn Storage, offset: u64, count: u64, order: u32) -> Result<()> {
    let width = 1usize << order;
    // BackingLayer a byte, the first entry lies in the least significant bits.
    let pattern: Vec<u8> = if width < 8 {
        vec![(0..8).step_by(width).fold(0, |byte, bit| byte | 1 << bit)]
    } else {
        let mut entry = vec![0; width / 8];
        entry[width / 8 - 1] = 1;
        entry
    };
    let whole = count * width as u64 / 8;
    // Whole entries, of which there are as many as are written, and at most a chunk.
    let least = usize::try_from(whole).unwrap_or(CHUNK).min(CHUNK);
    let chunk = pattern.repeat(least.div_ceil(pattern.len()));
    let mut done = 0;
    while done < whole {
        let len = usize::try_from(whole - done).unwrap_or(CHUNK).min(chunk.len());
        storage.write_at(&chunk[..len], offset + done)?;
        done += len as u64;
    }
    let bits = (count * width as u64) % 8;
    if bits > 0 {
        storage.write_at(&[pattern[0] & ((1 << bits) - 1)], offset + whole)?;
    }
    Ok(())
}

/// Writes `len` zero bytes from `offset` on.
pub(super) fn zeros(storage: &dyn Storage, offset: u64, len: u64) -> Result<()> {
    const ZEROS: usize = 1 << 20;
    let chunk = vec![0; usize::try_from(len).unwrap_or(ZEROS).min(ZEROS)];
    let mut done = 0;
    while done < len {
        let part = usize::try_from(len - done).unwrap_or(ZEROS).min(ZEROS);
        storage.write_at(&chunk[..part], offset + done)?;
        done += part as u64;
    }
    Ok(())
}
