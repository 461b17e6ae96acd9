//! A write-back cache of metadata slices: L2 tables and refcount blocks, cut into pieces of at most 4 KiB.
//!
//! Owned by [`Meta`](crate::meta::Meta) and guarded by its lock. A slice is *clean*, *dirty* (changed since
//! it was last handed to a write-back) or *being written*. Only clean slices are evicted: evicting one that
//! is on its way to disk would let the old bytes be read back.
//!
//! A slice that was read as zeros takes no bytes. A disk that is used in few places has hardly any other.

use std::collections::HashMap;
use std::sync::Arc;

use blockmirror_block::zero::is_zero;

use crate::offset::HostOffset;

/// The largest slice.
pub(crate) const SLICE_BYTES: usize = 4096;

/// What a slice of zeros reads as.
static ZEROS: [u8; SLICE_BYTES] = [0; SLICE_BYTES];

/// Slices of zeros that are kept for each one that has bytes.
const ZEROS_PER_SLICE: usize = 4;

/// One cached slice.
#[derive(Debug)]
struct Slice {
    /// `None` where it was read as zeros and has not been changed. Shared with a write-back.
    data: Option<Arc<[u8]>>,
    used: u64,
    dirty: bool,
    writing: bool,
    checked: bool,
}

/// Slices of one size, by host offset.
#[derive(Debug)]
pub(crate) struct SliceCache {
    slices: HashMap<u64, Slice>,
    slice_size: usize,
    /// Slices with bytes that are kept.
    capacity: usize,
    /// Slices with bytes that there are.
    with_bytes: usize,
    /// Those that are dirty. Some may have been forgotten since.
    to_write: Vec<u64>,
    /// Those that were handed to a write-back. Some may have been forgotten since.
    in_writing: Vec<u64>,
    dirty: usize,
    tick: u64,
}

/// A dirty slice as it was when it was handed out, to be written at its offset.
pub(crate) type DirtySlice = (HostOffset, Arc<[u8]>);

impl SliceCache {
    /// An empty cache of slices of `slice_size` bytes that keeps about `bytes` of them.
    pub(crate) fn new(slice_size: usize, bytes: usize) -> Self {
        // A handful of slices always fit, whatever the caller asked for: one operation may need several at
        // once.
        let capacity = (bytes / slice_size).max(16);
        Self {
            slices: HashMap::new(),
            slice_size,
            capacity,
            with_bytes: 0,
            to_write: Vec::new(),
            in_writing: Vec::new(),
            dirty: 0,
            tick: 0,
        }
    }

    pub(crate) fn slice_size(&self) -> usize {
        self.slice_size
    }

    /// Whether so much is dirty that a write-back should come first.
    pub(crate) fn wants_write_back(&self) -> bool {
        self.dirty > self.capacity / 2
    }

    /// Whether the slice at `offset` is here.
    pub(crate) fn contains(&self, offset: HostOffset) -> bool {
        self.slices.contains_key(&offset.0)
    }

    /// The slice at `offset`, if it is here.
    pub(crate) fn get(&mut self, offset: HostOffset) -> Option<&[u8]> {
        let size = self.slice_size;
        self.look(offset).map(|data| data.unwrap_or(&ZEROS[..size]))
    }

    /// The same; the inner `None` is a slice that was read as zeros and has not been changed.
    pub(crate) fn look(&mut self, offset: HostOffset) -> Option<Option<&[u8]>> {
        self.tick += 1;
        let slice = self.slices.get_mut(&offset.0)?;
        slice.used = self.tick;
        Some(slice.data.as_deref())
    }

    /// Changes the slice at `offset`, which is then dirty; `None` if it is not here.
    pub(crate) fn edit(&mut self, offset: HostOffset) -> Option<&mut [u8]> {
        self.tick += 1;
        // Zeros get their bytes here: a new image adds its tables this way and no other.
        if self.with_bytes >= self.capacity && self.slices.get(&offset.0)?.data.is_none() {
            self.evict(true);
        }
        let slice = self.slices.get_mut(&offset.0)?;
        slice.used = self.tick;
        if !slice.dirty {
            slice.dirty = true;
            self.dirty += 1;
            self.to_write.push(offset.0);
        }
        if slice.data.is_none() {
            self.with_bytes += 1;
        }
        let data = slice.data.get_or_insert_with(|| ZEROS[..self.slice_size].into());
        // Copied only while a write-back has it.
        Some(Arc::make_mut(data))
    }

    /// Whether the slice at `offset` is here and was found fit to be changed ([`crate::verify`]).
    pub(crate) fn is_checked(&self, offset: HostOffset) -> bool {
        self.slices.get(&offset.0).is_some_and(|slice| slice.checked)
    }

    /// The slice at `offset` is fit to be changed.
    pub(crate) fn set_checked(&mut self, offset: HostOffset) {
        if let Some(slice) = self.slices.get_mut(&offset.0) {
            slice.checked = true;
        }
    }

    /// Adds a clean slice, as read from disk, making room first. It is not here yet. One of an L2 table is
    /// shorter where the file ends in it; then the image is not writable.
    pub(crate) fn insert(&mut self, offset: HostOffset, data: &[u8]) {
        debug_assert!(data.len() <= self.slice_size);
        if data.len() == self.slice_size && is_zero(data) {
            return self.insert_zeros(offset);
        }
        if self.with_bytes >= self.capacity {
            self.evict(true);
        }
        self.with_bytes += 1;
        self.add(offset, Some(data.into()));
    }

    /// Adds a clean slice of zeros, which is not here yet.
    pub(crate) fn insert_zeros(&mut self, offset: HostOffset) {
        if self.slices.len() - self.with_bytes >= self.capacity * ZEROS_PER_SLICE {
            self.evict(false);
        }
        self.add(offset, None);
    }

    fn add(&mut self, offset: HostOffset, data: Option<Arc<[u8]>>) {
        self.tick += 1;
        let slice = Slice { data, used: self.tick, dirty: false, writing: false, checked: false };
        let before = self.slices.insert(offset.0, slice);
        debug_assert!(before.is_none());
    }

    /// Drops the clean slices that were not used for longest, of those with bytes or of the others, a quarter
    /// of what is kept at once, so that the cost of finding them is shared by many insertions.
    fn evict(&mut self, with_bytes: bool) {
        let evictable = |s: &Slice| !s.dirty && !s.writing && s.data.is_some() == with_bytes;
        let mut ages: Vec<u64> = self.slices.values().filter(|s| evictable(s)).map(|s| s.used).collect();
        if ages.is_empty() {
            return;
        }
        let kept = if with_bytes { self.capacity } else { self.capacity * ZEROS_PER_SLICE };
        let last = (kept / 4).clamp(1, ages.len()) - 1;
        let (_, &mut limit, _) = ages.select_nth_unstable(last);
        self.slices.retain(|_, s| !evictable(s) || s.used > limit);
        if with_bytes {
            self.with_bytes -= last + 1;
        }
    }

    /// Forgets slices inside `cluster_bytes` from `start`, whatever their state: the cluster is not metadata
    /// any more.
    pub(crate) fn forget(&mut self, start: HostOffset, cluster_bytes: u64) {
        for at in (start.0..start.0 + cluster_bytes).step_by(self.slice_size) {
            let Some(slice) = self.slices.remove(&at) else { continue };
            self.dirty -= usize::from(slice.dirty);
            self.with_bytes -= usize::from(slice.data.is_some());
        }
    }

    /// Hands out every dirty slice, in file order; they count as being written until [`Self::written`] or
    /// [`Self::not_written`].
    pub(crate) fn take_dirty(&mut self) -> Vec<DirtySlice> {
        let mut offsets = std::mem::take(&mut self.to_write);
        offsets.sort_unstable();
        let mut out: Vec<DirtySlice> = Vec::with_capacity(self.dirty);
        for offset in offsets {
            // One that was forgotten, and has been read anew since, is listed twice if it is dirty again.
            if let Some(slice) = self.slices.get_mut(&offset).filter(|slice| slice.dirty)
                && let Some(data) = &slice.data
            {
                (slice.dirty, slice.writing) = (false, true);
                out.push((HostOffset(offset), Arc::clone(data)));
                self.in_writing.push(offset);
            }
        }
        self.dirty = 0;
        out
    }

    /// The slices handed out have reached the storage.
    pub(crate) fn written(&mut self) {
        for offset in self.in_writing.drain(..) {
            if let Some(slice) = self.slices.get_mut(&offset) {
                slice.writing = false;
            }
        }
    }

    /// The slices handed out may not have reached the storage: they are dirty again.
    pub(crate) fn not_written(&mut self) {
        for offset in self.in_writing.drain(..) {
            let Some(slice) = self.slices.get_mut(&offset).filter(|slice| slice.writing) else { continue };
            slice.writing = false;
            if !slice.dirty {
                slice.dirty = true;
                self.dirty += 1;
                self.to_write.push(offset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(byte: u8) -> [u8; 512] {
        [byte; 512]
    }

    #[test]
    fn only_clean_slices_are_evicted() {
        let mut cache = SliceCache::new(512, 0);
        for i in 0..16 {
            cache.insert(HostOffset(i * 512), &slice(i as u8 + 1));
        }
        for i in 0..8 {
            cache.edit(HostOffset(i * 512)).unwrap()[0] = 0xff;
        }
        assert_eq!(cache.take_dirty().len(), 8);
        for i in 8..12 {
            cache.edit(HostOffset(i * 512)).unwrap()[0] = 0xee;
        }
        for i in 100..200 {
            cache.insert(HostOffset(i * 512), &slice(1));
        }
        for i in 0..12 {
            assert!(cache.get(HostOffset(i * 512)).is_some(), "slice {i} was lost");
        }
        assert!(cache.slices.len() <= 17);
    }

    #[test]
    fn a_slice_changed_while_it_is_written_stays_dirty() {
        let mut cache = SliceCache::new(512, 0);
        cache.insert(HostOffset(0), &slice(0));
        cache.edit(HostOffset(0)).unwrap()[0] = 1;
        assert_eq!(cache.take_dirty()[0].1[0], 1);
        cache.edit(HostOffset(0)).unwrap()[0] = 2;
        cache.written();
        assert_eq!(cache.take_dirty()[0].1[0], 2);
        cache.not_written();
        assert_eq!(cache.dirty, 1);
        assert_eq!(cache.take_dirty()[0].1[0], 2);
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let mut cache = SliceCache::new(512, 0);
        for i in 0..16 {
            cache.insert(HostOffset(i * 512), &slice(1));
        }
        for i in 0..4 {
            cache.get(HostOffset(i * 512));
        }
        cache.insert(HostOffset(999 * 512), &slice(1));
        assert!((0..4).all(|i| cache.slices.contains_key(&(i * 512))));
        assert!((4..8).all(|i| !cache.slices.contains_key(&(i * 512))));
    }

    #[test]
    fn zeros_take_no_bytes_until_they_are_changed() {
        let mut cache = SliceCache::new(512, 0);
        for i in 0..64 {
            cache.insert(HostOffset(i * 512), &slice(0));
        }
        assert_eq!((cache.with_bytes, cache.slices.len()), (0, 64));
        assert!(cache.look(HostOffset(0)) == Some(None) && cache.get(HostOffset(0)) == Some(&slice(0)[..]));
        cache.edit(HostOffset(0)).unwrap()[0] = 1;
        assert!(cache.look(HostOffset(0)).flatten().is_some());
        for i in 64..1000 {
            cache.insert(HostOffset(i * 512), &slice(0));
        }
        assert!(cache.slices.len() <= 1 + 64 && cache.with_bytes == 1);
        cache.forget(HostOffset(0), 512);
        assert_eq!((cache.with_bytes, cache.dirty), (0, 0));
    }

    /// A new image adds all of its tables as zeros: they stayed for good once they were changed.
    #[test]
    fn zeros_that_were_changed_are_evicted_once_they_are_written() {
        let mut cache = SliceCache::new(512, 0);
        for i in 0..1000 {
            cache.insert_zeros(HostOffset(i * 512));
            cache.edit(HostOffset(i * 512)).unwrap()[0] = 1;
            assert_eq!(cache.take_dirty().len(), 1);
            cache.written();
            assert!(cache.with_bytes <= 17, "{} slices after {i}", cache.with_bytes);
        }
    }

    /// A slice that is forgotten while it is dirty, and comes back, is written once.
    #[test]
    fn a_slice_that_was_forgotten_is_not_written_for_its_old_self() {
        let mut cache = SliceCache::new(512, 0);
        let at = HostOffset(512);
        cache.insert(at, &slice(1));
        cache.edit(at).unwrap()[0] = 2;
        cache.forget(at, 512);
        assert!(cache.take_dirty().is_empty());
        cache.insert(at, &slice(1));
        cache.edit(at).unwrap()[0] = 3;
        cache.forget(at, 512);
        cache.insert(at, &slice(4));
        cache.edit(at).unwrap()[0] = 5;
        let taken = cache.take_dirty();
        assert_eq!(taken.iter().map(|(at, data)| (at.0, data[0])).collect::<Vec<_>>(), [(512, 5)]);
        cache.forget(at, 512);
        cache.insert(at, &slice(4));
        cache.not_written();
        assert!(cache.take_dirty().is_empty(), "what was taken of the old one is not the new one's");
    }
}
