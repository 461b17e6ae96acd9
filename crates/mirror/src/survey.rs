//! What a stretch of the disk needs: the source's extents, set against what the target reads as already.
//!
//! Workers run a survey when the core asks for one, and a plan is nothing but surveys of the whole disk. One
//! survey is one query to the source and at most one to the target, whatever the number of runs; what it
//! holds in memory is capped, and so is what it looks at; the caller goes on from where it stopped.

use blockmirror_block::{
    self as block, Backing, BlockDevice, ByteRange, Extent, ExtentKind, QueryBudget, Visit,
};

use crate::cow_target::SourceFailed;
use crate::options::{MirrorOptions, SyncMode};
use crate::progress::Operation;

/// Runs of the source looked at in one survey.
const MAX_SOURCE_RUNS: usize = 1024;
/// Extents that one query of a survey visits. Neighbours that need the same merge into one run, so that the
/// number of runs alone bounds nothing.
pub(crate) const MAX_EXTENTS: usize = 65_536;
/// Segments that one survey returns; more than the source's runs because the target's extents cut them.
pub(crate) const MAX_SEGMENTS: usize = 4096;

/// What has to be done so that the target equals the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The source must be read.
    Copy {
        /// Whether the target is known to read as zeros there, so that zeros need not be written.
        target_zero: bool,
    },
    /// The target must be made zero.
    Zero,
    /// Nothing: it reads as zeros already.
    Nothing,
}

/// A run of the disk with one need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) range: ByteRange,
    pub(crate) need: Need,
    /// With [`SyncMode::Top`](crate::SyncMode::Top): the top image does not decide what is here, so that the
    /// target's backing file shows the same, unless the guest has written here since.
    pub(crate) below: bool,
}

/// How to look.
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
    /// Nothing, and it need not be asked: zeros that it tells of may show something else later.
    Unknown,
    /// All of it reads as zeros.
    Zero,
}

impl TargetContent {
    /// Of a target that is not promised to read as zeros.
    pub(crate) fn of(source: Backing, target: Backing, options: &MirrorOptions) -> Self {
        match target {
            Backing::Remote { can_zero: true } => Self::Unknown,
            Backing::Possible if needs_backing(source, options) => Self::AskedIfAllocated,
            _ => Self::Asked,
        }
    }

    /// What an extent of the target is worth.
    pub(crate) fn trusted(self, kind: ExtentKind) -> ExtentKind {
        match (self, kind) {
            (Self::Unknown, _) | (Self::AskedIfAllocated, ExtentKind::Unallocated) => ExtentKind::Unknown,
            (_, kind) => kind,
        }
    }
}

/// Whether what is copied is less than the source reads as, so that the target needs a backing file, sooner
/// or later.
pub(crate) fn needs_backing(source: Backing, options: &MirrorOptions) -> bool {
    match options.sync {
        SyncMode::Full => false,
        _ if options.target_is_below => false,
        SyncMode::Top => matches!(source, Backing::Attached | Backing::Hidden),
        SyncMode::None | SyncMode::Incremental | SyncMode::Bitmap => true,
    }
}

/// A failed operation, and whose it was.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) operation: Operation,
    pub(crate) error: block::Error,
}

impl Failure {
    /// Of an operation on the target: its own, unless it had to read the source.
    pub(crate) fn at_target(error: block::Error) -> Self {
        let is_sources = error.cause().is_some_and(|cause| cause.is::<SourceFailed>());
        Self { operation: if is_sources { Operation::Read } else { Operation::Write }, error }
    }
}

/// Finds out what a prefix of `range` needs. The segments are in order, without gaps, from the start of
/// `range`; an empty `range` gives none, any other at least one. Where they end before `range` does, a cap
/// was reached.
///
/// `target` is not asked if `rules` say that it is zero, and may then be `None`. Where it ends before `range`
/// does, zeros follow.
pub(crate) fn survey(
    source: &dyn BlockDevice,
    target: Option<&dyn BlockDevice>,
    range: ByteRange,
    rules: Rules,
) -> Result<Vec<Segment>, Failure> {
    let runs = source_runs(source, range, rules)?;
    let Some(end) = runs.last().map(|run| run.range.end()) else { return Ok(Vec::new()) };
    let mut zip = Zip { runs, next: 0, at: range.start(), out: Vec::new() };
    match (rules.target, target) {
        (TargetContent::Zero, _) => zip.advance(end, There::Zero),
        (TargetContent::Unknown, _) | (_, None) => zip.advance(end, There::Anything),
        (TargetContent::Asked | TargetContent::AskedIfAllocated, Some(target)) => {
            ask_target(target, &mut zip, rules, end)?;
        }
    }
    Ok(zip.out)
}

/// What the source says of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Here {
    Data,
    /// Zeros that the target must state.
    Zero,
    /// Zeros because no layer holds anything, and only the top is copied: the target may hold nothing as
    /// well.
    Nothing,
}

/// What the target says of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum There {
    Anything,
    Zero,
    /// Zeros now, because no layer holds anything.
    Nothing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct SourceRun {
    range: ByteRange,
    here: Here,
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
    /// Takes the answer for everything up to `end`; refuses it where the cap is reached.
    fn push(&mut self, end: u64, here: Here, below: bool) -> Visit {
        if end <= self.covered {
            return Visit::Continue(());
        }
        let full = self.runs.len() == MAX_SOURCE_RUNS;
        match self.runs.last_mut() {
            Some(last) if last.here == here && last.below == below => {
                last.range = ByteRange::new(last.range.start(), end);
            }
            _ if full => return Visit::Break(()),
            _ => self.runs.push(SourceRun { range: ByteRange::new(self.covered, end), here, below }),
        }
        self.covered = end;
        Visit::Continue(())
    }

    /// A gap before the extent counts as data: when in doubt, read.
    fn visit(&mut self, extent: &Extent, rules: Rules) -> Visit {
        let part = extent.range.intersect(self.within);
        if part.is_empty() {
            return Visit::Continue(());
        }
        self.push(part.start(), Here::Data, false)?;
        let below = rules.top_layers.is_some_and(|layers| extent.depth >= layers);
        let here = match extent.kind {
            ExtentKind::Data => Here::Data,
            kind if kind.is_unallocated() && rules.top_layers.is_some() => Here::Nothing,
            _ => Here::Zero,
        };
        self.push(part.end(), here, below)
    }
}

fn source_runs(source: &dyn BlockDevice, range: ByteRange, rules: Rules) -> Result<Vec<SourceRun>, Failure> {
    let mut runs = Runs { within: range, covered: range.start(), runs: Vec::new() };
    let mut budget = Budget::new();
    let mut stopped = false;
    let answer = source.extents(range, &mut |extent| {
        let visit = match runs.visit(&extent, rules) {
            Visit::Continue(()) => budget.spend(&extent),
            full => full,
        };
        stopped = visit.is_break();
        visit
    });
    answer.map_err(|error| Failure { operation: Operation::Read, error })?;
    if !stopped {
        // Nothing is lost if this reaches the cap: the caller comes back for the rest.
        let _ = runs.push(range.end(), Here::Data, false);
    }
    if rules.allocate {
        runs.runs.iter_mut().for_each(|run| run.here = Here::Data);
    }
    Ok(runs.runs)
}

fn ask_target(target: &dyn BlockDevice, zip: &mut Zip, rules: Rules, end: u64) -> Result<(), Failure> {
    let matters = |run: &SourceRun| !run.below && (run.here != Here::Data || rules.seek_zeros);
    let first = zip.runs.iter().find(|run| matters(run)).map(|run| run.range.start());
    let last = zip.runs.iter().rev().find(|run| matters(run)).map(|run| run.range.end());
    let last = last.map(|last| last.min(target.len()));
    if let (Some(first), Some(last)) = (first, last)
        && first < last
    {
        let mut budget = Budget::new();
        let mut full = false;
        let mut visit = |extent: Extent| {
            let part = extent.range.intersect(ByteRange::new(zip.at, end));
            let spent = budget.spend(&extent).is_break();
            let there = match rules.target.trusted(extent.kind) {
                ExtentKind::Zero | ExtentKind::Unallocated => There::Zero,
                ExtentKind::Unknown if extent.kind == ExtentKind::Unallocated => There::Nothing,
                _ => There::Anything,
            };
            if !part.is_empty() && (there != There::Anything || spent) {
                zip.advance(part.start(), There::Anything);
                zip.advance(part.end(), there);
            }
            full = zip.out.len() >= MAX_SEGMENTS || (spent && !zip.out.is_empty());
            if full { Visit::Break(()) } else { Visit::Continue(()) }
        };
        match target.extents(ByteRange::new(first, last), &mut visit) {
            // A target that cannot tell may hold anything.
            Err(error) if error.kind() == block::ErrorKind::Unsupported => {}
            Err(error) => return Err(Failure { operation: Operation::Write, error }),
            Ok(()) if full => return Ok(()),
            Ok(()) => {}
        }
    }
    zip.advance(end.min(target.len()), There::Anything);
    zip.advance(end, There::Zero);
    Ok(())
}

/// Lays the source's runs over the target's.
struct Zip {
    runs: Vec<SourceRun>,
    /// The first run that reaches past `at`.
    next: usize,
    at: u64,
    out: Vec<Segment>,
}

impl Zip {
    /// Emits everything up to `end`, over which the target says `there`.
    fn advance(&mut self, end: u64, there: There) {
        while self.at < end {
            let Some(run) = self.runs.get(self.next) else { return };
            let range = ByteRange::new(self.at, run.range.end().min(end));
            let need = match (run.here, there) {
                (Here::Data, _) => Need::Copy { target_zero: there == There::Zero },
                (_, There::Zero) | (Here::Nothing, There::Nothing) => Need::Nothing,
                (Here::Zero | Here::Nothing, _) => Need::Zero,
            };
            match self.out.last_mut() {
                Some(last) if last.need == need && last.below == run.below => {
                    last.range = ByteRange::new(last.range.start(), range.end());
                }
                _ => self.out.push(Segment { range, need, below: run.below }),
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
