//! The mapping metadata of an open image: the L1 table and cached L2 slices, and with them the refcounts if
//! the image is writable. Everything here runs under the image's one metadata lock; of the storage it only
//! reads slices.
//!
//! [`Meta::runs`] (`walk`) answers "what lies in this guest range" for reads and allocation queries; `write`
//! and `zero` read and change single entries.

mod walk;

use std::ops::Range;

use blockmirror_block::{Error, ErrorKind, Result, StorageEvent};
use byteorder::{BigEndian, ByteOrder};

use crate::cache::SliceCache;
use crate::cluster_set::ClusterSet;
use crate::context::ImageContext;
use crate::dirty::DirtySectors;
use crate::failure::Failure;
use crate::format::entry::{CompressedRun, Entry, EntryError, L1Entry, PlainEntry};
use crate::offset::{GuestCluster, HostCluster, HostOffset};
use crate::refcounts::Refcounts;

pub(crate) use walk::{MapRun, Mapping};

/// What the pass over the L2 tables (`verify`) may cost under one hold of the metadata lock, in bytes; and
/// for free, before clusters have been handed out.
pub(crate) const PASS_CREDIT: i64 = 1 << 20;

/// The part of the pass that goes over the L2 tables which only snapshots have.
#[derive(Debug)]
pub(crate) struct InactivePass {
    /// What is left, the next one last.
    pub(crate) tables: Vec<HostCluster>,
    /// How many entries of the next one are behind the pass.
    pub(crate) entry: u64,
}

/// The mutable side of an open image.
#[derive(Debug)]
pub(crate) struct Meta {
    l1: Vec<L1Entry>,
    l1_at: HostOffset,
    pub(crate) l1_dirty: DirtySectors,
    pub(crate) l2: SliceCache,
    /// Where slices are read that lie one behind the other, before they go to the cache (`walk`).
    read_ahead: Vec<u8>,
    /// Present in a writable image.
    pub(crate) refcounts: Option<Refcounts>,
    /// The pass over the L2 tables has come to this guest cluster (`verify`).
    pub(crate) verified_to: GuestCluster,
    /// Behind the active tables the pass goes over those that only snapshots have.
    pub(crate) inactive_pass: Option<InactivePass>,
    /// What the pass may still cost.
    pub(crate) pass_credit: i64,
    /// Where the file ended at opening, as long as it may have been cut short there: nothing makes it longer
    /// meanwhile (`cut_short`).
    pub(crate) doubtful_end: Option<HostOffset>,
    /// Why nothing is written any more, once a metadata write or a flush has failed.
    pub(crate) poisoned: Option<String>,
}

impl Meta {
    pub(crate) fn new(
        l1: Vec<L1Entry>,
        l1_at: HostOffset,
        l2: SliceCache,
        refcounts: Option<Refcounts>,
    ) -> Self {
        Self {
            l1,
            l1_at,
            l1_dirty: DirtySectors::default(),
            l2,
            read_ahead: Vec::new(),
            refcounts,
            verified_to: GuestCluster(0),
            inactive_pass: None,
            pass_credit: PASS_CREDIT,
            doubtful_end: None,
            poisoned: None,
        }
    }

    /// The L1 table, as it is to be on disk.
    pub(crate) fn l1(&self) -> &[L1Entry] {
        &self.l1
    }

    /// Where the L1 table lies.
    pub(crate) fn l1_at(&self) -> HostOffset {
        self.l1_at
    }

    /// The L1 table lies at `at` now and has `entries` of them, not fewer than before. Nothing in it is
    /// dirty.
    pub(crate) fn l1_moved(&mut self, at: HostOffset, entries: usize) {
        self.l1.resize(entries, L1Entry(0));
        self.l1_at = at;
    }

    /// The L1 table is `l1` now, and lies at `at`. Nothing in the old one was dirty.
    pub(crate) fn replace_l1(&mut self, l1: Vec<L1Entry>, at: HostOffset) {
        (self.l1, self.l1_at) = (l1, at);
    }

    /// Sets or clears COPIED in L1 entry `index`, if it has a table.
    pub(crate) fn set_l1_copied(&mut self, index: usize, copied: bool) {
        let entry = self.l1[index];
        if entry.table().is_some() && entry.copied() != copied {
            self.l1[index] = entry.with_copied(copied);
            self.l1_dirty.mark(index);
        }
    }

    /// Snapshots have these L2 tables now, or the active disk has others. The pass over the tables, if it is
    /// not over, begins anew.
    pub(crate) fn snapshots_changed(&mut self, ctx: &ImageContext, inactive: ClusterSet) -> Result<()> {
        self.refcounts(ctx)?.metadata.set_inactive_l2(inactive);
        (self.verified_to, self.inactive_pass) = (GuestCluster(0), None);
        Ok(())
    }

    /// Forgets the L2 table of L1 entry `index`, which is dropped.
    pub(crate) fn clear_l1(&mut self, ctx: &ImageContext, index: usize) {
        if let Some(table) = self.l1[index].table() {
            self.l2.forget(table, ctx.cluster().bytes());
        }
        self.l1[index] = L1Entry(0);
        self.l1_dirty.mark(index);
    }

    /// Fails if an earlier failure left the image in doubt.
    pub(crate) fn check_poison(&self, ctx: &ImageContext, operation: &'static str) -> Result<()> {
        match &self.poisoned {
            None => Ok(()),
            Some(why) => {
                Err(Error::new(ErrorKind::Poisoned, operation).in_file(ctx.name.clone()).because(why.clone()))
            }
        }
    }

    /// The error of a change that failed. Poisons the image, unless the change may be tried again.
    pub(crate) fn settle(&mut self, failure: Failure) -> Error {
        let may_be_tried_again = failure.may_be_tried_again();
        let (Failure::Write(error) | Failure::Doubt(error)) = failure;
        if !may_be_tried_again {
            self.poison(&error);
        }
        error
    }

    /// Nothing is written any more, because of `error`.
    pub(crate) fn poison(&mut self, error: &Error) {
        self.poisoned.get_or_insert_with(|| format!("an earlier metadata write failed: {error}"));
    }

    /// The refcounts; an error in an image that was opened read-only.
    pub(crate) fn refcounts(&mut self, ctx: &ImageContext) -> Result<&mut Refcounts> {
        self.refcounts
            .as_mut()
            .ok_or_else(|| Error::new(ErrorKind::ReadOnly, "write").in_file(ctx.name.clone()))
    }

    /// The L1 entry for guest cluster `cluster`.
    pub(crate) fn l1_entry(&self, ctx: &ImageContext, cluster: GuestCluster) -> Result<(usize, L1Entry)> {
        let index = cluster.0 / ctx.l2_entries();
        usize::try_from(index).ok().and_then(|i| Some((i, *self.l1.get(i)?))).ok_or_else(|| {
            ctx.corrupt("map", ctx.cluster().start(cluster).0, "the L1 table is too short for the disk")
        })
    }

    /// L1 entry `index` gets a new table, in which nothing is mapped: the cache need not read it back. The
    /// entry of `cluster` is changed next.
    pub(crate) fn install_empty_table(
        &mut self,
        ctx: &ImageContext,
        index: usize,
        table: HostOffset,
        cluster: GuestCluster,
    ) {
        let (slice, _) = self.locate(ctx, table, cluster);
        self.l2.insert_zeros(slice);
        // The table has a refcount, and no entry needs one.
        self.l2.set_checked(slice);
        self.set_l1(index, table);
    }

    /// Points L1 entry `index` at a table this image owns alone; written after the table is durable.
    pub(crate) fn set_l1(&mut self, index: usize, table: HostOffset) {
        self.l1[index] = L1Entry::owned(table);
        self.l1_dirty.mark(index);
    }

    /// Where the slice with the entry of `cluster` lies in `table`, and the byte offset of the entry inside
    /// the slice.
    pub(crate) fn locate(
        &self,
        ctx: &ImageContext,
        table: HostOffset,
        cluster: GuestCluster,
    ) -> (HostOffset, usize) {
        let slice_size = self.l2.slice_size() as u64;
        let at = (cluster.0 % ctx.l2_entries()) * ctx.format.entry_size();
        // The remainder is below the slice size.
        (table.plus(at - at % slice_size), (at % slice_size) as usize)
    }

    /// Makes sure the slice at `slice` is cached, and returns it.
    pub(crate) fn load(&mut self, ctx: &ImageContext, slice: HostOffset) -> Result<&[u8]> {
        if self.l2.get(slice).is_none() {
            ctx.storage.announce(StorageEvent::L2Load);
            // At most 4096.
            let mut data = vec![0; ctx.slice_size()];
            let there = ctx.read_slices("read L2 table", slice, &mut data)?;
            self.l2.insert(slice, listed(ctx, &data, there));
        }
        self.l2.get(slice).ok_or_else(|| Error::new(ErrorKind::Io, "read L2 table"))
    }

    /// The entry of one guest cluster.
    pub(crate) fn entry(&mut self, ctx: &ImageContext, cluster: GuestCluster) -> Result<Entry> {
        let (index, l1) = self.l1_entry(ctx, cluster)?;
        let Some(table) = l1.table() else { return Ok(Entry::UNALLOCATED) };
        ctx.check_table("read L1 table", table, index as u64)?;
        let (slice, at) = self.locate(ctx, table, cluster);
        let data = self.load(ctx, slice)?;
        decode_at(ctx, data, at, cluster, slice)
    }

    /// Changes the entry of one guest cluster, whose L2 table exists.
    pub(crate) fn set_entry(
        &mut self,
        ctx: &ImageContext,
        cluster: GuestCluster,
        entry: PlainEntry,
    ) -> Result<()> {
        self.set_words(ctx, cluster, ctx.format.encode(entry))
    }

    /// The same for a cluster that is stored compressed.
    pub(crate) fn set_compressed(
        &mut self,
        ctx: &ImageContext,
        cluster: GuestCluster,
        run: CompressedRun,
    ) -> Result<()> {
        self.set_words(ctx, cluster, (ctx.format.encode_compressed(run), 0))
    }

    fn set_words(
        &mut self,
        ctx: &ImageContext,
        cluster: GuestCluster,
        (word0, word1): (u64, u64),
    ) -> Result<()> {
        let (_, l1) = self.l1_entry(ctx, cluster)?;
        let Some(table) = l1.table() else {
            return Err(ctx.corrupt(
                "write L2 entry",
                ctx.cluster().start(cluster).0,
                "the L2 table is missing",
            ));
        };
        let (slice, at) = self.locate(ctx, table, cluster);
        self.load(ctx, slice)?;
        let Some(data) = self.l2.edit(slice) else {
            return Err(Error::new(ErrorKind::Io, "write L2 entry"));
        };
        BigEndian::write_u64(&mut data[at..], word0);
        if ctx.format.extended {
            BigEndian::write_u64(&mut data[at + 8..], word1);
        }
        Ok(())
    }
}

/// The host clusters that an entry holds a reference to.
pub(crate) fn references(ctx: &ImageContext, entry: &Entry) -> Range<HostCluster> {
    let cluster = ctx.cluster();
    match entry {
        Entry::Compressed(run) => cluster.touched(run.offset, run.len),
        Entry::Plain(PlainEntry { host: Some(host), .. }) if !ctx.format.external_data => {
            let index = cluster.index(*host);
            index..index.plus(1)
        }
        Entry::Plain(_) => Range::default(),
    }
}

/// Of `data`, a slice of an L2 table of which the file has `there` bytes, the entries that it has. What a
/// file that was cut short lacks of a table is not known, so it is not taken for zeros.
fn listed<'a>(ctx: &ImageContext, data: &'a [u8], there: usize) -> &'a [u8] {
    // Exact: 8 or 16.
    let step = ctx.format.entry_size() as usize;
    &data[..there.min(data.len()) / step * step]
}

/// The entry `at` bytes into `data`, the slice of an L2 table at `slice`, or what the file has of it.
pub(crate) fn decode_at(
    ctx: &ImageContext,
    data: &[u8],
    at: usize,
    cluster: GuestCluster,
    slice: HostOffset,
) -> Result<Entry> {
    // Exact: a slice is short.
    if at + ctx.format.entry_size() as usize > data.len() {
        let why = format!("guest cluster {}: the file ends before its entry", cluster.0);
        return Err(ctx.corrupt("read L2 entry", slice.0 + at as u64, why));
    }
    let word0 = BigEndian::read_u64(&data[at..]);
    let word1 = if ctx.format.extended { BigEndian::read_u64(&data[at + 8..]) } else { 0 };
    ctx.format.decode(word0, word1, ctx.cluster().start(cluster)).map_err(|error: EntryError| {
        Error::new(ErrorKind::Corrupt, "read L2 entry")
            .in_file(ctx.name.clone())
            .at(slice.0 + at as u64)
            .because(format!("guest cluster {}: {error}", cluster.0))
            .caused_by(error)
    })
}
