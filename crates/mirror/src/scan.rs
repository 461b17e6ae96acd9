//! Extent scan: the source's extents, compared with what the target reads as, give what each range needs.
//!
//! Workers scan when the core asks for it; a plan is a scan of the whole disk. One scan is one query to the
//! source and at most one to the target, whatever the number of runs. Its memory and the extents it visits
//! are capped; the caller goes on from where it stopped.

use blockmirror_block::{
    self as block, Backing, BlockDevice, ByteRange, Extent, ExtentKind, QueryBudget, Visit,
};

use crate::options::{MirrorOptions, SyncMode};
use crate::progress::Operation;

/// Runs of the source that one scan collects.
const MAX_SOURCE_RUNS: usize = 1024;
/// Extents that one query of a scan visits. Neighbours that need the same merge into one run, so that the
/// number of runs alone bounds nothing.
pub(crate) const MAX_EXTENTS: usize = 65_536;
/// Extents that one scan returns; more than the source's runs because the target's extents cut them.
pub(crate) const MAX_COPY_EXTENTS: usize = 4096;

/// What makes the target equal to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyAction {
    /// The source must be read.
    Copy {
        /// Whether the target is known to read as zeros there, so that zeros need not be written.
        target_zero: bool,
    },
    /// The source's files hold it in blocks that the target can share.
    Clone {
        /// As of a copy, for what cannot be shared after all.
        target_zero: bool,
    },
    /// The target must be made zero.
    Zero,
    /// Nothing: it reads as zeros already.
    Skip,
}

/// A run of the disk with one action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyExtent {
    pub(crate) range: ByteRange,
    pub(crate) action: CopyAction,
    /// With [`SyncMode::Top`]: the top image does not decide what is here, so that the
    /// target's backing file shows the same, unless the guest has written here since.
    pub(crate) below: bool,
}

/// What counts as data, and what is known of the target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// How many images from the top down decide what is copied; `None` for the whole chain.
    pub(crate) top_layers: Option<u32>,
    /// Whether data is searched for zeros, so that it matters whether the target reads as zero under it.
    pub(crate) seek_zeros: bool,
    /// Whether everything counts as data, so that zeros are written too.
    pub(crate) allocate: bool,
    pub(crate) target: TargetContent,
}

/// What is known of the target before it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TargetContent {
    /// It must be asked; what it says is zero stays zero.
    Asked,
    /// It must be asked; what it has not allocated may show something else later.
    AskedIfAllocated,
    /// Nothing, and it need not be asked: zeros that it reports may show something else later.
    Unknown,
    /// All of it reads as zeros.
    Zero,
}

impl TargetContent {
    /// That of a target which is not promised to read as zeros.
    pub(crate) fn of(source: Backing, target: Backing, options: &MirrorOptions) -> Self {
        match target {
            Backing::Remote { can_zero: true } => Self::Unknown,
            Backing::Possible if needs_backing(source, options) => Self::AskedIfAllocated,
            _ => Self::Asked,
        }
    }

    /// The part of an answer of the target that can be relied on.
    pub(crate) fn trusted(self, kind: ExtentKind) -> ExtentKind {
        match (self, kind) {
            (Self::Unknown, _) | (Self::AskedIfAllocated, ExtentKind::Unallocated) => ExtentKind::Unknown,
            (_, kind) => kind,
        }
    }
}

/// Whether less is copied than the source reads as, so that the target needs a backing file now or later.
pub(crate) fn needs_backing(source: Backing, options: &MirrorOptions) -> bool {
    match options.sync {
        SyncMode::Full => false,
        _ if options.target_is_below => false,
        SyncMode::Top => matches!(source, Backing::Attached | Backing::Hidden),
        SyncMode::None | SyncMode::Incremental | SyncMode::Bitmap => true,
    }
}

/// The cause of an error of an operation on the target that is the source's: it could not be read to complete
/// a unit.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SourceFailed(pub(crate) block::Error);

/// A failed operation, and the side of it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) operation: Operation,
    pub(crate) error: block::Error,
}

impl Failure {
    /// A failure of the source.
    pub(crate) fn at_source(error: block::Error) -> Self {
        Self { operation: Operation::Read, error }
    }

    /// A failure of the target, unless the operation had to read the source and that failed.
    pub(crate) fn at_target(error: block::Error) -> Self {
        let is_sources = error.cause().is_some_and(|cause| cause.is::<SourceFailed>());
        Self { operation: if is_sources { Operation::Read } else { Operation::Write }, error }
    }
}

/// Returns what a prefix of `range` needs. The extents are in order, without gaps, from the start of
/// `range`; an empty `range` gives none, any other at least one. Where they end before `range` does, a cap
/// was reached.
///
/// `target` is not asked if `rules` say that it is zero, and may then be `None`. Where it ends before `range`
/// does, zeros follow.
pub(crate) fn scan(
    source: &dyn BlockDevice,
    target: Option<&dyn BlockDevice>,
    range: ByteRange,
    rules: Rules,
) -> Result<Vec<CopyExtent>, Failure> {
    scan_sharing(source, target, range, rules, &|_| None)
}

/// The same; `shared` says which part of an extent of data can be cloned.
pub(crate) fn scan_sharing(
    source: &dyn BlockDevice,
    target: Option<&dyn BlockDevice>,
    range: ByteRange,
    rules: Rules,
    shared: &dyn Fn(&Extent) -> Option<ByteRange>,
) -> Result<Vec<CopyExtent>, Failure> {
    let runs = source_runs(source, range, rules, shared)?;
    let Some(end) = runs.last().map(|run| run.range.end()) else { return Ok(Vec::new()) };
    let zero_target = rules.target == TargetContent::Zero;
    let mut merge = ExtentMerge { runs, next: 0, at: range.start(), zero_target, out: Vec::new() };
    match (rules.target, target) {
        (TargetContent::Zero, _) => merge.advance(end, TargetKind::Zero),
        (TargetContent::Unknown, _) | (_, None) => merge.advance(end, TargetKind::Unknown),
        (TargetContent::Asked | TargetContent::AskedIfAllocated, Some(target)) => {
            ask_target(target, &mut merge, rules, end)?;
        }
    }
    Ok(merge.out)
}

/// The source's answer about a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SourceKind {
    Data,
    /// Data whose blocks the target can share.
    Shared,
    /// Zeros that the target must store.
    Zero,
    /// Zeros because no layer has allocated anything, and only the top is copied: the target need not
    /// allocate either.
    Unallocated,
}

/// The target's answer about a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TargetKind {
    Unknown,
    Zero,
    /// Zeros now, because no layer has allocated anything.
    Unallocated,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct SourceRun {
    range: ByteRange,
    source_kind: SourceKind,
    below: bool,
}

/// What one query may cost: partial extents and time by [`QueryBudget`], and a number of extents.
struct Budget {
    query: QueryBudget,
    visited: usize,
}

impl Budget {
    fn new() -> Self {
        Self { query: QueryBudget::new(), visited: 0 }
    }

    /// Counts `extent`, which has been taken; breaks if the query has taken enough.
    fn spend(&mut self, extent: &Extent) -> Visit {
        self.visited += 1;
        self.query.spend(extent)?;
        if self.visited < MAX_EXTENTS { Visit::Continue(()) } else { Visit::Break(()) }
    }
}

/// Collects the source's runs, neighbours with the same answer merged.
struct Runs {
    within: ByteRange,
    /// End of the last run, or start of `within`.
    covered: u64,
    runs: Vec<SourceRun>,
}

impl Runs {
    /// Appends everything up to `end`; breaks where the cap is reached.
    fn push(&mut self, end: u64, source_kind: SourceKind, below: bool) -> Visit {
        if end <= self.covered {
            return Visit::Continue(());
        }
        let full = self.runs.len() == MAX_SOURCE_RUNS;
        match self.runs.last_mut() {
            Some(last) if last.source_kind == source_kind && last.below == below => {
                last.range = ByteRange::new(last.range.start(), end);
            }
            _ if full => return Visit::Break(()),
            _ => self.runs.push(SourceRun { range: ByteRange::new(self.covered, end), source_kind, below }),
        }
        self.covered = end;
        Visit::Continue(())
    }

    /// A gap before the extent counts as data: when in doubt, read.
    fn visit(
        &mut self,
        extent: &Extent,
        rules: Rules,
        shared: &dyn Fn(&Extent) -> Option<ByteRange>,
    ) -> Visit {
        let part = extent.range.intersect(self.within);
        if part.is_empty() {
            return Visit::Continue(());
        }
        self.push(part.start(), SourceKind::Data, false)?;
        let below = rules.top_layers.is_some_and(|layers| extent.depth >= layers);
        let source_kind = match extent.kind {
            ExtentKind::Data => SourceKind::Data,
            kind if kind.is_unallocated() && rules.top_layers.is_some() => SourceKind::Unallocated,
            _ => SourceKind::Zero,
        };
        if source_kind == SourceKind::Data
            && !below
            && let Some(shared) = extent.clip(part).as_ref().and_then(shared)
        {
            self.push(shared.start(), SourceKind::Data, below)?;
            self.push(shared.end(), SourceKind::Shared, below)?;
        }
        self.push(part.end(), source_kind, below)
    }
}

fn source_runs(
    source: &dyn BlockDevice,
    range: ByteRange,
    rules: Rules,
    shared: &dyn Fn(&Extent) -> Option<ByteRange>,
) -> Result<Vec<SourceRun>, Failure> {
    let mut runs = Runs { within: range, covered: range.start(), runs: Vec::new() };
    let mut budget = Budget::new();
    let mut stopped = false;
    let answer = source.extents(range, &mut |extent| {
        let visit = match runs.visit(&extent, rules, shared) {
            Visit::Continue(()) => budget.spend(&extent),
            full => full,
        };
        stopped = visit.is_break();
        visit
    });
    answer.map_err(|error| Failure { operation: Operation::Read, error })?;
    if !stopped {
        // If this reaches the cap the caller asks for the rest.
        let _ = runs.push(range.end(), SourceKind::Data, false);
    }
    if rules.allocate {
        runs.runs.iter_mut().for_each(|run| run.source_kind = SourceKind::Data);
    }
    Ok(runs.runs)
}

fn ask_target(
    target: &dyn BlockDevice,
    merge: &mut ExtentMerge,
    rules: Rules,
    end: u64,
) -> Result<(), Failure> {
    let matters = |run: &SourceRun| match run.source_kind {
        _ if run.below => false,
        SourceKind::Data => rules.seek_zeros,
        SourceKind::Shared => false,
        SourceKind::Zero | SourceKind::Unallocated => true,
    };
    let first = merge.runs.iter().find(|run| matters(run)).map(|run| run.range.start());
    let last = merge.runs.iter().rev().find(|run| matters(run)).map(|run| run.range.end());
    let last = last.map(|last| last.min(target.len()));
    if let (Some(first), Some(last)) = (first, last)
        && first < last
    {
        let mut budget = Budget::new();
        let mut full = false;
        let mut visit = |extent: Extent| {
            let part = extent.range.intersect(ByteRange::new(merge.at, end));
            let spent = budget.spend(&extent).is_break();
            let target_kind = match rules.target.trusted(extent.kind) {
                ExtentKind::Zero | ExtentKind::Unallocated => TargetKind::Zero,
                ExtentKind::Unknown if extent.kind == ExtentKind::Unallocated => TargetKind::Unallocated,
                _ => TargetKind::Unknown,
            };
            if !part.is_empty() && (target_kind != TargetKind::Unknown || spent) {
                merge.advance(part.start(), TargetKind::Unknown);
                merge.advance(part.end(), target_kind);
            }
            full = merge.out.len() >= MAX_COPY_EXTENTS || (spent && !merge.out.is_empty());
            if full { Visit::Break(()) } else { Visit::Continue(()) }
        };
        match target.extents(ByteRange::new(first, last), &mut visit) {
            // A target without extent queries may hold anything.
            Err(error) if error.kind() == block::ErrorKind::Unsupported => {}
            Err(error) => return Err(Failure { operation: Operation::Write, error }),
            Ok(()) if full => return Ok(()),
            Ok(()) => {}
        }
    }
    merge.advance(end.min(target.len()), TargetKind::Unknown);
    merge.advance(end, TargetKind::Zero);
    Ok(())
}

/// Merges the source's runs with the target's extents.
struct ExtentMerge {
    runs: Vec<SourceRun>,
    /// The first run that reaches past `at`.
    next: usize,
    at: u64,
    /// All of the target is known to read as zeros.
    zero_target: bool,
    out: Vec<CopyExtent>,
}

impl ExtentMerge {
    /// Emits everything up to `end`, which is `target_kind` at the target.
    fn advance(&mut self, end: u64, target_kind: TargetKind) {
        while self.at < end {
            let Some(run) = self.runs.get(self.next) else { return };
            let range = ByteRange::new(self.at, run.range.end().min(end));
            let action = match (run.source_kind, target_kind) {
                (SourceKind::Data, _) => CopyAction::Copy { target_zero: target_kind == TargetKind::Zero },
                // What the target holds does not cut it: a clone is of whole units.
                (SourceKind::Shared, _) => CopyAction::Clone { target_zero: self.zero_target },
                (_, TargetKind::Zero) | (SourceKind::Unallocated, TargetKind::Unallocated) => {
                    CopyAction::Skip
                }
                (SourceKind::Zero | SourceKind::Unallocated, _) => CopyAction::Zero,
            };
            match self.out.last_mut() {
                Some(last) if last.action == action && last.below == run.below => {
                    last.range = ByteRange::new(last.range.start(), range.end());
                }
                _ => self.out.push(CopyExtent { range, action, below: run.below }),
            }
            self.at = range.end();
            if self.at == run.range.end() {
                self.next += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
