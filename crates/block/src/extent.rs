//! What lies where: the answer to an allocation query.

use std::sync::Arc;
use std::time::Duration;

use crate::sync::Instant;
use crate::{ByteRange, HostRun, Visit};

/// What a run of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
pub enum ExtentKind {
    /// Bytes that must be read to be known.
    Data,
    /// Known to read as zeros, by statement of the layer at `depth` (a zero cluster, a hole in a file).
    Zero,
    /// No layer of the chain says anything: reads as zeros.
    Unallocated,
    /// No layer that is attached says anything, and one of them names a backing file that is not attached. It
    /// reads as zeros until that file is attached; what it shows then is not known.
    Unknown,
}

impl ExtentKind {
    /// Whether no attached layer decides what is here.
    pub fn is_unallocated(self) -> bool {
        matches!(self, Self::Unallocated | Self::Unknown)
    }
}

/// One maximal run of a disk with one answer.
///
/// Extents of one query are delivered in order, without gaps or overlaps, and are never empty. Two
/// neighbours differ in something, unless the first of them is [`partial`](Self::partial).
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub struct Extent {
    /// The guest bytes it covers.
    pub range: ByteRange,
    /// What they are.
    pub kind: ExtentKind,
    /// How deep in the backing chain the answer was found; 0 is the image itself. For
    /// [`ExtentKind::Unallocated`] and [`ExtentKind::Unknown`], the depth of the last layer asked.
    pub depth: u32,
    /// Whether the bytes are stored compressed.
    pub compressed: bool,
    /// Where the bytes lie in a host file, if they lie somewhere as they are. Also set for
    /// [`ExtentKind::Zero`] where space is reserved for them.
    pub host: Option<HostRun>,
    /// With [`ExtentKind::Zero`]: the format maps stored bytes here, and the storage that should hold them
    /// has a hole there (a cluster that was preallocated, or a file that was made sparse). The layer decides
    /// what is here, as for data.
    pub mapped_hole: bool,
    /// The device has used up its budget of work inside a run and reports what it has: the run may go on in
    /// the next extent.
    pub partial: bool,
}

impl Extent {
    /// An extent at depth 0, neither compressed nor located.
    pub fn new(range: ByteRange, kind: ExtentKind) -> Self {
        Self { range, kind, depth: 0, compressed: false, host: None, mapped_hole: false, partial: false }
    }

    /// The same, one or more layers down.
    #[must_use]
    pub fn at_depth(mut self, depth: u32) -> Self {
        self.depth = depth;
        self
    }

    /// The same, stored compressed.
    #[must_use]
    pub fn compressed(mut self) -> Self {
        self.compressed = true;
        self
    }

    /// The same, located in a host file.
    #[must_use]
    pub fn in_host(mut self, host: HostRun) -> Self {
        self.host = Some(host);
        self
    }

    /// The same, mapped to bytes that are a hole of their storage: it reads as zeros.
    #[must_use]
    pub fn in_hole(mut self) -> Self {
        self.kind = ExtentKind::Zero;
        self.mapped_hole = true;
        self
    }

    /// Whether its bytes are known to read as zeros now, without reading them. What is
    /// [`ExtentKind::Unknown`] reads as zeros as well, but stays so only until a backing file is attached:
    /// who skips zeros that are there already asks for the kind.
    pub fn reads_as_zero(&self) -> bool {
        !matches!(self.kind, ExtentKind::Data)
    }

    /// Whether the image itself, not a layer below, decides what is here.
    pub fn in_top(&self) -> bool {
        self.depth == 0 && !self.kind.is_unallocated()
    }

    /// The part of it inside `range`, or `None` if they do not meet. The host location moves along.
    #[must_use]
    pub fn clip(&self, range: ByteRange) -> Option<Self> {
        let part = self.range.intersect(range);
        if part.is_empty() {
            return None;
        }
        let mut out = self.clone();
        out.range = part;
        if let Some(host) = &mut out.host {
            host.offset += part.start() - self.range.start();
        }
        Some(out)
    }

    /// Whether `next` follows directly and continues the same answer.
    pub fn continues_into(&self, next: &Self) -> bool {
        let host = match (&self.host, &next.host) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                Arc::ptr_eq(&a.storage, &b.storage)
                    && a.offset.checked_add(self.range.len()) == Some(b.offset)
            }
            _ => false,
        };
        host && self.range.end() == next.range.start()
            && self.kind == next.kind
            && self.depth == next.depth
            && self.compressed == next.compressed
            && self.mapped_hole == next.mapped_hole
    }
}

/// Collects extents into maximal runs, for devices that find them piecemeal.
#[derive(Debug, Default)]
pub struct ExtentMerger {
    pending: Option<Extent>,
}

impl ExtentMerger {
    /// Takes the next piece; hands the previous run to `visit` if the piece does not continue it. A partial
    /// piece is handed out at once, so that the budget of a layer below is the budget of the whole chain.
    pub fn push(&mut self, next: Extent, visit: &mut dyn FnMut(Extent) -> Visit) -> Visit {
        if next.range.is_empty() {
            return Visit::Continue(());
        }
        let partial = next.partial;
        match &mut self.pending {
            Some(run) if run.continues_into(&next) => {
                run.range = ByteRange::new(run.range.start(), next.range.end());
            }
            pending => {
                if let Some(done) = pending.replace(next) {
                    visit(done)?;
                }
            }
        }
        if partial { self.cut(visit) } else { Visit::Continue(()) }
    }

    /// Hands out the run so far, as partial. For a device that has used up its budget before the end of the
    /// query.
    pub fn cut(&mut self, visit: &mut dyn FnMut(Extent) -> Visit) -> Visit {
        match self.pending.take() {
            Some(run) => visit(Extent { partial: true, ..run }),
            None => Visit::Continue(()),
        }
    }

    /// Hands out the last run.
    pub fn finish(self, visit: &mut dyn FnMut(Extent) -> Visit) -> Visit {
        match self.pending {
            Some(run) => visit(run),
            None => Visit::Continue(()),
        }
    }
}

/// How long one caller waits for the answer to one query: the stop check of
/// [`extents`](crate::BlockDevice::extents).
///
/// A caller that must stay responsive asks [`spend`](Self::spend) about each extent after it has taken it,
/// stops where that breaks, and asks the device again from the end of that extent. Only at partial extents
/// does it break, so that an answer is never cut into pieces without need.
#[derive(Debug)]
pub struct QueryBudget {
    partial: u32,
    started: Instant,
}

impl Default for QueryBudget {
    fn default() -> Self {
        Self::new()
    }
}

impl QueryBudget {
    /// Partial extents that one query may deliver.
    const PARTIAL: u32 = 16;
    /// How long a query may take before its next partial extent is the last.
    const TIME: Duration = Duration::from_millis(100);

    /// The budget of a query that begins now.
    pub fn new() -> Self {
        Self { partial: 0, started: Instant::now() }
    }

    /// Counts `extent`, which has been taken; breaks if the query has taken enough.
    pub fn spend(&mut self, extent: &Extent) -> Visit {
        if !extent.partial {
            return Visit::Continue(());
        }
        self.partial += 1;
        let spent = self.partial >= Self::PARTIAL || self.started.elapsed() >= Self::TIME;
        if spent { Visit::Break(()) } else { Visit::Continue(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64, kind: ExtentKind) -> Extent {
        Extent::new(ByteRange::new(start, end), kind)
    }

    fn merged(pieces: Vec<Extent>) -> Vec<(u64, u64, bool)> {
        let (mut merger, mut out) = (ExtentMerger::default(), Vec::new());
        let mut visit = |e: Extent| {
            out.push((e.range.start(), e.range.end(), e.partial));
            Visit::Continue(())
        };
        for piece in pieces {
            let _ = merger.push(piece, &mut visit);
        }
        let _ = merger.finish(&mut visit);
        out
    }

    #[test]
    fn a_partial_piece_is_handed_out_at_once_with_what_came_before_it() {
        let mut second = extent(10, 20, ExtentKind::Data);
        second.partial = true;
        let pieces = vec![extent(0, 10, ExtentKind::Data), second, extent(20, 30, ExtentKind::Data)];
        assert_eq!(merged(pieces), [(0, 20, true), (20, 30, false)]);
    }

    #[test]
    fn a_mapped_hole_and_a_zero_cluster_are_different_runs() {
        let hole = extent(0, 10, ExtentKind::Data).in_hole();
        assert!(hole.reads_as_zero() && hole.in_top());
        assert_eq!(merged(vec![hole, extent(10, 20, ExtentKind::Zero)]), [(0, 10, false), (10, 20, false)]);
    }

    #[test]
    fn a_budget_breaks_at_partial_extents_only() {
        let mut budget = QueryBudget::new();
        let mut whole = extent(0, 1, ExtentKind::Zero);
        for _ in 0..1000 {
            assert!(budget.spend(&whole).is_continue());
        }
        whole.partial = true;
        let spent = (0..1000).position(|_| budget.spend(&whole).is_break());
        assert!(spent.is_some_and(|n| n < QueryBudget::PARTIAL as usize), "{spent:?}");
    }
}
