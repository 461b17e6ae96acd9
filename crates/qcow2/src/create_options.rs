//! What a new image is to be like: the options and their defaults. `create` checks them and makes the image;
//! the table of [`crate::options`] sets and shows them.

use crate::format::header::Compression;

/// The version of the format that a new image has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Version {
    /// Version 2, `compat=0.10`: for readers from before 2012.
    V2,
    /// Version 3, `compat=1.1`.
    #[default]
    V3,
}

impl Version {
    /// The value of `-o compat` and of `info`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V2 => "0.10",
            Self::V3 => "1.1",
        }
    }
}

/// What a new image has allocated from the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Preallocation {
    /// Nothing: clusters are allocated when they are written.
    #[default]
    Off,
    /// Every cluster is mapped; the file is sparse.
    Metadata,
    /// The same, and the host has reserved the space.
    Falloc,
    /// The same, and zeros have been written.
    Full,
}

impl Preallocation {
    /// Whether the whole disk takes space from the beginning.
    pub const fn takes_space(self) -> bool {
        matches!(self, Self::Falloc | Self::Full)
    }

    /// The value of `-o preallocation`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }

    /// The mode with the name `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Off, Self::Metadata, Self::Falloc, Self::Full].into_iter().find(|mode| mode.as_str() == name)
    }
}

/// How to create an image. Starts from `qemu-img`'s defaults; set the fields that differ.
///
/// ```
/// use blockmirror_qcow2::{CreateOptions, Version};
///
/// let mut options = CreateOptions::new(1 << 30);
/// options.cluster_size = 4096;
/// assert!(options.check().is_ok());
///
/// options.version = Version::V2;
/// options.lazy_refcounts = true;
/// assert_eq!(
///     options.check().unwrap_err().to_string(),
///     "option lazy_refcounts: it needs compat=1.1, not 0.10",
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Length of the disk in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// `compat`.
    pub version: Version,
    /// `cluster_size`: a power of two, 512 bytes to 2 MiB.
    pub cluster_size: u64,
    /// `refcount_bits`: a power of two up to 64.
    pub refcount_bits: u32,
    /// `compression_type`.
    pub compression: Compression,
    /// `extended_l2`: 32 subclusters in each cluster.
    pub extended_l2: bool,
    /// `lazy_refcounts`.
    pub lazy_refcounts: bool,
    /// `preallocation`.
    pub preallocation: Preallocation,
    /// `backing_file`: the name as it will stand in the image.
    pub backing_file: Option<Vec<u8>>,
    /// `backing_fmt`.
    pub backing_format: Option<String>,
    /// `data_file`: the name as it will stand in the image.
    pub data_file: Option<Vec<u8>>,
    /// `data_file_raw`: the data file stays a valid raw image.
    pub data_file_raw: bool,
    /// What the data file holds stays, and is what preallocated clusters show. Without it the data file is
    /// emptied.
    pub keep_data: bool,
    /// The clusters of the header and of the refcounts are written whole, zeros included, so that the file
    /// takes as much space as one that QEMU makes.
    pub whole_metadata: bool,
}

impl CreateOptions {
    /// The defaults, for a disk of `size` bytes.
    pub const fn new(size: u64) -> Self {
        Self {
            size,
            version: Version::V3,
            cluster_size: 65536,
            refcount_bits: 16,
            compression: Compression::Deflate,
            extended_l2: false,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            keep_data: false,
            whole_metadata: false,
        }
    }
}
