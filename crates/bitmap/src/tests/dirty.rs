//! `DirtyBitmap` against one boolean per byte of a small disk.

use std::ops::Range;

use proptest::prelude::*;

use crate::{Cursor, DirtyBitmap, GranularityError};

/// One boolean per granule; what bytes that means is computed the slow way.
struct Model {
    len: u64,
    granularity: u64,
    dirty: Vec<bool>,
}

impl Model {
    fn new(len: u64, granularity: u64) -> Self {
        Self { len, granularity, dirty: vec![false; len.div_ceil(granularity) as usize] }
    }

    fn bytes(&self, granule: usize) -> Range<u64> {
        let start = granule as u64 * self.granularity;
        start..(start + self.granularity).min(self.len)
    }

    /// Fills the granules that `pick` chooses; returns the bytes changed.
    fn fill(&mut self, value: bool, pick: impl Fn(Range<u64>) -> bool) -> u64 {
        let mut changed = 0;
        for i in 0..self.dirty.len() {
            let bytes = self.bytes(i);
            if pick(bytes.clone()) && self.dirty[i] != value {
                self.dirty[i] = value;
                changed += bytes.end - bytes.start;
            }
        }
        changed
    }

    fn set(&mut self, r: &Range<u64>) -> u64 {
        self.fill(true, |g| r.start < r.end && g.start < r.end && r.start < g.end)
    }

    fn clear(&mut self, r: &Range<u64>) -> u64 {
        self.fill(false, |g| r.start <= g.start && g.end <= r.end)
    }

    fn count(&self, r: &Range<u64>) -> u64 {
        (0..self.dirty.len())
            .filter(|&i| self.dirty[i])
            .map(|i| self.bytes(i))
            .map(|g| g.end.min(r.end).saturating_sub(g.start.max(r.start)))
            .sum()
    }

    /// The maximal run of bytes that are `value`, at or after `from`.
    fn run(&self, from: u64, value: bool) -> Option<Range<u64>> {
        let mut found: Option<Range<u64>> = None;
        for i in 0..self.dirty.len() {
            let bytes = self.bytes(i);
            if bytes.end <= from {
                continue;
            }
            match &mut found {
                None if self.dirty[i] == value => found = Some(bytes.start.max(from)..bytes.end),
                Some(run) if self.dirty[i] == value => run.end = bytes.end,
                Some(_) => break,
                None => {}
            }
        }
        found
    }
}

fn disk() -> impl Strategy<Value = (u64, u64)> {
    (prop_oneof![0u64..5000, 100_000u64..400_000, Just(262_144)], 9u32..14)
        .prop_map(|(len, shift)| (len, 1 << shift))
}

fn range(len: u64) -> impl Strategy<Value = Range<u64>> {
    let point = prop_oneof![0..=len + 600, (0..=len / 512).prop_map(|n| n * 512), Just(len)];
    (point, prop_oneof![0u64..3, 0u64..20_000, Just(512), Just(8192), 0..=len]).prop_map(|(at, n)| at..at + n)
}

fn case() -> impl Strategy<Value = (u64, u64, Vec<(bool, Range<u64>)>)> {
    disk().prop_flat_map(|(len, g)| {
        (Just(len), Just(g), proptest::collection::vec((any::<bool>(), range(len)), 1..30))
    })
}

fn play(len: u64, granularity: u64, ops: &[(bool, Range<u64>)]) -> (DirtyBitmap, Model) {
    let mut bitmap = DirtyBitmap::new(len, granularity).unwrap();
    let mut model = Model::new(len, granularity);
    for (set, range) in ops {
        if *set {
            assert_eq!(bitmap.set(range.clone()), model.set(range), "set {range:?}");
        } else {
            assert_eq!(bitmap.clear(range.clone()), model.clear(range), "clear {range:?}");
        }
    }
    (bitmap, model)
}

proptest! {
    #[test]
    fn agrees_with_the_model(
        (len, granularity, ops) in case(),
        probes in proptest::collection::vec((any::<u32>(), any::<u32>()), 10),
    ) {
        let (bitmap, model) = play(len, granularity, &ops);
        prop_assert_eq!(bitmap.dirty_bytes(), model.count(&(0..len)));
        prop_assert_eq!(bitmap.is_clean(), model.count(&(0..len)) == 0);
        for (a, b) in probes {
            let at = u64::from(a) % (len + 1000);
            let end = at + u64::from(b) % (len + 1000);
            prop_assert_eq!(bitmap.dirty_bytes_in(at..end), model.count(&(at..end)));
            let is_dirty = model.dirty.get((at / granularity) as usize).copied().unwrap_or(false);
            prop_assert_eq!(bitmap.is_dirty(at), is_dirty);
            prop_assert_eq!(bitmap.next_dirty(at, u64::MAX), model.run(at, true));
            prop_assert_eq!(bitmap.next_clean(at, u64::MAX), model.run(at, false));
            let max = u64::from(b) % 40_000;
            if let Some(run) = bitmap.next_dirty(at, max) {
                let whole = model.run(at, true).unwrap();
                prop_assert!(run.start == whole.start && run.end <= whole.end && run.end - run.start <= max);
                let more = whole.end.min(run.start + max);
                prop_assert!(run.end == more || (run.end % granularity == 0 && more - run.end < granularity));
            } else {
                prop_assert!(max == 0 || model.run(at, true).is_none());
            }
        }
    }

    #[test]
    fn taking_runs_and_clearing_them_ends_clean((len, granularity, ops) in case(), max_granules in 1u64..20) {
        let (mut bitmap, model) = play(len, granularity, &ops);
        let mut left = bitmap.dirty_bytes();
        let mut steps = 0;
        while let Some(run) = bitmap.next_dirty(0, max_granules * granularity) {
            let cleared = bitmap.clear(run.clone());
            prop_assert_eq!(cleared, run.end - run.start);
            prop_assert!(model.count(&run) == cleared);
            left -= cleared;
            steps += 1;
            prop_assert!(steps <= model.dirty.len());
        }
        prop_assert_eq!(left, 0);
        prop_assert!(bitmap.is_clean());
    }

    #[test]
    fn merging_marks_every_dirty_byte_and_only_granules_that_hold_one(
        (len, granularity, ops) in case(), (other_len, other_granularity, other_ops) in case()
    ) {
        for other_len in [len, other_len] {
            let (mut bitmap, mut model) = play(len, granularity, &ops);
            let (other, other_model) = play(other_len, other_granularity, &other_ops);
            bitmap.merge(&other);
            for i in 0..other_model.dirty.len() {
                if other_model.dirty[i] {
                    model.set(&other_model.bytes(i));
                }
            }
            prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), dirty_runs(&model));
        }
    }

    #[test]
    fn stored_and_loaded_in_any_pieces_it_is_the_same(
        (len, granularity, ops) in case(),
        cut in any::<u32>(),
        chunk in 1usize..40,
    ) {
        let (bitmap, model) = play(len, granularity, &ops);
        let mut bytes = vec![0xaa; bitmap.stored_len() as usize + 9];
        for (i, piece) in bytes.chunks_mut(chunk).enumerate() {
            bitmap.store((i * chunk) as u64, piece);
        }
        for (i, byte) in bytes.iter().enumerate() {
            let dirty = (0..8).filter(|b| model.dirty.get(i * 8 + b) == Some(&true));
            let naive = dirty.fold(0, |byte, b| byte | 1 << b);
            prop_assert_eq!(*byte, naive);
        }
        // What was there before is replaced, also by zeros.
        let mut loaded = DirtyBitmap::new(len, granularity).unwrap();
        loaded.set_all();
        let cut = cut as usize % bytes.len();
        loaded.load(cut as u64, &bytes[cut..]);
        loaded.load(0, &bytes[..cut]);
        prop_assert_eq!(&loaded, &bitmap);
        loaded.load(u64::MAX - 3, &[0xff; 9]);
        prop_assert_eq!(&loaded, &bitmap);
    }
}

fn dirty_runs(model: &Model) -> Vec<Range<u64>> {
    let (mut at, mut out) = (0, Vec::new());
    while let Some(run) = model.run(at, true) {
        at = run.end;
        out.push(run);
    }
    out
}

#[test]
fn granularities_are_checked_range_first() {
    for shift in 9..=31 {
        assert_eq!(DirtyBitmap::new(1, 1 << shift).map(|b| b.granularity()), Ok(1 << shift));
    }
    for bad in [0, 1, 511, (2 << 30) + 1, 4 << 30, u64::MAX] {
        assert_eq!(DirtyBitmap::new(1, bad).map(|_| ()), Err(GranularityError::OutOfRange(bad)));
    }
    let error = DirtyBitmap::new(1, 3000).unwrap_err();
    assert_eq!(error.to_string(), "granularity 3000 is not a power of two");
}

#[test]
fn a_disk_of_another_length_keeps_what_it_still_has() {
    let mut bitmap = DirtyBitmap::new(10_000, 4096).unwrap();
    bitmap.set(0..1);
    bitmap.set(9000..9001);
    let longer = bitmap.resized(20_000);
    assert_eq!(longer.runs().collect::<Vec<_>>(), [0..4096, 8192..12288]);
    let shorter = longer.resized(8192);
    assert_eq!(shorter.runs().collect::<Vec<_>>(), std::slice::from_ref(&(0..4096)));
    assert!(shorter.resized(20_000).next_dirty(4096, 1).is_none(), "what was cut off does not come back");
}

#[test]
fn a_partial_last_granule_counts_and_clears_by_the_bytes_it_has() {
    let mut bitmap = DirtyBitmap::new(1000, 512).unwrap();
    assert_eq!(bitmap.set(999..1000), 488);
    assert_eq!(bitmap.dirty_bytes(), 488);
    assert_eq!(bitmap.clear(512..999), 0);
    assert_eq!(bitmap.clear(512..1000), 488);
    bitmap.set_all();
    assert_eq!(bitmap.dirty_bytes(), 1000);
    assert_eq!(bitmap.next_dirty(700, 10), Some(700..710));
    assert_eq!(bitmap.next_dirty(1000, 10), None);
}

#[test]
fn a_walk_skips_what_was_cleared_ahead_and_misses_what_was_set_behind() {
    let mut bitmap = DirtyBitmap::new(1 << 20, 4096).unwrap();
    bitmap.set(0..4096);
    bitmap.set(65536..65537);
    bitmap.set(131_072..131_073);
    let mut cursor = Cursor::new(0);
    assert_eq!(cursor.next_run(&bitmap, u64::MAX), Some(0..4096));
    bitmap.clear(65536..69632);
    bitmap.set(0..1);
    assert_eq!(cursor.next_run(&bitmap, u64::MAX), Some(131_072..135_168));
    assert_eq!(cursor.next_run(&bitmap, u64::MAX), None);
    assert_eq!(cursor.position(), 135_168);
}

#[test]
fn the_largest_disk_works_to_its_last_byte() {
    let mut bitmap = DirtyBitmap::new(u64::MAX, 512).unwrap();
    assert_eq!(bitmap.set(u64::MAX - 1..u64::MAX), 511);
    assert_eq!(bitmap.next_dirty(0, u64::MAX), Some(u64::MAX - 511..u64::MAX));
    bitmap.set_all();
    assert_eq!(bitmap.dirty_bytes(), u64::MAX);
    assert_eq!(bitmap.next_clean(0, 1), None);
    let mut coarse = DirtyBitmap::new(u64::MAX, 2 << 30).unwrap();
    coarse.merge(&bitmap);
    assert_eq!(coarse.dirty_bytes(), u64::MAX);
}
