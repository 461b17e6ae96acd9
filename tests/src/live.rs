//! A disk that is written while it is mirrored, and the judge of what becomes of it.
//!
//! Called by `tests/tests/live/stress.rs` for seconds and by `cargo xtask stress` for as long as one likes.
//! Four writers work on a [`Tap`](blockmirror_mirror::Tap) in front of a real file, a fifth thread starts job
//! after job and asks them for this and that, and in between all writers stop and the disks are compared with
//! what the writers know.
//!
//! What must hold:
//! - Every word that is written says where it belongs, who wrote it and in which operation: a wrong
//!   byte tells where it came from.
//! - What the judge expects comes from the writers' own notes, never from a disk.
//! - The seed decides what is drawn, not how the threads interleave: a seed that failed may pass the next
//!   time.

mod contended;
mod control;
mod cut;
mod gate;
mod images;
mod layout;
mod model;
mod plan;
mod round;
mod run;
mod slow;
mod world;
mod writer;

use blockmirror_block::ByteRange;

pub use run::{Report, Stress};

/// Threads that write.
const WRITERS: usize = 4;
/// The writer that stands for what was there at the beginning.
const NO_WRITER: usize = 15;
/// Longest disk: offsets of words have 24 bits.
const MAX_LEN: u64 = 8 << 24;

/// The word at `offset` (a multiple of 8) that operation `n` of `writer` leaves there.
fn word(offset: u64, writer: usize, n: u64) -> u64 {
    (writer as u64) << 60 | (n & 0xf_ffff_ffff) << 24 | (offset / 8) & 0xff_ffff
}

/// Fills `buf`, which lies at `offset` of the disk, with the words of operation `n` of `writer`.
fn paint(buf: &mut [u8], offset: u64, writer: usize, n: u64) {
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        let inside = (at % 8) as usize;
        let take = rest.len().min(8 - inside);
        let (piece, tail) = rest.split_at_mut(take);
        piece.copy_from_slice(&word(at - at % 8, writer, n).to_be_bytes()[inside..inside + take]);
        at += take as u64;
        rest = tail;
    }
}

/// Who wrote the word at the start of `sector`, and in which operation; `None` for anything but a word of
/// `offset`.
fn author(sector: &[u8], offset: u64) -> Option<(usize, u64)> {
    let word = u64::from_be_bytes(sector.get(..8)?.try_into().ok()?);
    (word & 0xff_ffff == (offset / 8) & 0xff_ffff)
        .then_some(((word >> 60) as usize, word >> 24 & 0xf_ffff_ffff))
}

/// The bytes at `offset` in words: who, in which operation, for which place.
fn describe(bytes: &[u8], offset: u64) -> String {
    let skip = (offset.next_multiple_of(8) - offset) as usize;
    let Some(word) = bytes.get(skip..skip + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes) else {
        return format!("bytes {:02x?}", &bytes[..bytes.len().min(8)]);
    };
    match word {
        0 => "zeros".into(),
        _ => format!(
            "operation {} of writer {} for {}",
            word >> 24 & 0xf_ffff_ffff,
            word >> 60,
            (word & 0xff_ffff) * 8
        ),
    }
}

/// Where `found` first differs from `wanted`, both at `offset` of the disk.
fn difference(found: &[u8], wanted: &[u8], offset: u64) -> Option<String> {
    if found == wanted {
        return None;
    }
    let at = found.iter().zip(wanted).position(|(a, b)| a != b)?;
    let count = found.iter().zip(wanted).filter(|(a, b)| a != b).count();
    // From the start of the word, so that both can be read.
    let from = at.saturating_sub(((offset + at as u64) % 8) as usize);
    let place = offset + from as u64;
    Some(format!(
        "at {place} ({count} of {} bytes at {offset} are wrong): {} instead of {}",
        found.len(),
        describe(&found[from..], place),
        describe(&wanted[from..], place)
    ))
}

/// Where `range` lies in a buffer that holds `whole`.
fn slice_of(whole: ByteRange, range: ByteRange) -> std::ops::Range<usize> {
    (range.start() - whole.start()) as usize..(range.end() - whole.start()) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_tells_where_it_came_from() {
        let mut whole = vec![0; 64];
        paint(&mut whole, 4096, 3, 77);
        let mut part = vec![0; 21];
        paint(&mut part, 4099, 3, 77);
        assert_eq!(whole[3..24], part);
        assert_eq!(author(&whole, 4096), Some((3, 77)));
        assert_eq!(author(&whole, 4104), None);
        let mut other = whole.clone();
        paint(&mut other[16..40], 4112, 2, 5);
        assert_eq!(
            difference(&other, &whole, 4096).unwrap_or_default(),
            "at 4112 (6 of 64 bytes at 4096 are wrong): operation 5 of writer 2 for 4112 instead of \
             operation 77 of writer 3 for 4112"
        );
    }
}
