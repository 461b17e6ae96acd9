//! Committing an image to its backing file, in the order of `ops::Commit`.

use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags};

use super::{Session, StepError};
use crate::model::State;

impl Session<'_> {
    /// What the image holds is durable in the layer below before the image is emptied.
    pub(super) fn commit(&mut self, wanted: &mut State) -> Result<(), StepError> {
        // They show the layer below as well, which changes.
        if self.live_snapshots() > 0 {
            return self.flush(wanted);
        }
        let disk = self.disk()?;
        let Some(base) = disk.backing() else { return self.flush(wanted) };
        let len = disk.len();
        if base.len() < len {
            base.resize(len, false)?;
        }
        let mut own = Vec::new();
        disk.extents(ByteRange::new(0, len), &mut |extent| {
            if extent.depth == 0 && !extent.kind.is_unallocated() {
                own.push(extent.range);
            }
            Visit::Continue(())
        })?;
        for range in own {
            let mut bytes = vec![0; range.len() as usize];
            disk.read_at(&mut bytes, range.start())?;
            base.write_at(&bytes, range.start(), WriteFlags::NONE)?;
        }
        base.flush()?;
        disk.empty()?;
        wanted.durable = (self.clock)();
        Ok(())
    }
}
