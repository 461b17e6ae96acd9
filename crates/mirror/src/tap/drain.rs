//! Drain of a tap: quiesce the guest and wait until no write is under way.
//!
//! Snapshots, reopening with other options and resizing drain the tap, replace the device below it, and
//! resume the guest. Must hold: a drain replaces a device only while no write is under way and no job has it
//! as its source (a job's own pivot is `Tap::end`).

use std::sync::Arc;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::{Instant, MutexGuard};
use blockmirror_block::{self as block, BlockDevice, ByteRange, cancel};

use super::below::Below;
use super::{State, Tap};
use crate::error::Error;

/// The guest is quiesced and no write of it is under way, until this is dropped.
///
/// Writes that begin meanwhile wait, so the thread that has this must not write to the tap itself. Reads and
/// flushes go on, and end at the disk on which they began; they may keep a replaced disk open until then. A
/// job on the tap goes on copying.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, WriteFlags, testing::MemoryDisk};
/// use blockmirror_mirror::Tap;
///
/// let base = Arc::new(MemoryDisk::new(1 << 20));
/// let tap = Tap::new(Arc::clone(&base) as _);
/// tap.write_at(b"before", 0, WriteFlags::NONE)?;
///
/// // A snapshot: from here on the guest writes to an overlay.
/// let mut drained = tap.drain();
/// drained.device().flush()?;
/// let overlay = Arc::new(MemoryDisk::new(1 << 20).with_backing(Arc::clone(&base) as _));
/// drained.replace(overlay)?;
/// drop(drained);
///
/// tap.write_at(b"after.", 0, WriteFlags::NONE)?;
/// assert_eq!(&base.contents()?[..6], b"before");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the guest goes on as soon as this is dropped"]
pub struct Drained {
    tap: Arc<Tap>,
    /// What lay below when the last write had finished.
    device: Arc<dyn BlockDevice>,
}

impl Tap {
    /// Quiesces the guest, and waits until no write is under way: for ever, should one never end.
    ///
    /// Several may do so at once; the guest goes on when the last has ended. Several taps are best drained by
    /// one thread, one after another; a guest that has writes open on one tap while it begins
    /// one on another can make that wait for ever, for which there is [`drain_for`](Self::drain_for).
    pub fn drain(self: &Arc<Self>) -> Drained {
        let mut drained = self.quiesce();
        drained.wait(None);
        drained
    }

    /// The same for at most `timeout`; then the guest is resumed, and there is nothing to return.
    pub fn drain_for(self: &Arc<Self>, timeout: Duration) -> Option<Drained> {
        let mut drained = self.quiesce();
        drained.wait(Instant::now().checked_add(timeout)).then_some(drained)
    }

    fn quiesce(self: &Arc<Self>) -> Drained {
        self.begin_quiesce();
        Drained { tap: Arc::clone(self), device: self.device() }
    }

    fn begin_quiesce(&self) {
        let mut state = self.state.lock();
        state.drains += 1;
        self.update_observed(&state);
    }

    fn resume(&self) {
        let _deliver = self.wakers.deliver_at_end();
        let mut state = self.state.lock();
        state.drains -= 1;
        if state.drains == 0 {
            self.update_observed(&state);
            self.resumed.notify_all();
            self.wakers.raise();
        }
    }

    /// Waits until no drain quiesces the guest.
    ///
    /// # Errors
    /// The caller is cancelled.
    pub(super) fn wait_for_resume<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        operation: &'static str,
        range: ByteRange,
    ) -> block::Result<MutexGuard<'a, State>> {
        while state.drains > 0 {
            if cancel::is_cancelled() {
                return Err(given_up(operation, range));
            }
            state = cancel::wait(&self.resumed, state, None);
        }
        Ok(state)
    }

    /// Waits until no write is under way, or `until`.
    fn wait_for_landing(&self, until: Option<Instant>) -> Option<MutexGuard<'_, State>> {
        let mut state = self.state.lock();
        while self.under_way(&state) > 0 {
            state = match until {
                None => self.landed.wait(state),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.landed.wait_timeout(state, left).0
                }
            };
        }
        Some(state)
    }

    /// [`BlockDevice::resize`] of the device below, while the guest is quiesced.
    pub(super) fn resize_quiesced(&self, len: u64, may_shrink: bool) -> Result<(), Error> {
        self.begin_quiesce();
        let quiesce = QuiesceGuard(self);
        if let Some(mut state) = self.wait_for_landing(None) {
            self.resize_drained(&mut state, len, may_shrink)?;
        }
        drop(quiesce);
        Ok(())
    }

    /// The lock of the state is held over the I/O of this: no write may begin meanwhile, and all else that
    /// takes it only reads bitmaps.
    fn resize_drained(&self, state: &mut State, len: u64, may_shrink: bool) -> Result<(), Error> {
        if state.live_session().is_some() {
            return Err(Error::Busy { disk: self.title() });
        }
        let old = self.below.load_full();
        if let Some((name, _)) = state.bitmaps.iter().find(|(_, bitmap)| bitmap.users > 0) {
            return Err(Error::BitmapBusy { disk: self.title(), name: name.clone() });
        }
        state.check_no_log(|| self.title())?;
        let resized = old.device.resize(len, may_shrink).map_err(Error::Disk);
        // A disk may have its new length although the call has failed.
        let new = Below::new(Arc::clone(&old.device));
        if new.len != old.len {
            resize_bitmaps(state, old.len, new.len);
            self.below.store(Arc::new(new));
        }
        resized
    }
}

/// Ends the drain of a tap, also when something fails.
struct QuiesceGuard<'a>(&'a Tap);

impl Drop for QuiesceGuard<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

impl Drained {
    /// Whether no write is under way before `until`.
    fn wait(&mut self, until: Option<Instant>) -> bool {
        let landed = self.tap.wait_for_landing(until).is_some();
        self.device = self.tap.device();
        landed
    }

    /// The tap.
    pub fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// The disk below: every write acknowledged to the guest is there.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Puts `device` below the tap; the old disk is handed back.
    ///
    /// `device` may have another length, which is the tap's from then on. Bitmaps follow: what they know of
    /// bytes that are not there any more is forgotten, and new bytes count as written in those that record,
    /// because they were not copied. What `device` holds is the caller's affair: if it differs from the old
    /// disk inside the old length, no bitmap knows.
    ///
    /// # Errors
    /// Nothing was changed: [`Error::Busy`] while a job sits on the tap; [`Error::DiskChanged`] if another
    /// disk lies below than [`device`](Self::device), because a job pivoted or another drain has replaced it;
    /// [`Error::BitmapBusy`] if the length differs and a bitmap is in use, [`Error::LogAttached`] if there is
    /// a log.
    pub fn replace(&mut self, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>, Error> {
        let mut state = self.tap.state.lock();
        let state = &mut *state;
        if state.live_session().is_some() {
            return Err(Error::Busy { disk: self.tap.title() });
        }
        let old = self.tap.below.load();
        if !Arc::ptr_eq(&old.device, &self.device) {
            return Err(Error::DiskChanged { disk: old.device.name().to_owned() });
        }
        let new = Below::new(Arc::clone(&device));
        if new.len != old.len {
            state.check_no_log(|| self.tap.title())?;
            if let Some((name, _)) = state.bitmaps.iter().find(|(_, bitmap)| bitmap.users > 0) {
                return Err(Error::BitmapBusy { disk: self.tap.title(), name: name.clone() });
            }
            resize_bitmaps(state, old.len, new.len);
        }
        self.tap.below.store(Arc::new(new));
        self.tap.update_observed(state);
        Ok(std::mem::replace(&mut self.device, device))
    }

    /// Makes the disk below, and with it the tap, `len` bytes long. Bitmaps follow as in
    /// [`replace`](Self::replace).
    ///
    /// # Errors
    /// [`Error::Busy`] while a job sits on the tap, [`Error::BitmapBusy`] while a bitmap is in use,
    /// [`Error::LogAttached`] with a log, [`Error::Disk`] if the disk fails; the tap has the length of the
    /// disk then, too.
    pub fn resize(&mut self, len: u64, may_shrink: bool) -> Result<(), Error> {
        self.tap.resize_drained(&mut self.tap.state.lock(), len, may_shrink)
    }
}

/// The error of a call whose caller was cancelled while it waited for its turn. Nothing was done.
pub(super) fn given_up(operation: &'static str, range: ByteRange) -> block::Error {
    block::Error::new(block::ErrorKind::Cancelled, operation).at(range.start())
}

fn resize_bitmaps(state: &mut State, old_len: u64, len: u64) {
    for bitmap in state.bitmaps.values_mut() {
        // Its granularity was valid before.
        let Ok(mut map) = DirtyBitmap::new(len, bitmap.map.granularity()) else { continue };
        map.merge(&bitmap.map);
        bitmap.map = map;
        bitmap.record(ByteRange::new(old_len, len));
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.tap.resume();
    }
}
