//! What becomes of a target that does not hold what was written to it: it is kept, and marked as far as its
//! format and its place have a mark.
//!
//! Called when a verification has found a mismatch. Nothing of the target is removed: whatever is right in it
//! need not be written again.

use std::path::PathBuf;

use crate::create::NewImage;
use crate::disk_image::Image;
use crate::error::Result;
use crate::format::Format;
use crate::open::OpenOptions;
use crate::target::Target;

/// How a target was kept that does not hold what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kept {
    /// New files, under their temporary names. What has the target's name is as it was.
    Partial(Vec<PathBuf>),
    /// A qcow2 image under its name, with the corrupt bit: no program writes to it before a check.
    Corrupt,
    /// A qcow2 image that was written in place and keeps the mark of an unfinished one: no program opens it.
    Unfinished,
    /// Nothing says so of it: a raw image, or a qcow2 image that has no such bit or could not be written.
    Unmarked,
}

impl NewImage {
    /// Opens the image anew for reading, so that it is read as its files have it, not as what has written it
    /// remembers it. What has written it is closed.
    ///
    /// # Errors
    /// As for [`OpenOptions::open`].
    pub fn read_back(&self, options: &OpenOptions) -> Result<Image> {
        self.open(&options.clone().read_back())
    }

    /// Keeps the image although it does not hold what it should. What has written it is closed.
    pub fn keep_marked(self, options: &OpenOptions) -> Kept {
        if self.targets().all(|target| target.partial_path().is_none()) {
            return self.keep_in_place(options);
        }
        let (file, data) = self.into_targets();
        let targets = [Some(file), data].into_iter().flatten();
        Kept::Partial(targets.filter_map(Target::leave).collect())
    }

    /// An image all of whose files are written in place.
    fn keep_in_place(self, options: &OpenOptions) -> Kept {
        if self.format() == Format::Raw {
            return Kept::Unmarked;
        }
        let marked = self.open(options).and_then(|image| image.set_corrupt());
        match marked {
            // The bit is there before the other mark goes.
            Ok(true) if self.persist().is_ok() => Kept::Corrupt,
            _ => Kept::Unfinished,
        }
    }
}

impl Image {
    /// Marks a qcow2 image corrupt and closes it; whether it has such a mark.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn set_corrupt(self) -> Result<bool> {
        let marked = match &self.qcow2 {
            Some(image) => image.set_corrupt()?,
            None => false,
        };
        self.close()?;
        Ok(marked)
    }
}
