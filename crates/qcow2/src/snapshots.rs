//! Internal snapshots of an open image: listed, created, applied and deleted.
//!
//! A snapshot is an entry of the snapshot table and an L1 table of its own; L2 tables and data are shared
//! with the active disk and with other snapshots, by refcounts. Writing copies what is shared first (`write`,
//! `zero`), so a snapshot never changes. Called by `image`, and by users of the library.
//!
//! Each operation holds all guest clusters, so no guest reads or writes meanwhile, and makes one write of the
//! header the point at which it happens. In order, with a flush of the storage at each arrow:
//!
//! ```text
//! create   COPIED cleared -> refcounts raised, L1 copy, new snapshot table -> header: table -> old table freed
//! apply    COPIED cleared -> refcounts raised, new active L1 -> header: L1 and length -> old L1 and its references dropped
//! delete   new snapshot table -> header: table -> references dropped -> COPIED set
//! ```
//!
//! What must hold at each instant on disk: a snapshot that is listed is whole, no refcount is below its
//! references, and no entry with COPIED maps a cluster with more than one. A crash leaves clusters that
//! nothing uses, and entries without COPIED whose clusters have one reference: those are copied once more
//! than they need to be, and a repair sets them right.

mod apply;
mod create;
mod delete;
mod directory;
mod references;

use blockmirror_block::{ByteRange, Error as BlockError, ErrorKind};

pub use create::NewSnapshot;

use crate::damage::Damage;
use crate::error::{Error, Result};
use crate::format::snapshot::Snapshot;
use crate::image::Qcow2;
use crate::snapshot_ref::SnapshotRef;
use crate::stop::StopCheck;

/// All guest bytes, whatever the length.
const ALL: ByteRange = ByteRange::new(0, u64::MAX);

impl SnapshotRef {
    /// The snapshot that is meant.
    pub fn find<'a>(&self, snapshots: &'a [Snapshot]) -> Option<&'a Snapshot> {
        let rank = |snapshot: &'a Snapshot| Some((self.rank(&snapshot.id, &snapshot.name)?, snapshot));
        // The first of those that fit equally well.
        snapshots.iter().filter_map(rank).min_by_key(|(rank, _)| *rank).map(|(_, snapshot)| snapshot)
    }
}

impl Qcow2 {
    /// The snapshots, in order of the table.
    ///
    /// # Errors
    /// The snapshot table is damaged or cannot be read.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let _no_change = self.changing.lock();
        let mut all = Vec::new();
        self.each_snapshot(&mut |snapshot, _| all.push(snapshot))?;
        Ok(all)
    }

    /// Runs `operation` on a quiesced disk that is on disk as it is in memory.
    fn quiesced<T>(
        &self,
        name: &'static str,
        operation: impl FnOnce(&StopCheck<'_>) -> Result<T>,
    ) -> Result<T> {
        self.check_writable(name)?;
        if self.ctx.format.external_data {
            return Err(self.snapshot_refused(name, "an image with an external data file has no snapshots"));
        }
        let _only_one = self.changing.lock();
        let _quiesced = self.ranges.lock_exclusive(ALL)?;
        let stop = self.stop_check(name);
        let result = self.write_back().map_err(Error::from).and_then(|()| operation(&stop));
        if let Err(Error::Storage(error) | Error::SnapshotLeaks { cause: error }) = &result
            && Damage::of(error).is_some()
        {
            self.mark_corrupt(error);
        }
        result
    }

    fn snapshot_refused(&self, operation: &'static str, why: &str) -> Error {
        BlockError::new(ErrorKind::Unsupported, operation).in_file(self.ctx.name.clone()).because(why).into()
    }
}
