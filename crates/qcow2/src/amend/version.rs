//! Another version of the format.
//!
//! **From 2 to 3** only the header changes, once snapshots say how long their disk was, as version 3 wants.
//! **From 3 to 2** what version 2 cannot say goes first, durably: clusters that are marked as zero become
//! unallocated where nothing lies below the image, and else clusters of zeros, past the end of the disk too,
//! where VM state may lie; in version 3 that reads the same. Then the header changes.

use std::ops::Range;

use blockmirror_block::ByteRange;
use byteorder::{BigEndian, ByteOrder};

use super::Meter;
use crate::error::Result;
use crate::format::entry::{Entry, PlainEntry};
use crate::format::header::{FULL_LENGTH, Header, V2_LENGTH};
use crate::format::relist::{FeatureNames, NewList, change_list};
use crate::image::Qcow2;
use crate::meta::references;
use crate::offset::{ClusterRange, GuestCluster};
use crate::overlap::MetadataMap;
use crate::refcounts::Missing;
use crate::stop::StopCheck;

/// Where the header has the version, and what version 3 adds: the features, the refcount width and the header
/// length.
const VERSION: Range<usize> = 4..8;
const REFCOUNT_ORDER: Range<usize> = 96..100;
const HEADER_LENGTH: Range<usize> = 100..104;

/// The width of all refcounts in version 2: 16 bits.
const V2_REFCOUNT_ORDER: u32 = 4;

impl Qcow2 {
    /// Makes version 2 version 3.
    pub(super) fn upgrade(&self) -> Result<()> {
        self.complete_snapshots()?;
        let mut fixed = self.first_cluster()?[..V2_LENGTH].to_vec();
        BigEndian::write_u32(&mut fixed[VERSION], 3);
        fixed.resize(FULL_LENGTH, 0);
        BigEndian::write_u32(&mut fixed[REFCOUNT_ORDER], V2_REFCOUNT_ORDER);
        BigEndian::write_u32(&mut fixed[HEADER_LENGTH], FULL_LENGTH as u32);
        self.write_version(fixed, FeatureNames::Known)
    }

    /// Makes version 3 version 2. The image is not used afterwards: what it holds in memory is version 3.
    pub(super) fn downgrade(self, meter: &mut Meter<'_>) -> Result<()> {
        self.unmark_zeros(meter)?;
        // On disk, too, no active table is shared then that has such an entry.
        self.write_back()?;
        self.unmark_zeros_of_snapshots(meter)?;
        self.write_back()?;
        let mut fixed = self.first_cluster()?[..V2_LENGTH].to_vec();
        BigEndian::write_u32(&mut fixed[VERSION], 2);
        self.write_version(fixed, FeatureNames::Dropped)
    }

    fn write_version(&self, fixed: Vec<u8>, feature_names: FeatureNames) -> Result<()> {
        let _no_write_back = self.write_back.lock();
        let cluster = self.first_cluster()?;
        let old = self.header();
        let version = BigEndian::read_u32(&fixed[VERSION]);
        let new = NewList { fixed, data_file: None, feature_names, option: "compat" };
        let steps = change_list(&cluster, old.header_length as usize, &new)?;
        let expected = |header: &Header| {
            let same_places =
                header.l1_offset == old.l1_offset && header.snapshots_offset == old.snapshots_offset;
            same_places && header.version == version && header.backing == old.backing
        };
        self.write_steps("amend", cluster, &steps, expected)
    }

    /// Whether any entry of the active L2 tables is compressed.
    pub(super) fn has_compressed_clusters(&self) -> Result<bool> {
        let mut found = false;
        self.each_slice(&mut |clusters| {
            let mut meta = self.meta.lock();
            for cluster in clusters.each() {
                found |= matches!(meta.entry(&self.ctx, cluster)?, Entry::Compressed(_));
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Makes what is marked as zero unallocated, or clusters of zeros.
    fn unmark_zeros(&self, meter: &mut Meter<'_>) -> Result<()> {
        let bytes = self.ctx.slice_size() as u64;
        let tables = self.meta.lock().l1().iter().filter(|entry| entry.table().is_some()).count() as u64;
        meter.expect(tables * self.ctx.cluster().bytes());
        self.each_slice(&mut |clusters| {
            meter.step(&*self.ctx.storage, bytes)?;
            self.maybe_write_back()?;
            for range in self.unmark_in_slice(clusters)? {
                self.map_ahead(range)?;
            }
            Ok(())
        })
    }

    /// Unmarks `clusters`, which one slice of an L2 table maps; returns those that need zeros as data.
    fn unmark_in_slice(&self, clusters: Range<GuestCluster>) -> Result<Vec<ByteRange>> {
        let ctx = &self.ctx;
        let stop = self.stop_check("amend");
        let mut by_data = Vec::new();
        let needs_data = ctx.backed();
        for cluster in clusters.each() {
            let start = ctx.cluster().start(cluster).0;
            if needs_data && start >= ctx.size() {
                self.zero_past_end(cluster, &stop)?;
                continue;
            }
            while let Some(missing) = self.unmark(cluster, needs_data)? {
                self.provide(missing, &stop)?;
            }
            let is_marked = needs_data && is_zero(&self.meta.lock().entry(ctx, cluster)?);
            if is_marked {
                push(&mut by_data, ByteRange::new(start, (start + ctx.cluster().bytes()).min(ctx.size())));
            }
        }
        Ok(by_data)
    }

    /// Unmarks `cluster` if it is marked, unless it `needs_data`; `Some` says what must come first.
    fn unmark(&self, cluster: GuestCluster, needs_data: bool) -> Result<Option<Missing>> {
        let ctx = &self.ctx;
        let mut meta = self.meta.lock();
        let entry = meta.entry_to_write(ctx, cluster)?;
        if needs_data || !is_zero(&entry) {
            return Ok(None);
        }
        if let Some(missing) = meta.missing_l2_table(ctx, cluster)? {
            return Ok(Some(missing));
        }
        meta.set_entry(ctx, cluster, PlainEntry::default())?;
        meta.refcounts(ctx)?.defer_unref(ctx, references(ctx, &entry));
        Ok(None)
    }

    /// Makes `cluster`, which lies past the end of the disk, where no request leads, one of zeros if it is
    /// marked.
    fn zero_past_end(&self, cluster: GuestCluster, stop: &StopCheck<'_>) -> Result<()> {
        let ctx = &self.ctx;
        loop {
            let missing = {
                let mut meta = self.meta.lock();
                if !is_zero(&meta.entry_to_write(ctx, cluster)?) {
                    return Ok(());
                }
                meta.missing_l2_table(ctx, cluster)?
            };
            let Some(missing) = missing else { break };
            self.provide(missing, stop)?;
        }
        // At most 2 MiB.
        let new = self.write_table(&vec![0; ctx.cluster().bytes() as usize], stop)?;
        let host = Some(ctx.cluster().start(new.start));
        let zeros = PlainEntry { host, copied: true, allocated: ctx.format.all(), ..PlainEntry::default() };
        let mapped = {
            let mut meta = self.meta.lock();
            let old = meta.entry_to_write(ctx, cluster);
            old.and_then(|old| meta.set_entry(ctx, cluster, zeros).map(|()| old))
        };
        let old = mapped.inspect_err(|error| self.give_back_table(new, error))?;
        let mut meta = self.meta.lock();
        meta.refcounts(ctx)?.defer_unref(ctx, references(ctx, &old));
        Ok(())
    }

    /// Calls `visit` with the guest clusters of each slice of the L2 tables.
    fn each_slice(&self, visit: &mut dyn FnMut(Range<GuestCluster>) -> Result<()>) -> Result<()> {
        let stop = self.stop_check("amend");
        for clusters in self.tables_past(0) {
            if self.meta.lock().l1_entry(&self.ctx, clusters.start)?.1.table().is_none() {
                continue;
            }
            for slice in self.slices(clusters) {
                stop.check()?;
                visit(slice)?;
            }
        }
        Ok(())
    }

    /// Closes the image once free clusters, and what lies past the end of the file, are known to belong to
    /// nothing, and all changes are durable; returns where its tables lie.
    pub(super) fn into_metadata(self) -> Result<MetadataMap> {
        let stop = self.stop_check("amend");
        self.look_at_rest(&stop)?;
        if self.ctx.storage.info().fixed_len {
            self.note_damage(self.verify_all(&stop))?;
        }
        self.write_back()?;
        let mut meta = self.meta.lock();
        Ok(std::mem::take(&mut meta.refcounts(&self.ctx)?.metadata))
    }
}

fn is_zero(entry: &Entry) -> bool {
    matches!(entry, Entry::Plain(plain) if plain.zero != 0)
}

/// Adds `range`, which lies behind the others.
fn push(ranges: &mut Vec<ByteRange>, range: ByteRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == range.start() => *last = ByteRange::new(last.start(), range.end()),
        _ => ranges.push(range),
    }
}
