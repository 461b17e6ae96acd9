//! A write-back cache of metadata slices: L2 tables and refcount blocks, cut into pieces of at most 4 KiB.
//!
//! Owned by [`Meta`](crate::meta::Meta) and guarded by its lock. A slice is *clean*, *dirty* (changed since
//! it was last handed to a write-back) or *being written*. Only clean slices are evicted: evicting one that
//! is on its way to disk would let the old bytes be read back.

use std::collections::HashMap;

use crate::offset::HostOffset;

/// One cached slice.
#[derive(Debug)]
struct Slice {
    data: Box<[u8]>,
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
    capacity: usize,
    dirty: usize,
    tick: u64,
}

/// A copy of a dirty slice, to be written at its offset.
pub(crate) type DirtySlice = (HostOffset, Box<[u8]>);

impl SliceCache {
    /// An empty cache of slices of `slice_size` bytes that keeps about `bytes` of them.
    pub(crate) fn new(slice_size: usize, bytes: usize) -> Self {
        // A handful of slices always fit, whatever the caller asked for: one operation may need several at
        // once.
        let capacity = (bytes / slice_size).max(16);
        Self { slices: HashMap::new(), slice_size, capacity, dirty: 0, tick: 0 }
    }

    pub(crate) fn slice_size(&self) -> usize {
        self.slice_size
    }

    /// Whether so much is dirty that a write-back should come first.
    pub(crate) fn wants_write_back(&self) -> bool {
        self.dirty > self.capacity / 2
    }

    /// The slice at `offset`, if it is here.
    pub(crate) fn get(&mut self, offset: HostOffset) -> Option<&[u8]> {
        self.tick += 1;
        let slice = self.slices.get_mut(&offset.0)?;
        slice.used = self.tick;
        Some(&slice.data)
    }

    /// Changes the slice at `offset`, which is then dirty; `None` if it is not here.
    pub(crate) fn edit(&mut self, offset: HostOffset) -> Option<&mut [u8]> {
        self.tick += 1;
        let slice = self.slices.get_mut(&offset.0)?;
        slice.used = self.tick;
        if !slice.dirty {
            slice.dirty = true;
            self.dirty += 1;
        }
        Some(&mut slice.data)
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

    /// Adds a clean slice, as read from disk, making room first.
    pub(crate) fn insert(&mut self, offset: HostOffset, data: Box<[u8]>) {
        debug_assert_eq!(data.len(), self.slice_size);
        if self.slices.len() >= self.capacity {
            self.evict();
        }
        self.tick += 1;
        self.slices
            .insert(offset.0, Slice { data, used: self.tick, dirty: false, writing: false, checked: false });
    }

    /// Drops the clean slices that were not used for longest, a quarter of the capacity at once, so that the
    /// cost of finding them is shared by many insertions.
    fn evict(&mut self) {
        let mut ages: Vec<u64> =
            self.slices.values().filter(|s| !s.dirty && !s.writing).map(|s| s.used).collect();
        if ages.is_empty() {
            return;
        }
        let last = (self.capacity / 4).clamp(1, ages.len()) - 1;
        let (_, &mut limit, _) = ages.select_nth_unstable(last);
        self.slices.retain(|_, s| s.dirty || s.writing || s.used > limit);
    }

    /// Forgets slices inside `cluster_bytes` from `start`, whatever their state: the cluster is not metadata
    /// any more.
    pub(crate) fn forget(&mut self, start: HostOffset, cluster_bytes: u64) {
        for at in (start.0..start.0 + cluster_bytes).step_by(self.slice_size) {
            if self.slices.remove(&at).is_some_and(|s| s.dirty) {
                self.dirty -= 1;
            }
        }
    }

    /// Copies every dirty slice, in file order; they count as being written until [`Self::written`] or
    /// [`Self::not_written`].
    pub(crate) fn take_dirty(&mut self) -> Vec<DirtySlice> {
        let mut out: Vec<DirtySlice> = Vec::with_capacity(self.dirty);
        for (&offset, slice) in &mut self.slices {
            if slice.dirty {
                slice.dirty = false;
                slice.writing = true;
                out.push((HostOffset(offset), slice.data.clone()));
            }
        }
        self.dirty = 0;
        out.sort_unstable_by_key(|(offset, _)| *offset);
        out
    }

    /// The slices handed out have reached the storage.
    pub(crate) fn written(&mut self) {
        for slice in self.slices.values_mut() {
            slice.writing = false;
        }
    }

    /// The slices handed out may not have reached the storage: they are dirty again.
    pub(crate) fn not_written(&mut self) {
        for slice in self.slices.values_mut() {
            if slice.writing {
                slice.writing = false;
                if !slice.dirty {
                    slice.dirty = true;
                    self.dirty += 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(byte: u8) -> Box<[u8]> {
        vec![byte; 512].into_boxed_slice()
    }

    #[test]
    fn only_clean_slices_are_evicted() {
        let mut cache = SliceCache::new(512, 0);
        for i in 0..16 {
            cache.insert(HostOffset(i * 512), slice(i as u8));
        }
        for i in 0..8 {
            cache.edit(HostOffset(i * 512)).unwrap()[0] = 0xff;
        }
        assert_eq!(cache.take_dirty().len(), 8);
        for i in 8..12 {
            cache.edit(HostOffset(i * 512)).unwrap()[0] = 0xee;
        }
        for i in 100..200 {
            cache.insert(HostOffset(i * 512), slice(0));
        }
        for i in 0..12 {
            assert!(cache.get(HostOffset(i * 512)).is_some(), "slice {i} was lost");
        }
        assert!(cache.slices.len() <= 17);
    }

    #[test]
    fn a_slice_changed_while_it_is_written_stays_dirty() {
        let mut cache = SliceCache::new(512, 0);
        cache.insert(HostOffset(0), slice(0));
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
            cache.insert(HostOffset(i * 512), slice(0));
        }
        for i in 0..4 {
            cache.get(HostOffset(i * 512));
        }
        cache.insert(HostOffset(999 * 512), slice(0));
        assert!((0..4).all(|i| cache.slices.contains_key(&(i * 512))));
        assert!((4..8).all(|i| !cache.slices.contains_key(&(i * 512))));
    }
}
