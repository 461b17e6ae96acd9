//! Planning a write: where each part of it goes, under the metadata lock.

use std::ops::Range;

use blockmirror_block::{ByteRange, Result};

use super::{Fill, Update, WriteGuard, WriteRun, writable_in_place};
use crate::format::entry::{Entry, PlainEntry};
use crate::meta::{Meta, references};
use crate::offset::{GuestCluster, GuestOffset, HostCluster, HostOffset};
use crate::refcounts::Missing;

/// What a disk writes as a whole.
const SECTOR: u64 = 512;

impl WriteGuard<'_> {
    /// Plans the write if every cluster of it can be overwritten in place as it is.
    pub(super) fn find_in_place(&mut self) -> Result<bool> {
        let mut meta = self.image.meta.lock();
        let ctx = &self.image.ctx;
        let mut at = GuestOffset(self.range.start());
        while at.0 < self.range.end() {
            let part = self.part_at(at);
            let cluster = ctx.cluster().index(at);
            let Entry::Plain(entry) = meta.entry_to_write(ctx, cluster)? else { return Ok(false) };
            let touched = self.touched(part);
            match entry.host {
                Some(host)
                    if writable_in_place(ctx, &entry)
                        && touched & !entry.allocated == 0
                        && !meta.doubts(ctx, host) =>
                {
                    self.check_overlap(&mut meta, host)?;
                    self.push_run(part, host);
                }
                _ => return Ok(false),
            }
            at = GuestOffset(part.end());
        }
        Ok(true)
    }

    /// Plans the write from where the last call stopped; `Some` says what must come first.
    pub(super) fn plan(&mut self) -> Result<Option<Missing>> {
        let image = self.image;
        let ctx = &image.ctx;
        let mut meta = image.meta.lock();
        meta.check_poison(ctx, "write")?;
        // The tables first, so that they do not lie between the data clusters.
        let clusters = ctx.cluster().touched(GuestOffset(self.range.start()), self.range.len());
        let mut first = clusters.start;
        while first < clusters.end {
            if let Some(missing) = meta.missing_l2_table(ctx, first)? {
                return Ok(Some(missing));
            }
            first = GuestCluster((first.0 / ctx.l2_entries() + 1) * ctx.l2_entries());
        }
        let mut spare = Range::<HostCluster>::default();
        let mut fresh = false;
        let mut wanted = 0;
        loop {
            let at = self.runs.last().map_or(self.range.start(), |run| run.range.end());
            if at >= self.range.end() {
                return Ok(None);
            }
            let at = GuestOffset(at);
            let cluster = ctx.cluster().index(at);
            let entry = meta.entry_to_write(ctx, cluster)?;
            if let Entry::Plain(plain) = entry
                && let Some(host) = plain.host
                && writable_in_place(ctx, &plain)
            {
                if meta.doubts(ctx, host) {
                    return Ok(Some(Missing::RestOfTables));
                }
                self.check_overlap(&mut meta, host)?;
                self.plan_in_place(at, plain, host);
                continue;
            }
            if ctx.format.external_data {
                // An external data file has each cluster at its guest offset.
                self.plan_new(at, entry, HostOffset(ctx.cluster().start(cluster).0), false);
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
                        spare = grant.clusters();
                        fresh = grant.fresh;
                    }
                }
            }
            let host = ctx.cluster().start(spare.start);
            spare.start = spare.start.plus(1);
            self.plan_new(at, entry, host, fresh);
        }
    }

    /// How many clusters from `first` on need a new place.
    fn count_new(&self, meta: &mut Meta, first: GuestCluster, end: GuestCluster) -> Result<u64> {
        let ctx = &self.image.ctx;
        let mut count = 1;
        while first.plus(count) < end {
            match meta.entry_to_write(ctx, first.plus(count))? {
                Entry::Plain(entry) if writable_in_place(ctx, &entry) => break,
                _ => count += 1,
            }
        }
        Ok(count)
    }

    /// The cluster keeps its host cluster, but some of its subclusters come to life.
    fn plan_in_place(&mut self, at: GuestOffset, old: PlainEntry, host: HostOffset) {
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
            self.updates.push(Update { cluster: ctx.cluster().index(at), entry, drops: Range::default() });
        }
    }

    /// The cluster moves to `host`; what it held goes along.
    fn plan_new(&mut self, at: GuestOffset, old: Entry, host: HostOffset, fresh: bool) {
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
    fn part_at(&self, at: GuestOffset) -> ByteRange {
        let cluster = self.image.ctx.cluster();
        ByteRange::new(at.0, cluster.start(cluster.index(at).plus(1)).0.min(self.range.end()))
    }

    fn touched(&self, part: ByteRange) -> u32 {
        let within = self.image.ctx.cluster().within(GuestOffset(part.start()));
        self.image.ctx.format.touched(within, within + part.len())
    }

    /// Notes that `part` goes to the cluster at `host`.
    fn push_run(&mut self, part: ByteRange, host: HostOffset) {
        let host = host.plus(self.image.ctx.cluster().within(GuestOffset(part.start())));
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
        let size = ctx.format.subcluster_size();
        let start = part.start() - ctx.cluster().within(GuestOffset(part.start()));
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

    fn check_overlap(&self, meta: &mut Meta, host: HostOffset) -> Result<()> {
        let ctx = &self.image.ctx;
        if ctx.format.external_data {
            return Ok(());
        }
        meta.refcounts(ctx)?.metadata.check_write(ctx, host)
    }
}
