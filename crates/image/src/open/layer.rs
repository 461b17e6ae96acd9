//! One image of a chain: open as a file, and made a device on what lies below it. Called by the opener of the
//! chain.

use std::path::PathBuf;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_qcow2::{Qcow2, SnapshotRef};
use blockmirror_raw::{Raw, RawOptions};

use super::OpenOptions;
use crate::error::{Error, Result};
use crate::format::Format;

/// An image as a disk, and as what it is if it is a qcow2 image.
pub(super) type Disk = (Arc<dyn BlockDevice>, Option<Arc<Qcow2>>);

/// One image of the chain, open but not yet a device.
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) format: Format,
    pub(super) guessed: bool,
    pub(super) data: Option<Arc<dyn Storage>>,
    /// Its name in the header of the image above.
    pub(super) name: PathBuf,
    /// What is opened in place of its disk.
    pub(super) snapshot: Option<SnapshotRef>,
}

impl Layer {
    /// Bytes of storage that it occupies, if its files tell.
    pub(super) fn allocated(&self) -> Option<u64> {
        let of = |storage: &Arc<dyn Storage>| storage.allocated_bytes().ok().flatten();
        of(&self.storage)?.checked_add(self.data.as_ref().map_or(Some(0), of)?)
    }

    /// The disk, and the same as what it is in its format.
    pub(super) fn device(&self, below: Option<Arc<dyn BlockDevice>>, options: &OpenOptions) -> Result<Disk> {
        let storage = Arc::clone(&self.storage);
        match self.format {
            Format::Raw if self.snapshot.is_some() => Err(Error::NoSnapshots { path: self.path.clone() }),
            Format::Raw => Ok((Arc::new(Raw::open(storage, RawOptions::new().probed(self.guessed))?), None)),
            Format::Qcow2 => {
                let name = storage.name().into();
                let options = self.qcow2_options(below, options);
                let image = Arc::new(options.open(storage).map_err(|e| e.in_file(&name))?);
                Ok((Arc::clone(&image) as _, Some(image)))
            }
        }
    }

    /// How it is opened as a qcow2 image on `below`.
    pub(super) fn qcow2_options(
        &self,
        below: Option<Arc<dyn BlockDevice>>,
        options: &OpenOptions,
    ) -> blockmirror_qcow2::OpenOptions {
        let mut open = blockmirror_qcow2::OpenOptions::new()
            .writable(self.storage.info().writable && !options.read_back)
            .snapshot(self.snapshot.clone())
            .overlap_checks(options.node.overlap_checks)
            .whole_tables(options.node.whole_tables)
            .holes_if_preallocated(options.holes_if_preallocated);
        // One that is written keeps zeros that do not depend on what its header names.
        if options.node.no_backing && !self.storage.info().writable {
            open = open.without_backing();
        }
        if let Some(below) = below {
            open = open.backing(below);
        }
        if let Some(data) = &self.data {
            open = open.data_file(Arc::clone(data));
        }
        open
    }
}
