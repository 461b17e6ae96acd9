//! The part of the disk that all writers write to, and which of its contents are possible.
//!
//! Every operation is noted before it begins and when it has ended. What an observer may find in a sector:
//! what an operation left there that it can have seen, unless another that it must have seen began after that
//! one ended. Of operations that overlap in time either may win, for each sector; a reader while one is under
//! way may find both in one sector, in words: Linux copies to and from its page cache without a lock.

use std::collections::VecDeque;

use blockmirror_block::ByteRange;
use blockmirror_block::sync::Mutex;

use super::layout::SECTOR;
use super::{author, paint, slice_of};

/// Bytes of a word.
const WORD: u64 = 8;

/// Operations are noted by blocks of this length.
const BLOCK: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Zero,
    /// Leaves old bytes or zeros.
    Discard,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Note {
    pub(super) writer: usize,
    pub(super) n: u64,
    pub(super) kind: Kind,
    pub(super) range: ByteRange,
    pub(super) begin: u64,
    pub(super) end: u64,
}

/// What an observer can know of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// It had ended before the read.
    Must,
    /// It was under way.
    May,
    /// It began later.
    Not,
}

#[derive(Debug)]
pub(super) struct Contended {
    range: ByteRange,
    blocks: Vec<Mutex<Block>>,
}

#[derive(Debug)]
struct Block {
    range: ByteRange,
    /// What was there when all writers had stopped.
    base: Vec<u8>,
    notes: VecDeque<Note>,
}

impl Contended {
    pub(super) fn new(range: ByteRange, disk: &[u8]) -> Self {
        let block = |range: ByteRange| {
            let base = disk[range.start() as usize..range.end() as usize].to_vec();
            Mutex::new(Block { range, base, notes: VecDeque::new() })
        };
        Self { range, blocks: range.pieces(BLOCK).map(block).collect() }
    }

    fn blocks_of(&self, range: ByteRange) -> impl Iterator<Item = &Mutex<Block>> {
        let first = (range.start() - self.range.start()) / BLOCK;
        let last = (range.end() - 1 - self.range.start()) / BLOCK;
        self.blocks[first as usize..=last as usize].iter()
    }

    /// An operation is about to begin.
    pub(super) fn begin(&self, note: Note) {
        for block in self.blocks_of(note.range) {
            block.lock().notes.push_back(note);
        }
    }

    /// It has ended.
    pub(super) fn end(&self, note: Note, end: u64) {
        for block in self.blocks_of(note.range) {
            let mut block = block.lock();
            let found = block.notes.iter_mut().rev().find(|n| n.writer == note.writer && n.n == note.n);
            if let Some(found) = found {
                found.end = end;
            }
        }
    }

    /// What is wrong with `bytes`, found at `range` by a reader that has seen operations as `sight` says.
    pub(super) fn judge(
        &self,
        range: ByteRange,
        bytes: &[u8],
        sight: impl Fn(&Note) -> Sight,
    ) -> Option<String> {
        self.blocks_of(range).find_map(|block| {
            let (within, base, notes) = {
                let block = block.lock();
                let within = block.range.intersect(range);
                let notes: Vec<Note> =
                    block.notes.iter().filter(|n| n.range.overlaps(within)).copied().collect();
                (within, block.base[slice_of(block.range, within)].to_vec(), notes)
            };
            within.pieces(SECTOR).find_map(|sector| {
                let notes: Vec<Note> = notes
                    .iter()
                    .filter(|n| n.range.overlaps(sector) && sight(n) != Sight::Not)
                    .copied()
                    .collect();
                let base = &base[slice_of(within, sector)];
                let found = &bytes[slice_of(range, sector)];
                let wrong = judge_part(sector, found, base, &notes, &sight)?;
                let calm = notes.iter().all(|n| sight(n) == Sight::Must);
                let word_is_wrong = |word: ByteRange| {
                    let place = slice_of(sector, word);
                    judge_part(word, &found[place.clone()], &base[place], &notes, &sight).is_some()
                };
                (calm || sector.pieces(WORD).any(word_is_wrong)).then_some(wrong)
            })
        })
    }

    /// All writers have stopped and the disk holds `disk`: what led there does not matter any more.
    pub(super) fn settle(&self, disk: &[u8]) {
        for block in &self.blocks {
            let mut block = block.lock();
            let place = block.range.start() as usize..block.range.end() as usize;
            block.base.copy_from_slice(&disk[place]);
            block.notes.clear();
        }
    }

    pub(super) fn range(&self) -> ByteRange {
        self.range
    }
}

/// What is wrong with a part that one operation has left as a whole.
fn judge_part(
    sector: ByteRange,
    found: &[u8],
    base: &[u8],
    notes: &[Note],
    sight: &impl Fn(&Note) -> Sight,
) -> Option<String> {
    let lasts = |end: u64| {
        let over = |n: &&Note| n.kind != Kind::Discard && sight(n) == Sight::Must && n.begin > end;
        !notes.iter().any(|n| over(&n))
    };
    let zero = found.iter().all(|&b| b == 0);
    let mut left = vec![0; found.len()];
    let possible = (found == base && lasts(0))
        || notes.iter().any(|note| {
            let equal = match note.kind {
                Kind::Zero | Kind::Discard => zero,
                Kind::Write => {
                    author(found, sector.start()) == Some((note.writer, note.n)) && {
                        paint(&mut left, sector.start(), note.writer, note.n);
                        found == left
                    }
                }
            };
            equal && lasts(note.end)
        });
    (!possible).then(|| {
        let latest = notes.iter().filter(|n| sight(n) == Sight::Must).max_by_key(|n| n.begin);
        let author = author(found, sector.start());
        let note = notes.iter().find(|n| Some((n.writer, n.n)) == author);
        let torn = author.is_some_and(|(writer, n)| {
            paint(&mut left, sector.start(), writer, n);
            found != left
        });
        format!(
            "shared sector {sector} holds {} ({}, noted as {note:?}); the last that must show: {latest:?}",
            super::describe(found, sector.start()),
            if torn { "torn" } else { "whole" },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(writer: usize, kind: Kind, begin: u64, end: u64) -> Note {
        Note { writer, n: 1, kind, range: ByteRange::at(0, 512), begin, end }
    }

    fn painted(writer: usize) -> Vec<u8> {
        let mut sector = vec![0; 512];
        paint(&mut sector, 0, writer, 1);
        sector
    }

    #[test]
    fn what_was_written_over_must_not_come_back() {
        let zone = Contended::new(ByteRange::at(0, 512), &[0; 512]);
        zone.begin(note(1, Kind::Write, 1, 2));
        zone.begin(note(2, Kind::Write, 3, 5));
        zone.begin(note(3, Kind::Write, 4, 6));
        let sector = ByteRange::at(0, 512);
        let seen = |writer| zone.judge(sector, &painted(writer), |_| Sight::Must).is_none();
        assert!(!seen(1) && seen(2) && seen(3), "of two at once either may win");
        assert!(zone.judge(sector, &[0; 512], |_| Sight::Must).is_some());
        // A reader that looked earlier.
        let early = |n: &Note| if n.writer == 1 { Sight::Must } else { Sight::May };
        assert!(zone.judge(sector, &painted(1), early).is_none());
        // Torn: a reader may see that for a moment, but it must not stay.
        let mut torn = painted(3);
        torn[256..].copy_from_slice(&painted(2)[256..]);
        assert!(zone.judge(sector, &torn, |_| Sight::Must).is_some());
        assert!(zone.judge(sector, &torn, |_| Sight::May).is_none());
    }

    #[test]
    fn a_discard_leaves_old_or_zero() {
        let zone = Contended::new(ByteRange::at(0, 512), &painted(1));
        zone.begin(note(2, Kind::Discard, 1, 2));
        let sector = ByteRange::at(0, 512);
        assert!(zone.judge(sector, &painted(1), |_| Sight::Must).is_none());
        assert!(zone.judge(sector, &[0; 512], |_| Sight::Must).is_none());
        assert!(zone.judge(sector, &painted(2), |_| Sight::Must).is_some());
    }
}
