//! The inputs that reached something new, from which others are made.
//!
//! An input is kept if an edge of the code ran that had not run before, or ran another number of times, in
//! powers of two (the rule of AFL). Each thread has its own pool, so that a seed repeats what it found.

use blockmirror_block::testing::Rng;

use crate::edges;

/// Bytes that a pool keeps, at most.
pub(crate) const MOST_BYTES: usize = 64 << 20;

/// Inputs, each with its length in bytes.
pub(crate) struct Pool<T> {
    kept: Vec<(T, usize)>,
    bytes: usize,
    /// Of each edge the numbers of times that it ran in some input, as bits.
    seen: Vec<u8>,
}

impl<T> Pool<T> {
    pub(crate) fn new() -> Self {
        Self { kept: Vec::new(), bytes: 0, seen: vec![0; edges::MOST] }
    }

    /// How many edges have run.
    pub(crate) fn edges(&self) -> usize {
        self.seen.iter().filter(|seen| **seen != 0).count()
    }

    /// How many inputs are kept.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// One of those that are kept.
    pub(crate) fn pick(&self, rng: &mut Rng) -> Option<&T> {
        // The newest lead furthest.
        let newest = self.kept.len().min(16);
        let index = if rng.chance(30) {
            self.kept.len() - newest + rng.index(newest)
        } else {
            rng.index(self.kept.len())
        };
        self.kept.get(index).map(|(input, _)| input)
    }

    /// Whether what ran on this thread since [`edges::clear`] is new.
    pub(crate) fn is_new(&mut self) -> bool {
        let mut is_new = false;
        edges::visit(|edge, times| {
            let bit = bucket(times);
            is_new |= self.seen[edge] & bit == 0;
            self.seen[edge] |= bit;
        });
        is_new
    }

    /// Keeps `input`, of `len` bytes; another one goes where there is no room.
    pub(crate) fn keep(&mut self, input: T, len: usize, rng: &mut Rng) {
        self.bytes += len;
        self.kept.push((input, len));
        while self.bytes > MOST_BYTES && self.kept.len() > 1 {
            let (_, gone) = self.kept.swap_remove(rng.index(self.kept.len() - 1));
            self.bytes -= gone;
        }
    }
}

/// The bit of a number of times, from 1 on.
fn bucket(times: u8) -> u8 {
    match times {
        0..=3 => 1 << (times.max(1) - 1),
        4..=7 => 1 << 3,
        8..=15 => 1 << 4,
        16..=31 => 1 << 5,
        32..=127 => 1 << 6,
        _ => 1 << 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_where_there_is_no_room() {
        let mut rng = Rng::new(1, 0);
        let mut pool = Pool::new();
        (0..100).for_each(|input| pool.keep(input, MOST_BYTES / 10, &mut rng));
        assert_eq!(pool.len(), 10);
        assert!(pool.kept.iter().any(|(input, _)| *input == 99), "the last one stays");
        assert!(pool.pick(&mut rng).is_some());
    }

    #[test]
    fn numbers_of_times_fall_into_eight_classes() {
        let all: Vec<_> = [1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 127, 128, 255].map(bucket).into();
        assert_eq!(all, [1, 2, 4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128]);
    }
}
