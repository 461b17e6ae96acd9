//! What the name of an image says besides its path and format: the options of QEMU's block drivers that
//! `--image-opts` and `json:` have.
//!
//! Made by [`crate::ImageName`] out of what a person has typed, and kept by [`crate::OpenOptions`] for the
//! image itself; what lies below it has none. What must hold: nothing here comes out of an image.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{BlockDevice, Error as BlockError, ErrorKind};
use blockmirror_filter::{BlkdebugDisk, BlkdebugError, BlkdebugOptions, DEFAULT_NULL_SIZE, NullDisk};
use blockmirror_qcow2::OverlapChecks;
use blockmirror_raw::Part;

use crate::error::Result;
use crate::format::Format;

/// How an image is opened, as far as its name says it. The default is as if the name were a path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeOptions {
    /// The part of the file, or of the export, that it lies in.
    pub part: Part,
    /// Which kinds of metadata writes to it are checked against, if it is a qcow2 image.
    pub overlap_checks: OverlapChecks,
    /// Its files are opened for direct I/O, whatever the cache mode.
    pub direct: bool,
    /// What it reads as does not depend on the backing file that its header names.
    pub no_backing: bool,
    /// New L2 tables of it are written whole: said of a new image by its settings, not by its name.
    pub(crate) whole_tables: bool,
    /// What it stands on, in place of the backing file that its header names.
    pub(crate) backing: Option<Box<TypedBacking>>,
    /// What an NBD server is asked for in place of what its export holds.
    #[cfg(feature = "nbd")]
    pub(crate) context: Option<String>,
    pub(crate) null: Option<NullOptions>,
    /// Faults of the file that it lies in.
    pub(crate) file_rules: Option<Box<FaultRules>>,
    /// Faults of the disk.
    pub(crate) disk_rules: Option<Box<FaultRules>>,
}

impl NodeOptions {
    /// What is read, and as what, as a text: two names of the same files that read as different disks have
    /// different ones. What they fail with, and how the files are cached, is no part of it.
    pub fn selection(&self) -> String {
        let own = format!("{:?} {}", self.part, self.no_backing);
        match &self.backing {
            Some(backing) => format!("{own} on {:?} ({})", backing.format, backing.node.selection()),
            None => own,
        }
    }

    /// Whether the image reads as one that has been opened by its path alone.
    pub(crate) fn reads_as_its_path(&self) -> bool {
        #[cfg(feature = "nbd")]
        let of_context = self.context.is_some();
        #[cfg(not(feature = "nbd"))]
        let of_context = false;
        let of_rules = self.file_rules.is_some() || self.disk_rules.is_some();
        let is_default = self.part == Part::default() && !self.no_backing && self.backing.is_none();
        is_default && self.null.is_none() && !of_rules && !of_context
    }
}

/// What an image stands on by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TypedBacking {
    pub(crate) path: PathBuf,
    pub(crate) format: Option<Format>,
    pub(crate) node: NodeOptions,
}

/// A disk without a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NullOptions {
    pub(crate) size: u64,
    pub(crate) read_zeroes: bool,
    pub(crate) latency: Duration,
}

impl Default for NullOptions {
    fn default() -> Self {
        Self { size: DEFAULT_NULL_SIZE, read_zeroes: false, latency: Duration::ZERO }
    }
}

impl NullOptions {
    pub(crate) fn disk(self) -> NullDisk {
        NullDisk::new(self.size).latency(self.latency).read_zeroes(self.read_zeroes)
    }
}

/// Rules for faults, and the file that has more of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FaultRules {
    pub(crate) config: Option<PathBuf>,
    pub(crate) options: BlkdebugOptions,
}

impl FaultRules {
    /// All rules; those of the file come first.
    ///
    /// # Errors
    /// The file cannot be read, or is none of rules.
    pub(crate) fn read(&self) -> Result<BlkdebugOptions> {
        let mut options = self.options.clone();
        if let Some(config) = &self.config {
            let mut from_file = BlkdebugOptions::default();
            from_file.read_config(config).map_err(|error| refused(&error))?;
            options.inject_error.splice(0..0, from_file.inject_error);
            options.set_state.splice(0..0, from_file.set_state);
        }
        Ok(options)
    }

    /// `disk` under the rules.
    ///
    /// # Errors
    /// As for [`read`](Self::read); rules that make no sense on this disk.
    pub(crate) fn over(&self, disk: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
        Ok(Arc::new(BlkdebugDisk::new(disk, self.read()?).map_err(|error| refused(&error))?))
    }
}

fn refused(error: &BlkdebugError) -> BlockError {
    BlockError::new(ErrorKind::InvalidInput, "open").because(error.to_string())
}
