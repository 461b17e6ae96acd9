//! Operations on persistent bitmaps, in the image and in the model.

use blockmirror_block::ErrorKind;
use blockmirror_qcow2::BitmapOptions;

use super::{Session, StepError};
use crate::model::{Bits, Listing, State, TrackedBitmap};
use crate::op::Op;

/// Most bitmaps of an image.
const MOST: usize = 4;

impl Session<'_> {
    pub(super) fn add_bitmap(&mut self, step: u64, wanted: &mut State) -> Result<(), StepError> {
        if self.history.bitmaps.iter().filter(|bitmap| bitmap.listing.may_be(usize::MAX - 1)).count() >= MOST
        {
            return self.flush(wanted);
        }
        let name = format!("step{step}");
        let disabled = step % 4 == 3;
        self.disk()?;
        let index = self.history.bitmaps.len();
        let listing = Listing::new((self.clock)(), usize::MAX);
        self.history.bitmaps.push(TrackedBitmap::new(name.clone(), listing, !disabled));
        let options = BitmapOptions::new().granularity(512 << (step % 3)).disabled(disabled);
        let added = self.disk()?.add_bitmap(&name, &options);
        let listing = &mut self.history.bitmaps[index].listing;
        match &added {
            Ok(()) => listing.durable = (self.clock)(),
            Err(error) if error.kind() == ErrorKind::InvalidInput => listing.deleted = listing.begun,
            Err(_) => {}
        }
        Ok(added?)
    }

    /// Removes, toggles or merges those bitmaps that are listed for certain; a flush if there are too few.
    pub(super) fn change_bitmap(&mut self, op: Op, wanted: &mut State) -> Result<(), StepError> {
        let is_certain = |bitmap: &TrackedBitmap| bitmap.listing.is_certain();
        let first = self.history.bitmaps.iter().position(is_certain);
        let last = self.history.bitmaps.iter().rposition(is_certain);
        self.disk()?;
        match (op, first, last) {
            (Op::RemoveBitmap, Some(first), _) => self.remove_bitmap(first),
            (Op::ToggleBitmap, Some(first), _) => self.toggle_bitmap(first),
            (Op::MergeBitmap, Some(first), Some(last)) if first != last => self.merge_bitmap(first, last),
            _ => self.flush(wanted),
        }
    }

    fn remove_bitmap(&mut self, index: usize) -> Result<(), StepError> {
        self.history.bitmaps[index].listing.deleting = (self.clock)();
        let name = self.history.bitmaps[index].name.clone();
        self.disk()?.remove_bitmap(&name)?;
        self.history.bitmaps[index].listing.deleted = (self.clock)();
        Ok(())
    }

    fn toggle_bitmap(&mut self, index: usize) -> Result<(), StepError> {
        let bitmap = &mut self.history.bitmaps[index];
        let enable = !bitmap.records;
        let name = bitmap.name.clone();
        bitmap.may_record = true;
        let disk = self.disk()?;
        if enable {
            disk.enable_bitmap(&name)?
        } else {
            disk.disable_bitmap(&name)?
        }
        let bitmap = &mut self.history.bitmaps[index];
        (bitmap.records, bitmap.unsure, bitmap.may_record) = (enable, false, enable);
        Ok(())
    }

    fn merge_bitmap(&mut self, from: usize, to: usize) -> Result<(), StepError> {
        let source = self.history.bitmaps[from].clone();
        let bits = self.disk()?.read_bitmap(&source.name)?;
        let begun = (self.clock)();
        self.history.bitmaps[to].may_get(&source, bits.granularity(), begun);
        let name = self.history.bitmaps[to].name.clone();
        self.disk()?.merge_bitmap(&name, &bits)?;
        let done = (self.clock)();
        self.history.bitmaps[to].has_got(&source, done);
        Ok(())
    }

    /// The bits in memory are those that they must be, without any crash.
    pub(super) fn check_open_bitmaps(&mut self) -> Result<(), StepError> {
        let now = (self.clock)();
        if self.history.bitmaps.is_empty() {
            return Ok(());
        }
        let listed = self.disk()?.bitmaps()?;
        for entry in listed.iter().filter(|entry| !entry.in_use) {
            let found = self.disk()?.read_bitmap(&entry.name.to_text())?;
            let set =
                (0..found.granules()).map(|index| found.is_dirty(index * found.granularity())).collect();
            let bits = Bits { granularity: found.granularity(), records: entry.auto, set };
            let tracked = self.history.bitmaps.iter().find(|bitmap| entry.name == bitmap.name);
            let tracked = tracked.ok_or_else(|| StepError::Wrong(format!("a bitmap {}", entry.name)))?;
            let checked = tracked.check(&bits, now);
            checked.map_err(|why| StepError::Wrong(format!("{why}, without any crash")))?;
        }
        Ok(())
    }
}
