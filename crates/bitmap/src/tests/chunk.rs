//! `ChunkBitmap` against a vector of booleans.

use std::ops::Range;

use proptest::prelude::*;

use crate::ChunkBitmap;

#[derive(Clone, Debug)]
enum Op {
    Set(Range<u64>),
    Clear(Range<u64>),
    SetAll,
    ClearAll,
    Word(u64, u64),
    Union(Vec<Range<u64>>),
}

/// Ranges that like borders of words (64) and leaves (4096), as well as single chunks and long runs.
fn range(len: u64) -> impl Strategy<Value = Range<u64>> {
    let point = prop_oneof![
        0..=len + 5,
        (0..=len / 64 + 1).prop_map(|n| n * 64),
        (0..=len / 4096 + 1).prop_map(|n| n * 4096)
    ];
    (point, prop_oneof![Just(1), 0u64..70, 0u64..5000, 0..=len]).prop_map(|(at, n)| at..at + n)
}

fn op(len: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => range(len).prop_map(Op::Set),
        5 => range(len).prop_map(Op::Clear),
        1 => Just(Op::SetAll),
        1 => Just(Op::ClearAll),
        3 => (0..=len / 64 + 1, prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)])
            .prop_map(|(i, w)| Op::Word(i, w)),
        2 => proptest::collection::vec(range(len), 0..5).prop_map(Op::Union),
    ]
}

fn case() -> impl Strategy<Value = (u64, Vec<Op>)> {
    let len =
        prop_oneof![0u64..300, 4000u64..4200, 8000u64..30_000, 262_100u64..262_200, 262_144u64..270_000];
    len.prop_flat_map(|len| (Just(len), proptest::collection::vec(op(len), 1..40)))
}

fn model_fill(model: &mut [bool], range: &Range<u64>, value: bool) -> u64 {
    let mut changed = 0;
    for bit in model.iter_mut().take(range.end as usize).skip(range.start as usize) {
        changed += u64::from(*bit != value);
        *bit = value;
    }
    changed
}

fn model_next(model: &[bool], from: u64, value: bool) -> Option<u64> {
    model.iter().skip(from as usize).position(|&b| b == value).map(|i| from + i as u64)
}

fn apply(bits: &mut ChunkBitmap, model: &mut [bool], op: &Op) {
    match op {
        Op::Set(r) => assert_eq!(bits.set(r.clone()), model_fill(model, r, true)),
        Op::Clear(r) => assert_eq!(bits.clear(r.clone()), model_fill(model, r, false)),
        Op::SetAll => {
            bits.set_all();
            model.fill(true);
        }
        Op::ClearAll => {
            bits.clear_all();
            model.fill(false);
        }
        Op::Word(index, word) => {
            bits.set_word(*index, *word);
            for (i, bit) in model.iter_mut().skip(*index as usize * 64).take(64).enumerate() {
                *bit = word >> i & 1 == 1;
            }
        }
        Op::Union(runs) => {
            let mut other = ChunkBitmap::new(bits.len());
            for run in runs {
                other.set(run.clone());
                model_fill(model, run, true);
            }
            bits.union(&other);
        }
    }
}

proptest! {
    #[test]
    fn behaves_like_a_vector_of_booleans(
        (len, ops) in case(),
        probes in proptest::collection::vec(any::<u64>(), 8),
    ) {
        let mut bits = ChunkBitmap::new(len);
        let mut model = vec![false; len as usize];
        for op in &ops {
            apply(&mut bits, &mut model, op);
            prop_assert_eq!(bits.count(), model.iter().filter(|b| **b).count() as u64);
        }
        for probe in probes {
            let at = probe % (len + 10);
            prop_assert_eq!(bits.get(at), model.get(at as usize).copied().unwrap_or(false));
            prop_assert_eq!(bits.next_set(at), model_next(&model, at, true));
            prop_assert_eq!(bits.next_clear(at), model_next(&model, at, false));
            let end = at + probe % 5000;
            let naive = model.iter().take(end as usize).skip(at as usize).filter(|b| **b).count() as u64;
            prop_assert_eq!(bits.count_in(at..end), naive);
            let index = at / 64;
            let bits_of_word = model.iter().skip(index as usize * 64).take(64);
            let naive = bits_of_word.enumerate().fold(0, |w, (i, &b)| w | u64::from(b) << i);
            prop_assert_eq!(bits.word(index), naive);
        }
        // Walking the runs finds exactly the bits that are set, in maximal runs.
        let (mut at, mut seen) = (0, vec![false; len as usize]);
        while let Some(run) = bits.next_run(at) {
            prop_assert!(run.start < run.end && (run.start > at || at == 0));
            model_fill(&mut seen, &run, true);
            at = run.end;
        }
        prop_assert_eq!(seen, model);
    }

    #[test]
    fn equality_is_about_the_bits((len, ops) in case()) {
        let mut bits = ChunkBitmap::new(len);
        let mut model = vec![false; len as usize];
        ops.iter().for_each(|op| apply(&mut bits, &mut model, op));
        let mut rebuilt = ChunkBitmap::new(len);
        let mut end = model.len();
        while let Some(last) = model[..end].iter().rposition(|b| *b) {
            let start = model[..last].iter().rposition(|b| !b).map_or(0, |clear| clear + 1);
            rebuilt.set(start as u64..last as u64 + 1);
            end = start;
        }
        prop_assert!(bits == rebuilt);
        if len > 0 {
            let flip = len / 2;
            if rebuilt.clear(flip..flip + 1) == 0 {
                rebuilt.set(flip..flip + 1);
            }
            prop_assert!(bits != rebuilt);
        }
    }
}

#[test]
fn union_of_different_lengths_ignores_what_lies_past_the_end() {
    let mut small = ChunkBitmap::new(100);
    let mut large = ChunkBitmap::new(100_000);
    large.set(90..50_000);
    small.set(3..4);
    small.union(&large);
    assert_eq!(small.count(), 11);
    large.union(&small);
    assert_eq!(large.count(), 49_911);
}

#[test]
fn the_whole_64_bit_space_works() {
    let mut bits = ChunkBitmap::new(u64::MAX);
    assert_eq!(bits.set(u64::MAX - 10..u64::MAX), 10);
    assert_eq!(bits.next_set(0), Some(u64::MAX - 10));
    assert_eq!(bits.next_clear(u64::MAX - 10), None);
    assert_eq!(bits.next_set(u64::MAX), None);
    bits.set_all();
    assert_eq!(bits.count(), u64::MAX);
    assert_eq!(bits.next_clear(0), None);
    bits.clear(1 << 63..(1 << 63) + 1);
    assert_eq!(bits.next_clear(0), Some(1 << 63));
    assert_eq!(bits.word(u64::MAX), 0);
    assert_eq!(bits.word(1 << 57), u64::MAX - 1);
    bits.set_word(u64::MAX / 64, 0);
    assert_eq!(bits.next_clear((1 << 63) + 1), Some(u64::MAX / 64 * 64));
}

#[test]
fn nothing_in_an_empty_bitmap() {
    let mut bits = ChunkBitmap::new(0);
    assert!(bits.is_empty());
    assert_eq!(bits.set(0..10), 0);
    bits.set_all();
    assert_eq!((bits.count(), bits.next_set(0), bits.next_clear(0)), (0, None, None));
}

#[test]
#[allow(clippy::reversed_empty_ranges, reason = "the point of the test")]
fn reversed_ranges_are_empty() {
    let mut bits = ChunkBitmap::new(10);
    assert_eq!(bits.set(7..3), 0);
    assert_eq!(bits.count_in(7..3), 0);
}
