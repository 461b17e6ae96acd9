//! Provides what planning finds missing ([`Missing`]) and cannot get under the metadata lock.
//!
//! Planning runs under that lock. Where it finds something missing it returns what, the lock is released, the
//! missing thing is provided (reserve under the lock, write without it, check again, install), and planning
//! starts anew. So tables are written without keeping readers out, and long searches let others in between.

use blockmirror_block::sync::thread;
use blockmirror_block::{Result, cancel};

use crate::failure::{Failure, may_come_late};
use crate::image::Qcow2;
use crate::refcounts::{Missing, NewBlocks};
use crate::stop::StopCheck;

impl Qcow2 {
    /// Does what an allocation needs first. The caller holds neither the write-back lock nor the metadata
    /// lock.
    pub(crate) fn provide(&self, missing: Missing, stop: &StopCheck<'_>) -> Result<()> {
        stop.check()?;
        match missing {
            Missing::Verification => self.verify_all(stop),
            Missing::RestOfTables => self.look_at_rest(stop),
            Missing::Search => {
                thread::yield_now();
                Ok(())
            }
            Missing::RefcountBlocks(new) => self.add_refcount_blocks(&new),
            Missing::L2Table(cluster) => self.make_l2_table(cluster, stop),
            Missing::RefcountTable(block) => {
                // There is no place past the end for the larger table.
                if self.ctx.storage.info().fixed_len {
                    self.verify_all(stop)?;
                }
                self.grow_refcount_table(block)
            }
        }
    }

    /// Grows the refcount table so that it reaches `block`. On storage of a fixed length the pass over the L2
    /// tables is over.
    pub(crate) fn grow_refcount_table(&self, block: u64) -> Result<()> {
        let _only_one = self.write_back.lock();
        let _tables = self.tables.lock();
        let _shield = cancel::shield();
        let ctx = &self.ctx;
        let (grown, dirty) = {
            let mut meta = self.meta.lock();
            meta.check_poison(ctx, "grow refcount table")?;
            let refcounts = meta.refcounts(ctx)?;
            match refcounts.plan_table(ctx, block) {
                Ok(None) => return Ok(()),
                Ok(Some(grown)) => (grown, refcounts.blocks.take_dirty()),
                Err(error) => return Err(meta.settle(error.into())),
            }
        };
        let written = grown.write(ctx, &dirty);
        let mut meta = self.meta.lock();
        let refcounts = meta.refcounts(ctx)?;
        let used = match written {
            Ok(()) => {
                refcounts.blocks.written();
                refcounts.use_table(ctx, grown).map_err(Failure::from)
            }
            Err(failure) => {
                refcounts.blocks.not_written();
                Err(failure)
            }
        };
        used.map_err(|failure| meta.settle(failure))
    }

    /// Adds refcount blocks, unless another thread has added one of them.
    pub(crate) fn add_refcount_blocks(&self, new: &NewBlocks) -> Result<()> {
        let _tables = self.tables.lock();
        let ctx = &self.ctx;
        {
            let mut meta = self.meta.lock();
            meta.check_poison(ctx, "allocate cluster")?;
            if !meta.refcounts(ctx)?.can_add(new) {
                return Ok(());
            }
        }
        let written = new.write(ctx);
        let mut meta = self.meta.lock();
        let refcounts = meta.refcounts(ctx)?;
        match &written {
            Ok(()) => refcounts.add(ctx, new),
            Err(error) if may_come_late(error) => refcounts.give_up(ctx, new),
            Err(_) => {}
        }
        written
    }
}
