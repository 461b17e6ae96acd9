//! Persistent bitmaps: those of a node's tap that its image stores under the same name.
//!
//! The tap's bitmap is what users see and change. The image records writes as well, and marks its bitmaps as
//! in use on disk before the first one; so after a kill they are inconsistent, and no reader uses them. When
//! the node is closed, becomes read-only or gets an overlay, the image gets the tap's bits and stores them.
//!
//! Called by drivers, commands and the close of nodes, under no lock. Must hold: a write that the tap's
//! bitmap has seen is in the image's one, or that is marked.

use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::BlockDevice;
use blockmirror_mirror::Tap;
use blockmirror_qcow2::format::bitmaps::BitmapEntry;
use blockmirror_qcow2::{Qcow2, Result};
use tracing::warn;

use super::Node;

/// The bitmaps of a node that its image stores.
#[derive(Clone, Debug)]
pub(crate) struct StoredBitmaps {
    pub(crate) tap: Arc<Tap>,
    pub(crate) image: Arc<Qcow2>,
}

impl Node {
    /// The bitmaps that its image stores, if it is one that can be written.
    pub(crate) fn stored_bitmaps(&self) -> Option<StoredBitmaps> {
        let image = self.qcow2.as_ref().filter(|image| image.geometry().writable)?;
        Some(StoredBitmaps { tap: Arc::clone(&self.tap), image: Arc::clone(image) })
    }

    /// What its image says of the bitmaps that it stores. Asks no file.
    pub(crate) fn bitmap_entries(&self) -> Vec<BitmapEntry> {
        match self.stored_bitmaps() {
            // Its list is in memory.
            Some(stored) => stored.image.bitmaps().unwrap_or_default(),
            None => self.bitmaps_at_open.clone(),
        }
    }

    /// Reads the bitmaps that its image stores into its tap.
    pub(crate) fn load_bitmaps(&mut self) {
        let Some(image) = &self.qcow2 else { return };
        let entries = image.bitmaps().unwrap_or_else(|error| {
            warn!(name = self.name, %error, "the bitmaps of an image cannot be read");
            Vec::new()
        });
        for entry in entries.iter().filter(|entry| !entry.in_use) {
            let bits = image.read_bitmap(&entry.name).map_err(|error| error.to_string());
            let adopt = |bits| {
                let adopted = self.tap.adopt_bitmap(&entry.name, bits, entry.auto);
                adopted.map_err(|error| error.to_string())
            };
            if let Err(error) = bits.and_then(adopt) {
                warn!(name = self.name, bitmap = entry.name, error, "a bitmap of an image is not used");
            }
        }
        self.bitmaps_at_open = entries;
    }
}

impl StoredBitmaps {
    /// Whether there are any.
    pub(crate) fn is_empty(&self) -> bool {
        self.image.bitmaps().is_ok_and(|entries| entries.is_empty())
    }

    /// The image has at least `bits` in `name`, before the tap gets them back.
    pub(crate) fn give_back_bits(&self, name: &str, bits: &DirtyBitmap) {
        self.give_back(name, |image| image.merge_bitmap(name, bits));
    }

    /// The image records in `name`, before the tap does again.
    pub(crate) fn give_back_recording(&self, name: &str) {
        self.give_back(name, |image| image.enable_bitmap(name));
    }

    /// If it fails the bitmap is not persistent any more: that of the image would miss something.
    fn give_back(&self, name: &str, work: impl FnOnce(&Qcow2) -> Result<()>) {
        let has = |entries: Vec<BitmapEntry>| entries.iter().any(|entry| entry.name == name);
        if !self.image.bitmaps().is_ok_and(has) {
            return;
        }
        let Err(error) = work(&self.image) else { return };
        warn!(bitmap = name, %error, "a bitmap is not persistent any more: it cannot be undone in the image");
        if let Err(error) = self.image.remove_bitmap(name) {
            warn!(bitmap = name, %error, "the bitmap of the image is not to be used after a kill");
        }
    }

    /// Gives the image the bits of the tap, and stores them. The guest does not write meanwhile.
    ///
    /// # Errors
    /// There is no room; writing fails. The bitmaps stay marked as in use then, if they miss a write.
    pub(crate) fn store(&self) -> Result<()> {
        let entries = self.image.bitmaps()?;
        if entries.is_empty() {
            // Storing waits for reads under way.
            return Ok(());
        }
        let infos = self.tap.bitmaps();
        for entry in entries.iter().filter(|entry| !entry.in_use) {
            let Some(info) = infos.iter().find(|info| info.name == entry.name) else { continue };
            let Ok(bits) = self.tap.bitmap(&entry.name) else { continue };
            let is_same = entry.auto == info.enabled
                && self.image.read_bitmap(&entry.name).is_ok_and(|old| old == bits);
            if !is_same {
                self.image.replace_bitmap(&entry.name, bits, info.enabled)?;
            }
        }
        self.image.store_bitmaps()
    }
}
