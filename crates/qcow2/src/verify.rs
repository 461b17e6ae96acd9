//! Damaged refcounts: a cluster that an entry maps must not be handed out, although its refcount is zero.
//!
//! Two rules, both without a check of the whole image at opening:
//!
//! - The first time a slice of an L2 table is needed for writing, each cluster that its entries map must have
//!   a refcount. One that has none is proof of damage: the operation fails, and the image is marked corrupt
//!   ([`Qcow2::note_damage`]).
//! - A free cluster below the file's length at opening (*unverified*) is handed out only after one pass over
//!   all L2 tables has found no entry that maps a free cluster. The pass goes on by a piece with each
//!   allocation that meets such a cluster, and until it is done new clusters come from past that length.
//!   Clusters that this image freed itself need no pass. A fresh image has no unverified clusters.
//!
//! On storage of a fixed length nothing lies past the end, so there the first allocation waits for the whole
//! pass ([`Missing::Verified`]). No pass is bounded by what the image says of itself: the metadata lock is
//! released between the pieces, and
//! [`Qcow2::cancel_in_flight`](blockmirror_block::BlockDevice::cancel_in_flight) ends it.

use std::sync::atomic::Ordering;

use blockmirror_block::sync::thread;
use blockmirror_block::{ByteRange, Error, ErrorKind, Result, Visit};

use crate::format::entry::Entry;
use crate::image::Qcow2;
use crate::io::Io;
use crate::meta::{Meta, decode_at};
use crate::offset::HostOffset;
use crate::overlap::WRITE_OVER_METADATA;
use crate::refcounts::{Allocation, Grant};
use crate::write::compressed_clusters;

/// The operation that finds an entry which maps a free cluster; the caller then marks the image corrupt.
const CHECK_REFCOUNTS: &str = "check refcounts";

/// Bytes of L2 tables that the pass reads for one allocation, or under one hold of the metadata lock.
const PASS_BYTES: u64 = 1 << 20;

/// What an entry of the L1 table, and a table that lies in a hole, take of these bytes.
const L1_ENTRY_COST: u64 = 8;
const HOLE_COST: u64 = 64;

/// How far past a table a hole is looked for.
const LOOK_AHEAD: u64 = 1 << 30;

/// What must be done, without the metadata lock, before clusters can be handed out ([`Qcow2::provide`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Missing {
    /// The refcount table does not reach this refcount block.
    Block(u64),
    /// The pass over all L2 tables has not come to its end, and nothing but unverified clusters is left.
    Verified,
}

impl Meta {
    /// Hands out up to `want` contiguous clusters. The inner error says what must come first.
    pub(crate) fn allocate(&mut self, io: &Io, want: u64) -> Result<Result<Grant, Missing>> {
        let mut skip = false;
        loop {
            match self.refcounts(io)?.allocate(io, want, skip)? {
                Allocation::Got(grant) => return Ok(Ok(grant)),
                Allocation::TableFull(block) => return Ok(Err(Missing::Block(block))),
                Allocation::Unverified if io.storage.info().fixed_len => return Ok(Err(Missing::Verified)),
                Allocation::Unverified => {
                    self.verify(io)?;
                    skip = true;
                }
            }
        }
    }

    /// Hands out `want` contiguous clusters, at least one. The inner error as for [`Self::allocate`].
    pub(crate) fn allocate_run(&mut self, io: &Io, want: u64) -> Result<Result<u64, Missing>> {
        let refcounts = self.refcounts(io)?;
        if io.storage.info().fixed_len && refcounts.has_unverified(0) {
            return Ok(Err(Missing::Verified));
        }
        Ok(refcounts.allocate_run(io, want)?.map_err(Missing::Block))
    }

    /// The entry of one guest cluster that may be changed, or whose cluster may be written.
    ///
    /// # Errors
    /// Its table, or a cluster mapped in the same slice of it, has no refcount.
    pub(crate) fn entry_to_write(&mut self, io: &Io, cluster: u64) -> Result<Entry> {
        let (index, l1) = self.l1_entry(io, cluster)?;
        let Some(table) = l1.table() else { return Ok(Entry::UNALLOCATED) };
        io.check_table("read L1 table", table, index as u64)?;
        let (slice, at) = self.locate(io, table, cluster);
        if !self.l2.is_checked(slice) {
            let data = self.load(io, slice)?.to_vec();
            let first = cluster - at as u64 / io.format.entry_size();
            self.check_table_refcount(io, table, first)?;
            self.check_entries(io, &data, first, slice)?;
            self.l2.set_checked(slice);
        }
        decode_at(io, self.load(io, slice)?, at, cluster, slice)
    }

    fn check_table_refcount(&mut self, io: &Io, table: HostOffset, guest: u64) -> Result<()> {
        if self.refcounts(io)?.get(io, io.cluster().index(table.0))? == 0 {
            return Err(io.corrupt(CHECK_REFCOUNTS, table.0, free_but("holds the L2 table of", guest)));
        }
        Ok(())
    }

    /// Checks the clusters that `data`, the slice of an L2 table at `slice`, maps for the guest clusters from
    /// `first` on. An entry that makes no sense maps nothing: its use is an error.
    pub(crate) fn check_entries(
        &mut self,
        io: &Io,
        data: &[u8],
        first: u64,
        slice: HostOffset,
    ) -> Result<()> {
        if io.format.external_data {
            return Ok(());
        }
        let refcounts = self.refcounts(io)?;
        let step = io.format.entry_size() as usize;
        for (at, guest) in (0..data.len()).step_by(step).zip(first..) {
            let mapped = match decode_at(io, data, at, guest, slice) {
                Ok(Entry::Compressed(run)) => compressed_clusters(io, run),
                Ok(Entry::Plain(plain)) => plain.host.map_or(0..0, |host| {
                    let index = io.cluster().index(host.0);
                    index..index + 1
                }),
                Err(_) => continue,
            };
            for cluster in mapped {
                if refcounts.get(io, cluster)? == 0 {
                    let at = io.cluster().start(cluster);
                    return Err(io.corrupt(CHECK_REFCOUNTS, at, free_but("is mapped by", guest)));
                }
            }
        }
        Ok(())
    }

    /// Goes on with the pass over the L2 tables for about [`PASS_BYTES`] of them; whether it is over. At its
    /// end every free cluster may be handed out. Where a table cannot be read the pass is given up:
    /// unverified clusters then stay unused.
    ///
    /// # Errors
    /// An entry that maps a free cluster. On storage of a fixed length, where nothing but unverified clusters
    /// may be left, a table that cannot be read.
    fn verify(&mut self, io: &Io) -> Result<bool> {
        let per_slice = self.l2.slice_size() as u64 / io.format.entry_size();
        let mut left = PASS_BYTES;
        let mut runs = Runs::default();
        // At most 2^22 tables.
        let end = self.l1().len() as u64 * io.l2_entries();
        while self.verified_to < end {
            if left == 0 {
                return Ok(false);
            }
            let guest = self.verified_to;
            let next_table = (guest / io.l2_entries() + 1) * io.l2_entries();
            let Some(table) = self.l1_entry(io, guest)?.1.table() else {
                left = left.saturating_sub(L1_ENTRY_COST);
                self.verified_to = next_table;
                continue;
            };
            // A table of zeros maps nothing. What was changed in memory since, and is not on disk yet, was
            // checked when it was.
            if runs.is_hole(io, ByteRange::at(table.0, io.cluster().bytes())) {
                left = left.saturating_sub(HOLE_COST);
                self.verified_to = next_table;
                continue;
            }
            left = left.saturating_sub(self.l2.slice_size() as u64);
            if let Err(error) = self.verify_slice(io, table, guest) {
                if error.operation() == CHECK_REFCOUNTS || io.storage.info().fixed_len {
                    return Err(error);
                }
                self.refcounts(io)?.never_verify();
                return Ok(true);
            }
            self.verified_to = guest + per_slice;
        }
        self.refcounts(io)?.all_verified();
        Ok(true)
    }

    /// Checks the slice of `table` that begins with guest cluster `guest`, without keeping it.
    fn verify_slice(&mut self, io: &Io, table: HostOffset, guest: u64) -> Result<()> {
        io.check_table("read L1 table", table, guest / io.l2_entries())?;
        let (slice, _) = self.locate(io, table, guest);
        let data = match self.l2.get(slice) {
            Some(data) => data.to_vec().into_boxed_slice(),
            None => io.read_slice("read L2 table", slice)?,
        };
        self.check_entries(io, &data, guest, slice)
    }
}

/// The run of the image file that was last looked at. Kept under one hold of the metadata lock only: a hole
/// may be written.
#[derive(Debug, Default)]
struct Runs {
    last: ByteRange,
    hole: bool,
}

impl Runs {
    /// Whether all of `range` is a hole of the file.
    fn is_hole(&mut self, io: &Io, range: ByteRange) -> bool {
        let holds = |last: ByteRange| last.start() <= range.start() && range.end() <= last.end();
        if !holds(self.last) {
            // What the storage cannot tell is read.
            (self.last, self.hole) = (range, false);
            let rest = ByteRange::new(range.start(), range.end().saturating_add(LOOK_AHEAD));
            let _ = io.storage.extents(rest, &mut |run| {
                (self.last, self.hole) = (run.range, run.hole);
                Visit::Break(())
            });
        }
        self.hole && holds(self.last)
    }
}

fn free_but(how: &str, guest: u64) -> String {
    format!("the cluster {how} guest cluster {guest}, but its refcount is 0; the image is marked corrupt")
}

impl Qcow2 {
    /// Does what an allocation needs first. The caller holds neither the write-back lock nor the metadata
    /// lock.
    pub(crate) fn provide(&self, missing: Missing) -> Result<()> {
        match missing {
            Missing::Verified => self.verify_all(),
            Missing::Block(block) => {
                // There is no place past the end for the larger table.
                if self.io.storage.info().fixed_len {
                    self.verify_all()?;
                }
                self.grow_refcount_table(block)
            }
        }
    }

    /// Brings the pass over the L2 tables to its end, with room for others between its pieces.
    fn verify_all(&self) -> Result<()> {
        let cancelled = self.cancelled.load(Ordering::Acquire);
        loop {
            {
                let mut meta = self.meta.lock();
                meta.check_poison(&self.io, CHECK_REFCOUNTS)?;
                if meta.verify(&self.io)? {
                    return Ok(());
                }
            }
            if self.cancelled.load(Ordering::Acquire) != cancelled {
                return Err(Error::new(ErrorKind::Cancelled, CHECK_REFCOUNTS).in_file(self.io.name.clone()));
            }
            thread::yield_now();
        }
    }

    /// Marks the image corrupt if an operation was refused because it would have hit metadata, or has met a
    /// mapped cluster without a refcount. The caller holds neither the write-back lock nor the metadata lock.
    pub(crate) fn note_damage<T>(&self, result: Result<T>) -> Result<T> {
        // The check of refcounts may also be cancelled, or fail to read.
        let proof = |error: &Error| {
            error.kind() == ErrorKind::Corrupt
                && [WRITE_OVER_METADATA, CHECK_REFCOUNTS].contains(&error.operation())
        };
        if let Err(error) = &result
            && proof(error)
        {
            self.mark_corrupt(error);
        }
        result
    }
}
