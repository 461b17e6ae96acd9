//! What lies where: the answer to an allocation query.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::{ByteRange, Storage};

/// What a visitor of extents answers: go on, or stop here.
pub type Visit = ControlFlow<()>;

/// What a run of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes that must be read to be known.
    Data,
    /// Known to read as zeros, by statement of the layer at `depth` (a zero cluster, a hole in a file).
    Zero,
    /// No layer of the chain says anything: reads as zeros.
    Unallocated,
    /// No layer that is attached says anything, and one of them names a backing file that is not attached. It reads as zeros
    /// until that file is attached; what it shows then is not known.
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
/// neighbours differ in something.
#[derive(Clone, Debug)]
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
}

impl Extent {
    /// An extent at depth 0, neither compressed nor located.
    pub fn new(range: ByteRange, kind: ExtentKind) -> Self {
        Self { range, kind, depth: 0, compressed: false, host: None }
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

    /// Whether its bytes are known to read as zeros now, without reading them. What is [`ExtentKind::Unknown`] reads as zeros
    /// as well, but stays so only until a backing file is attached: who skips zeros that are there already asks for the kind.
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
    }
}

/// Collects extents into maximal runs, for devices that find them piecemeal.
#[derive(Debug, Default)]
pub struct ExtentMerger {
    pending: Option<Extent>,
}

impl ExtentMerger {
    /// Takes the next piece; hands the previous run to `visit` if the piece does not continue it.
    pub fn push(&mut self, next: Extent, visit: &mut dyn FnMut(Extent) -> Visit) -> Visit {
        if next.range.is_empty() {
            return Visit::Continue(());
        }
        match &mut self.pending {
            Some(run) if run.continues_into(&next) => {
                run.range = ByteRange::new(run.range.start(), next.range.end());
                Visit::Continue(())
            }
            pending => match pending.replace(next) {
                Some(done) => visit(done),
                None => Visit::Continue(()),
            },
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

/// A place in a host file where guest bytes lie as they are.
#[derive(Clone)]
pub struct HostRun {
    /// The file.
    pub storage: Arc<dyn Storage>,
    /// The offset in it.
    pub offset: u64,
}

impl fmt::Debug for HostRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:#x}", self.storage.name(), self.offset)
    }
}
