//! The persistent bitmaps of an image in the model: which it lists, and which bits each has.
//!
//! After a crash a bitmap is in use, or has a bit for every write that was answered while it recorded, and no
//! bit that nothing set.

use blockmirror_block::ByteRange;

use super::{History, Listing};
use crate::directory::{ListedBitmap, bitmaps, bits};

/// The bits of a bitmap, as they were found.
pub(crate) struct Bits {
    pub(crate) granularity: u64,
    pub(crate) records: bool,
    pub(crate) set: Vec<bool>,
}

/// Guest bytes that were recorded, from moment to moment.
#[derive(Clone, Copy, Debug)]
struct Recorded {
    range: ByteRange,
    from: usize,
    until: usize,
    /// Counts only if the bitmap is found to record: a change of that was not answered.
    if_recording: bool,
}

impl Recorded {
    fn new(range: ByteRange, from: usize) -> Self {
        Self { range, from, until: usize::MAX, if_recording: false }
    }
}

/// A bitmap that was made.
#[derive(Clone, Debug)]
pub(crate) struct TrackedBitmap {
    pub(crate) name: String,
    pub(crate) listing: Listing,
    /// Whether it records for certain, or did before a change that was not answered; and whether it may.
    pub(crate) records: bool,
    pub(crate) unsure: bool,
    pub(crate) may_record: bool,
    /// What it must have, and what it may have.
    must: Vec<Recorded>,
    may: Vec<Recorded>,
}

impl TrackedBitmap {
    /// A bitmap with no bit set.
    pub(crate) fn new(name: String, listing: Listing, records: bool) -> Self {
        let (must, may) = (Vec::new(), Vec::new());
        Self { name, listing, records, unsure: false, may_record: records, must, may }
    }

    fn found(bytes: &[u8], listed: &ListedBitmap) -> Result<Self, String> {
        let name = String::from_utf8_lossy(&listed.name).into_owned();
        let mut bitmap = Self::new(name, Listing::new(0, 0), listed.auto);
        for (index, _) in bits(bytes, listed)?.into_iter().enumerate().filter(|(_, set)| *set) {
            let range = ByteRange::at(index as u64 * listed.granularity, listed.granularity);
            bitmap.must.push(Recorded::new(range, 0));
        }
        bitmap.may = bitmap.must.clone();
        Ok(bitmap)
    }

    /// From `moment` on it may have what `other` has.
    pub(crate) fn may_get(&mut self, other: &Self, granularity: u64, moment: usize) {
        let aligned = |old: &Recorded| Recorded::new(old.range.align_outward(granularity), moment);
        self.may.extend(other.may.iter().map(aligned));
    }

    /// From `moment` on it has what `other` has.
    pub(crate) fn has_got(&mut self, other: &Self, moment: usize) {
        let lasting = other.must.iter().filter(|recorded| recorded.until == usize::MAX);
        self.must.extend(lasting.map(|old| Recorded { from: moment, ..*old }));
    }

    /// The image was opened again, and it was found to record or not.
    pub(crate) fn was_found(&mut self, records: bool) {
        self.unsure |= self.records && !records;
    }

    /// Whether it may have `bits` at `moment`.
    pub(crate) fn check(&self, bits: &Bits, moment: usize) -> Result<(), String> {
        let size = bits.granularity;
        let then = |recorded: &&Recorded| recorded.from <= moment && moment < recorded.until;
        for (index, set) in bits.set.iter().enumerate() {
            let here = ByteRange::at(index as u64 * size, size);
            let covers = |recorded: &Recorded| recorded.range.align_outward(size).overlaps(here);
            if *set && !self.may.iter().filter(then).any(covers) {
                return Err(format!(
                    "the bitmap {} has a bit at {} that nothing set",
                    self.name,
                    here.start()
                ));
            }
            let demanded = |recorded: &&Recorded| then(recorded) && (bits.records || !recorded.if_recording);
            if !set && self.must.iter().filter(demanded).any(covers) {
                return Err(format!("the bitmap {} misses a write at {}", self.name, here.start()));
            }
        }
        Ok(())
    }
}

impl History {
    /// The bitmaps that the image in `bytes` lists from the beginning.
    pub(crate) fn list_bitmaps(&mut self, bytes: &[u8]) -> Result<(), String> {
        for listed in bitmaps(bytes)? {
            self.bitmaps.push(TrackedBitmap::found(bytes, &listed)?);
        }
        Ok(())
    }

    /// A change of `range` begins.
    pub(crate) fn begin_change(&mut self, range: ByteRange, moment: usize) {
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.may_record && !range.is_empty()) {
            bitmap.may.push(Recorded::new(range, moment));
        }
    }

    /// A change of `range` was answered.
    pub(crate) fn end_change(&mut self, range: ByteRange, moment: usize) {
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.records && !range.is_empty()) {
            let if_recording = bitmap.unsure;
            bitmap.must.push(Recorded { if_recording, ..Recorded::new(range, moment) });
        }
    }

    /// The disk gets `len` bytes from `moment` on: what lies past them is not recorded any more.
    pub(crate) fn cut_bitmaps(&mut self, len: u64, moment: usize) {
        for bitmap in &mut self.bitmaps {
            let mut kept = Vec::new();
            for old in bitmap.must.iter_mut().filter(|old| old.until == usize::MAX && old.range.end() > len) {
                old.until = moment;
                let range = old.range.intersect(ByteRange::new(0, len));
                kept.push(Recorded { range, from: old.from.max(moment), until: usize::MAX, ..*old });
            }
            bitmap.must.extend(kept.into_iter().filter(|recorded| !recorded.range.is_empty()));
        }
    }

    /// Every bitmap that must be listed at `moment` in the image in `bytes` is, no other is, and each is in
    /// use or has the bits that it must have.
    pub(crate) fn check_bitmaps(&self, bytes: &[u8], moment: usize) -> Result<(), String> {
        let found = bitmaps(bytes)?;
        for listed in &found {
            let name = String::from_utf8_lossy(&listed.name);
            let is_it = |bitmap: &&TrackedBitmap| bitmap.name == name && bitmap.listing.may_be(moment);
            let Some(bitmap) = self.bitmaps.iter().find(is_it) else {
                return Err(format!("the bitmap {name} is listed"));
            };
            if !listed.in_use {
                let set = bits(bytes, listed)?;
                let (granularity, records) = (listed.granularity, listed.auto);
                bitmap.check(&Bits { granularity, records, set }, moment)?;
            }
        }
        let mut must_be = self.bitmaps.iter().filter(|bitmap| bitmap.listing.must_be(moment));
        match must_be.find(|bitmap| !found.iter().any(|listed| listed.name == bitmap.name.as_bytes())) {
            None => Ok(()),
            Some(bitmap) => Err(format!("the bitmap {} is not listed", bitmap.name)),
        }
    }
}
