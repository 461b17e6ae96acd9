//! The persistent bitmaps of an image that is open for writing, in memory: what the directory has, the bits
//! of those that record, and whether they are marked as in use on disk.
//!
//! Kept in the open image. `bitmaps` changes it; must hold: the list and the mark change while all ranges of
//! the image are held exclusively, bits while theirs is held.

mod load;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::ByteRange;
use blockmirror_block::sync::Mutex;

pub(crate) use load::{claim_bitmaps, clusters_of, load_bits};

use crate::context::ImageContext;
use crate::error::{Error, Result};
use crate::format::bitmaps::{BitmapEntry, Bitmaps, encode_directory};
use crate::format::header::Header;

/// A bitmap of an open image.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    /// Its entry in the directory; in memory `in_use` says that the bits are not to be trusted.
    pub(crate) entry: BitmapEntry,
    /// The bits, if they are in memory: those of an enabled bitmap that can be trusted are.
    pub(crate) bits: Option<Arc<DirtyBitmap>>,
    /// The bits differ from those in the table; without bits, the mark on disk is to be taken off.
    pub(crate) changed: bool,
    /// The owner of the image may have more bits than there are here: on disk it is in use until it is
    /// replaced.
    pub(crate) kept: bool,
}

impl Bitmap {
    /// One of the directory, without its bits.
    pub(crate) fn listed(entry: BitmapEntry) -> Self {
        Self { entry, bits: None, changed: false, kept: false }
    }

    pub(crate) fn records(&self) -> bool {
        self.entry.auto && !self.entry.in_use
    }

    /// Takes over what `old`, the same one in memory, knew of it.
    fn take_over(&mut self, old: &mut Self, len: u64) {
        self.kept |= old.kept;
        match old.bits.take() {
            Some(bits) if self.entry.auto && old.entry.auto && bits.len() == len => self.bits = Some(bits),
            // It has missed nothing, whatever the length was.
            Some(bits) if self.entry.in_use && !self.entry.auto && !old.entry.auto => {
                self.bits = Some(bits.resized(len).into());
            }
            // Only its mark has changed, if that. Of one that is kept it stays on disk.
            None if !self.entry.auto && !old.entry.auto => {
                self.changed = self.entry.in_use && !self.kept;
                self.entry.in_use = false;
                return;
            }
            _ => return,
        }
        self.entry.in_use = false;
        self.changed = true;
    }

    /// Whether its entry in the directory is to have the mark *in use*, if it is `marked` or not.
    pub(crate) fn in_use_on_disk(&self, marked: bool) -> bool {
        self.entry.in_use || self.kept || marked
    }
}

/// The persistent bitmaps of an image that is open for writing; empty in others.
#[derive(Debug, Default)]
pub(crate) struct ImageBitmaps {
    /// Some bitmap records. Changes while all ranges are held exclusively.
    recording: AtomicBool,
    /// On disk all bitmaps that record are marked as in use. Taken off while all ranges are held exclusively.
    marked: AtomicBool,
    /// The directory was found in the image, and may not be durable as it was found.
    found: AtomicBool,
    /// They are not stored when the image is dropped.
    given_up: AtomicBool,
    /// *Guards* the list, in the order of the directory. Leaf lock.
    list: Mutex<Vec<Bitmap>>,
    /// *Guards* the mark on disk: one thread sets it. *Order*: after `ranges`, before `meta`. *Not under it*:
    /// guest data.
    pub(crate) marking: Mutex<()>,
}

impl ImageBitmaps {
    /// Reads the bitmaps of an image that is opened for writing.
    ///
    /// # Errors
    /// Damage in a table; more bits than the [limits](crate::limits) allow.
    pub(crate) fn load(ctx: &ImageContext, header: &Header) -> Result<Self> {
        let Some(extension) = header.bitmaps.filter(|_| header.bitmaps_valid()) else {
            return Ok(Self::default());
        };
        let list = Bitmaps::new(&*ctx.storage, &extension)?.map(|entry| entry.map(Bitmap::listed));
        let mut list = list.collect::<Result<Vec<_>>>()?;
        // The names are there once: they may take as much memory as all the rest.
        let mut names = HashSet::new();
        if let Some(index) = list.iter().position(|bitmap| !names.insert(bitmap.entry.name.as_bytes())) {
            let problem = "two bitmaps with one name".into();
            // At most 65535.
            let (table, index) = ("bitmap directory", index as u32);
            let offset = extension.directory_offset;
            return Err(Error::TableEntry { table, index, offset, problem });
        }
        let mut bytes = 0;
        for bitmap in list.iter_mut().filter(|bitmap| bitmap.records()) {
            bitmap.bits = Some(load_bits(ctx, &bitmap.entry, &mut bytes)?.into());
        }
        let bitmaps = Self { found: AtomicBool::new(true), ..Self::default() };
        bitmaps.replace(list);
        Ok(bitmaps)
    }

    /// A copy, which shares the bits.
    pub(crate) fn list(&self) -> Vec<Bitmap> {
        self.list.lock().clone()
    }

    /// The directory, in which those of `which` are marked as in use, and those that are so anyway.
    pub(crate) fn directory(&self, which: impl Fn(&Bitmap) -> bool) -> Vec<u8> {
        let list = self.list.lock();
        encode_directory(list.iter().map(|bitmap| (&bitmap.entry, bitmap.in_use_on_disk(which(bitmap)))))
    }

    /// Whether bitmaps on disk are marked as in use by this image.
    pub(crate) fn is_marked(&self) -> bool {
        self.marked.load(Ordering::Acquire)
    }

    /// Whether a write has anything to do for them.
    pub(crate) fn concern_writes(&self) -> bool {
        self.is_recording() || self.found.load(Ordering::Acquire)
    }

    /// Whether a crash leaves no bitmap that misses what is written now and is not marked.
    pub(crate) fn is_ready_for_writes(&self) -> bool {
        (self.is_marked() || !self.is_recording()) && !self.found.load(Ordering::Acquire)
    }

    /// The directory is durable as it was found, or as it is now.
    pub(crate) fn set_durable(&self) {
        self.found.store(false, Ordering::Release);
    }

    /// `list` is on disk, with no mark of this image. The caller holds all ranges.
    pub(crate) fn stored(&self, mut list: Vec<Bitmap>) {
        for bitmap in list.iter_mut().filter(|bitmap| !bitmap.records()) {
            bitmap.bits = None;
        }
        self.marked.store(false, Ordering::Release);
        self.set_durable();
        self.replace(list);
    }

    pub(crate) fn replace(&self, list: Vec<Bitmap>) {
        self.recording.store(list.iter().any(Bitmap::records), Ordering::Release);
        *self.list.lock() = list;
    }

    /// Whether the bits in memory are to be stored, or a mark is to be taken off.
    pub(crate) fn must_be_stored(&self) -> bool {
        self.is_marked() || self.list.lock().iter().any(|bitmap| bitmap.changed)
    }

    /// They are not stored when the image is dropped.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    /// Whether [`give_up`](Self::give_up) was called.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Those that `which` takes, and that can be trusted, are kept from now on; whether there are any.
    pub(crate) fn keep(&self, which: impl Fn(&str) -> bool) -> bool {
        let mut list = self.list.lock();
        let mut any = false;
        for bitmap in list.iter_mut().filter(|b| !b.entry.in_use && which(&b.entry.name.to_text())) {
            bitmap.kept = true;
            any = true;
        }
        any
    }

    /// Takes over the bits of `old`, the same image before it was opened anew: they have all that was
    /// written, which the marked ones on disk have not. A change of the directory that failed may have
    /// reached the disk, and have taken marks off there: then the next write marks all that record; a mark
    /// that failed may be there. The disk has `len` bytes now; bits of another length, of one that records,
    /// are not used, and the bitmap stays in use.
    pub(crate) fn take_over(&self, old: &Self, len: u64) {
        let had_more = old.must_be_stored();
        old.marked.store(false, Ordering::Release);
        let mut marked = true;
        let mut before = std::mem::take(&mut *old.list.lock());
        let mut list = std::mem::take(&mut *self.list.lock());
        for bitmap in &mut list {
            marked &= bitmap.entry.in_use || !bitmap.entry.auto;
            let same = |old: &&mut Bitmap| {
                !old.entry.in_use
                    && (had_more || old.kept || bitmap.entry.in_use)
                    && old.entry.name == bitmap.entry.name
                    && old.entry.granularity == bitmap.entry.granularity
            };
            if let Some(old) = before.iter_mut().find(same) {
                bitmap.take_over(old, len);
            }
        }
        self.marked.store(marked && list.iter().any(Bitmap::records), Ordering::Release);
        self.replace(list);
    }

    /// Whether some bitmap records.
    pub(crate) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Acquire)
    }

    /// Those that record are marked as in use on disk.
    pub(crate) fn set_marked(&self) {
        self.marked.store(true, Ordering::Release);
    }

    /// Sets the bits of `range` in those that record.
    pub(crate) fn set_bits(&self, range: ByteRange) {
        let mut list = self.list.lock();
        for bitmap in list.iter_mut().filter(|bitmap| bitmap.records()) {
            if let Some(bits) = &mut bitmap.bits {
                bitmap.changed |= Arc::make_mut(bits).set(range.start()..range.end()) > 0;
            }
        }
    }
}
