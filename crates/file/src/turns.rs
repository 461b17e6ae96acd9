//! Lets short writes to a file overtake long ones.
//!
//! The kernel lets one write at a time into a regular file's page cache, and who waits is not sure to be
//! next: threads that write long pieces, one after the other, keep a writer of 4 KiB out for as long as the
//! scheduler leaves them the processors. A guest whose disk is being copied is such a writer. So while short
//! writes come to a file, long ones take turns here, one thread at a time, and release the file after each
//! piece.
//!
//! Where few come, as when an image is converted, nothing changes: taking turns costs a quarter of the
//! throughput.

use std::sync::atomic::{AtomicU32, Ordering};

use blockmirror_block::Result;
use blockmirror_block::sync::Mutex;

/// Shorter writes are in a hurry. Those of a copy, in clusters most often, are longer.
const SHORT: usize = 16 << 10;
/// Longer writes take turns, in pieces of this size, where others are in a hurry.
const PIECE: usize = 64 << 10;
/// A short write has so many long ones after it take turns ...
const WARMTH: u32 = 4;
/// ... and many of them so many.
const WARMEST: u32 = 64;

/// Who writes to one open file at present.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Long writes to come that take turns. Racing updates may lose one: it is a guess anyway.
    warmth: AtomicU32,
    /// Held while a long write is done that takes turns, with nothing else locked inside.
    turn: Mutex<()>,
}

impl Turns {
    /// Does a write of `buf` by one or more calls of `write`, with each piece and where it begins in `buf`.
    pub(crate) fn write(&self, buf: &[u8], mut write: impl FnMut(&[u8], usize) -> Result<()>) -> Result<()> {
        let warmth = self.warmth.load(Ordering::Relaxed);
        if buf.len() <= SHORT && warmth < WARMEST {
            self.warmth.store((warmth + WARMTH).min(WARMEST), Ordering::Relaxed);
        }
        if buf.len() <= PIECE || warmth == 0 {
            return write(buf, 0);
        }
        self.warmth.store(warmth - 1, Ordering::Relaxed);
        let _turn = self.turn.lock();
        buf.chunks(PIECE).enumerate().try_for_each(|(i, piece)| write(piece, i * PIECE))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;
    use std::time::Duration;

    use blockmirror_block::{Error, ErrorKind};

    use super::*;

    /// The pieces by which a write of `len` bytes is done.
    fn pieces(turns: &Turns, len: usize) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        let buf: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        turns
            .write(&buf, |piece, at| {
                assert_eq!(piece, &buf[at..at + piece.len()]);
                pieces.push((at, piece.len()));
                Ok(())
            })
            .unwrap();
        pieces
    }

    #[test]
    fn long_writes_are_cut_for_a_while_after_short_ones() {
        let turns = Turns::default();
        let long = 2 * PIECE + 5;
        let cut = [(0, PIECE), (PIECE, PIECE), (2 * PIECE, 5)];
        assert_eq!(pieces(&turns, long), [(0, long)]);
        assert_eq!(pieces(&turns, PIECE), [(0, PIECE)]);
        assert_eq!(pieces(&turns, long), [(0, long)]);
        assert_eq!(pieces(&turns, SHORT), [(0, SHORT)]);
        for _ in 0..WARMTH {
            assert_eq!(pieces(&turns, long), cut);
        }
        assert_eq!(pieces(&turns, long), [(0, long)]);
        for _ in 0..1000 {
            pieces(&turns, 512);
        }
        let warm = (0..1000).take_while(|_| pieces(&turns, long) == cut).count();
        assert_eq!(warm, WARMEST as usize);
    }

    /// Eight threads copied, the guest wrote 4 KiB at a time, and 99 of 100 of its writes took 25 ms instead
    /// of 6.
    #[test]
    fn long_writes_take_turns_and_a_short_one_waits_for_none() {
        let turns = Turns::default();
        pieces(&turns, 1);
        let (inside, done) = (Barrier::new(2), Barrier::new(2));
        thread::scope(|scope| {
            let first = scope.spawn(|| {
                turns.write(&[0; PIECE + 1], |_, at| {
                    if at == 0 {
                        inside.wait();
                        done.wait();
                    }
                    Ok(())
                })
            });
            inside.wait();
            let second = scope.spawn(|| pieces(&turns, PIECE + 1));
            assert_eq!(pieces(&turns, 4096), [(0, 4096)]);
            thread::sleep(Duration::from_millis(20));
            assert!(!second.is_finished());
            done.wait();
            first.join().unwrap().unwrap();
            assert_eq!(second.join().unwrap().len(), 2);
        });
    }

    #[test]
    fn a_failure_ends_the_write_and_the_turn() {
        let turns = Turns::default();
        pieces(&turns, 1);
        let mut calls = 0;
        let result = turns.write(&[0; 3 * PIECE], |_, _| {
            calls += 1;
            if calls == 2 { Err(Error::new(ErrorKind::NoSpace, "write")) } else { Ok(()) }
        });
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::NoSpace, 2));
        assert_eq!(pieces(&turns, 2 * PIECE).len(), 2);
    }
}
