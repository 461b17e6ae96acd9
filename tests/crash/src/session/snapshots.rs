//! Operations on snapshots, in the image and in the model.

use blockmirror_block::BlockDevice;
use blockmirror_qcow2::{NewSnapshot, SnapshotRef};

use super::{Session, StepError};
use crate::model::{Listing, State, TakenSnapshot};
use crate::op::Op;

/// Most snapshots of an image: narrow refcounts count few.
const MOST: usize = 6;

impl Session<'_> {
    pub(super) fn snapshot_operation(
        &mut self,
        op: Op,
        step: u64,
        wanted: &mut State,
    ) -> Result<(), StepError> {
        match op {
            Op::Snapshot => self.take(step)?,
            Op::Apply => self.apply(wanted)?,
            _ => self.delete_first()?,
        }
        // All three begin with a flush.
        wanted.durable = (self.clock)();
        Ok(())
    }

    /// The first snapshot that is listed for certain.
    fn first(&self) -> Option<usize> {
        self.history.snapshots.iter().position(|taken| taken.listing.is_certain())
    }

    /// How many may be listed.
    pub(super) fn live_snapshots(&self) -> usize {
        self.history.snapshots.iter().filter(|taken| taken.listing.may_be(usize::MAX - 1)).count()
    }

    fn take(&mut self, step: u64) -> Result<(), StepError> {
        if self.live_snapshots() >= MOST {
            return Ok(self.disk()?.flush()?);
        }
        let id = format!("step{step}");
        self.disk()?;
        let taken = TakenSnapshot {
            id: id.clone().into_bytes(),
            contents: self.now.clone(),
            listing: Listing::new((self.clock)(), usize::MAX),
        };
        let index = self.history.snapshots.len();
        self.history.snapshots.push(taken);
        self.disk()?.create_snapshot(&NewSnapshot::new("name").id(id))?;
        self.history.snapshots[index].listing.durable = (self.clock)();
        Ok(())
    }

    fn apply(&mut self, wanted: &mut State) -> Result<(), StepError> {
        let Some(first) = self.first() else { return Ok(self.disk()?.flush()?) };
        let TakenSnapshot { id, contents, .. } = self.history.snapshots[first].clone();
        wanted.contents = contents;
        let wanted = SnapshotRef::Id(String::from_utf8_lossy(&id).into_owned());
        self.disk()?.apply_snapshot(&wanted)?;
        Ok(())
    }

    fn delete_first(&mut self) -> Result<(), StepError> {
        let Some(first) = self.first() else { return Ok(self.disk()?.flush()?) };
        let id = SnapshotRef::Id(String::from_utf8_lossy(&self.history.snapshots[first].id).into_owned());
        self.disk()?;
        self.history.snapshots[first].listing.deleting = (self.clock)();
        self.disk()?.delete_snapshot(&id)?;
        self.history.snapshots[first].listing.deleted = (self.clock)();
        Ok(())
    }
}
