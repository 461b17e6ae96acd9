//! The files of an image: itself, its external data file, its backing file.

use std::iter::once;
use std::sync::Arc;

use blockmirror_block::Storage;

/// One thing for each file of an image.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PerFile<T> {
    pub(crate) image: T,
    /// For the external data file, if there is one.
    pub(crate) data: Option<T>,
    /// For the backing file, if there is one.
    pub(crate) backing: Option<T>,
}

/// The storages of an image.
pub(crate) type ImageFiles = PerFile<Arc<dyn Storage>>;

impl<T> PerFile<T> {
    pub(crate) fn map<U>(&self, mut change: impl FnMut(&T) -> U) -> PerFile<U> {
        PerFile {
            image: change(&self.image),
            data: self.data.as_ref().map(&mut change),
            backing: self.backing.as_ref().map(&mut change),
        }
    }

    /// All of them, in the order of the fields.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        once(&self.image).chain(&self.data).chain(&self.backing)
    }
}

impl<S: Storage + 'static> PerFile<Arc<S>> {
    /// The same files, as an image is opened on them.
    pub(crate) fn storages(&self) -> ImageFiles {
        self.map(|file| Arc::clone(file) as Arc<dyn Storage>)
    }
}
