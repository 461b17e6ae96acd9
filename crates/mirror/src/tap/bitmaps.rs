//! Named dirty bitmaps of a tap: what was written since they were made, or made anew.
//!
//! They are what incremental copies start from. They live as long as the tap; who wants them longer takes
//! [`bitmap`](Tap::bitmap) when nobody writes any more, and gives it back with [`adopt_bitmap`](Tap::adopt_bitmap).

use blockmirror_bitmap::DirtyBitmap;

use super::Tap;
use crate::error::Error;
use crate::granularity::check_granularity;

/// Bitmaps of one tap.
pub const MAX_BITMAPS: usize = 256;

impl Tap {
    /// Begins to collect, in units of `granularity` bytes, what is written.
    ///
    /// # Errors
    /// An invalid granularity; a name that is taken; [`MAX_BITMAPS`] bitmaps already.
    pub fn add_bitmap(&self, name: &str, granularity: u64) -> Result<(), Error> {
        let granularity = check_granularity(granularity)?;
        let bitmap = DirtyBitmap::new(self.len, granularity)
            .map_err(|_| crate::GranularityError::OutOfRange(granularity))?;
        self.adopt_bitmap(name, bitmap)
    }

    /// Goes on collecting in `bitmap`, which was kept somewhere since the disk was last written.
    ///
    /// # Errors
    /// A bitmap for another length, a name that is taken, [`MAX_BITMAPS`] bitmaps already.
    pub fn adopt_bitmap(&self, name: &str, bitmap: DirtyBitmap) -> Result<(), Error> {
        if bitmap.len() != self.len {
            return Err(Error::SyncBitmap { why: "the bitmap belongs to a disk of another length" });
        }
        let mut state = self.state.lock();
        if state.bitmaps.contains_key(name) || state.bitmaps.len() >= MAX_BITMAPS {
            return Err(Error::BitmapExists { disk: self.name.to_string(), name: name.to_owned() });
        }
        state.bitmaps.insert(name.to_owned(), bitmap);
        self.set_lanes(&state);
        Ok(())
    }

    /// What the bitmap holds now.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn bitmap(&self, name: &str) -> Result<DirtyBitmap, Error> {
        self.state.lock().bitmaps.get(name).cloned().ok_or_else(|| self.no_bitmap(name))
    }

    /// Stops collecting, and hands the bitmap out.
    ///
    /// # Errors
    /// There is none of that name, or a job works from it.
    pub fn remove_bitmap(&self, name: &str) -> Result<DirtyBitmap, Error> {
        let mut state = self.state.lock();
        let in_use = state
            .session
            .as_ref()
            .is_some_and(|session| session.bitmap.as_deref() == Some(name) && !session.engine.is_over());
        if in_use {
            return Err(Error::Busy { disk: self.name.to_string() });
        }
        let bitmap = state.bitmaps.remove(name).ok_or_else(|| self.no_bitmap(name))?;
        self.set_lanes(&state);
        Ok(bitmap)
    }

    pub(super) fn no_bitmap(&self, name: &str) -> Error {
        Error::NoBitmap { disk: self.name.to_string(), name: name.to_owned() }
    }
}
