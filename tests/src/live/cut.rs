//! Whether a copy shows one instant.
//!
//! Each writer does one operation after the other, every second of which marks its number in one of two
//! sectors far from each other. So the marks in a copy say for each writer up to which operation it goes;
//! everything else in it must fit. And the instants must be one: no operation that is missing may have ended
//! before one began that is there.

use blockmirror_block::sync::Mutex;

use super::contended::Sight;
use super::layout::Layout;
use super::model::{Done, Model};
use super::{WRITERS, author};

/// When the copy was taken, at the earliest and at the latest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) asked: u64,
    pub(super) over: u64,
}

/// Up to which operation of each writer a copy goes.
#[derive(Debug)]
pub(super) struct Cut {
    /// The last operation that is there for sure, and the first that is not.
    last: [(u64, u64); WRITERS],
}

impl Cut {
    pub(super) fn sight(&self, writer: usize, n: u64) -> Sight {
        match self.last.get(writer) {
            Some((in_it, _)) if n <= *in_it => Sight::Must,
            Some((_, first_out)) if n < *first_out => Sight::May,
            _ => Sight::Not,
        }
    }

    /// Reads the marks in `found`, and takes back in `expected`, which holds everything that was ever done,
    /// what came after them.
    pub(super) fn find(
        layout: &Layout,
        models: &[Mutex<Model>; WRITERS],
        found: &[u8],
        expected: &mut [u8],
        window: Window,
    ) -> Result<Self, String> {
        let mut last = [(0, 0); WRITERS];
        let mut latest_begin = (window.asked, 0, 0);
        let mut earliest_end = (window.over, 0, 0);
        for (writer, last) in last.iter_mut().enumerate() {
            let mark = [false, true]
                .into_iter()
                .filter_map(|second| {
                    let mark = layout.mark(writer, second);
                    author(&found[mark.start() as usize..], mark.start())
                })
                .filter(|(by, _)| *by == writer)
                .map(|(_, n)| n)
                .max()
                .unwrap_or(0);
            let model = models[writer].lock();
            let (mut in_it, mut first_out) = (mark, mark + 1);
            for done in model.undo.iter().rev().take_while(|done| done.n > mark) {
                let Some((range, old)) = &done.change else {
                    // In the part that all write to; whether it is in the copy is unknown.
                    first_out = first_out.max(if done.n == mark + 1 { mark + 2 } else { 0 });
                    continue;
                };
                let place = range.start() as usize..range.end() as usize;
                if done.n == mark + 1 && found[place.clone()] == expected[place.clone()] {
                    // What follows a mark and comes before the next one may be in it.
                    first_out = mark + 2;
                    if found[place.clone()] != old[..] {
                        in_it = mark + 1;
                    }
                    continue;
                }
                expected[place].copy_from_slice(old);
            }
            let kept_from = model.undo.front().map_or(model.n + 1, |done| done.n);
            if mark + 1 < kept_from {
                return Err(format!(
                    "the copy shows writer {writer} at {mark}, long before it was asked for"
                ));
            }
            let of = |n: u64| model.undo.iter().find(|done| done.n == n);
            let later = |done: &Done| (done.begin, writer, done.n);
            latest_begin = of(in_it).map(later).into_iter().fold(latest_begin, |a, b| a.max(b));
            let sooner = |done: &Done| (done.end, writer, done.n);
            earliest_end = of(first_out).map(sooner).into_iter().fold(earliest_end, |a, b| a.min(b));
            *last = (in_it, first_out);
        }
        if latest_begin.0 >= earliest_end.0 {
            return Err(format!(
                "the copy shows no single instant of {window:?}: (began, writer, operation) {latest_begin:?} is in \
                 it, (ended, writer, operation) {earliest_end:?} is not"
            ));
        }
        Ok(Self { last })
    }
}
