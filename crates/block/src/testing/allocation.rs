//! Which units of a disk a format has an answer for: the allocation map of `memory_disk`.

use std::collections::BTreeMap;

use crate::{ByteRange, ExtentKind};

/// Runs of [`ExtentKind::Data`] and [`ExtentKind::Zero`]; what is in no run is unallocated.
///
/// Must hold: runs do not overlap, are not empty, and two that touch differ.
#[derive(Clone, Debug, Default)]
pub(crate) struct AllocationMap {
    /// By start.
    runs: BTreeMap<u64, (u64, ExtentKind)>,
}

impl AllocationMap {
    /// Says that `range` is of `kind` from now on.
    pub(crate) fn set(&mut self, range: ByteRange, kind: ExtentKind) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start(), range.end());
        // Runs that touch `range`, the one that begins before it included.
        let near: Vec<(u64, u64, ExtentKind)> = self
            .runs
            .range(..=end)
            .rev()
            .take_while(|(_, (run_end, _))| *run_end >= start)
            .map(|(at, (run_end, kind))| (*at, *run_end, *kind))
            .collect();
        for (run_start, run_end, run_kind) in near {
            self.runs.remove(&run_start);
            if run_kind == kind {
                start = start.min(run_start);
                end = end.max(run_end);
                continue;
            }
            if run_start < range.start() {
                self.runs.insert(run_start, (range.start(), run_kind));
            }
            if run_end > range.end() {
                self.runs.insert(range.end(), (run_end, run_kind));
            }
        }
        if kind != ExtentKind::Unallocated {
            self.runs.insert(start, (end, kind));
        }
    }

    /// The maximal runs of `range`, in order, without gaps.
    pub(crate) fn runs(&self, range: ByteRange) -> Vec<(ByteRange, ExtentKind)> {
        let mut out = Vec::new();
        let mut at = range.start();
        let before = self.runs.range(..=at).next_back().map_or(at, |(start, _)| *start);
        for (start, (end, kind)) in self.runs.range(before..range.end().max(before)) {
            let run = ByteRange::new(*start, *end).intersect(range);
            if run.is_empty() {
                continue;
            }
            if at < run.start() {
                out.push((ByteRange::new(at, run.start()), ExtentKind::Unallocated));
            }
            out.push((run, *kind));
            at = run.end();
        }
        if at < range.end() {
            out.push((ByteRange::new(at, range.end()), ExtentKind::Unallocated));
        }
        out
    }
}
