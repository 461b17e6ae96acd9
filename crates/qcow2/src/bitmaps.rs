//! The persistent bitmaps of an open image.
//!
//! Those that are enabled (the flag *auto*) record which guest bytes change. Their bits are loaded when the
//! image is opened for writing. Before the first write the directory on disk marks them as in use, durably;
//! [`Qcow2::store_bitmaps`] stores the bits and takes the mark off. So after a crash a bitmap that misses a
//! write is marked, and no reader uses it. Disabled ones do not change with writes: they stay as they are on
//! disk.
//!
//! | file | what it does |
//! |---|---|
//! | this one | what writes do to the list of bitmaps in memory (`bitmap_list`) |
//! | `store` | new tables and a new directory, and the header that leads to it |
//! | `change` | add, remove, clear, enable, disable, merge; another length of the disk |
//!
//! Must hold: an operation that changes guest bytes holds their range ([`Qcow2::ranges`]) from before
//! [`Qcow2::record_write`] until the bytes are written; a change of the list holds all ranges exclusively.

mod change;
mod store;

use std::sync::atomic::Ordering;

use blockmirror_block::{ByteRange, Result, cancel};

pub use change::{BitmapBits, BitmapOptions};

use crate::bitmap_list::Bitmap;
use crate::error;
use crate::failure::Failure;
use crate::format::bitmaps::{BitmapEntry, Bitmaps};
use crate::image::Qcow2;

impl Qcow2 {
    /// The persistent bitmaps, in the order of the directory. None if a program that does not know them has
    /// written to the image. [`in_use`](BitmapEntry::in_use) are those that missed writes.
    ///
    /// # Errors
    /// The directory cannot be read, in an image that is open for reading.
    pub fn bitmaps(&self) -> error::Result<Vec<BitmapEntry>> {
        if self.is_writable() {
            return Ok(self.bitmaps.list().into_iter().map(|bitmap| bitmap.entry).collect());
        }
        let header = self.header();
        match header.bitmaps.as_ref().filter(|_| header.bitmaps_valid()) {
            Some(extension) => Bitmaps::new(&*self.ctx.storage, extension)?.collect(),
            None => Ok(Vec::new()),
        }
    }

    /// Guest bytes in `range` are about to change: notes it in the bitmaps that record. The caller holds the
    /// range until they have changed.
    ///
    /// # Errors
    /// The bitmaps cannot be marked as in use; then nothing may be written.
    pub(crate) fn record_write(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.mark_bitmaps()?;
        if self.bitmaps.is_recording() {
            self.bitmaps.set_bits(range);
        }
        Ok(())
    }

    /// The same for a request for `range`, not all of which changes; the caller does not hold it.
    pub(crate) fn record_request(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() || !self.bitmaps.concern_writes() {
            return Ok(());
        }
        let _held = self.ranges.lock_shared(range)?;
        self.record_write(range)
    }

    /// Marks the bitmaps that record as in use, durably, unless they are. What the directory was found to say
    /// is durable then, too: a process that was killed may have left it unflushed.
    fn mark_bitmaps(&self) -> Result<()> {
        if self.bitmaps.is_ready_for_writes() {
            return Ok(());
        }
        let _only_one = self.bitmaps.marking.lock();
        if self.bitmaps.is_ready_for_writes() {
            return Ok(());
        }
        if self.bitmaps.is_recording() && !self.bitmaps.is_marked() {
            self.mark_on_disk(Bitmap::records)?;
            self.bitmaps.set_marked();
        } else {
            self.meta.lock().check_poison(&self.ctx, "write")?;
            let _shield = cancel::shield();
            self.ctx.barrier().map_err(|failure| self.meta.lock().settle(failure))?;
        }
        self.bitmaps.set_durable();
        Ok(())
    }

    /// Marks the bitmaps whose names `which` takes as in use, durably, and keeps each so until it is
    /// [replaced](Self::replace_bitmaps): for an owner who has bitmaps of the same names, which may come to
    /// have more bits than these. A program that ends before that leaves bitmaps that no reader uses.
    ///
    /// # Errors
    /// A read-only or poisoned image; writing fails.
    pub fn keep_bitmaps_in_use(&self, which: impl Fn(&str) -> bool) -> error::Result<()> {
        self.check_writable("mark bitmaps in use")?;
        let _only_one = self.changing.lock();
        let _no_other_mark = self.bitmaps.marking.lock();
        if !self.bitmaps.keep(which) {
            return Ok(());
        }
        let is_marked = self.bitmaps.is_marked();
        Ok(self.mark_on_disk(|bitmap| is_marked && bitmap.records())?)
    }

    /// The image writes nothing more when it is dropped. Bitmaps that were not stored stay marked as in use:
    /// for an owner who has tried to store them, and does not wait for the storage again.
    pub fn give_up_bitmaps(&self) {
        self.bitmaps.give_up();
    }

    /// How many writes and flushes of metadata have ended so far. It rises while a flush, or the storing of
    /// bitmaps, goes on, however slow the storage is.
    pub fn metadata_progress(&self) -> u64 {
        self.ctx.progress.load(Ordering::Relaxed)
    }

    /// Marks all bitmaps as in use, durably. The caller holds all ranges.
    fn mark_all_bitmaps(&self) -> Result<()> {
        let _only_one = self.bitmaps.marking.lock();
        self.mark_on_disk(|_| true)?;
        self.bitmaps.set_marked();
        self.bitmaps.set_durable();
        Ok(())
    }

    /// Marks those of `which`, and those that are kept so, as in use in the directory on disk. No other byte
    /// of it changes, so it may be torn.
    fn mark_on_disk(&self, which: impl Fn(&Bitmap) -> bool) -> Result<()> {
        let ctx = &self.ctx;
        let Some(directory) = self.header().bitmaps else { return Ok(()) };
        self.meta.lock().check_poison(ctx, "mark bitmaps in use")?;
        let marked = self.bitmaps.directory(which);
        let _shield = cancel::shield();
        let written = ctx.storage.write_at(&marked, directory.directory_offset);
        let marked = written.map_err(Failure::from).and_then(|()| ctx.barrier());
        marked.map_err(|failure| self.meta.lock().settle(failure))
    }
}

/// As far as it goes: who must know whether the bits were stored calls [`Qcow2::store_bitmaps`]. Otherwise
/// they stay marked as in use. It waits as long as the storage does: see [`Qcow2::give_up_bitmaps`].
impl Drop for Qcow2 {
    fn drop(&mut self) {
        if !std::thread::panicking() && !self.bitmaps.is_given_up() {
            let _ = self.store_bitmaps();
        }
    }
}
