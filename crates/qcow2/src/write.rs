//! Writing guest bytes: resolve, move the data, commit.
//!
//! [`Qcow2::resolve_write`] plans where the bytes go, under the metadata lock (`plan`), and returns a guard
//! (`guard`). Without that lock the edges of new clusters are filled and the data is written.
//! [`WriteGuard::commit`] publishes the entries. Dropping the guard instead releases the clusters: nothing
//! ever pointed at them. Those of a write that may still reach the disk stay unused.
//!
//! Two writes whose clusters overlap are serialized where either changes the mapping; overwrites in place are
//! not.

mod cloned;
mod compressed;
mod guard;
mod l2_table;
mod plan;

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use blockmirror_block::{BlockDevice, ByteRange, RangeGuard, Result, WriteFlags, ZeroFlags};

use crate::context::ImageContext;
use crate::format::entry::PlainEntry;
use crate::image::Qcow2;
use crate::offset::{GuestCluster, HostCluster, HostOffset};
use crate::refcounts::Grant;

/// Bytes that one guard covers at most when the device writes for itself.
const MAX_WRITE: u64 = 8 << 20;

/// Clusters that one guard maps at most where no data is written.
const MAX_AHEAD: u64 = 8192;

/// Guest bytes and where they are to be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteRun {
    /// The guest bytes.
    pub range: ByteRange,
    /// Where they go in the image file, or in the external data file.
    pub host: HostOffset,
}

/// Bytes around the written ones that a newly used (sub)cluster must hold as well.
#[derive(Clone, Copy, Debug)]
struct Fill {
    range: ByteRange,
    host: HostOffset,
    /// The host reads as zeros there.
    fresh: bool,
}

/// A change of one L2 entry that waits for its data.
#[derive(Clone, Debug)]
struct Update {
    cluster: GuestCluster,
    entry: PlainEntry,
    /// Host clusters that lose a reference by it.
    drops: Range<HostCluster>,
}

/// A write that has its place but is not visible yet.
#[must_use = "a write that is not committed never happened"]
#[derive(Debug)]
pub struct WriteGuard<'a> {
    image: &'a Qcow2,
    range: ByteRange,
    runs: Vec<WriteRun>,
    fills: Vec<Fill>,
    updates: Vec<Update>,
    grants: Vec<Grant>,
    /// A write to its place has failed and may still reach the disk.
    may_come_late: AtomicBool,
    /// What a file that was cut short lacks around the range becomes zeros.
    lost_as_zeros: bool,
    /// `None` where the caller holds the range.
    _lock: Option<RangeGuard<'a>>,
}

impl Qcow2 {
    /// Finds or allocates a place for a write of `range`.
    ///
    /// Waits for overlapping operations that are under way. The caller writes the data to
    /// [`WriteGuard::runs`] after [`WriteGuard::fill_edges`], in any order, and then commits.
    ///
    /// # Errors
    /// A read-only or poisoned image; a range past the disk; damaged metadata; no space.
    pub fn resolve_write(&self, range: ByteRange) -> Result<WriteGuard<'_>> {
        self.resolve(range, true)
    }

    /// The same; bitmaps record it only if the guest is to see another content.
    fn resolve(&self, range: ByteRange, changes_content: bool) -> Result<WriteGuard<'_>> {
        let range = self.bounds("write", Some(range), range.start(), range.len())?;
        self.check_writable("write")?;
        self.maybe_write_back()?;
        self.note_damage(self.plan_write(range, changes_content))
    }

    /// Writes `buf` at `range`, whose clusters the caller holds exclusively.
    pub(crate) fn write_held(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        let guard = self.note_damage(self.plan_moving(WriteGuard::new(self, range, None)))?;
        guard.fill_edges()?;
        guard.write(buf)?;
        guard.commit()
    }

    fn plan_write(&self, range: ByteRange, changes_content: bool) -> Result<WriteGuard<'_>> {
        let clusters = range.align_outward(self.ctx.cluster().bytes());
        let recorded = if changes_content { range } else { ByteRange::default() };
        let mut guard = WriteGuard::new(self, range, Some(self.ranges.lock_shared(clusters)?));
        self.record_write(recorded)?;
        if guard.find_in_place()? {
            return Ok(guard);
        }
        drop(guard);
        let guard = WriteGuard::new(self, range, Some(self.ranges.lock_exclusive(clusters)?));
        // In between the bitmaps may have been stored.
        self.record_write(recorded)?;
        self.plan_moving(guard)
    }

    /// Plans a write that may change the mapping; the clusters are held.
    fn plan_moving<'a>(&'a self, mut guard: WriteGuard<'a>) -> Result<WriteGuard<'a>> {
        let stop = self.stop_check("write");
        while let Some(missing) = guard.plan()? {
            self.provide(missing, &stop)?;
        }
        Ok(guard)
    }

    /// Writes `buf` at `range`, inside the disk. Of `flags` only [`WriteFlags::LOST_AS_ZEROS`] counts.
    pub(crate) fn write_mapped(&self, buf: &[u8], range: ByteRange, flags: WriteFlags) -> Result<()> {
        let mut rest = buf;
        // Bounds what one operation allocates, plans and fills at once.
        for part in range.pieces(MAX_WRITE) {
            // A piece of the buffer's range.
            let (now, later) = rest.split_at(part.len() as usize);
            let mut guard = self.resolve_write(part)?;
            guard.lost_as_zeros = flags.contains(WriteFlags::LOST_AS_ZEROS);
            guard.fill_edges()?;
            guard.write(now)?;
            guard.commit()?;
            rest = later;
        }
        // An empty write still says whether the image can be written.
        self.check_writable("write")
    }

    /// Maps `range`, which reads as zeros, to bytes that do so, as `preallocation=metadata` does for a whole
    /// image.
    pub(crate) fn map_ahead(&self, range: ByteRange) -> Result<()> {
        let cluster = self.ctx.cluster();
        let stop = self.stop_check("preallocate");
        for part in range.pieces(MAX_AHEAD * cluster.bytes()) {
            stop.check()?;
            let guard = self.resolve(part, false)?;
            guard.fill_edges()?;
            // A place that was used before holds what it held; one past the end of the file is zeros once the
            // file is longer.
            for run in guard.runs() {
                let end = run.host.0 + run.range.len();
                // The file ends with a cluster, though the disk may not.
                let whole = run.range.end() == self.ctx.size() && !self.ctx.format.external_data;
                let end = if whole { end.next_multiple_of(cluster.bytes()) } else { end };
                let zeroed = ByteRange::new(run.host.0, end);
                let zeroed = self.ctx.data().write_zeroes(zeroed, ZeroFlags::MAY_UNMAP);
                zeroed.inspect_err(|error| guard.not_written(error))?;
            }
            guard.commit()?;
        }
        self.check_writable("preallocate")
    }

    /// Maps `range` of a raw data file, whose bytes there are zeros.
    pub(crate) fn map_zeros(&self, range: ByteRange) -> Result<()> {
        let stop = self.stop_check("resize");
        for part in range.pieces(MAX_AHEAD * self.ctx.cluster().bytes()) {
            stop.check()?;
            self.resolve(part, false)?.commit()?;
        }
        Ok(())
    }

    /// Writes metadata back if so much of it is dirty that the caches would overflow.
    pub(crate) fn maybe_write_back(&self) -> Result<()> {
        let wanted = {
            let meta = self.meta.lock();
            meta.check_poison(&self.ctx, "write")?;
            meta.l2.wants_write_back() || meta.refcounts.as_ref().is_some_and(|r| r.wants_write_back())
        };
        if wanted { self.flush() } else { Ok(()) }
    }
}

/// Whether the host cluster of `entry` belongs to it alone.
pub(crate) fn writable_in_place(ctx: &ImageContext, entry: &PlainEntry) -> bool {
    entry.host.is_some() && (entry.copied || ctx.format.external_data)
}
