//! An L2 table of its own for a guest cluster that is about to change.

use blockmirror_block::Result;

use crate::context::ImageContext;
use crate::meta::Meta;
use crate::offset::{GuestCluster, HostOffset};
use crate::verify::Missing;

/// Makes sure that guest cluster `cluster` has an L2 table that may be changed in place; `Some` says what
/// must come first.
pub(crate) fn ensure_l2_table(
    ctx: &ImageContext,
    meta: &mut Meta,
    cluster: GuestCluster,
) -> Result<Option<Missing>> {
    let (index, l1) = meta.l1_entry(ctx, cluster)?;
    if l1.copied() && l1.table().is_some() {
        return Ok(None);
    }
    let grant = match meta.allocate(ctx, 1)? {
        Err(missing) => return Ok(Some(missing)),
        Ok(grant) => grant,
    };
    let new = ctx.cluster().start(grant.first);
    let written = match l1.table() {
        None => ctx.zero_cluster(new),
        Some(old) => copy_table(ctx, meta, old, new),
    };
    let refcounts = meta.refcounts(ctx)?;
    if let Err(error) = written {
        refcounts.release(ctx, grant.clusters())?;
        return Err(error);
    }
    refcounts.metadata.insert(grant.first);
    if let Some(old) = l1.table() {
        let old_cluster = ctx.cluster().index(old);
        refcounts.metadata.remove(old_cluster);
        refcounts.defer_unref(ctx, old_cluster..old_cluster.plus(1));
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
