//! Changing the length of the disk.
//!
//! **Growing**: the L1 table moves to a larger place if it is too short; what lies past the old end is made
//! zero; then the header says the new length. A crash before that leaves a disk of the old length with a
//! longer L1 table, or leaks. What a raw data file gains is mapped as a whole, as at creation.
//!
//! **Shrinking**: what will be freed is read first, so that damage changes nothing; then the header says
//! the new length. What lies past it is invisible from then on, and is freed after. A crash in between
//! leaves it there, invisible and counted, and growing zeroes whatever it finds past the end.
//!
//! Both can be cancelled. A shrink that was cancelled or has failed may have its new length already; what it
//! has not freed then stays counted, until the disk is shrunk to the same length once more. That changes
//! nothing where no shrink was cut off: nothing is mapped past the end, and a data file keeps its length.
//! In an image with snapshots what is mapped there may be the VM state of one that was applied: only the open
//! image that was cut off finishes its shrink so. What another one has left stays mapped and counted, until
//! the disk is shrunk further.

use std::ops::Range;
use std::sync::atomic::Ordering;

use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, Result, ZeroFlags, zero};
use byteorder::{BigEndian, ByteOrder};

use crate::format::entry::{Entry, PlainEntry};
use crate::format::header::{Header, l1_entries_for};
use crate::image::Qcow2;
use crate::limits::MAX_L1_BYTES;
use crate::meta::references;
use crate::offset::{ClusterRange, GuestCluster, HostCluster};
use crate::overlap::MetadataKind;
use crate::stop::StopCheck;

/// Where the header holds the virtual size, and the L1 table's size (4 bytes) and offset (8 bytes). Each lies
/// in one sector, so it changes at once.
const HEADER_SIZE: u64 = 24;
const HEADER_L1: u64 = 36;

/// The length of a disk is a multiple of this.
const SECTOR: u64 = 512;

/// Runs of references that are dropped under one hold of the metadata lock.
const DROPS: usize = 512;

/// All guest bytes, whatever the length.
const ALL: ByteRange = ByteRange::new(0, u64::MAX);

impl Qcow2 {
    pub(crate) fn resize_to(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.check_writable("resize")?;
        let _only_one = self.changing.lock();
        self.meta.lock().check_poison(&self.ctx, "resize")?;
        let old = self.ctx.size();
        let header = self.header();
        if header.version < 3 && header.snapshot_count > 0 {
            let why = "its version, 2, cannot change the length of a disk with snapshots";
            return Err(self.refused(ErrorKind::Unsupported, why.into()));
        }
        if !len.is_multiple_of(SECTOR) {
            return Err(self.refused(ErrorKind::InvalidInput, format!("{len} is not a multiple of {SECTOR}")));
        }
        if len < old && !may_shrink {
            let why = format!("{len} bytes would cut off some of the {old}");
            return Err(self.refused(ErrorKind::InvalidInput, why));
        }
        if len == old && !(may_shrink && self.is_shrink_unfinished(len)?) {
            return self.note_damage(self.flush());
        }
        let named = |error: crate::Error| error.in_file(&self.ctx.name);
        self.begin_resize_of_bitmaps(len).map_err(named)?;
        let resized = self.note_damage(if len > old { self.grow(old, len) } else { self.shrink(len) });
        // Those of the length that it has now, whichever that is.
        let stored = self.end_resize_of_bitmaps(old).map_err(named);
        resized.and(stored)
    }

    /// Whether a shrink to `len` was cut off, here or before the image was opened. Damage that is met past
    /// the end is only reported: no guest reads there.
    fn is_shrink_unfinished(&self, len: u64) -> Result<bool> {
        if self.shrink_unfinished.load(Ordering::Relaxed) {
            return Ok(true);
        }
        if self.header().snapshot_count > 0 {
            // It may be VM state, which an applied snapshot has brought back.
            return Ok(false);
        }
        let ctx = &self.ctx;
        let stop = self.stop_check("resize");
        for clusters in self.tables_past(len) {
            stop.check()?;
            if self.meta.lock().l1_entry(ctx, clusters.start)?.1.table().is_none() {
                continue;
            }
            if clusters.start.0.is_multiple_of(ctx.l2_entries()) {
                return Ok(true);
            }
            for slice in self.slices(clusters) {
                stop.check()?;
                let mut meta = self.meta.lock();
                for cluster in slice.each() {
                    if meta.entry_to_write(ctx, cluster)? != Entry::UNALLOCATED {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    fn refused(&self, kind: ErrorKind, why: String) -> Error {
        Error::new(kind, "resize").in_file(self.ctx.name.clone()).because(why)
    }

    fn grow(&self, old: u64, len: u64) -> Result<()> {
        let ctx = &self.ctx;
        let entries = l1_entries_for(len, ctx.cluster().bits(), ctx.format.extended);
        if i64::try_from(len).is_err() || entries * 8 > MAX_L1_BYTES {
            let why = format!(
                "{len} bytes are too many for clusters of {} bytes: the L1 table would need {} bytes, \
                 more than {MAX_L1_BYTES}",
                ctx.cluster().bytes(),
                entries * 8
            );
            return Err(self.refused(ErrorKind::LimitExceeded, why));
        }
        if ctx.hidden_backing() {
            let why = "its backing file is not open, so it is not known what would show past the old end";
            return Err(self.refused(ErrorKind::Unsupported, why.into()));
        }
        self.grow_data_file(old, len)?;
        // usize to u64 is exact here.
        if entries > self.meta.lock().l1().len() as u64 {
            self.move_l1(entries)?;
        }
        // Here the disk is longer already, so that what lies past the old end can be zeroed; on disk it is
        // not.
        ctx.size.store(len, Ordering::Release);
        let grown = self.zero_past(old, len).and_then(|()| self.flush()).and_then(|()| {
            self.write_header_field(HEADER_SIZE, &be64(len), |header| header.virtual_size = len)
        });
        if grown.is_err() {
            ctx.size.store(old, Ordering::Release);
        }
        grown
    }

    /// A raw data file is as long as the disk.
    fn grow_data_file(&self, old: u64, len: u64) -> Result<()> {
        let Some(data_file) = self.ctx.data_file.as_ref().filter(|_| self.raw_data_file()) else {
            return Ok(());
        };
        let (info, present) = (data_file.info(), data_file.len()?);
        if info.fixed_len && present < len {
            let why = format!("its data file {} has a fixed length of {present}", data_file.name());
            return Err(self.refused(ErrorKind::NoSpace, why));
        }
        let stale = ByteRange::new(old, if info.zero_init { present.min(len) } else { len });
        if !info.fixed_len && present < len {
            data_file.set_len(len)?;
        }
        if stale.is_empty() { Ok(()) } else { data_file.write_zeroes(stale, ZeroFlags::MAY_UNMAP) }
    }

    /// Makes what lies past `old` read as zeros, up to `len`: bytes in the last cluster, what a longer
    /// backing file would show, and what an interrupted shrinking left.
    fn zero_past(&self, old: u64, len: u64) -> Result<()> {
        if self.raw_data_file() {
            // Its bytes are zeros already. Where nothing was mapped a write that no flush has covered would
            // reach the raw file and not the mapping.
            let mapped = old.next_multiple_of(self.ctx.format.subcluster_size()).min(len);
            return self.map_zeros(ByteRange::new(mapped, len));
        }
        let border = old.next_multiple_of(self.ctx.cluster().bytes()).min(len);
        // Less than a cluster.
        let mut tail = vec![0; (border - old) as usize];
        self.read_at(&mut tail, old)?;
        if !zero::is_zero(&tail) {
            self.zero(ByteRange::new(old, border), ZeroFlags::MAY_UNMAP)?;
        }
        self.zero_grown(ByteRange::new(border, len))
    }

    /// Moves the L1 table to a place with room for `entries`.
    fn move_l1(&self, entries: u64) -> Result<()> {
        let ctx = &self.ctx;
        let cluster = ctx.cluster();
        let _nobody_maps = self.ranges.lock_exclusive(ALL)?;
        // From here on no change of the table is in memory only.
        self.write_back()?;
        // At most 32 MiB, and whole clusters.
        let mut table = vec![0; (cluster.count(entries * 8) * cluster.bytes()) as usize];
        for (word, entry) in table.chunks_exact_mut(8).zip(self.meta.lock().l1()) {
            BigEndian::write_u64(word, entry.0);
        }
        let new = self.write_table(&table, &self.stop_check("resize"))?;
        let at = cluster.start(new.start);
        // The table, its refcounts, and the refcount table.
        self.write_back().inspect_err(|error| self.give_back_table(new.clone(), error))?;

        let mut field = [0; 12];
        // At most 32 MiB of table: it fits.
        BigEndian::write_u32(&mut field, entries as u32);
        BigEndian::write_u64(&mut field[4..], at.0);
        {
            let _only_one = self.write_back.lock();
            self.write_header_field(HEADER_L1, &field, |header| {
                header.l1_entries = entries as u32;
                header.l1_offset = at.0;
            })?;
            let mut meta = self.meta.lock();
            let old = cluster.touched(meta.l1_at(), meta.l1().len() as u64 * 8);
            meta.l1_moved(at, entries as usize);
            let refcounts = meta.refcounts(ctx)?;
            for cluster in new.each() {
                refcounts.metadata.insert(MetadataKind::ActiveL1, cluster);
            }
            old.each().for_each(|cluster| refcounts.metadata.remove(MetadataKind::ActiveL1, cluster));
            refcounts.defer_unref_table(ctx, old);
        }
        Ok(())
    }

    /// To the length that the disk has already, it finishes a shrink that was cut off.
    fn shrink(&self, len: u64) -> Result<()> {
        let ctx = &self.ctx;
        let _nobody_maps = self.ranges.lock_exclusive(ALL)?;
        self.check_past(len)?;
        self.write_back()?;
        let old = ctx.size();
        if len < old {
            self.write_header_field(HEADER_SIZE, &be64(len), |header| header.virtual_size = len)?;
            ctx.size.store(len, Ordering::Release);
            self.shrink_unfinished.store(true, Ordering::Relaxed);
        }
        self.unmap_past(len)?;
        self.write_back()?;
        self.shrink_data_file(old, len)?;
        self.shrink_unfinished.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Nothing shows any more what the data file holds past `len`. A device may hold more than the disk past
    /// `old`, which is not the image's.
    fn shrink_data_file(&self, old: u64, len: u64) -> Result<()> {
        let Some(file) = &self.ctx.data_file else { return Ok(()) };
        let fixed_len = file.info().fixed_len;
        let end = if fixed_len { old } else { file.len()? };
        if end <= len {
            return Ok(());
        }
        if self.raw_data_file() && !fixed_len {
            file.set_len(len)?;
            return self.write_back();
        }
        file.discard(ByteRange::new(len, end))
    }

    /// Reads every entry that [`Self::unmap_past`] will drop, so that damage is met while the disk has its
    /// old length.
    pub(crate) fn check_past(&self, len: u64) -> Result<()> {
        let ctx = &self.ctx;
        let stop = self.stop_check("resize");
        for clusters in self.tables_past(len) {
            stop.check()?;
            if self.meta.lock().l1_entry(ctx, clusters.start)?.1.table().is_none() {
                continue;
            }
            for slice in self.slices(clusters) {
                stop.check()?;
                let mut meta = self.meta.lock();
                for cluster in slice.each() {
                    meta.entry_to_write(ctx, cluster)?;
                }
            }
        }
        Ok(())
    }

    /// Frees every cluster that lies past `len` as a whole. What has been freed when it is
    /// cancelled or fails stays so, and the rest stays counted.
    pub(crate) fn unmap_past(&self, len: u64) -> Result<()> {
        let stop = self.stop_check("resize");
        for clusters in self.tables_past(len) {
            stop.check()?;
            if clusters.start.0.is_multiple_of(self.ctx.l2_entries()) {
                self.drop_table(clusters, &stop)?;
            } else {
                self.unmap_in_table(clusters, &stop)?;
            }
        }
        Ok(())
    }

    /// The guest clusters past `len` that the L1 table covers, by L2 tables.
    pub(crate) fn tables_past(&self, len: u64) -> impl Iterator<Item = Range<GuestCluster>> {
        let per_table = self.ctx.l2_entries();
        let first = self.ctx.cluster().count(len);
        // usize to u64 is exact here.
        let tables = self.meta.lock().l1().len() as u64;
        (first / per_table..tables).map(move |index| {
            GuestCluster((index * per_table).max(first))..GuestCluster((index + 1) * per_table)
        })
    }

    /// `clusters` of one L2 table, by the slices that have their entries.
    pub(crate) fn slices(&self, clusters: Range<GuestCluster>) -> impl Iterator<Item = Range<GuestCluster>> {
        let per_slice = self.ctx.slice_size() as u64 / self.ctx.format.entry_size();
        (clusters.start.0 / per_slice..clusters.end.0.div_ceil(per_slice)).map(move |index| {
            let slice = GuestCluster(index * per_slice);
            slice.max(clusters.start)..slice.plus(per_slice).min(clusters.end)
        })
    }

    /// Drops the L2 table of `clusters`, which are all that it maps.
    fn drop_table(&self, clusters: Range<GuestCluster>, stop: &StopCheck<'_>) -> Result<()> {
        let ctx = &self.ctx;
        let (index, l1) = self.meta.lock().l1_entry(ctx, clusters.start)?;
        let Some(table) = l1.table() else { return Ok(()) };
        let mut held: Vec<Range<HostCluster>> = Vec::new();
        for slice in self.slices(clusters) {
            stop.check()?;
            let mut meta = self.meta.lock();
            for cluster in slice.each() {
                let next = references(ctx, &meta.entry_to_write(ctx, cluster)?);
                match held.last_mut() {
                    Some(last) if last.end == next.start => last.end = next.end,
                    _ if next.is_empty() => {}
                    _ => held.push(next),
                }
            }
        }
        {
            let mut meta = self.meta.lock();
            meta.refcounts(ctx)?;
            meta.clear_l1(ctx, index);
            let cluster = ctx.cluster().index(table);
            let refcounts = meta.refcounts(ctx)?;
            refcounts.metadata.remove(MetadataKind::ActiveL2, cluster);
            refcounts.defer_unref_table(ctx, cluster..cluster.plus(1));
        }
        // These may wait for a later write-back than the L1 entry, never for an earlier one. Nothing maps
        // them any more, so a write-back that fails must not keep any of them from being dropped.
        let mut written = Ok(());
        for some in held.chunks(DROPS) {
            written = written.and_then(|()| self.maybe_write_back());
            let mut meta = self.meta.lock();
            let refcounts = meta.refcounts(ctx)?;
            some.iter().for_each(|clusters| refcounts.defer_unref(ctx, clusters.clone()));
        }
        written
    }

    /// Unmaps `clusters`, the last ones of an L2 table.
    fn unmap_in_table(&self, clusters: Range<GuestCluster>, stop: &StopCheck<'_>) -> Result<()> {
        let ctx = &self.ctx;
        loop {
            let missing = {
                let mut meta = self.meta.lock();
                if meta.l1_entry(ctx, clusters.start)?.1.table().is_none() {
                    return Ok(());
                }
                meta.missing_l2_table(ctx, clusters.start)?
            };
            let Some(missing) = missing else { break };
            self.provide(missing, stop)?;
        }
        for slice in self.slices(clusters) {
            stop.check()?;
            self.maybe_write_back()?;
            let mut meta = self.meta.lock();
            for cluster in slice.each() {
                let entry = meta.entry_to_write(ctx, cluster)?;
                if entry != Entry::UNALLOCATED {
                    meta.set_entry(ctx, cluster, PlainEntry::default())?;
                    meta.refcounts(ctx)?.defer_unref(ctx, references(ctx, &entry));
                }
            }
        }
        Ok(())
    }

    /// Changes a field of the header, on disk and here. All that it stands for is durable.
    pub(crate) fn write_header_field(
        &self,
        at: u64,
        bytes: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        self.write_header(at, bytes)?;
        let mut header = (*self.header()).clone();
        change(&mut header);
        self.set_header(header);
        Ok(())
    }
}

fn be64(value: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    BigEndian::write_u64(&mut bytes, value);
    bytes
}
