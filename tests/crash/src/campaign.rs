//! Which sequences are played, and the count of what came of them.

use std::fmt;

use blockmirror_block::testing::Rng;
use blockmirror_testing::qemu::Qemu;

use crate::op::{OPS, Op, opening, sequences};
use crate::played::{Played, play};
use crate::recorder::Point;
use crate::start::Start;

/// A write goes on at every so-manieth point.
const GO_ON_EVERY: u64 = 23;
/// QEMU looks at every so-manieth point, a process each time.
const QEMU_EVERY: u64 = 100;
/// One point of so many is looked at in long sequences: their flushes are far apart.
const THIN_LONG: u64 = 8;

/// What is played.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// On what.
    pub start: Start,
    /// What is done, a flush at the end aside.
    pub ops: Vec<Op>,
    /// One crash point of so many is looked at.
    pub thin: u64,
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.ops.iter().map(|op| op.name()).collect();
        write!(f, "{}: {}", self.start, names.join(","))
    }
}

impl Sequence {
    /// All sequences of `len` operations on `start`.
    pub fn all(start: Start, len: usize) -> Vec<Self> {
        sequences(start, len).into_iter().map(|ops| Self { start, ops, thin: 1 }).collect()
    }

    /// All sequences of up to two operations on every start, and of three on the first.
    pub fn exhaustive() -> Vec<Self> {
        let mut all = Vec::new();
        for (index, start) in Start::all().into_iter().enumerate() {
            let longest = if index == 0 { 3 } else { start.longest() };
            for len in 1..=longest {
                all.extend(Self::all(start, len));
            }
        }
        all
    }

    /// A random sequence of 8 to 40 operations.
    pub fn random(rng: &mut Rng) -> Self {
        let starts: Vec<_> = Start::all().into_iter().filter(|start| start.longest() > 1).collect();
        let start = rng.pick(&starts);
        let possible: Vec<_> = OPS.into_iter().filter(|op| op.applies_to(start)).collect();
        let mut ops = opening(start);
        ops.extend((0..rng.range(8, 40)).map(|_| rng.pick(&possible)));
        Self { start, ops, thin: THIN_LONG }
    }
}

/// What came of sequences.
#[derive(Debug, Default)]
pub struct Tally {
    /// Sequences played.
    pub sequences: u64,
    /// Crash points looked at.
    pub points: u64,
    /// Points after which a guest went on.
    pub went_on: u64,
    /// Points that `qemu-img check` judged.
    pub judged_by_qemu: u64,
    /// Operations that were refused.
    pub refused: u64,
    /// What must not happen, each with its sequence.
    pub violations: Vec<String>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} points of {} sequences, {} judged by qemu-img, a guest went on after {}; {} operations refused; {} violations",
            self.points,
            self.sequences,
            self.judged_by_qemu,
            self.went_on,
            self.refused,
            self.violations.len()
        )
    }
}

impl Tally {
    /// Plays `sequence` and looks at its crash points.
    pub fn replay(&mut self, sequence: &Sequence, qemu: Option<Qemu>) {
        self.sequences += 1;
        let result =
            play(sequence.start, &sequence.ops).and_then(|played| self.look_at(&played, sequence.thin, qemu));
        if let Err(why) = result {
            self.violations.push(format!("{sequence}: {why}"));
        }
    }

    fn look_at(&mut self, played: &Played, thin: u64, qemu: Option<Qemu>) -> Result<(), String> {
        self.refused += played.refused;
        let (mut seen, mut last) = (0, Vec::new());
        let mut look = |point: Point<'_>| -> Result<(), String> {
            seen += 1;
            if thin > 1 && !(seen + self.sequences).is_multiple_of(thin) {
                return Ok(());
            }
            self.points += 1;
            let survivor = played.verify(point)?;
            if self.points.is_multiple_of(GO_ON_EVERY) {
                self.went_on += 1;
                played.go_on(&survivor)?;
            }
            if let Some(qemu) = qemu
                && self.points.is_multiple_of(QEMU_EVERY)
            {
                self.judged_by_qemu += 1;
                played.judge(qemu, point, &survivor)?;
            }
            last = survivor.contents().to_vec();
            Ok(())
        };
        let mut visit = |point: Point<'_>| look(point).map_err(|why| format!("{why}; {}", point.describe()));
        played.visit_points(&mut visit)?;
        if thin == 1 && last != played.final_contents() {
            return Err("the last flush did not last".into());
        }
        Ok(())
    }
}
