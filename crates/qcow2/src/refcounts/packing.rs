//! Places for compressed clusters: runs of bytes, several of which share a host cluster. Each holds a
//! reference to every host cluster that it touches.
//!
//! There is room in one host cluster at a time, behind what was placed last. What must hold: room is only in
//! a cluster that was allocated for compressed data while the image is open, and it is closed before the last
//! reference to the cluster is dropped. Otherwise the cluster could be freed, and its space given back to the
//! host, while new data goes there.

use std::ops::Range;

use blockmirror_block::Result;

use super::Refcounts;
use crate::context::ImageContext;
use crate::offset::{ClusterRange, HostCluster, HostOffset};

/// Where a batch begins: writes of whole sectors need no read-modify-write below.
const SECTOR: u64 = 512;

/// The bytes behind the compressed data that was placed last, to the end of their cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room(HostOffset);

impl Refcounts {
    /// The next place begins with a sector.
    pub(crate) fn begin_batch(&mut self, ctx: &ImageContext) {
        if let Some(Room(at)) = &mut self.room {
            at.0 = at.0.next_multiple_of(SECTOR);
            if ctx.cluster().within(*at) == 0 {
                self.room = None;
            }
        }
    }

    /// Places `len` bytes in the room there is, or in the cluster `new`, which was allocated for it, and
    /// adds references. `None` if that does not do.
    pub(crate) fn place(
        &mut self,
        ctx: &ImageContext,
        len: u64,
        new: Option<HostCluster>,
    ) -> Result<Option<HostOffset>> {
        let size = ctx.cluster();
        let at = match (self.shared_room(ctx)?, new) {
            (Some(at), _) if size.within(at) + len <= size.bytes() => at,
            (Some(at), Some(new)) if size.index(at).plus(1) == new => at,
            (_, Some(new)) => size.start(new),
            (_, None) => return Ok(None),
        };
        if size.within(at) != 0 {
            let cluster = size.index(at);
            let count = self.get(ctx, cluster)?;
            self.set(ctx, cluster, count + 1)?;
        }
        let end = at.plus(len);
        self.room = (size.within(end) != 0).then_some(Room(end));
        Ok(Some(at))
    }

    /// The room in a cluster that can have one more reference.
    fn shared_room(&mut self, ctx: &ImageContext) -> Result<Option<HostOffset>> {
        let Some(Room(at)) = self.room else { return Ok(None) };
        let count = self.get(ctx, ctx.cluster().index(at))?;
        if (1..self.width.max()).contains(&count) {
            return Ok(Some(at));
        }
        self.room = None;
        Ok(None)
    }

    /// `cluster` loses its last reference, or its bytes are in doubt: nothing more is placed in it.
    pub(super) fn close_room(&mut self, ctx: &ImageContext, cluster: HostCluster) {
        if self.room.is_some_and(|Room(at)| ctx.cluster().index(at) == cluster) {
            self.room = None;
        }
    }

    /// Takes a reference to each of `clusters` back, whose place nothing ever pointed at. If its write
    /// `may_come_late`, they are not handed out while the image is open, also once others have no reference
    /// to them any more.
    pub(crate) fn unplace(
        &mut self,
        ctx: &ImageContext,
        clusters: Range<HostCluster>,
        may_come_late: bool,
    ) -> Result<()> {
        for cluster in clusters.each() {
            self.close_room(ctx, cluster);
            if may_come_late {
                self.leave_unused(cluster..cluster.plus(1));
            }
            let count = self.get(ctx, cluster)?;
            self.set(ctx, cluster, count.saturating_sub(1))?;
            if count == 1 {
                self.next_free = self.next_free.min(cluster);
            }
        }
        Ok(())
    }
}
