//! What an amendment changes.

use crate::create_options::Version;

/// The options of an image that are to change; `None` leaves one as it is. The names are those of
/// `qemu-img amend -o`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AmendOptions {
    /// `compat`. Going to version 2, clusters that are marked as zero become data over a backing file, and
    /// unallocated without one.
    pub version: Option<Version>,
    /// `lazy_refcounts`.
    pub lazy_refcounts: Option<bool>,
    /// `refcount_bits`: a power of two up to 64.
    pub refcount_bits: Option<u32>,
    /// `size`: the length of the disk, a multiple of 512. What lies past a shorter one is lost.
    pub size: Option<u64>,
    /// `backing_file`. It cannot be changed: the one that the image has, or none.
    pub backing_file: Option<Vec<u8>>,
    /// `backing_fmt`, with `backing_file`.
    pub backing_format: Option<String>,
    /// `data_file`: the name of the data file as it will stand in the image. The file is not looked at.
    pub data_file: Option<Vec<u8>>,
    /// `data_file_raw`. It can only be turned off.
    pub data_file_raw: Option<bool>,
}
