//! Emptying an image: it holds nothing of its own afterwards, and what lies below it shows everywhere.
//!
//! Called when all that the image holds has been committed to its backing file. L2 tables are dropped one by
//! one, in the order of a write-back: a crash leaves some of them, which show what the backing file shows
//! too, or leaks. So it can be done again.

use blockmirror_block::{ByteRange, Error, ErrorKind, Result};

use crate::image::Qcow2;

/// All guest bytes, whatever the length.
const ALL: ByteRange = ByteRange::new(0, u64::MAX);

impl Qcow2 {
    /// Drops all data and all zero clusters of the disk, durably, and gives their space back; length, backing
    /// file, snapshots and persistent bitmaps stay. What the guest reads changes wherever the layers below
    /// hold something else, which no bitmap records: that is the caller's affair.
    ///
    /// # Errors
    /// A read-only or poisoned image; one whose data file is a raw image; damaged metadata, which is met
    /// before anything changes; a write that fails. What has been dropped by then stays dropped.
    pub fn empty(&self) -> Result<()> {
        self.check_writable("empty")?;
        if self.raw_data_file() {
            let error = Error::new(ErrorKind::Unsupported, "empty").in_file(self.ctx.name.clone());
            return Err(error.because("its data file is a raw image, which must stay what the guest sees"));
        }
        let _only_one = self.changing.lock();
        self.meta.lock().check_poison(&self.ctx, "empty")?;
        self.note_damage(self.drop_all())
    }

    fn drop_all(&self) -> Result<()> {
        let _nobody_maps = self.ranges.lock_exclusive(ALL)?;
        self.check_past(0)?;
        self.write_back()?;
        self.unmap_past(0)?;
        self.write_back()?;
        match &self.ctx.data_file {
            Some(file) => file.discard(ByteRange::new(0, file.len()?.min(self.ctx.size()))),
            None => Ok(()),
        }
    }
}
