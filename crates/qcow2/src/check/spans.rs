//! Tables that may overlap, cut into spans that do not.
//!
//! Snapshots have L1 tables of their own, and bitmaps tables; where a damaged image has many of them in one
//! place, each byte is read once and counted as often as it is used. So the work is bounded by the file.

/// A table, or part of one: from `start` to `end`, in any unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Of the active image, not of a snapshot or a bitmap.
    pub(super) active: bool,
}

/// A stretch that the same tables use from its start to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    /// How many active tables it is a part of.
    pub(super) active: u64,
    /// How many other tables.
    pub(super) others: u64,
}

impl Span {
    pub(super) fn uses(&self) -> u64 {
        self.active + self.others
    }
}

/// Cuts `uses` into spans, in order.
pub(super) fn spans(uses: &[Use]) -> Vec<Span> {
    // Where it changes, and by how much.
    let mut changes: Vec<(u64, i64, i64)> = Vec::with_capacity(uses.len() * 2);
    for one in uses.iter().filter(|one| one.start < one.end) {
        let (active, others) = if one.active { (1, 0) } else { (0, 1) };
        changes.push((one.start, active, others));
        changes.push((one.end, -active, -others));
    }
    changes.sort_unstable_by_key(|change| change.0);
    let (mut out, mut at, mut active, mut others) = (Vec::new(), 0, 0i64, 0i64);
    for (place, more_active, more_others) in changes {
        if place > at && active + others > 0 {
            // Sums of at most 65536 tables, never below zero.
            out.push(Span { start: at, end: place, active: active as u64, others: others as u64 });
        }
        (at, active, others) = (place, active + more_active, others + more_others);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_cut_and_counted() {
        let used = |start, end, active| Use { start, end, active };
        let found = spans(&[used(0, 10, true), used(5, 20, false), used(5, 8, false), used(30, 30, true)]);
        let flat: Vec<_> = found.iter().map(|s| (s.start, s.end, s.active, s.others)).collect();
        assert_eq!(flat, [(0, 5, 1, 0), (5, 8, 1, 2), (8, 10, 1, 1), (10, 20, 0, 1)]);
    }
}
