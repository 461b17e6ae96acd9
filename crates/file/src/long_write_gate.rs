//! Keeps long writes to a file from starving short ones.
//!
//! The kernel admits one write at a time to a regular file's page cache (the inode lock), and its lock is not
//! fair: threads that write long pieces, one after the other, starve a writer of 4 KiB for whole time slices.
//! A guest whose disk is being copied is such a writer. So while short writes arrive, long writes are
//! serialised by this gate and split into pieces, and the inode lock is free between two pieces.
//!
//! Where few short writes arrive, as in a conversion, the gate is open: serialising costs a quarter of the
//! throughput. Called by [`FileStorage`](crate::FileStorage) for each write.

use std::sync::atomic::{AtomicU32, Ordering};

use blockmirror_block::Result;
use blockmirror_block::sync::Mutex;

/// Writes up to this size are short. A copy writes clusters, which are longer.
const SHORT: usize = 16 << 10;
/// Longer writes are serialised, in pieces of this size, while short writes arrive.
const PIECE: usize = 64 << 10;
/// How many long writes a short write closes the gate for ...
const CLOSED_BY_ONE: u32 = 4;
/// ... and how many a series of them does.
const MAX_CLOSED: u32 = 64;

/// The gate of one open file.
#[derive(Debug, Default)]
pub(crate) struct LongWriteGate {
    /// How many of the next long writes are serialised. Updates that race may lose one: it is a heuristic.
    closed_for: AtomicU32,
    /// *Guards*: the right to do a serialised long write. *Order*: leaf. *Not under it*: another lock.
    serial: Mutex<()>,
}

impl LongWriteGate {
    /// Does a write of `buf` by one or more calls of `write`, with each piece and where it begins in `buf`.
    pub(crate) fn write(&self, buf: &[u8], mut write: impl FnMut(&[u8], usize) -> Result<()>) -> Result<()> {
        let closed_for = self.closed_for.load(Ordering::Relaxed);
        if buf.len() <= SHORT && closed_for < MAX_CLOSED {
            self.closed_for.store((closed_for + CLOSED_BY_ONE).min(MAX_CLOSED), Ordering::Relaxed);
        }
        if buf.len() <= PIECE || closed_for == 0 {
            return write(buf, 0);
        }
        self.closed_for.store(closed_for - 1, Ordering::Relaxed);
        let _serial = self.serial.lock();
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
    fn pieces(gate: &LongWriteGate, len: usize) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        let buf: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        gate.write(&buf, |piece, at| {
            assert_eq!(piece, &buf[at..at + piece.len()]);
            pieces.push((at, piece.len()));
            Ok(())
        })
        .unwrap();
        pieces
    }

    #[test]
    fn long_writes_are_cut_for_a_while_after_short_ones() {
        let gate = LongWriteGate::default();
        let long = 2 * PIECE + 5;
        let cut = [(0, PIECE), (PIECE, PIECE), (2 * PIECE, 5)];
        assert_eq!(pieces(&gate, long), [(0, long)]);
        assert_eq!(pieces(&gate, PIECE), [(0, PIECE)]);
        assert_eq!(pieces(&gate, long), [(0, long)]);
        assert_eq!(pieces(&gate, SHORT), [(0, SHORT)]);
        for _ in 0..CLOSED_BY_ONE {
            assert_eq!(pieces(&gate, long), cut);
        }
        assert_eq!(pieces(&gate, long), [(0, long)]);
        for _ in 0..1000 {
            pieces(&gate, 512);
        }
        let warm = (0..1000).take_while(|_| pieces(&gate, long) == cut).count();
        assert_eq!(warm, MAX_CLOSED as usize);
    }

    /// Eight threads copied, the guest wrote 4 KiB at a time, and 99 of 100 of its writes took 25 ms instead
    /// of 6.
    #[test]
    fn long_writes_are_serialised_and_a_short_one_waits_for_none() {
        let gate = LongWriteGate::default();
        pieces(&gate, 1);
        let (inside, done) = (Barrier::new(2), Barrier::new(2));
        thread::scope(|scope| {
            let first = scope.spawn(|| {
                gate.write(&[0; PIECE + 1], |_, at| {
                    if at == 0 {
                        inside.wait();
                        done.wait();
                    }
                    Ok(())
                })
            });
            inside.wait();
            let second = scope.spawn(|| pieces(&gate, PIECE + 1));
            assert_eq!(pieces(&gate, 4096), [(0, 4096)]);
            thread::sleep(Duration::from_millis(20));
            assert!(!second.is_finished());
            done.wait();
            first.join().unwrap().unwrap();
            assert_eq!(second.join().unwrap().len(), 2);
        });
    }

    #[test]
    fn a_failure_ends_the_write_and_opens_the_gate() {
        let gate = LongWriteGate::default();
        pieces(&gate, 1);
        let mut calls = 0;
        let result = gate.write(&[0; 3 * PIECE], |_, _| {
            calls += 1;
            if calls == 2 { Err(Error::new(ErrorKind::NoSpace, "write")) } else { Ok(()) }
        });
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::NoSpace, 2));
        assert_eq!(pieces(&gate, 2 * PIECE).len(), 2);
    }
}
