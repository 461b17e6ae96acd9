//! The persistent bitmaps of an image: the verbs of `qemu-img bitmap`, and closing an image that was written.
//!
//! Called by the command and by whole operations (`blockmirror-ops`). Only qcow2 images have bitmaps.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Error as BlockError, ErrorKind};
use blockmirror_qcow2::{BitmapOptions, Qcow2};

use crate::disk_image::{CommitLayer, Image};
use crate::error::Result;

/// One change of a persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapAction {
    /// Makes it, with no bit set.
    Add(BitmapOptions),
    /// Removes it, an inconsistent one too.
    Remove,
    /// Clears all of its bits.
    Clear,
    /// Makes it record what is written from now on.
    Enable,
    /// Makes it record nothing any more.
    Disable,
    /// Sets the bits that are set in the bitmap of this name, in the same image or in another.
    Merge(String),
}

impl Image {
    /// Changes the persistent bitmap `name`, durably; [`BitmapAction::Merge`] reads that of `source`, or of
    /// this image.
    ///
    /// ```
    /// use blockmirror_image::{BitmapAction, CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("disk.qcow2");
    /// let spec = CreateSpec::new(Format::Qcow2, 1 << 30, CreateSettings::default());
    /// NewImage::create(&path, &spec)?.persist()?;
    /// let image = OpenOptions::new().writable(true).open(&path)?;
    /// image.change_bitmap("backup-1", &BitmapAction::Add(Default::default()), None)?;
    /// image.device().write_at(&[1; 512], 1 << 20, Default::default())?;
    /// image.close()?;
    ///
    /// let image = OpenOptions::new().open(&path)?;
    /// let Some(qcow2) = image.qcow2() else { panic!("not qcow2") };
    /// assert_eq!(qcow2.read_bitmap("backup-1")?.dirty_bytes(), 65536);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// An image of a format without bitmaps; what [`Qcow2`] refuses, as the cause of the error.
    pub fn change_bitmap(&self, name: &str, action: &BitmapAction, source: Option<&Self>) -> Result<()> {
        let image = self.with_bitmaps()?;
        let changed = match action {
            BitmapAction::Add(options) => image.add_bitmap(name, options),
            BitmapAction::Remove => image.remove_bitmap(name),
            BitmapAction::Clear => image.clear_bitmap(name),
            BitmapAction::Enable => image.enable_bitmap(name),
            BitmapAction::Disable => image.disable_bitmap(name),
            BitmapAction::Merge(from) => {
                let source = source.unwrap_or(self).with_bitmaps()?;
                let bits = source.read_bitmap(from).map_err(|error| in_file(error, source))?;
                image.merge_bitmap(name, &bits)
            }
        };
        Ok(changed.map_err(|error| in_file(error, image))?)
    }

    /// The image, if it is of a format that has bitmaps.
    ///
    /// # Errors
    /// It is not.
    pub fn with_bitmaps(&self) -> Result<&Arc<Qcow2>> {
        self.qcow2.as_ref().ok_or_else(|| {
            let error = BlockError::new(ErrorKind::Unsupported, "use persistent bitmap");
            let why = format!("a {} image has no bitmaps", self.format);
            error.in_file(self.path.display().to_string()).because(why).into()
        })
    }

    /// Makes all that was written durable, the persistent bitmaps with it. An image that is dropped does so
    /// as far as it goes, and reports nothing.
    ///
    /// # Errors
    /// The flush fails; the bitmaps cannot be stored, and stay marked as in use.
    pub fn close(self) -> Result<()> {
        if self.device.geometry().writable {
            self.device.flush()?;
        }
        store(self.qcow2.as_ref())
    }
}

impl CommitLayer {
    /// Makes all that was written to it durable, its persistent bitmaps with it.
    ///
    /// # Errors
    /// As for [`Image::close`].
    pub fn close(&self) -> Result<()> {
        self.device.flush()?;
        store(self.qcow2.as_ref())
    }
}

/// Stores the bitmaps of `image`, if its format has any.
fn store(image: Option<&Arc<Qcow2>>) -> Result<()> {
    match image {
        Some(image) => Ok(image.store_bitmaps().map_err(|error| in_file(error, image))?),
        None => Ok(()),
    }
}

fn in_file(error: blockmirror_qcow2::Error, image: &Qcow2) -> BlockError {
    error.in_file(&image.name().into())
}
