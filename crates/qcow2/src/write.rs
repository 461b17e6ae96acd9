//! Writing guest bytes: resolve, move the data, commit.
//!
//! [`Qcow2::resolve_write`] decides where the bytes go, under the metadata lock, and returns a guard. Then,
//! without any metadata lock, the edges that a new cluster needs are filled and the data is written.
//! [`WriteGuard::commit`] publishes the entries. Dropping the guard gives the clusters back: nothing ever
//! pointed at them.
//!
//! Two writes whose clusters overlap take turns where either changes the mapping; overwrites in place do not.

use std::ops::Range;

use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, RangeGuard, Result, WriteFlags, ZeroFlags, read_lost_as_zeros,
};

use crate::context::ImageContext;
use crate::format::entry::{Entry, PlainEntry};
use crate::image::Qcow2;
use crate::meta::{Mapping, Meta, references};
use crate::offset::HostOffset;
use crate::refcounts::Grant;
use crate::verify::Missing;

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
    cluster: u64,
    entry: PlainEntry,
    /// Host clusters that lose a reference by it.
    drops: Range<u64>,
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
        let range = self.bounds("write", Some(range), range.start(), range.len())?;
        self.check_writable("write")?;
        self.maybe_write_back()?;
        self.note_damage(self.plan_write(range))
    }

    /// Writes `buf` at `range`, whose clusters the caller holds exclusively.
    pub(crate) fn write_held(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        let guard = self.note_damage(self.plan_moving(WriteGuard::new(self, range, None)))?;
        guard.fill_edges()?;
        guard.write(buf)?;
        guard.commit()
    }

    fn plan_write(&self, range: ByteRange) -> Result<WriteGuard<'_>> {
        let clusters = range.align_outward(self.ctx.cluster().bytes());
        let mut guard = WriteGuard::new(self, range, Some(self.ranges.shared(clusters)));
        if guard.find_in_place()? {
            return Ok(guard);
        }
        drop(guard);
        let guard = WriteGuard::new(self, range, Some(self.ranges.exclusive(clusters)));
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
            let guard = self.resolve_write(part)?;
            guard.fill_edges()?;
            // A place that was used before holds what it held; one past the end of the file is zeros once the
            // file is longer.
            for run in guard.runs() {
                let end = run.host.0 + run.range.len();
                // The file ends with a cluster, though the disk may not.
                let whole = run.range.end() == self.ctx.size() && !self.ctx.format.external_data;
                let end = if whole { end.next_multiple_of(cluster.bytes()) } else { end };
                self.ctx.data().write_zeroes(ByteRange::new(run.host.0, end), ZeroFlags::MAY_UNMAP)?;
            }
            guard.commit()?;
        }
        self.check_writable("preallocate")
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

/// What a disk writes as a whole.
const SECTOR: u64 = 512;

/// Bytes that one guard covers at most when the device writes for itself.
const MAX_WRITE: u64 = 8 << 20;

/// Clusters that one guard maps at most where no data is written.
const MAX_AHEAD: u64 = 8192;

impl<'a> WriteGuard<'a> {
    fn new(image: &'a Qcow2, range: ByteRange, lock: Option<RangeGuard<'a>>) -> Self {
        Self {
            image,
            range,
            runs: Vec::new(),
            fills: Vec::new(),
            updates: Vec::new(),
            grants: Vec::new(),
            lost_as_zeros: false,
            _lock: lock,
        }
    }

    /// Where the data goes, in order and without gaps.
    pub fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    /// Writes what newly used clusters must hold around the data: old contents, backing contents or zeros.
    ///
    /// # Errors
    /// Reading the old contents or writing the new ones failed; drop the guard then.
    pub fn fill_edges(&self) -> Result<()> {
        for fill in &self.fills {
            self.fill(fill)?;
        }
        Ok(())
    }

    /// Writes `data`, all of the range, to its place.
    ///
    /// # Errors
    /// The storage failed, or `data` has another length than the range; drop the guard then.
    pub fn write(&self, data: &[u8]) -> Result<()> {
        if data.len() as u64 != self.range.len() {
            return Err(Error::new(ErrorKind::InvalidInput, "write").because(format!(
                "{} bytes of data for a range of {}",
                data.len(),
                self.range.len()
            )));
        }
        let mut rest = data;
        for run in &self.runs {
            // The runs cover the range, and the data is as long.
            let (now, later) = rest.split_at(run.range.len() as usize);
            self.image.ctx.data().write_at(now, run.host.0)?;
            rest = later;
        }
        Ok(())
    }

    /// Makes the write visible. The data and the edges must have been written.
    ///
    /// # Errors
    /// The metadata could not be read back; then each cluster of the range is either old or new.
    pub fn commit(mut self) -> Result<()> {
        if self.updates.is_empty() {
            return Ok(());
        }
        let ctx = &self.image.ctx;
        // From here on the clusters belong to the image. Should publishing one of them fail they leak.
        self.grants.clear();
        let mut meta = self.image.meta.lock();
        for update in self.updates.drain(..) {
            meta.set_entry(ctx, update.cluster, update.entry)?;
            if !update.drops.is_empty() {
                meta.refcounts(ctx)?.defer_unref(ctx, update.drops);
            }
        }
        Ok(())
    }

    /// Plans the write if every cluster of it can be overwritten in place as it is.
    fn find_in_place(&mut self) -> Result<bool> {
        let mut meta = self.image.meta.lock();
        let ctx = &self.image.ctx;
        let mut at = self.range.start();
        while at < self.range.end() {
            let part = self.part_at(at);
            let cluster = ctx.cluster().index(at);
            let Entry::Plain(entry) = meta.entry_to_write(ctx, cluster)? else { return Ok(false) };
            let touched = self.touched(part);
            match entry.host {
                Some(host) if writable_in_place(ctx, &entry) && touched & !entry.allocated == 0 => {
                    self.check_overlap(&mut meta, host)?;
                    self.push_run(part, host);
                }
                _ => return Ok(false),
            }
            at = part.end();
        }
        Ok(true)
    }

    /// Plans the write from where the last call stopped; `Some` says what must come first.
    fn plan(&mut self) -> Result<Option<Missing>> {
        let image = self.image;
        let ctx = &image.ctx;
        let mut meta = image.meta.lock();
        meta.check_poison(ctx, "write")?;
        // The tables first, so that they do not lie between the data clusters.
        let clusters = ctx.cluster().index(self.range.start())..ctx.cluster().count(self.range.end());
        let mut first = clusters.start;
        while first < clusters.end {
            if let Some(missing) = ensure_l2_table(ctx, &mut meta, first)? {
                return Ok(Some(missing));
            }
            first = (first / ctx.l2_entries() + 1) * ctx.l2_entries();
        }
        let mut spare = 0..0;
        let mut fresh = false;
        let mut wanted = 0;
        loop {
            let at = self.runs.last().map_or(self.range.start(), |run| run.range.end());
            if at >= self.range.end() {
                return Ok(None);
            }
            let cluster = ctx.cluster().index(at);
            let entry = meta.entry_to_write(ctx, cluster)?;
            if let Entry::Plain(plain) = entry
                && let Some(host) = plain.host
                && writable_in_place(ctx, &plain)
            {
                self.check_overlap(&mut meta, host)?;
                self.plan_in_place(at, plain, host);
                continue;
            }
            if ctx.format.external_data {
                self.plan_new(at, entry, HostOffset(ctx.cluster().start(cluster)), false);
                continue;
            }
            if spare.is_empty() {
                // Counted once for each run: free space may come in many small pieces.
                if wanted == 0 {
                    wanted = self.count_new(&mut meta, cluster, clusters.end)?;
                }
                match meta.allocate(ctx, wanted)? {
                    Err(missing) => return Ok(Some(missing)),
                    Ok(grant) => {
                        self.grants.push(grant);
                        wanted -= grant.count;
                        spare = grant.first..grant.first + grant.count;
                        fresh = grant.fresh;
                    }
                }
            }
            let host = HostOffset(ctx.cluster().start(spare.start));
            spare.start += 1;
            self.plan_new(at, entry, host, fresh);
        }
    }

    /// How many clusters from `first` on need a new place.
    fn count_new(&self, meta: &mut Meta, first: u64, end: u64) -> Result<u64> {
        let ctx = &self.image.ctx;
        let mut count = 1;
        while first + count < end {
            match meta.entry_to_write(ctx, first + count)? {
                Entry::Plain(entry) if writable_in_place(ctx, &entry) => break,
                _ => count += 1,
            }
        }
        Ok(count)
    }

    /// The cluster keeps its host cluster, but some of its subclusters come to life.
    fn plan_in_place(&mut self, at: u64, old: PlainEntry, host: HostOffset) {
        let ctx = &self.image.ctx;
        let part = self.part_at(at);
        let touched = self.touched(part);
        self.push_fills(touched & !old.allocated, part, host, false);
        self.push_run(part, host);
        if touched & !old.allocated != 0 {
            let entry = PlainEntry {
                allocated: old.allocated | touched,
                zero: old.zero & !touched,
                copied: true,
                host: Some(host),
            };
            self.updates.push(Update { cluster: ctx.cluster().index(at), entry, drops: 0..0 });
        }
    }

    /// The cluster moves to `host`; what it held goes along.
    fn plan_new(&mut self, at: u64, old: Entry, host: HostOffset, fresh: bool) {
        let ctx = &self.image.ctx;
        let part = self.part_at(at);
        let touched = self.touched(part);
        let drops = references(ctx, &old);
        let (keep, zero) = match old {
            Entry::Compressed(_) => (ctx.format.all(), 0),
            Entry::Plain(plain) => (plain.allocated, plain.zero & !touched),
        };
        self.push_fills(touched | keep, part, host, fresh);
        self.push_run(part, host);
        let entry = PlainEntry { host: Some(host), copied: true, allocated: touched | keep, zero };
        self.updates.push(Update { cluster: ctx.cluster().index(at), entry, drops });
    }

    /// The part of the write that lies in the cluster of `at`.
    fn part_at(&self, at: u64) -> ByteRange {
        let cluster = self.image.ctx.cluster();
        ByteRange::new(at, cluster.start(cluster.index(at) + 1).min(self.range.end()))
    }

    fn touched(&self, part: ByteRange) -> u32 {
        let start = self.image.ctx.cluster().floor(part.start());
        self.image.ctx.format.touched(part.start() - start, part.end() - start)
    }

    /// Notes that `part` goes to the cluster at `host`.
    fn push_run(&mut self, part: ByteRange, host: HostOffset) {
        let host = host.plus(self.image.ctx.cluster().within(part.start()));
        match self.runs.last_mut() {
            Some(last) if last.host.plus(last.range.len()) == host => {
                last.range = ByteRange::new(last.range.start(), part.end());
            }
            _ => self.runs.push(WriteRun { range: part, host }),
        }
    }

    /// Notes the bytes of the subclusters in `mask` that `part` does not write.
    ///
    /// A sector that `part` cuts is filled whole, before the data comes: where the old mapping still shows
    /// this place after a crash (a zero cluster that kept it), the sector is then old, or zero, or new, never
    /// a mixture.
    fn push_fills(&mut self, mut mask: u32, part: ByteRange, host: HostOffset, fresh: bool) {
        let ctx = &self.image.ctx;
        let (size, start) = (ctx.format.subcluster_size(), ctx.cluster().floor(part.start()));
        while mask != 0 {
            let first = mask.trailing_zeros();
            let count = (mask >> first).trailing_ones();
            let group = ByteRange::at(start + u64::from(first) * size, u64::from(count) * size);
            for range in [
                ByteRange::new(group.start(), part.start().next_multiple_of(SECTOR).min(group.end())),
                ByteRange::new((part.end() & !(SECTOR - 1)).max(group.start()), group.end()),
            ] {
                if !range.is_empty() {
                    self.fills.push(Fill { range, host: host.plus(range.start() - start), fresh });
                }
            }
            // A shift by 32 clears everything.
            mask &= u32::MAX.checked_shl(first + count).unwrap_or(0);
        }
    }

    /// Copies what the guest sees in `fill.range` to its new place. Nothing is published yet, so the old
    /// mapping answers; past the end of the disk it is zeros.
    fn fill(&self, fill: &Fill) -> Result<()> {
        let image = self.image;
        let ctx = &image.ctx;
        let there = fill.range.intersect(ByteRange::new(0, ctx.size()));
        if fill.fresh && image.shows_zero(there)? {
            return Ok(());
        }
        // A data file need not reach past the end of the disk, and on a device may not.
        let len = if ctx.format.external_data { there.len() } else { fill.range.len() };
        // At most a cluster, 2 MiB.
        let mut buf = vec![0; len as usize];
        let read = |buf: &mut [u8], at| image.read_mapped(buf, ByteRange::at(at, buf.len() as u64));
        let old = &mut buf[..there.len() as usize];
        if self.lost_as_zeros {
            // The caller that asks for it knows of the loss.
            read_lost_as_zeros(&read, old, there.start())?;
        } else {
            read(old, there.start())?;
        }
        ctx.data().write_at(&buf, fill.host.0)
    }

    fn check_overlap(&self, meta: &mut Meta, host: HostOffset) -> Result<()> {
        let ctx = &self.image.ctx;
        if ctx.format.external_data {
            return Ok(());
        }
        meta.refcounts(ctx)?.metadata.check_write(ctx, host)
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        if self.grants.is_empty() {
            return;
        }
        let ctx = &self.image.ctx;
        let mut meta = self.image.meta.lock();
        if let Ok(refcounts) = meta.refcounts(ctx) {
            for grant in &self.grants {
                // If the refcounts cannot be read the clusters leak, which is harmless.
                let _ = refcounts.release(ctx, grant.first..grant.first + grant.count);
            }
        }
    }
}

impl Qcow2 {
    /// Whether all of `range` is known to read as zeros now, without reading it.
    fn shows_zero(&self, range: ByteRange) -> Result<bool> {
        self.all_zero(range, |hole| !self.ctx.hidden_backing() && !self.ctx.backing_covers(hole))
    }

    /// Whether all of `range` reads as zeros, whatever lies below the image now or later; if `explicit`, also
    /// should it be given a backing file.
    pub(crate) fn is_zero_by_itself(&self, range: ByteRange, explicit: bool) -> Result<bool> {
        self.all_zero(range, |_| !explicit && !self.ctx.backed())
    }

    /// Whether all of `range` reads as zeros, if `unallocated` says which holes of the mapping do.
    fn all_zero(&self, range: ByteRange, unallocated: impl Fn(ByteRange) -> bool) -> Result<bool> {
        let mut at = range.start();
        while at < range.end() {
            let runs = self.meta.lock().runs(&self.ctx, ByteRange::new(at, range.end()), 64)?;
            for run in runs {
                match run.mapping {
                    Mapping::Zero(_) => {}
                    Mapping::Unallocated if unallocated(run.range) => {}
                    _ => return Ok(false),
                }
                at = run.range.end();
            }
        }
        Ok(true)
    }
}

/// Whether the host cluster of `entry` belongs to it alone.
pub(crate) fn writable_in_place(ctx: &ImageContext, entry: &PlainEntry) -> bool {
    entry.host.is_some() && (entry.copied || ctx.format.external_data)
}

/// Makes sure that guest cluster `cluster` has an L2 table that may be changed in place; `Some` says what
/// must come first.
pub(crate) fn ensure_l2_table(ctx: &ImageContext, meta: &mut Meta, cluster: u64) -> Result<Option<Missing>> {
    let (index, l1) = meta.l1_entry(ctx, cluster)?;
    if l1.copied() && l1.table().is_some() {
        return Ok(None);
    }
    let grant = match meta.allocate(ctx, 1)? {
        Err(missing) => return Ok(Some(missing)),
        Ok(grant) => grant,
    };
    let new = HostOffset(ctx.cluster().start(grant.first));
    let written = match l1.table() {
        None => ctx.zero_cluster(new),
        Some(old) => copy_table(ctx, meta, old, new),
    };
    let refcounts = meta.refcounts(ctx)?;
    if let Err(error) = written {
        refcounts.release(ctx, grant.first..grant.first + 1)?;
        return Err(error);
    }
    refcounts.metadata.insert(grant.first);
    if let Some(old) = l1.table() {
        let old_cluster = ctx.cluster().index(old.0);
        refcounts.metadata.remove(old_cluster);
        refcounts.defer_unref(ctx, old_cluster..old_cluster + 1);
        meta.l2.forget(old, ctx.cluster().bytes());
    }
    meta.set_l1(index, new);
    Ok(None)
}

/// Copies an L2 table that a snapshot may refer to as well. Such a table is never changed, so the disk is up
/// to date.
fn copy_table(ctx: &ImageContext, meta: &mut Meta, old: HostOffset, new: HostOffset) -> Result<()> {
    ctx.check_table("read L1 table", old, 0)?;
    meta.l2.forget(new, ctx.cluster().bytes());
    // At most 2 MiB.
    let mut table = vec![0; ctx.cluster().bytes() as usize];
    ctx.storage.read_at(&mut table, old.0)?;
    ctx.storage.write_at(&table, new.0)
}
