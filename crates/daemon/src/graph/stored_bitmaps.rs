//! Persistent bitmaps: those of a node's tap that its image stores under the same name.
//!
//! The tap's bitmap is what users see and change. The image records writes as well, and marks its bitmaps as
//! in use on disk before the first one; so after a kill they are inconsistent, and no reader uses them. When
//! the node is closed, becomes read-only or gets an overlay, the image gets the tap's bits and stores them.
//! A pivot gives the node another tap, whose bitmaps join those of the same name; so the image marks its
//! bitmaps before a job starts that may pivot the node, and keeps them marked until they are stored. The node
//! whose tap went gets a fresh one, with copies of the bitmaps that its image stores.
//!
//! Called by drivers, commands, jobs and the close of nodes, under no lock. Must hold: what the tap's bitmap
//! has is in the image's one, or that is marked.

use std::collections::BTreeSet;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::{BlockDevice, ErrorKind};
use blockmirror_mirror::Tap;
use blockmirror_qcow2::format::bitmaps::BitmapEntry;
use blockmirror_qcow2::{BitmapBits, Qcow2, Result};
use blockmirror_qmp::QmpError;
use tracing::warn;

use super::Node;
use crate::Reply;
use crate::errors::qmp_error;

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
            let name = entry.name.to_text();
            let bits = image.read_bitmap(&name).map_err(|error| error.to_string());
            let adopt = |bits| {
                let adopted = self.tap.adopt_bitmap(&name, bits, entry.auto);
                adopted.map_err(|error| error.to_string())
            };
            if let Err(error) = bits.and_then(adopt) {
                warn!(name = self.name, bitmap = &*name, error, "a bitmap of an image is not used");
            }
        }
        self.bitmaps_at_open = entries;
    }

    /// Gives `fresh`, which is to be its tap, copies of the tap's bitmaps that its image stores: by them the
    /// image is closed with what it has recorded, and without marks. Asks no file.
    pub(super) fn copy_stored_bitmaps(&self, fresh: &Tap) {
        let entries = self.bitmap_entries();
        let is_stored = |name: &str| entries.iter().any(|entry| !entry.in_use && entry.name == *name);
        for info in self.tap.bitmaps().into_iter().filter(|info| is_stored(&info.name)) {
            let Ok(bits) = self.tap.bitmap(&info.name) else { continue };
            if let Err(error) = fresh.adopt_bitmap(&info.name, bits, info.enabled) {
                // The image stays marked.
                warn!(name = self.name, bitmap = info.name, %error, "a bitmap of an image is not used");
            }
        }
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
        let has =
            |entries: Vec<BitmapEntry>| entries.iter().any(|entry| !entry.in_use && entry.name == *name);
        if !self.image.bitmaps().is_ok_and(has) {
            return;
        }
        let Err(error) = work(&self.image) else { return };
        warn!(bitmap = name, %error, "a bitmap is not persistent any more: it cannot be undone in the image");
        if let Err(error) = self.image.remove_bitmap(name) {
            warn!(bitmap = name, %error, "the bitmap of the image is not to be used after a kill");
        }
    }

    /// Gives the image the bits of the tap, and stores them, for a command that holds the guest meanwhile.
    ///
    /// # Errors
    /// As [`store`](Self::store); reads of the image do not end for `limit`.
    pub(crate) fn store_within(&self, limit: Duration) -> Reply<()> {
        let reads = CancelSource::new();
        let (ended, is_ended) = mpsc::channel::<()>();
        let stored = {
            // Only the wait for reads can be cancelled.
            let _calls = reads.enter();
            let watched = thread::Builder::new().name("store bitmaps".into()).spawn(move || {
                if is_ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                    reads.cancel();
                }
            });
            watched.map_err(qmp_error)?;
            self.store()
        };
        drop(ended);
        stored.map_err(|error| match error.kind() {
            ErrorKind::Cancelled => QmpError::generic("A read does not end: bitmaps were not stored"),
            _ => qmp_error(error),
        })
    }

    /// Gives the image the bits of the tap, and stores them. The guest does not write meanwhile. Waits for
    /// reads under way.
    ///
    /// # Errors
    /// There is no room; writing fails; cancelled. The bitmaps stay marked as in use then, if they miss a
    /// write.
    pub(crate) fn store(&self) -> Result<()> {
        let entries = self.image.bitmaps()?;
        if entries.is_empty() {
            // Storing waits for reads under way.
            return Ok(());
        }
        let infos = self.tap.bitmaps();
        let of_tap = entries.iter().filter(|entry| !entry.in_use).filter_map(|entry| {
            let info = infos.iter().find(|info| entry.name == info.name)?;
            let bits = self.tap.bitmap(&info.name).ok()?;
            Some(BitmapBits::new(&*info.name, bits, info.enabled))
        });
        self.image.replace_bitmaps(of_tap.collect())
    }

    /// A job may give the node another tap, whose bitmaps join those of this one: on disk they are in use
    /// until they are stored.
    ///
    /// # Errors
    /// Writing fails.
    pub(crate) fn keep_in_use(&self) -> Result<()> {
        let names: BTreeSet<_> = self.tap.bitmaps().into_iter().map(|info| info.name).collect();
        self.image.keep_bitmaps_in_use(|name| names.contains(name))
    }
}
