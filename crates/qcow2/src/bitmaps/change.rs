//! Changes of the persistent bitmaps: each is durable when it returns, and after a crash all of it is there
//! or nothing. The last bitmap may be left marked as in use by a crash while it is removed.
//!
//! Called by library users and by the command; the bitmaps follow the length of the disk by `resize`.

use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::ByteRange;

use crate::bitmap_list::{Bitmap, load_bits};
use crate::error::{BitmapProblem, Error, Result};
use crate::format::bitmaps::BitmapEntry;
use crate::image::Qcow2;
use crate::limits;

/// All guest bytes, whatever the length.
const ALL: ByteRange = ByteRange::new(0, u64::MAX);

/// The granularity that a bitmap has by default is that of a cluster, inside of these bounds.
const DEFAULT_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65536;

/// How a new bitmap is to be. By default it is enabled, with the granularity of a cluster, but at least 4 KiB
/// and at most 64 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitmapOptions {
    granularity: Option<u64>,
    disabled: bool,
    kept_in_use: bool,
}

/// The bits of a bitmap, and whether it is enabled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapBits {
    /// Its name.
    pub name: String,
    /// Its bits, and its granularity.
    pub bits: DirtyBitmap,
    /// It records what is written from then on.
    pub enabled: bool,
}

impl BitmapBits {
    /// The bits `bits` for the bitmap `name`.
    pub fn new(name: impl Into<String>, bits: DirtyBitmap, enabled: bool) -> Self {
        Self { name: name.into(), bits, enabled }
    }
}

impl BitmapOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes per bit: a power of two from 512 to 2 GiB.
    #[must_use]
    pub fn granularity(mut self, bytes: u64) -> Self {
        self.granularity = Some(bytes);
        self
    }

    /// It records nothing until it is enabled.
    #[must_use]
    pub fn disabled(mut self, disabled: bool) -> Self {
        self.disabled = disabled;
        self
    }

    /// On disk it is marked as in use until it is replaced, as by
    /// [`keep_bitmaps_in_use`](Qcow2::keep_bitmaps_in_use).
    #[must_use]
    pub fn kept_in_use(mut self, kept: bool) -> Self {
        self.kept_in_use = kept;
        self
    }
}

impl Qcow2 {
    /// Makes a persistent bitmap with no bit set.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a name that is taken or too long, a granularity that no bitmap can have, an
    /// image that cannot have bitmaps; [`Error::Storage`] for a read-only image, and if writing fails.
    pub fn add_bitmap(&self, name: &str, options: &BitmapOptions) -> Result<()> {
        self.insert(name, options, |len| {
            let cluster = self.ctx.cluster().bytes();
            let default = cluster.clamp(*DEFAULT_GRANULARITY.start(), *DEFAULT_GRANULARITY.end());
            let granularity = options.granularity.unwrap_or(default);
            DirtyBitmap::new(len, granularity).map_err(|_| BitmapProblem::Granularity(granularity))
        })
    }

    /// Makes a persistent bitmap that has the bits `bits`; it records if it is `enabled`.
    ///
    /// # Errors
    /// As [`add_bitmap`](Self::add_bitmap), and if `bits` are those of a disk of another length.
    pub fn insert_bitmap(&self, name: &str, bits: DirtyBitmap, enabled: bool) -> Result<()> {
        self.insert(name, &BitmapOptions::new().disabled(!enabled), |_| Ok(bits))
    }

    /// Makes a persistent bitmap that is inconsistent, like the one that `entry` described: it undoes the
    /// removal of such a one.
    ///
    /// # Errors
    /// As [`add_bitmap`](Self::add_bitmap).
    pub fn insert_inconsistent_bitmap(&self, entry: &BitmapEntry) -> Result<()> {
        let problem = |problem| Error::Bitmap { name: entry.name.to_string(), problem };
        self.change_bitmaps("add bitmap", |list| {
            if list.iter().any(|bitmap| bitmap.entry.name == entry.name) {
                return Err(problem(BitmapProblem::Exists));
            }
            let bits = DirtyBitmap::new(self.ctx.size(), entry.granularity)
                .map_err(|_| problem(BitmapProblem::Granularity(entry.granularity)))?;
            let mut bitmap = self.new_bitmap(&entry.name.to_text(), entry.auto, Ok(bits)).map_err(problem)?;
            bitmap.entry.name.clone_from(&entry.name);
            bitmap.entry.in_use = true;
            list.push(bitmap);
            Ok(())
        })
    }

    fn insert(
        &self,
        name: &str,
        options: &BitmapOptions,
        make: impl FnOnce(u64) -> Result<DirtyBitmap, BitmapProblem>,
    ) -> Result<()> {
        let problem = |problem| Error::Bitmap { name: name.to_owned(), problem };
        self.change_bitmaps("add bitmap", |list| {
            if find(list, name).is_ok() {
                return Err(problem(BitmapProblem::Exists));
            }
            let bitmap = self.new_bitmap(name, !options.disabled, make(self.ctx.size()));
            list.push(Bitmap { kept: options.kept_in_use, ..bitmap.map_err(problem)? });
            Ok(())
        })
    }

    /// Gives bitmaps, inconsistent ones too, the bits that `new` has for them, with their granularity, and
    /// stores all bitmaps as [`store_bitmaps`](Self::store_bitmaps) does. After a crash the image has the old
    /// ones or the new ones.
    ///
    /// # Errors
    /// As [`insert_bitmap`](Self::insert_bitmap), but there must be one of each name.
    pub fn replace_bitmaps(&self, new: Vec<BitmapBits>) -> Result<()> {
        self.check_writable("replace bitmaps")?;
        let _only_one = self.changing.lock();
        let _nobody_writes = self.ranges.lock_exclusive(ALL)?;
        let mut list = self.bitmaps.list();
        let mut changed = self.bitmaps.must_be_stored();
        for BitmapBits { name, bits, enabled } in new {
            let index = find(&list, &name)?;
            let old = &list[index];
            let is_same = !old.kept && old.entry.auto == enabled;
            if is_same && self.bits_of(old).is_ok_and(|old| *old == bits) {
                continue;
            }
            let new = self.new_bitmap(&name, enabled, Ok(bits));
            list[index] = new.map_err(|problem| Error::Bitmap { name, problem })?;
            changed = true;
        }
        if changed { self.publish_bitmaps(list) } else { Ok(()) }
    }

    /// A bitmap that has no table yet.
    fn new_bitmap(
        &self,
        name: &str,
        enabled: bool,
        bits: Result<DirtyBitmap, BitmapProblem>,
    ) -> Result<Bitmap, BitmapProblem> {
        let bits = self.check_new_bitmap(name, bits?)?;
        let entry = BitmapEntry::new(name, bits.granularity(), enabled);
        Ok(Bitmap { bits: Some(bits.into()), changed: true, ..Bitmap::listed(entry) })
    }

    fn check_new_bitmap(&self, name: &str, bits: DirtyBitmap) -> Result<DirtyBitmap, BitmapProblem> {
        if !(1..=limits::MAX_BITMAP_NAME).contains(&name.len()) {
            return Err(BitmapProblem::NameLength(name.len()));
        }
        if self.header().version < 3 {
            return Err(BitmapProblem::Version2);
        }
        let (own, other) = (self.ctx.size(), bits.len());
        if own != other {
            return Err(BitmapProblem::OtherLength { own, other });
        }
        if own == 0 {
            return Err(BitmapProblem::EmptyDisk);
        }
        if bits.stored_len() > limits::MAX_BITMAP_BYTES {
            return Err(BitmapProblem::TooFine(bits.stored_len()));
        }
        Ok(bits)
    }

    /// Removes a bitmap, an inconsistent one too.
    ///
    /// # Errors
    /// There is none of that name; a read-only image, and if writing fails.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmaps("remove bitmap", |list| {
            let index = find(list, name)?;
            list.remove(index);
            Ok(())
        })
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// There is none of that name, or it is inconsistent; a read-only image, and if writing fails.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.change_bits("clear bitmap", name, |bitmap, bits| {
            bits.clear_all();
            bitmap.changed = true;
            Ok(())
        })
    }

    /// Makes a bitmap record what is written from now on.
    ///
    /// # Errors
    /// As [`clear_bitmap`](Self::clear_bitmap).
    pub fn enable_bitmap(&self, name: &str) -> Result<()> {
        self.change_bits("enable bitmap", name, |bitmap, _| {
            bitmap.entry.auto = true;
            Ok(())
        })
    }

    /// Makes a bitmap record nothing any more; it keeps its bits.
    ///
    /// # Errors
    /// As [`clear_bitmap`](Self::clear_bitmap).
    pub fn disable_bitmap(&self, name: &str) -> Result<()> {
        self.change_bits("disable bitmap", name, |bitmap, _| {
            bitmap.entry.auto = false;
            Ok(())
        })
    }

    /// Sets the bits of all that is dirty in `source`, whatever its granularity.
    ///
    /// # Errors
    /// As [`clear_bitmap`](Self::clear_bitmap), and if `source` is that of a disk of another length.
    pub fn merge_bitmap(&self, name: &str, source: &DirtyBitmap) -> Result<()> {
        self.change_bits("merge bitmap", name, |bitmap, bits| {
            if source.len() != bits.len() {
                return Err(BitmapProblem::OtherLength { own: bits.len(), other: source.len() });
            }
            bits.merge(source);
            bitmap.changed = true;
            Ok(())
        })
    }

    /// The bits of a bitmap as they are now.
    ///
    /// # Errors
    /// There is none of that name, or it is inconsistent; damage in its table; reading fails.
    pub fn read_bitmap(&self, name: &str) -> Result<DirtyBitmap> {
        let mut list = self.bitmaps.list();
        if !self.is_writable() {
            let entries = self.bitmaps()?.into_iter();
            list = entries.map(Bitmap::listed).collect();
        }
        let index = find(&list, name)?;
        let bits = self.bits_of(&list[index])?;
        Ok(Arc::unwrap_or_clone(bits))
    }

    /// The bits of `bitmap`, from the disk if they are not in memory.
    fn bits_of(&self, bitmap: &Bitmap) -> Result<Arc<DirtyBitmap>> {
        if bitmap.entry.in_use {
            let problem = BitmapProblem::Inconsistent;
            return Err(Error::Bitmap { name: bitmap.entry.name.to_string(), problem });
        }
        match &bitmap.bits {
            Some(bits) => Ok(Arc::clone(bits)),
            None => Ok(load_bits(&self.ctx, &bitmap.entry, &mut 0)?.into()),
        }
    }

    /// Changes one bitmap that can be trusted.
    fn change_bits(
        &self,
        operation: &'static str,
        name: &str,
        change: impl FnOnce(&mut Bitmap, &mut DirtyBitmap) -> Result<(), BitmapProblem>,
    ) -> Result<()> {
        self.change_bitmaps(operation, |list| {
            let index = find(list, name)?;
            let mut bits = self.bits_of(&list[index])?;
            list[index].bits = None;
            let changed = change(&mut list[index], Arc::make_mut(&mut bits));
            list[index].bits = Some(bits);
            changed.map_err(|problem| Error::Bitmap { name: name.to_owned(), problem })
        })
    }

    /// Changes the list of bitmaps and makes it durable; if that fails nothing has changed. But where the
    /// last bitmap was to go it may be marked as in use on disk, until the bitmaps are stored.
    fn change_bitmaps(
        &self,
        operation: &'static str,
        change: impl FnOnce(&mut Vec<Bitmap>) -> Result<()>,
    ) -> Result<()> {
        self.check_writable(operation)?;
        let _only_one = self.changing.lock();
        let _nobody_writes = self.ranges.lock_exclusive(ALL)?;
        let mut list = self.bitmaps.list();
        change(&mut list)?;
        if list.is_empty() {
            // A writer that finds no bitmap flushes nothing, and a crash may bring the old header back.
            self.mark_all_bitmaps()?;
        }
        self.publish_bitmaps(list)
    }

    /// Prepares the bitmaps for a disk of `len` bytes: all are marked as in use on disk, and their bits
    /// are in memory. The caller holds `changing`.
    ///
    /// # Errors
    /// One of them is inconsistent: how long it should be is not known. Or there are some, and the disk is to
    /// be empty: no table has no entries.
    pub(crate) fn begin_resize_of_bitmaps(&self, len: u64) -> Result<()> {
        let _nobody_writes = self.ranges.lock_exclusive(ALL)?;
        let mut list = self.bitmaps.list();
        if let Some(first) = list.first().filter(|_| len == 0) {
            let (name, problem) = (first.entry.name.to_string(), BitmapProblem::EmptyDisk);
            return Err(Error::Bitmap { name, problem });
        }
        for bitmap in &mut list {
            bitmap.bits = Some(self.bits_of(bitmap)?);
        }
        if list.is_empty() {
            return Ok(());
        }
        self.bitmaps.replace(list);
        Ok(self.mark_all_bitmaps()?)
    }

    /// Stores the bitmaps for the length that the disk has now. What it has gained since it had `old` bytes
    /// counts as written. The caller holds `changing`.
    ///
    /// # Errors
    /// As for [`store_bitmaps`](Self::store_bitmaps).
    pub(crate) fn end_resize_of_bitmaps(&self, old: u64) -> Result<()> {
        let _nobody_writes = self.ranges.lock_exclusive_shielded(ALL);
        if !self.bitmaps.is_marked() {
            return Ok(());
        }
        let (len, mut list) = (self.ctx.size(), self.bitmaps.list());
        for bitmap in &mut list {
            let records = bitmap.records();
            let Some(bits) = bitmap.bits.as_mut().filter(|bits| bits.len() != len) else { continue };
            let mut resized = bits.resized(len);
            if records && old < len {
                resized.set(old..len);
            }
            *bits = resized.into();
            bitmap.changed = true;
        }
        // If they cannot be stored now, what is stored later must not have the old length.
        self.bitmaps.replace(list.clone());
        self.publish_bitmaps(list)
    }
}

/// Where the bitmap `name` is in `list`.
fn find(list: &[Bitmap], name: &str) -> Result<usize> {
    let found = list.iter().position(|bitmap| bitmap.entry.name == *name);
    found.ok_or_else(|| Error::Bitmap { name: name.to_owned(), problem: BitmapProblem::NotFound })
}
