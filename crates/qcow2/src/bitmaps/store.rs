//! Storing bitmaps: their bits, their tables, and a directory that replaces the old one as a whole.
//!
//! ```text
//! guest data -> bits, tables, directory, refcounts -> header (extension, autoclear bit) -> dropped references
//! ```
//!
//! with a flush at each arrow. Everything new lies in clusters of its own, so that until the header leads to
//! the new directory the old one is whole, with its bitmaps marked as in use if anything was written.

use std::collections::HashSet;
use std::ops::Range;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{ByteRange, Error as BlockError, cancel};
use byteorder::{BigEndian, ByteOrder};

use crate::bitmap_list::{Bitmap, clusters_of};
use crate::error::{BitmapProblem, Error, Result};
use crate::failure::may_come_late;
use crate::format::bitmaps::{TableEntry, encode_directory};
use crate::format::extension::BitmapsExtension;
use crate::format::rewrite::change_bitmaps;
use crate::image::Qcow2;
use crate::limits;
use crate::offset::{ClusterRange, HostCluster, HostOffset};
use crate::overlap::MetadataKind;
use crate::refcounts::RunSearch;

/// Bytes of bits that are written at once.
const PIECE: u64 = 1 << 20;

/// All guest bytes, whatever the length.
const ALL: ByteRange = ByteRange::new(0, u64::MAX);

impl Qcow2 {
    /// Stores the persistent bitmaps, durably, and takes their mark *in use* off. Nothing happens if nothing
    /// was written since they were loaded or stored. Waits for reads and writes under way; the image can be
    /// used on afterwards.
    ///
    /// An image that is dropped stores them too, as far as it goes. Bitmaps that were not stored stay marked,
    /// and are not used any more.
    ///
    /// # Errors
    /// The image is poisoned; there is no room for the bits; writing fails.
    pub fn store_bitmaps(&self) -> Result<()> {
        let _only_one = self.changing.lock();
        let _nobody_writes = self.ranges.lock_exclusive(ALL)?;
        if !self.bitmaps.must_be_stored() {
            return Ok(());
        }
        let list = self.bitmaps.list();
        self.publish_bitmaps(list)
    }

    /// Makes `list` the bitmaps of the image, durably. The caller holds `changing` and all ranges.
    pub(super) fn publish_bitmaps(&self, mut list: Vec<Bitmap>) -> Result<()> {
        let ctx = &self.ctx;
        self.meta.lock().check_poison(ctx, "store bitmaps")?;
        let _shield = cancel::shield();
        self.write_back()?;
        let mut taken = TakenClusters::new(self);
        for bitmap in list.iter_mut().filter(|bitmap| bitmap.is_to_be_written()) {
            bitmap.store(&mut taken)?;
        }
        let extension = taken.write_directory(&list)?;
        // The bits, and the refcounts of all that is new.
        self.write_back()?;
        let dropped = self.dropped_clusters(&list)?;
        let plan = |cluster: &[u8], length: usize| change_bitmaps(cluster, length, extension.as_ref());
        self.check_header_change(plan)?;
        let new = taken.keep();
        self.rewrite_header(plan, |header| header.bitmaps == extension)?;
        {
            let mut meta = self.meta.lock();
            let refcounts = meta.refcounts(ctx)?;
            new.iter().flat_map(ClusterRange::each).for_each(|cluster| {
                refcounts.metadata.insert(MetadataKind::BitmapDirectory, cluster);
            });
            for clusters in dropped {
                for cluster in clusters.each() {
                    refcounts.metadata.remove(MetadataKind::BitmapDirectory, cluster);
                }
                refcounts.defer_unref(ctx, clusters);
            }
        }
        self.bitmaps.stored(list);
        // The bitmaps are durable. Clusters that are not given back now are so by the next write-back, or
        // leak: then the image is poisoned.
        let _ = self.write_back();
        Ok(())
    }

    /// What the old directory takes, and those of its bitmaps whose tables `list` does not have any more.
    fn dropped_clusters(&self, list: &[Bitmap]) -> Result<Vec<Range<HostCluster>>> {
        let header = self.header();
        let Some(old) = header.bitmaps.filter(|_| header.bitmaps_valid()) else { return Ok(Vec::new()) };
        let mut dropped =
            vec![self.ctx.cluster().touched(HostOffset(old.directory_offset), old.directory_size)];
        let kept: HashSet<u64> = list.iter().map(|b| b.entry.table_offset).collect();
        for bitmap in self.bitmaps.list() {
            if !kept.contains(&bitmap.entry.table_offset) {
                dropped.extend(clusters_of(&self.ctx, &bitmap.entry)?);
            }
        }
        Ok(dropped)
    }
}

impl Bitmap {
    /// Whether its bits are not on disk as they are. One that is inconsistent keeps its table, if it has one.
    fn is_to_be_written(&self) -> bool {
        self.entry.table_offset == 0 || (self.changed && !self.entry.in_use)
    }

    /// Writes the bits to clusters of their own.
    fn store(&mut self, taken: &mut TakenClusters<'_>) -> Result<()> {
        let Some(bits) = &self.bits else {
            self.changed = false;
            return Ok(());
        };
        let cluster = taken.image.ctx.cluster().bytes();
        let mut table: Vec<TableEntry> =
            (0..bits.stored_len()).step_by(cluster as usize).map(|at| uniform(bits, at, cluster)).collect();
        let mut mixed: Vec<usize> = (0..table.len()).filter(|i| table[*i] == TableEntry::Invalid).collect();
        while !mixed.is_empty() {
            // usize to u64 is exact here.
            let want = (mixed.len() as u64).min((PIECE / cluster).max(1));
            let clusters = taken.some(want)?;
            // At most a piece, or a cluster.
            let mut buf = vec![0; (clusters.len() * cluster) as usize];
            let here: Vec<usize> = mixed.drain(..clusters.len() as usize).collect();
            for (index, part) in here.iter().zip(buf.chunks_exact_mut(cluster as usize)) {
                bits.store(*index as u64 * cluster, part);
            }
            taken.write(&clusters, &buf)?;
            for (index, at) in here.into_iter().zip(clusters.each()) {
                table[index] = TableEntry::Stored(taken.image.ctx.cluster().start(at));
            }
        }
        let mut bytes = vec![0; table.len() * 8];
        for (word, entry) in bytes.chunks_exact_mut(8).zip(&table) {
            BigEndian::write_u64(word, entry.encode());
        }
        self.entry.table_offset = taken.write_run(bytes)?.0;
        // The bitmap has at most 512 MiB.
        self.entry.table_entries = table.len() as u32;
        self.changed = false;
        Ok(())
    }
}

/// What the table says of the bits in the `cluster` bytes at `at` of the stored form; `Invalid` where they
/// must be stored.
fn uniform(bits: &DirtyBitmap, at: u64, cluster: u64) -> TableEntry {
    let byte = bits.granularity() * 8;
    let (start, end) = (at * byte, (at + cluster).saturating_mul(byte).min(bits.len()));
    let reaches = |run: Option<Range<u64>>| run.is_some_and(|run| run.start < end);
    match (reaches(bits.next_dirty(start, 1)), reaches(bits.next_clean(start, 1))) {
        (false, _) => TableEntry::Clear,
        (true, false) => TableEntry::Set,
        (true, true) => TableEntry::Invalid,
    }
}

/// Clusters that were allocated and that nothing points at yet; given back unless they are kept.
struct TakenClusters<'a> {
    image: &'a Qcow2,
    runs: Vec<Range<HostCluster>>,
    /// A write to one of them has failed and may still reach the disk.
    late: bool,
}

impl<'a> TakenClusters<'a> {
    fn new(image: &'a Qcow2) -> Self {
        Self { image, runs: Vec::new(), late: false }
    }

    /// Up to `want` clusters one behind the other, at least one.
    fn some(&mut self, want: u64) -> Result<Range<HostCluster>> {
        let stop = self.image.stop_check("store bitmaps");
        loop {
            let answer = self.image.meta.lock().allocate(&self.image.ctx, want)?;
            match answer {
                Ok(grant) => {
                    self.runs.push(grant.clusters());
                    return Ok(grant.clusters());
                }
                Err(missing) => self.image.provide(missing, &stop)?,
            }
        }
    }

    /// Writes `bytes` to clusters one behind the other, with zeros up to the end of the last one.
    fn write_run(&mut self, mut bytes: Vec<u8>) -> Result<HostOffset> {
        let cluster = self.image.ctx.cluster();
        // usize to u64 is exact here.
        let want = cluster.count(bytes.len() as u64);
        let stop = self.image.stop_check("store bitmaps");
        let mut search = RunSearch::default();
        let run = loop {
            let answer = self.image.meta.lock().allocate_run(&self.image.ctx, want, &mut search)?;
            match answer {
                Ok(run) => break run,
                Err(missing) => self.image.provide(missing, &stop)?,
            }
        };
        self.runs.push(run.clone());
        bytes.resize((want * cluster.bytes()) as usize, 0);
        self.write(&run, &bytes)?;
        Ok(cluster.start(run.start))
    }

    fn write(&mut self, clusters: &Range<HostCluster>, bytes: &[u8]) -> Result<()> {
        let ctx = &self.image.ctx;
        let written = ctx.write_metadata(bytes, ctx.cluster().start(clusters.start).0);
        self.late |= written.as_ref().is_err_and(|error: &BlockError| may_come_late(error));
        Ok(written?)
    }

    /// Writes the directory of `list`; none if that is empty.
    fn write_directory(&mut self, list: &[Bitmap]) -> Result<Option<BitmapsExtension>> {
        let Some(last) = list.last() else { return Ok(None) };
        let too_many =
            || Error::Bitmap { name: last.entry.name.to_string(), problem: BitmapProblem::TooMany };
        let directory =
            encode_directory(list.iter().map(|bitmap| (&bitmap.entry, bitmap.in_use_on_disk(false))));
        // usize to u64 is exact here.
        let directory_size = directory.len() as u64;
        let count = u32::try_from(list.len()).ok().filter(|count| *count <= limits::MAX_BITMAPS);
        let count = count.filter(|_| directory_size <= limits::MAX_BITMAP_DIRECTORY_BYTES);
        let count = count.ok_or_else(too_many)?;
        let directory_offset = self.write_run(directory)?.0;
        Ok(Some(BitmapsExtension { count, directory_size, directory_offset }))
    }

    /// They belong to the image from now on.
    fn keep(mut self) -> Vec<Range<HostCluster>> {
        std::mem::take(&mut self.runs)
    }
}

impl Drop for TakenClusters<'_> {
    fn drop(&mut self) {
        let ctx = &self.image.ctx;
        let mut meta = self.image.meta.lock();
        let Ok(refcounts) = meta.refcounts(ctx) else { return };
        for run in self.runs.drain(..) {
            // If the refcounts cannot be read the clusters leak, which is harmless.
            let _ = match self.late {
                true => refcounts.release_unusable(ctx, run),
                false => refcounts.release(ctx, run),
            };
        }
    }
}
