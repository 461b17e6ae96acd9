//! Operations on a closed image, and ends of the process that has it open.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Visit};
use blockmirror_qcow2::{AmendOptions, Header, Qcow2, Repair, Version, amend, repair};

use super::{Session, StepError, read_all};
use crate::damage;
use crate::model::{State, possible, reachable};
use crate::op::Op;
use crate::start::open_options;

impl Session<'_> {
    fn flush_and_close(&mut self, wanted: &mut State) -> Result<(), StepError> {
        if let Some(disk) = &self.disk {
            disk.flush()?;
            // What follows may have nothing to do, and makes nothing durable then.
            wanted.durable = (self.clock)();
            disk.store_bitmaps()?;
        }
        self.disk = None;
        Ok(())
    }

    pub(super) fn amend(&mut self, op: Op, wanted: &mut State) -> Result<(), StepError> {
        self.flush_and_close(wanted)?;
        let header = Header::read(&*self.files.image)?;
        let mut options = AmendOptions::default();
        if op == Op::AmendVersion {
            options.version = Some(if header.version >= 3 { Version::V2 } else { Version::V3 });
        } else {
            options.refcount_bits = Some(if header.refcount_bits() == 16 { 8 } else { 16 });
        }
        let open = open_options(&self.files)?;
        amend(Arc::clone(&self.files.image), &open, &options, &mut |_, _| Visit::Continue(()))?;
        Ok(())
    }

    pub(super) fn repair(&mut self, wanted: &mut State) -> Result<(), StepError> {
        self.flush_and_close(wanted)?;
        let report = repair(&*self.files.image, Repair::All, &mut ())?;
        if !report.is_clean() {
            return Err(StepError::Wrong(format!("not clean after a repair: {report:?}")));
        }
        Ok(())
    }

    /// What is not durable may be lost, in the image; a close stores the bitmaps.
    pub(super) fn end(&mut self, op: Op, wanted: &mut State) -> Result<(), StepError> {
        let before = self.disk.as_ref().map_or(Ok(Vec::new()), consistent_bitmaps)?;
        match op {
            Op::Kill => self.kill(),
            _ => self.disk = None,
        }
        let found = read_all(self.disk()?)?;
        possible(&reachable(&self.history.states, (self.clock)()), &found).map_err(StepError::Wrong)?;
        wanted.contents = found;
        let after = consistent_bitmaps(self.disk()?)?;
        // A close that fails says nothing.
        if op == Op::Close
            && self.answered.is_none()
            && let Some(name) = before.iter().find(|name| !after.contains(name))
        {
            return Err(StepError::Wrong(format!("the bitmap {name} is in use after a close")));
        }
        Ok(())
    }

    /// The guest data of the image stays as it is.
    pub(super) fn open_dirty(&mut self, wanted: &mut State) -> Result<(), StepError> {
        self.flush_and_close(wanted)?;
        if Header::read(&*self.files.image)?.version >= 3 {
            damage::lag_behind(&*self.files.image)?;
        }
        self.disk()?;
        Ok(())
    }
}

/// The names of the bitmaps that are not in use.
fn consistent_bitmaps(disk: &Qcow2) -> Result<Vec<String>, StepError> {
    let list = disk.bitmaps()?.into_iter();
    Ok(list.filter(|entry| !entry.in_use).map(|entry| entry.name.to_string()).collect())
}
