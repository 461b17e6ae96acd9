//! How long the file of a new image becomes: computed from the options alone, in the layout of `create`.
//!
//! The figures are those of `qemu-img measure`. Nothing is created, so limits on tables of preallocated
//! images do not count here.

use crate::create::layout;
use crate::create_options::{CreateOptions, Preallocation};
use crate::error::Result;
use crate::format::bitmaps::BitmapEntry;
use crate::offset::ClusterSize;

/// Bytes of a directory entry of a bitmap before its name.
const DIRECTORY_ENTRY: u64 = 24;

/// How long the file of an image becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct ImageSize {
    /// With the data that is known: all tables, and what is to be preallocated.
    pub required: u64,
    /// With data in every cluster of the disk.
    pub fully_allocated: u64,
}

impl CreateOptions {
    /// How long the file becomes, without internal snapshots and bitmaps. Tables count as if the whole disk
    /// was written, which it may be; a backing file or a data file changes nothing. `written` is how many
    /// clusters of the disk will hold data.
    ///
    /// ```
    /// use blockmirror_qcow2::CreateOptions;
    ///
    /// let size = CreateOptions::new(1 << 30).measure(16)?;
    /// assert_eq!((size.required, size.fully_allocated), (1_441_792, 1_074_135_040));
    /// # Ok::<(), blockmirror_qcow2::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`check`](Self::check).
    pub fn measure(&self, written: u64) -> Result<ImageSize> {
        let mut whole = self.clone();
        (whole.backing_file, whole.backing_format) = (None, None);
        (whole.data_file, whole.data_file_raw) = (None, false);
        whole.preallocation = Preallocation::Metadata;
        let checked = whole.checked()?;
        let (fully_allocated, data) = layout::fully_allocated(&checked);
        let written = written.saturating_mul(checked.cluster.bytes()).min(data);
        let needed = if self.preallocation.takes_space() { data } else { written };
        Ok(ImageSize { required: fully_allocated - data + needed, fully_allocated })
    }

    /// How many bytes copies of `bitmaps` take in the image, if each cluster of them is stored. Those that
    /// are in use are not copied.
    pub fn measure_bitmaps(&self, bitmaps: &[BitmapEntry]) -> u64 {
        let cluster = self.cluster_size.max(1 << ClusterSize::MIN_BITS);
        let mut directory = 0_u64;
        let mut bytes = 0_u64;
        for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
            let clusters = self.size.div_ceil(bitmap.granularity.max(1)).div_ceil(8).div_ceil(cluster);
            let table = (clusters * 8).next_multiple_of(cluster);
            bytes = bytes.saturating_add((clusters * cluster).saturating_add(table));
            directory += (DIRECTORY_ENTRY + bitmap.name.as_bytes().len() as u64).next_multiple_of(8);
        }
        bytes.saturating_add(directory.next_multiple_of(cluster))
    }
}
