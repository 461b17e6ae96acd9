//! Creating an image: the options, and the rules they obey.
//!
//! The options, their defaults and what contradicts what are those of `qemu-img create -f qcow2`, encryption
//! apart. [`CreateOptions::check`] can be asked before any file exists; [`CreateOptions::create`] asks it
//! first. The layout on disk is decided in `layout`, which this hands only checked options.

pub(crate) mod layout;
mod stream;

use blockmirror_block::Storage;

use crate::create_options::{CreateOptions, Preallocation, Version};
use crate::error::{Error, Result};
use crate::format::header::{FULL_LENGTH, V2_LENGTH, l1_entries_for};
use crate::format::{extension, feature::FeatureName};
use crate::limits;
use crate::offset::ClusterSize;
use crate::options::{self, OPTIONS, OptionKind};

impl CreateOptions {
    /// Whether the options are valid and agree with each other.
    ///
    /// # Errors
    /// [`Error::Option`] naming the option at fault, or [`Error::LimitExceeded`] where a table would be too
    /// large.
    pub fn check(&self) -> Result<()> {
        self.checked().map(drop)
    }

    /// Writes a new, empty image to `storage`, whose contents are lost. With `data_file` set, `data` is that
    /// file; its contents are lost as well.
    ///
    /// The header is written last, so what an interruption leaves is no image. Nothing is flushed: the caller
    /// makes the image durable together with whatever else it writes.
    ///
    /// # Errors
    /// As for [`Self::check`]; [`Error::Storage`] if writing fails, [`Error::Option`] if `data` is missing or
    /// not asked for.
    pub fn create(&self, storage: &dyn Storage, data: Option<&dyn Storage>) -> Result<()> {
        let checked = self.checked()?;
        match (&self.data_file, data) {
            (Some(_), None) => Err(option("data_file", "the file itself was not handed over".into())),
            (None, Some(_)) => Err(option("data_file", "a file was handed over, but no name".into())),
            _ => layout::write(&checked, storage, data),
        }
    }

    /// The bytes that a storage of fixed length must have for [`create`](Self::create): those of the empty
    /// image, with what is preallocated in it. What lies in a data file does not count.
    ///
    /// # Errors
    /// As for [`Self::check`].
    pub fn storage_len(&self) -> Result<u64> {
        layout::len(&self.checked()?)
    }

    pub(crate) fn checked(&self) -> Result<Checked<'_>> {
        self.check_version()?;
        let cluster = self.cluster()?;
        self.check_range("refcount_bits", self.refcount_bits.into())?;
        if self.extended_l2 && cluster.bits() < limits::MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(option(
                "extended_l2",
                format!("it needs clusters of 16384 bytes or more, not {}", cluster.bytes()),
            ));
        }
        self.check_other_files()?;
        let size = self.size.checked_next_multiple_of(512).filter(|size| i64::try_from(*size).is_ok());
        let Some(size) = size else {
            return Err(option("size", format!("{} is more than {}", self.size, i64::MAX)));
        };
        let l1_entries = l1_entries_for(size, cluster.bits(), self.extended_l2);
        if l1_entries * 8 > limits::MAX_L1_BYTES {
            let most = (limits::MAX_L1_BYTES / 8) * (size / l1_entries);
            return Err(option(
                "size",
                format!(
                    "{size} is too large for clusters of {} bytes, which allow about {most}",
                    cluster.bytes()
                ),
            ));
        }
        // A raw data file has every cluster at its place, so all are mapped from the beginning.
        let preallocation = match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            other => other,
        };
        let (extensions, backing_offset) = self.header_rest(cluster)?;
        Ok(Checked { options: self, cluster, size, l1_entries, preallocation, extensions, backing_offset })
    }

    fn cluster(&self) -> Result<ClusterSize> {
        self.check_range("cluster_size", self.cluster_size)?;
        ClusterSize::from_bits(self.cluster_size.trailing_zeros())
            .ok_or_else(|| option("cluster_size", format!("{} is not allowed", self.cluster_size)))
    }

    /// Whether a number lies in the range that the table of options gives.
    fn check_range(&self, name: &'static str, value: u64) -> Result<()> {
        let Some(def) = options::option(name).filter(|def| !def.kind.allows(value)) else { return Ok(()) };
        let range = match def.kind {
            OptionKind::PowerOfTwoSize { least, most } => {
                format!("from {least} to {most} ({} MiB)", most >> 20)
            }
            OptionKind::PowerOfTwo { least, most } => format!("from {least} to {most}"),
            _ => return Ok(()),
        };
        Err(option(name, format!("{value} is not a power of two {range}")))
    }

    fn check_version(&self) -> Result<()> {
        if self.version == Version::V3 {
            return Ok(());
        }
        let defaults = Self::new(self.size);
        let newer = OPTIONS.iter().find(|def| def.needs_v3 && def.get(self) != def.get(&defaults));
        match newer {
            Some(def) => Err(option(def.name, "it needs compat=1.1, not 0.10".into())),
            None => Ok(()),
        }
    }

    fn check_other_files(&self) -> Result<()> {
        if self.data_file_raw && self.data_file.is_none() {
            return Err(option("data_file_raw", "it needs a data_file".into()));
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Err(option("data_file_raw", "it cannot be combined with a backing_file".into()));
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return Err(option("backing_fmt", "it needs a backing_file".into()));
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(option("preallocation", "with a backing_file it needs extended_l2".into()));
        }
        for (name, value) in [("backing_file", &self.backing_file), ("data_file", &self.data_file)] {
            let Some(value) = value else { continue };
            let limit = limits::MAX_BACKING_NAME as usize;
            if value.is_empty() || value.len() > limit {
                return Err(option(
                    name,
                    format!("the name has {} bytes, 1 to {limit} are allowed", value.len()),
                ));
            }
            if value.contains(&0) {
                return Err(option(name, "the name has a NUL byte".into()));
            }
        }
        let format = self.backing_format.as_deref().unwrap_or("raw");
        if !(1..=limits::MAX_BACKING_FORMAT).contains(&format.len())
            || !format.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(option("backing_fmt", format!("{format:?} is not the name of a format")));
        }
        Ok(())
    }

    /// What follows the fixed fields: extensions, then the backing file's name, whose offset is the second
    /// value (0 without one). The table of feature names is left out where there is no room for it.
    fn header_rest(&self, cluster: ClusterSize) -> Result<(Vec<u8>, u64)> {
        let fixed = if self.version == Version::V3 { FULL_LENGTH } else { V2_LENGTH };
        let mut out = Vec::new();
        if let Some(format) = &self.backing_format {
            extension::append(&mut out, extension::BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extension::append(&mut out, extension::DATA_FILE, name);
        }
        let backing = self.backing_file.as_deref().unwrap_or_default();
        let room = (cluster.bytes() as usize).checked_sub(fixed + out.len() + 8 + backing.len());
        let Some(room) = room else {
            let name = if self.backing_file.is_some() { "backing_file" } else { "data_file" };
            return Err(option(
                name,
                format!("the name does not fit into a cluster of {} bytes", cluster.bytes()),
            ));
        };
        if self.version == Version::V3 {
            let names = FeatureName::encode_known();
            if room >= names.len() + 8 {
                extension::append(&mut out, extension::FEATURE_NAMES, &names);
            }
        }
        extension::append(&mut out, extension::END, &[]);
        let offset = if backing.is_empty() { 0 } else { (fixed + out.len()) as u64 };
        out.extend(backing);
        Ok((out, offset))
    }
}

/// Options that are valid, with what follows from them.
pub(crate) struct Checked<'a> {
    options: &'a CreateOptions,
    pub(crate) cluster: ClusterSize,
    /// A multiple of 512.
    size: u64,
    l1_entries: u64,
    preallocation: Preallocation,
    /// Extensions and backing name.
    extensions: Vec<u8>,
    backing_offset: u64,
}

fn option(option: &'static str, problem: String) -> Error {
    Error::Option { option, problem }
}
