//! Disk contents that tell where they belong.
//!
//! Every 512-byte sector starts with its own number and a salt, so that bytes which end up in the wrong place
//! differ from those that should be there; the rest of the sector repeats that stamp, so that images of them
//! compress well.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes in the unit that carries a stamp.
pub const SECTOR: u64 = 512;

/// Fills `buf`, which lies at `offset` of the disk, with stamped sectors.
pub fn stamp(buf: &mut [u8], offset: u64, salt: u32) {
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        let inside = at % SECTOR;
        let take = rest.len().min(usize::try_from(SECTOR - inside).unwrap_or(usize::MAX));
        let (piece, tail) = rest.split_at_mut(take);
        let text = format!("{:010}/{salt:04x};", at / SECTOR);
        for (i, byte) in piece.iter_mut().enumerate() {
            *byte = text.as_bytes()[(i + usize::try_from(inside).unwrap_or(0)) % text.len()];
        }
        at += take as u64;
        rest = tail;
    }
}

/// A stamped run of `len` bytes at `offset`.
pub fn stamped(offset: u64, len: usize, salt: u32) -> Vec<u8> {
    let mut buf = vec![0; len];
    stamp(&mut buf, offset, salt);
    buf
}

/// Fills `buf` with bytes no compressor shrinks, the same for the same `seed`.
pub fn noise(buf: &mut [u8], seed: u64) {
    let mut reader = blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof();
    reader.fill(buf);
}

/// Fills `buf` with words, the same for the same `seed`, which a compressor shrinks to about a third.
pub fn words(buf: &mut [u8], seed: u64) {
    const LETTERS: &[u8; 16] = b"etaoinshrdlucmfw";
    let mut drawn = vec![0; buf.len() / 4 + 1];
    noise(&mut drawn, seed);
    let mut at = 0;
    for word in drawn {
        for letter in 0..2 + usize::from(word) % 7 {
            let Some(byte) = buf.get_mut(at) else { return };
            // The same letters for the same word.
            *byte = LETTERS[(usize::from(word) * (letter + 3) + letter * 5) % 16];
            at += 1;
        }
        let Some(byte) = buf.get_mut(at) else { return };
        *byte = b' ';
        at += 1;
    }
    buf[at..].fill(b'.');
}

/// What a run of a made-up disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Stamped sectors with this salt.
    Stamp(u32),
    /// Incompressible bytes.
    Noise,
    /// Words, which compress.
    Words,
    /// Zero bytes that are written, not left out.
    Zeros,
}

/// Writes a raw disk of `len` bytes that holds `runs` (offset, length, content) and is a hole elsewhere.
pub fn write_raw(path: &Path, len: u64, runs: &[(u64, u64, Fill)]) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(len)?;
    let mut buf = vec![0u8; 1 << 20];
    for &(offset, run, fill) in runs {
        let end = (offset + run).min(len);
        let mut at = offset;
        while at < end {
            let take = usize::try_from(end - at).unwrap_or(usize::MAX).min(buf.len());
            let piece = &mut buf[..take];
            match fill {
                Fill::Stamp(salt) => stamp(piece, at, salt),
                Fill::Noise => noise(piece, at),
                Fill::Words => words(piece, at),
                Fill::Zeros => piece.fill(0),
            }
            file.write_all_at(piece, at)?;
            at += take as u64;
        }
    }
    Ok(())
}

/// blake3 of a file from its first byte to its last.
pub fn hash_file(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_depends_on_the_place_alone() {
        let whole = stamped(0, 4096, 7);
        assert_eq!(whole[700..1700], stamped(700, 1000, 7));
        assert_ne!(whole[..512], whole[512..1024]);
        assert!(whole.starts_with(b"0000000000/0007;"));
    }
}
