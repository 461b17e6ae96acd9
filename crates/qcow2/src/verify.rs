//! Damaged refcounts: a cluster that an entry maps must not be handed out, although its refcount is zero.
//!
//! Two rules, both without a check of the whole image at opening:
//!
//! - The first time a slice of an L2 table is needed for writing, each cluster that its entries map must have
//!   a refcount. One that has none is proof of damage: the operation fails, and the image is marked corrupt
//!   ([`Damage`]).
//! - A free cluster below the file's length at opening (*unverified*) is handed out only after one pass over
//!   all L2 tables has found no entry that maps a free cluster. Until the pass is done new clusters come from
//!   past that length. Clusters that this image freed itself need no pass. A fresh image has no unverified
//!   clusters.
//!
//! The pass has a credit: a first part is free, then the clusters handed out meanwhile pay for as many bytes
//! of it. So it costs no more than the writes that it is for, whatever the image says. What it reads counts,
//! of L2 tables and of refcount blocks; holes of the file are skipped.
//!
//! On storage of a fixed length nothing lies past the end, so there the first allocation waits for the whole
//! pass ([`Missing::Verification`]): the metadata lock is released between the pieces, and
//! [`Qcow2::cancel_in_flight`](blockmirror_block::BlockDevice::cancel_in_flight) ends it.

use std::ops::Range;

use blockmirror_block::sync::thread;
use blockmirror_block::{ByteRange, Result};
use byteorder::{BigEndian, ByteOrder};

use crate::context::ImageContext;
use crate::damage::Damage;
use crate::format::entry::{Entry, PlainEntry};
use crate::holes::HoleCursor;
use crate::image::Qcow2;
use crate::meta::{InactivePass, Meta, PASS_CREDIT, decode_at, references};
use crate::offset::{ClusterRange, GuestCluster, HostCluster, HostOffset};
use crate::refcounts::{Allocation, Grant, Missing, RunSearch};
use crate::stop::StopCheck;

/// What is paid for an entry of the L1 table, for a slice or table that lies in a hole, and for each call of
/// the storage: a slice of an L2 table or of a refcount block that is read, or a look for holes.
const L1_ENTRY_COST: i64 = 8;
const HOLE_COST: i64 = 64;
const CALL_COST: i64 = 4096;

impl Meta {
    /// Hands out up to `want` contiguous clusters. The inner error says what must come first.
    pub(crate) fn allocate(&mut self, ctx: &ImageContext, want: u64) -> Result<Result<Grant, Missing>> {
        if self.doubtful_end.is_some() {
            return Ok(Err(Missing::RestOfTables));
        }
        let mut skip = false;
        loop {
            match self.refcounts(ctx)?.allocate(ctx, want, skip)? {
                Allocation::Got(grant) => {
                    if skip {
                        self.pay_for_pass(ctx, &grant);
                    }
                    return Ok(Ok(grant));
                }
                Allocation::Searching => return Ok(Err(Missing::Search)),
                Allocation::Uncounted(new) => return Ok(Err(Missing::RefcountBlocks(new))),
                Allocation::TableFull(block) => return Ok(Err(Missing::RefcountTable(block))),
                Allocation::Unverified if ctx.storage.info().fixed_len => {
                    return Ok(Err(Missing::Verification));
                }
                Allocation::Unverified => {
                    self.verify(ctx)?;
                    skip = true;
                }
            }
        }
    }

    /// Hands out `want` contiguous clusters, at least one. The inner error as for [`Self::allocate`]; the
    /// next call goes on with the same `search`.
    pub(crate) fn allocate_run(
        &mut self,
        ctx: &ImageContext,
        want: u64,
        search: &mut RunSearch,
    ) -> Result<Result<Range<HostCluster>, Missing>> {
        if self.doubtful_end.is_some() {
            return Ok(Err(Missing::RestOfTables));
        }
        let refcounts = self.refcounts(ctx)?;
        if ctx.storage.info().fixed_len && refcounts.has_unverified(HostCluster(0)) {
            return Ok(Err(Missing::Verification));
        }
        refcounts.allocate_run(ctx, want, search)
    }

    /// What is handed out past the unverified clusters pays for as much of the pass, so that whatever the
    /// image says the pass takes no longer than writing what it is for.
    fn pay_for_pass(&mut self, ctx: &ImageContext, grant: &Grant) {
        // At most a refcount block of clusters, each of 2 MiB.
        let bytes = (grant.count * ctx.cluster().bytes()) as i64;
        self.pass_credit = (self.pass_credit + bytes).min(PASS_CREDIT);
    }

    /// The entry of one guest cluster that may be changed, or whose cluster may be written.
    ///
    /// # Errors
    /// Its table, or a cluster mapped in the same slice of it, has no refcount.
    pub(crate) fn entry_to_write(&mut self, ctx: &ImageContext, cluster: GuestCluster) -> Result<Entry> {
        let (index, l1) = self.l1_entry(ctx, cluster)?;
        let Some(table) = l1.table() else { return Ok(Entry::UNALLOCATED) };
        ctx.check_table("read L1 table", table, index as u64)?;
        let (slice, at) = self.locate(ctx, table, cluster);
        if !self.l2.is_checked(slice) {
            self.load(ctx, slice)?;
            // Zeros map nothing, but the table must have a refcount all the same.
            let data = match self.l2.look(slice).flatten() {
                Some(data) => data.to_vec(),
                None => Vec::new(),
            };
            let first = GuestCluster(cluster.0 - at as u64 / ctx.format.entry_size());
            self.check_table_refcount(ctx, table, first)?;
            let shared = self.check_entries(ctx, &data, first, slice)?;
            if let Some(data) = (!shared.is_empty()).then(|| self.l2.edit(slice)).flatten() {
                shared.into_iter().for_each(|(at, word)| BigEndian::write_u64(&mut data[at..], word));
            }
            self.l2.set_checked(slice);
        }
        decode_at(ctx, self.load(ctx, slice)?, at, cluster, slice)
    }

    fn check_table_refcount(
        &mut self,
        ctx: &ImageContext,
        table: HostOffset,
        guest: GuestCluster,
    ) -> Result<()> {
        if self.refcounts(ctx)?.get(ctx, ctx.cluster().index(table))? == 0 {
            return Err(Damage::TableUncounted(guest).met(ctx, table));
        }
        Ok(())
    }

    /// Checks the clusters that `data`, the slice of an L2 table at `slice`, maps for the guest clusters from
    /// `first` on. An entry that makes no sense maps nothing: its use is an error.
    ///
    /// Returns the entries that say COPIED although their clusters have more references than one, as their
    /// offsets in the slice and what their first words should be. A crash of another writer may leave them.
    pub(crate) fn check_entries(
        &mut self,
        ctx: &ImageContext,
        data: &[u8],
        first: GuestCluster,
        slice: HostOffset,
    ) -> Result<Vec<(usize, u64)>> {
        let mut shared = Vec::new();
        if ctx.format.external_data {
            return Ok(shared);
        }
        let refcounts = self.refcounts(ctx)?;
        let step = ctx.format.entry_size() as usize;
        for (at, guest) in (0..data.len()).step_by(step).zip((first.0..).map(GuestCluster)) {
            if BigEndian::read_u64(&data[at..]) == 0 {
                continue;
            }
            let Ok(entry) = decode_at(ctx, data, at, guest, slice) else { continue };
            for cluster in references(ctx, &entry).each() {
                match refcounts.get(ctx, cluster)? {
                    0 => return Err(Damage::MappedUncounted(guest).met(ctx, ctx.cluster().start(cluster))),
                    1 => {}
                    _ if matches!(entry, Entry::Plain(PlainEntry { copied: true, .. })) => {
                        let word = BigEndian::read_u64(&data[at..]);
                        shared.push((at, ctx.format.with_copied(word, false)));
                    }
                    _ => {}
                }
            }
        }
        Ok(shared)
    }

    /// Goes on with the pass over the L2 tables, also those that only snapshots have, as far as its credit
    /// goes, and with one slice perhaps further; whether it is over. At its end every free cluster may be
    /// handed out. Where a table cannot be read the pass is given up: unverified clusters then stay unused.
    ///
    /// # Errors
    /// An entry that maps a free cluster. On storage of a fixed length, where nothing but unverified clusters
    /// may be left, a table that cannot be read.
    fn verify(&mut self, ctx: &ImageContext) -> Result<bool> {
        let mut runs = HoleCursor::default();
        let over = match self.verify_active(ctx, &mut runs) {
            Ok(true) => self.verify_inactive(ctx, &mut runs),
            other => other,
        };
        match over {
            Ok(true) => self.refcounts(ctx)?.all_verified(),
            Ok(false) => {}
            Err(error) if Damage::of(&error).is_some() || ctx.storage.info().fixed_len => return Err(error),
            Err(_) => {
                self.refcounts(ctx)?.never_verify();
                return Ok(true);
            }
        }
        over
    }

    /// The pass over the active L2 tables.
    fn verify_active(&mut self, ctx: &ImageContext, runs: &mut HoleCursor) -> Result<bool> {
        // At most 2^22 tables.
        let end = GuestCluster(self.l1().len() as u64 * ctx.l2_entries());
        while self.verified_to < end {
            if self.pass_credit <= 0 {
                return Ok(false);
            }
            let guest = self.verified_to;
            self.verified_to = match self.l1_entry(ctx, guest)?.1.table() {
                Some(table) => self.pass_over(ctx, table, guest, runs)?,
                None => {
                    self.pass_credit -= L1_ENTRY_COST;
                    GuestCluster((guest.0 / ctx.l2_entries() + 1) * ctx.l2_entries())
                }
            };
        }
        Ok(true)
    }

    /// The pass over the L2 tables that only snapshots have.
    fn verify_inactive(&mut self, ctx: &ImageContext, runs: &mut HoleCursor) -> Result<bool> {
        let mut pass = match self.inactive_pass.take() {
            Some(pass) => pass,
            None => {
                let mut tables = self.refcounts(ctx)?.metadata.only_inactive_l2();
                tables.reverse();
                InactivePass { tables, entry: 0 }
            }
        };
        let mut outcome = Ok(true);
        while let Some(table) = pass.tables.last() {
            if self.pass_credit <= 0 {
                outcome = Ok(false);
                break;
            }
            let at = ctx.cluster().start(*table);
            // What the table maps is not known here, only where in it the entries lie.
            let guest = GuestCluster(pass.entry);
            let counted = self.check_table_refcount(ctx, at, guest);
            match counted.and_then(|()| self.pass_over(ctx, at, guest, runs)) {
                Ok(next) if next.0 < ctx.l2_entries() => pass.entry = next.0,
                Ok(_) => {
                    pass.tables.pop();
                    pass.entry = 0;
                }
                Err(error) => {
                    outcome = Err(match (Damage::of(&error), error.offset()) {
                        (Some(Damage::MappedUncounted(_) | Damage::TableUncounted(_)), Some(at)) => {
                            Damage::SnapshotUncounted.met(ctx, HostOffset(at))
                        }
                        _ => error,
                    });
                    break;
                }
            }
        }
        self.inactive_pass = Some(pass);
        outcome
    }

    /// Takes the pass over the slice of `table` that begins with guest cluster `guest`, or over more if that
    /// lies in a hole; returns the guest cluster behind it.
    fn pass_over(
        &mut self,
        ctx: &ImageContext,
        table: HostOffset,
        guest: GuestCluster,
        runs: &mut HoleCursor,
    ) -> Result<GuestCluster> {
        let per_slice = self.l2.slice_size() as u64 / ctx.format.entry_size();
        let (looks, loads) = (runs.looks, self.refcounts(ctx)?.loads());
        let checked = match self.skip_hole(ctx, table, guest, runs) {
            Some(next) => {
                self.pass_credit -= HOLE_COST;
                Ok(next)
            }
            None => {
                self.pass_credit -= CALL_COST;
                self.verify_slice(ctx, table, guest).map(|()| guest.plus(per_slice))
            }
        };
        let calls = runs.looks - looks + self.refcounts(ctx)?.loads() - loads;
        // At most the entries of a slice, times three for compressed clusters.
        self.pass_credit -= calls as i64 * CALL_COST;
        checked
    }

    /// Where the table, or the slice of it that begins with guest cluster `guest`, lies in a hole: the guest
    /// cluster behind it. Entries of zeros map nothing. What was changed in memory since, and is not on disk
    /// yet, was checked when it was.
    fn skip_hole(
        &self,
        ctx: &ImageContext,
        table: HostOffset,
        guest: GuestCluster,
        runs: &mut HoleCursor,
    ) -> Option<GuestCluster> {
        let (slice, _) = self.locate(ctx, table, guest);
        let in_table = slice.0 - table.0;
        if !runs.is_hole(ctx, ByteRange::at(slice.0, self.l2.slice_size() as u64)) {
            return None;
        }
        // More of the table may lie in the same hole.
        let end = runs.end().min(table.0 + ctx.cluster().bytes());
        let slices = (end - table.0 - in_table) / self.l2.slice_size() as u64;
        Some(guest.plus(slices * (self.l2.slice_size() as u64 / ctx.format.entry_size())))
    }

    /// Checks the slice of `table` that begins with guest cluster `guest`, without keeping it.
    fn verify_slice(&mut self, ctx: &ImageContext, table: HostOffset, guest: GuestCluster) -> Result<()> {
        ctx.check_table("read L1 table", table, guest.0 / ctx.l2_entries())?;
        let (slice, _) = self.locate(ctx, table, guest);
        let data = match self.l2.get(slice) {
            Some(data) => data.to_vec().into_boxed_slice(),
            None => ctx.read_slice("read L2 table", slice)?,
        };
        self.check_entries(ctx, &data, guest, slice).map(drop)
    }
}

impl Qcow2 {
    /// Brings the pass over the L2 tables to its end, with room for others between its pieces.
    pub(crate) fn verify_all(&self, stop: &StopCheck<'_>) -> Result<()> {
        loop {
            {
                let mut meta = self.meta.lock();
                meta.check_poison(&self.ctx, "check refcounts")?;
                meta.pass_credit = PASS_CREDIT;
                if meta.verify(&self.ctx)? {
                    return Ok(());
                }
            }
            stop.check()?;
            thread::yield_now();
        }
    }
}
