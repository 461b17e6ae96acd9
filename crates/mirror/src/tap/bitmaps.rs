//! Named dirty bitmaps of a tap: what was written since they were made, or made anew.
//!
//! They are what incremental copies start from, and what management layers steer with QEMU's
//! `block-dirty-bitmap-*` verbs. They live as long as the tap; to keep one longer, take
//! [`bitmap`](Tap::bitmap) when all writes have ended, and gives it back with
//! [`adopt_bitmap`](Tap::adopt_bitmap).
//!
//! What must hold: an enabled bitmap records every write before the write is acknowledged; one that is in use
//! (a job works from it, or a caller holds a [`BitmapUse`]) is changed by nothing but writes and that job.

use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{BlockDevice, ByteRange};

use super::{State, Tap};
use crate::error::Error;
use crate::granularity::check_granularity;

/// Bitmaps of one tap.
pub const MAX_BITMAPS: usize = 256;

/// The number of the next bitmap.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A bitmap and what is asked of it.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) map: DirtyBitmap,
    enabled: bool,
    /// Rises with each bitmap that is made.
    number: u64,
    /// Those who have a [`BitmapUse`].
    pub(super) users: usize,
}

/// A bitmap as [`Tap::bitmaps`] lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
    /// Bits that are set.
    pub dirty_granules: u64,
    /// Bytes of the disk that they stand for; the last bit may stand for less than a whole granule.
    pub dirty_bytes: u64,
    /// Whether it records what is written.
    pub enabled: bool,
    /// Whether a job works from it or a caller reads it, so that it cannot be changed.
    pub busy: bool,
    /// Rises with each bitmap that is made, on whatever tap.
    pub number: u64,
}

impl Named {
    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// `range` was written.
    pub(super) fn record(&mut self, range: ByteRange) {
        if self.enabled {
            self.map.set(range.start()..range.end());
        }
    }

    /// Forgets all but `missing`. One that does not record learns nothing new.
    pub(super) fn cut_to(&mut self, missing: &[ByteRange]) {
        let old = self.map.clone();
        self.map.clear_all();
        for range in missing {
            if self.enabled {
                self.map.set(range.start()..range.end());
                continue;
            }
            let mut at = range.start();
            while let Some(run) = old.next_dirty(at, u64::MAX).filter(|run| run.start < range.end()) {
                self.map.set(run.start..run.end.min(range.end()));
                at = run.end;
            }
        }
    }
}

impl Tap {
    /// Begins to record, in units of `granularity` bytes, what is written.
    ///
    /// # Errors
    /// An invalid granularity; a name that is taken; [`MAX_BITMAPS`] bitmaps already.
    pub fn add_bitmap(&self, name: &str, granularity: u64) -> Result<(), Error> {
        self.insert_bitmap(name, true, |len| empty(len, granularity))
    }

    /// Makes an empty bitmap that records nothing until it is [enabled](Self::enable_bitmap).
    ///
    /// # Errors
    /// As [`add_bitmap`](Self::add_bitmap).
    pub fn add_disabled_bitmap(&self, name: &str, granularity: u64) -> Result<(), Error> {
        self.insert_bitmap(name, false, |len| empty(len, granularity))
    }

    /// Takes in a `bitmap` that was kept somewhere. If it is `enabled` it goes on recording: then nothing may
    /// have been written since the last report.
    ///
    /// # Errors
    /// A bitmap for another length, a name that is taken, [`MAX_BITMAPS`] bitmaps already.
    pub fn adopt_bitmap(&self, name: &str, bitmap: DirtyBitmap, enabled: bool) -> Result<(), Error> {
        self.insert_bitmap(name, enabled, |len| same_length(len, &bitmap).map(|()| bitmap))
    }

    fn insert_bitmap(
        &self,
        name: &str,
        enabled: bool,
        make: impl FnOnce(u64) -> Result<DirtyBitmap, Error>,
    ) -> Result<(), Error> {
        let mut state = self.state.lock();
        let map = make(self.len())?;
        if state.bitmaps.contains_key(name) || state.bitmaps.len() >= MAX_BITMAPS {
            return Err(Error::BitmapExists { disk: self.title(), name: name.to_owned() });
        }
        state.bitmaps.insert(
            name.to_owned(),
            Named { map, enabled, number: NEXT.fetch_add(1, Ordering::Relaxed), users: 0 },
        );
        self.update_observed(&state);
        Ok(())
    }

    /// All bitmaps, by name.
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        let state = self.state.lock();
        let info = |(name, bitmap): (&String, &Named)| BitmapInfo {
            name: name.clone(),
            granularity: bitmap.map.granularity(),
            dirty_granules: bitmap.map.dirty_granules(),
            dirty_bytes: bitmap.map.dirty_bytes(),
            enabled: bitmap.enabled,
            busy: state.is_busy(name, bitmap),
            number: bitmap.number,
        };
        state.bitmaps.iter().map(info).collect()
    }

    /// What the bitmap holds now.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn bitmap(&self, name: &str) -> Result<DirtyBitmap, Error> {
        let state = self.state.lock();
        let bitmap = state.bitmaps.get(name).ok_or_else(|| self.no_bitmap(name))?;
        Ok(bitmap.map.clone())
    }

    /// The first dirty runs inside `range`, in order, clipped to it, at most `max` of them: a look at a large
    /// bitmap that takes no copy of it.
    ///
    /// # Errors
    /// There is no bitmap of that name.
    pub fn dirty_runs(&self, name: &str, range: ByteRange, max: usize) -> Result<Vec<ByteRange>, Error> {
        let state = self.state.lock();
        let map = &state.bitmaps.get(name).ok_or_else(|| self.no_bitmap(name))?.map;
        let mut runs = Vec::new();
        let mut at = range.start();
        while runs.len() < max
            && let Some(run) = map.next_dirty(at, u64::MAX).filter(|run| run.start < range.end())
        {
            at = run.end;
            runs.push(ByteRange::new(run.start, run.end).intersect(range));
        }
        Ok(runs)
    }

    /// Forgets the bitmap, and hands out what it held.
    ///
    /// # Errors
    /// There is none of that name, or it is in use.
    pub fn remove_bitmap(&self, name: &str) -> Result<DirtyBitmap, Error> {
        let mut state = self.state.lock();
        self.free_bitmap(&state, name)?;
        let bitmap = state.bitmaps.remove(name).ok_or_else(|| self.no_bitmap(name))?;
        self.update_observed(&state);
        Ok(bitmap.map)
    }

    /// Starts the bitmap anew, and hands out what it held: [merged](Self::merge_bitmap) back in, that undoes
    /// the step.
    ///
    /// # Errors
    /// There is none of that name, or it is in use.
    pub fn clear_bitmap(&self, name: &str) -> Result<DirtyBitmap, Error> {
        self.change_bitmap(name, |bitmap| {
            let old = bitmap.map.clone();
            bitmap.map.clear_all();
            Ok(old)
        })
    }

    /// Records from now on.
    ///
    /// # Errors
    /// There is no bitmap of that name, or it is in use.
    pub fn enable_bitmap(&self, name: &str) -> Result<(), Error> {
        self.change_bitmap(name, |bitmap| {
            bitmap.enabled = true;
            Ok(())
        })
    }

    /// Records nothing any more, and keeps what it has.
    ///
    /// # Errors
    /// There is no bitmap of that name, or it is in use.
    pub fn disable_bitmap(&self, name: &str) -> Result<(), Error> {
        self.change_bitmap(name, |bitmap| {
            bitmap.enabled = false;
            Ok(())
        })
    }

    /// Adds everything that is dirty in one of `others`, whatever their granularity and whichever disk they
    /// come from.
    ///
    /// # Errors
    /// There is no bitmap of that name, it is in use, or one of the others is for another length: nothing was
    /// added then.
    pub fn merge_bitmap(&self, name: &str, others: &[&DirtyBitmap]) -> Result<(), Error> {
        self.change_bitmap(name, |bitmap| {
            others.iter().try_for_each(|other| same_length(bitmap.map.len(), other))?;
            for other in others {
                bitmap.map.merge(other);
            }
            Ok(())
        })
    }

    /// Something has written to the disk below without the tap, or may have: everything counts as written in
    /// bitmaps that record.
    pub fn note_rewritten(&self) {
        let all = ByteRange::new(0, self.len());
        self.state.lock().bitmaps.values_mut().for_each(|bitmap| bitmap.record(all));
    }

    /// Takes in all bitmaps of `other`, a tap of the disk that has come to lie below this one; they join
    /// those of the same name, which record if one of the two did. None of them is in use ([`BitmapUse`]). If
    /// the disk was `rewritten` meanwhile, everything counts as written in those of `other` that record.
    pub fn take_bitmaps(&self, other: &Self, rewritten: bool) {
        let taken = std::mem::take(&mut other.state.lock().bitmaps);
        let mut state = self.state.lock();
        let len = self.len();
        for (name, mut bitmap) in taken {
            // Its granularity was valid before.
            let Ok(mut map) = DirtyBitmap::new(len, bitmap.map.granularity()) else { continue };
            map.merge(&bitmap.map);
            bitmap.map = map;
            if rewritten {
                bitmap.record(ByteRange::new(0, len));
            }
            match state.bitmaps.entry(name) {
                Entry::Vacant(place) => {
                    place.insert(bitmap);
                }
                Entry::Occupied(mut same) => {
                    let same = same.get_mut();
                    same.map.merge(&bitmap.map);
                    same.enabled |= bitmap.enabled;
                }
            }
        }
        self.update_observed(&state);
    }

    /// Gives its bitmaps to `other`, a tap that has none of their names; those that are in use stay.
    pub fn give_bitmaps(&self, other: &Self) {
        let mut state = self.state.lock();
        let given: Vec<_> = {
            let state = &mut *state;
            let free = state.bitmaps.iter().filter(|(name, bitmap)| !state.is_busy(name, bitmap));
            let names: Vec<_> = free.map(|(name, _)| name.clone()).collect();
            names.iter().filter_map(|name| state.bitmaps.remove_entry(name)).collect()
        };
        self.update_observed(&state);
        drop(state);
        let mut state = other.state.lock();
        state.bitmaps.extend(given);
        other.update_observed(&state);
    }

    /// Keeps others from changing the bitmap, while it is exported, say. It goes on recording.
    ///
    /// # Errors
    /// There is none of that name, or it is in use already.
    pub fn use_bitmap(self: &Arc<Self>, name: &str) -> Result<BitmapUse, Error> {
        self.change_bitmap(name, |bitmap| {
            bitmap.users += 1;
            Ok(BitmapUse { tap: Arc::clone(self), name: name.to_owned() })
        })
    }

    fn change_bitmap<R>(
        &self,
        name: &str,
        change: impl FnOnce(&mut Named) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut state = self.state.lock();
        self.free_bitmap(&state, name)?;
        let answer = match state.bitmaps.get_mut(name) {
            Some(bitmap) => change(bitmap)?,
            None => return Err(self.no_bitmap(name)),
        };
        self.update_observed(&state);
        Ok(answer)
    }

    /// The bitmap, unless it is in use.
    pub(super) fn free_bitmap<'s>(&self, state: &'s State, name: &str) -> Result<&'s Named, Error> {
        let bitmap = state.bitmaps.get(name).ok_or_else(|| self.no_bitmap(name))?;
        if state.is_busy(name, bitmap) {
            return Err(Error::BitmapBusy { disk: self.title(), name: name.to_owned() });
        }
        Ok(bitmap)
    }

    fn no_bitmap(&self, name: &str) -> Error {
        Error::NoBitmap { disk: self.title(), name: name.to_owned() }
    }
}

impl State {
    fn is_busy(&self, name: &str, bitmap: &Named) -> bool {
        let by_job = |session: &super::Session| session.bitmap.as_deref() == Some(name);
        bitmap.users > 0 || self.live_session().is_some_and(by_job)
    }
}

fn empty(len: u64, granularity: u64) -> Result<DirtyBitmap, Error> {
    let granularity = check_granularity(granularity)?;
    let bitmap = DirtyBitmap::new(len, granularity);
    Ok(bitmap.map_err(|_| crate::GranularityError::OutOfRange(granularity))?)
}

fn same_length(len: u64, bitmap: &DirtyBitmap) -> Result<(), Error> {
    if bitmap.len() == len {
        return Ok(());
    }
    Err(Error::SyncBitmap { why: "the bitmap belongs to a disk of another length" })
}

/// A bitmap that no other caller may change until this is dropped.
#[must_use = "the bitmap is free again as soon as this is dropped"]
pub struct BitmapUse {
    tap: Arc<Tap>,
    name: String,
}

impl BitmapUse {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// [`Tap::dirty_runs`] of it.
    pub fn dirty_runs(&self, range: ByteRange, max: usize) -> Vec<ByteRange> {
        // It is there as long as it is in use.
        self.tap.dirty_runs(&self.name, range, max).unwrap_or_default()
    }
}

impl Drop for BitmapUse {
    fn drop(&mut self) {
        if let Some(bitmap) = self.tap.state.lock().bitmaps.get_mut(&self.name) {
            bitmap.users -= 1;
        }
    }
}

impl fmt::Debug for BitmapUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BitmapUse").field("name", &self.name).finish_non_exhaustive()
    }
}
