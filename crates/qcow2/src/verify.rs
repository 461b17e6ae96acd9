//! Damaged refcounts: a cluster that an entry maps must not be handed out, although its refcount is zero.
//!
//! Two rules, both without a check of the whole image at opening:
//!
//! - The first time a slice of an L2 table is needed for writing, each cluster that its entries map must have a refcount. One
//!   that has none is proof of damage: the operation fails, and the image is marked corrupt ([`Qcow2::note_damage`]).
//! - A free cluster below the file's length at opening (*unverified*) is handed out only after one pass over all L2 tables has
//!   found no entry that maps a free cluster. The pass goes on by a piece with each allocation that meets such a cluster, and
//!   until it is done new clusters come from past that length. Clusters that this image freed itself need no pass. A fresh
//!   image has no unverified clusters.
//!
//! On storage of a fixed length nothing lies past the end, so there the first allocation makes the whole pass.

use blockmirror_block::{Error, Result};

use crate::format::entry::Entry;
use crate::image::Qcow2;
use crate::io::Io;
use crate::meta::{Meta, decode_at};
use crate::offset::HostOffset;
use crate::overlap::WRITE_OVER_METADATA;
use crate::refcounts::{Allocation, Grant};
use crate::write::compressed_clusters;
use crate::writeback::Failure;

/// The operation that finds an entry which maps a free cluster; whoever meets it marks the image corrupt.
const CHECK_REFCOUNTS: &str = "check refcounts";

/// Bytes of L2 tables that the pass reads for one allocation.
const PASS_BYTES: u64 = 1 << 20;

impl Meta {
    /// Hands out up to `want` contiguous clusters. The inner error is the refcount block that the refcount table must first
    /// reach.
    pub(crate) fn allocate(&mut self, io: &Io, want: u64) -> Result<Result<Grant, u64>> {
        let mut skip = false;
        loop {
            match self.refcounts(io)?.allocate(io, want, skip)? {
                Allocation::Got(grant) => return Ok(Ok(grant)),
                Allocation::TableFull(block) => return Ok(Err(block)),
                Allocation::Unverified => {
                    let fixed = io.storage.info().fixed_len;
                    self.verify(io, if fixed { u64::MAX } else { PASS_BYTES })?;
                    skip = true;
                }
            }
        }
    }

    /// Hands out `want` contiguous clusters, at least one. The inner error as for [`Self::allocate`].
    pub(crate) fn allocate_run(&mut self, io: &Io, want: u64) -> Result<Result<u64, u64>> {
        if io.storage.info().fixed_len && self.refcounts(io)?.has_unverified(0) {
            self.verify(io, u64::MAX)?;
        }
        self.refcounts(io)?.allocate_run(io, want)
    }

    /// Moves the refcount table to a larger place so that it reaches block `block`.
    pub(crate) fn grow_refcount_table(&mut self, io: &Io, block: u64) -> Result<(), Failure> {
        let refcounts = self.refcounts(io)?;
        // The new place is fixed: it lies right behind what the table counts.
        let first_uncounted = refcounts.first_uncounted(io);
        if refcounts.has_unverified(first_uncounted) {
            self.verify(io, u64::MAX)?;
        }
        self.refcounts(io)?.grow_table(io, block)
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

    /// Checks the clusters that `data`, the slice of an L2 table at `slice`, maps for the guest clusters from `first` on. An
    /// entry that makes no sense maps nothing: whoever uses it gets an error.
    fn check_entries(&mut self, io: &Io, data: &[u8], first: u64, slice: HostOffset) -> Result<()> {
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

    /// Goes on with the pass over the L2 tables for about `budget` bytes of them. At its end every free cluster may be handed
    /// out. Where a table cannot be read the pass is given up: unverified clusters then stay unused.
    ///
    /// # Errors
    /// An entry that maps a free cluster. On storage of a fixed length, where nothing but unverified clusters may be left,
    /// a table that cannot be read.
    fn verify(&mut self, io: &Io, budget: u64) -> Result<()> {
        let per_slice = self.l2.slice_size() as u64 / io.format.entry_size();
        let mut left = budget;
        // At most 2^22 tables; those without a table take no budget.
        let end = self.l1().len() as u64 * io.l2_entries();
        while self.verified_to < end {
            let guest = self.verified_to;
            let Some(table) = self.l1_entry(io, guest)?.1.table() else {
                self.verified_to = (guest / io.l2_entries() + 1) * io.l2_entries();
                continue;
            };
            if left == 0 {
                return Ok(());
            }
            left = left.saturating_sub(self.l2.slice_size() as u64);
            if let Err(error) = self.verify_slice(io, table, guest) {
                if error.operation() == CHECK_REFCOUNTS || io.storage.info().fixed_len {
                    return Err(error);
                }
                self.refcounts(io)?.never_verify();
                return Ok(());
            }
            self.verified_to = guest + per_slice;
        }
        self.refcounts(io)?.all_verified();
        Ok(())
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

fn free_but(how: &str, guest: u64) -> String {
    format!("the cluster {how} guest cluster {guest}, but its refcount is 0; the image is marked corrupt")
}

impl Qcow2 {
    /// Marks the image corrupt if an operation was refused because it would have hit metadata, or has met a mapped cluster
    /// without a refcount. The caller holds neither the write-back lock nor the metadata lock.
    pub(crate) fn note_damage<T>(&self, result: Result<T>) -> Result<T> {
        let proof = |error: &Error| [WRITE_OVER_METADATA, CHECK_REFCOUNTS].contains(&error.operation());
        if let Err(error) = &result
            && proof(error)
        {
            self.mark_corrupt(error);
        }
        result
    }
}
