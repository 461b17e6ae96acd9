//! Whether a range reads as zeros, answered from the mapping without reading data.

use blockmirror_block::{ByteRange, Result};

use crate::image::Qcow2;
use crate::meta::Mapping;

impl Qcow2 {
    /// Whether all of `range` is known to read as zeros now, without reading it.
    pub(crate) fn shows_zero(&self, range: ByteRange) -> Result<bool> {
        self.all_zero(range, |hole| !self.ctx.hidden_backing() && !self.ctx.backing_covers(hole))
    }

    /// Whether all of `range` reads as zeros, whatever lies below the image now or later; if `explicit`, also
    /// should it be given a backing file.
    pub(crate) fn is_zero_by_itself(&self, range: ByteRange, explicit: bool) -> Result<bool> {
        self.all_zero(range, |_| !explicit && !self.ctx.backed())
    }

    /// Whether all of `range` reads as zeros, if `unallocated` says which holes of the mapping do.
    fn all_zero(&self, range: ByteRange, unallocated: impl Fn(ByteRange) -> bool) -> Result<bool> {
        let mut at = range.start();
        while at < range.end() {
            let runs = self.meta.lock().runs(&self.ctx, ByteRange::new(at, range.end()), 64)?;
            for run in runs {
                match run.mapping {
                    Mapping::Zero(_) => {}
                    Mapping::Unallocated if unallocated(run.range) => {}
                    _ => return Ok(false),
                }
                at = run.range.end();
            }
        }
        Ok(true)
    }
}
