//! An L2 table of its own for a guest cluster that is about to change.
//!
//! Made one at a time: a cluster is reserved under the metadata lock, the table is written without it, then
//! the L1 entry points there. Operations that need one find it missing ([`Missing::L2Table`]) and have it
//! provided.

use blockmirror_block::Result;

use crate::context::ImageContext;
use crate::failure::may_come_late;
use crate::image::Qcow2;
use crate::meta::Meta;
use crate::offset::{GuestCluster, HostOffset};
use crate::overlap::MetadataKind;
use crate::refcounts::Missing;
use crate::stop::StopCheck;

impl Meta {
    /// Whether `cluster` has an L2 table that may be changed in place; `Some` says that it must come first.
    ///
    /// The refcount decides, where a flag says more than it may.
    pub(crate) fn missing_l2_table(
        &mut self,
        ctx: &ImageContext,
        cluster: GuestCluster,
    ) -> Result<Option<Missing>> {
        let (_, l1) = self.l1_entry(ctx, cluster)?;
        let owned = match l1.table().filter(|_| l1.copied()) {
            // A table without a refcount is found to be damage where its entries are looked at.
            Some(table) => self.refcounts(ctx)?.get(ctx, ctx.cluster().index(table))? <= 1,
            None => false,
        };
        Ok((!owned).then_some(Missing::L2Table(cluster)))
    }
}

impl Qcow2 {
    /// Makes an L2 table for `cluster`, unless another thread has.
    pub(crate) fn make_l2_table(&self, cluster: GuestCluster, stop: &StopCheck<'_>) -> Result<()> {
        while let Some(missing) = self.try_make_l2_table(cluster)? {
            self.provide(missing, stop)?;
        }
        Ok(())
    }

    /// The same; `Some` says what the allocation of its cluster needs first.
    fn try_make_l2_table(&self, cluster: GuestCluster) -> Result<Option<Missing>> {
        let ctx = &self.ctx;
        let _tables = self.tables.lock();
        let (index, old, grant) = {
            let mut meta = self.meta.lock();
            meta.check_poison(ctx, "write")?;
            if meta.missing_l2_table(ctx, cluster)?.is_none() {
                return Ok(None);
            }
            let (index, l1) = meta.l1_entry(ctx, cluster)?;
            match meta.allocate(ctx, 1)? {
                Err(missing) => return Ok(Some(missing)),
                Ok(grant) => (index, l1.table(), grant),
            }
        };
        let new = ctx.cluster().start(grant.first);
        let (written, may_be_used) = match read_table(ctx, old, grant.fresh && !ctx.whole_tables) {
            Ok(end_of_table) => {
                let at = new.0 + ctx.cluster().bytes() - end_of_table.len() as u64;
                let written = ctx.storage.write_at(&end_of_table, at);
                let may_be_used = !written.as_ref().is_err_and(may_come_late);
                (written, may_be_used)
            }
            Err(error) => (Err(error), true),
        };
        let mut meta = self.meta.lock();
        if let Err(error) = written {
            let refcounts = meta.refcounts(ctx)?;
            match may_be_used {
                true => refcounts.release(ctx, grant.clusters())?,
                false => refcounts.release_unusable(ctx, grant.clusters())?,
            }
            return Err(error);
        }
        meta.l2.forget(new, ctx.cluster().bytes());
        let refcounts = meta.refcounts(ctx)?;
        refcounts.metadata.insert(MetadataKind::ActiveL2, grant.first);
        if let Some(old) = old {
            let its = ctx.cluster().index(old);
            refcounts.metadata.remove(MetadataKind::ActiveL2, its);
            refcounts.defer_unref_table(ctx, its..its.plus(1));
            meta.l2.forget(old, ctx.cluster().bytes());
        }
        match old {
            Some(_) => meta.set_l1(index, new),
            None => meta.install_empty_table(ctx, index, new, cluster),
        }
        Ok(None)
    }
}

/// The end of a new L2 table as it is to be written, at most all of it: the rest reads as zeros.
///
/// It holds what the old one does, that a snapshot may refer to as well, or nothing. Such a table is never
/// changed, so the disk is up to date. Of an empty table in a `fresh` place only the last slice is written:
/// the file reaches over the table then, and the slices before it are written when an entry in them changes.
fn read_table(ctx: &ImageContext, old: Option<HostOffset>, fresh: bool) -> Result<Vec<u8>> {
    let Some(old) = old else {
        let len = if fresh { ctx.slice_size() as u64 } else { ctx.cluster().bytes() };
        return Ok(vec![0; len as usize]);
    };
    // At most 2 MiB.
    let mut table = vec![0; ctx.cluster().bytes() as usize];
    ctx.check_table("read L1 table", old, 0)?;
    ctx.storage.read_at(&mut table, old.0)?;
    Ok(table)
}
