//! An open image: the disk, and what the caller may want to know about the files below it.
//!
//! Made by [`OpenOptions::open`](crate::OpenOptions::open) and [`NewImage::open`](crate::NewImage::open); it
//! keeps every file of the chain open, and locked, for as long as its device lives.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_file::FileId;
use blockmirror_qcow2::{CompressFilter, Qcow2};

use crate::error::{Error, Result};
use crate::format::Format;
use crate::protocol_id::ProtocolId;
use crate::storage_stamp::StorageStamp;

/// An open image.
#[derive(Debug)]
pub struct Image {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) qcow2: Option<Arc<Qcow2>>,
    pub(crate) base: Option<Box<CommitLayer>>,
    pub(crate) format: Format,
    pub(crate) path: PathBuf,
    pub(crate) backing: Option<Backing>,
    /// The image, its data file if it has one, and then the rest of the chain.
    pub(crate) files: Vec<ProtocolId>,
    /// The images of the chain, from the top down.
    pub(crate) layers: Vec<LayerId>,
    /// What the storages of the chain were when they were opened, from the top down; `None` for zeros.
    pub(crate) stamps: Vec<Option<StorageStamp>>,
    /// How many of `files` are not below it.
    pub(crate) own_files: usize,
    pub(crate) notes: Vec<Note>,
    pub(crate) allocated: Option<u64>,
}

/// Which file an image of a chain lies in, and its format; `None` of one that reads otherwise than such an
/// image does by its path alone, by what is typed.
pub(crate) type LayerId = Option<(ProtocolId, Format)>;

/// The layer below an image.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Backing {
    /// Its name as it stands in the header.
    pub name: PathBuf,
    /// The same as a path from where we are.
    pub path: PathBuf,
    /// The format it was opened in.
    pub format: Format,
}

/// A layer below an image that is open for writing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CommitLayer {
    /// The disk that it is, with what lies below it.
    pub device: Arc<dyn BlockDevice>,
    /// Its names and its format.
    pub backing: Backing,
    /// How many images lie above it: 1 for the image's own backing file.
    pub depth: u32,
    /// The files that a write to it changes.
    pub files: Vec<FileId>,
    pub(crate) qcow2: Option<Arc<Qcow2>>,
}

/// Something about a chain that its owner should know, though it does not stop anything.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The header of an image has no format of its backing file: it was detected.
    BackingFormatGuessed {
        /// The image.
        image: PathBuf,
        /// The detected format.
        format: Format,
    },
}

/// The disk of `image`, which is open from `path`, with data that is written stored compressed.
pub(crate) fn compressing(path: &Path, image: Option<&Arc<Qcow2>>) -> Result<Arc<dyn BlockDevice>> {
    match image {
        Some(image) => Ok(Arc::new(CompressFilter::new(Arc::clone(image))?)),
        None => Err(Error::NotCompressible { path: path.to_owned() }),
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BackingFormatGuessed { image, format } => {
                write!(f, "{}: its header has no backing format; detected {format}", image.display())
            }
        }
    }
}

impl Image {
    /// The disk.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// The image as what it is, if it is a qcow2 image: for what no other format has.
    pub fn qcow2(&self) -> Option<&Arc<Qcow2>> {
        self.qcow2.as_ref()
    }

    /// The layer that [`OpenOptions::commit_base`](crate::OpenOptions::commit_base) has asked for, if the
    /// chain has it.
    pub fn commit_base(&self) -> Option<&CommitLayer> {
        self.base.as_deref()
    }

    /// The format of the image itself.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The layer below, if the image has one.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Whether `path` leads to one of the files (or to the export) that are open for it: images and data
    /// files of the whole chain; or to a block device that shows bytes of theirs, or to the file below one
    /// that is open for it.
    pub fn uses(&self, path: impl AsRef<Path>) -> bool {
        ProtocolId::of(path.as_ref()).is_some_and(|id| self.files.iter().any(|file| file.overlaps(&id)))
    }

    /// Whether a write to it changes one of the files that are open for `other`: it or its data file is among
    /// them.
    pub fn writes_into(&self, other: &Image) -> bool {
        self.files.iter().take(self.own_files).any(|id| other.files.iter().any(|file| file.overlaps(id)))
    }

    /// How deep in its own chain the image `other` lies, which is open a second time: from there on the two
    /// chains are the same. `None` if it is not in the chain, or reads otherwise there: in another format, on
    /// other layers, or by options that are typed.
    pub fn depth_of(&self, other: &Image) -> Option<u32> {
        if other.layers.iter().any(Option::is_none) {
            return None;
        }
        let depth = self.layers.len().checked_sub(other.layers.len()).filter(|depth| *depth > 0)?;
        (self.layers[depth..] == other.layers).then_some(u32::try_from(depth).ok()?)
    }

    /// Whether an image whose header names its [backing file](Self::backing) stands on the same disk. It does
    /// not where options that are typed say how that is read. True if there is none.
    pub fn can_share_backing(&self) -> bool {
        self.layers.get(1).is_none_or(Option::is_some)
    }

    /// Whether some of its bytes come from a server, which may have them in a file of this host.
    pub fn may_be_served(&self) -> bool {
        self.files.iter().any(ProtocolId::may_be_served)
    }

    /// The files that a write to it changes: its own, and that of its data.
    pub fn own_files(&self) -> impl Iterator<Item = FileId> {
        self.files.iter().take(self.own_files).filter_map(ProtocolId::file)
    }

    /// What the storages of the chain were when they were opened, from the top down. While that stays the
    /// same, and all of them [show writes](StorageStamp::shows_writes), the disk does. `None` if one of them
    /// is nothing but zeros.
    pub fn stamps(&self) -> Option<Vec<StorageStamp>> {
        self.stamps.iter().cloned().collect()
    }

    /// Bytes of storage that the files of the chain occupied when they were opened; `None` if one of them
    /// does not tell.
    pub fn allocated_bytes(&self) -> Option<u64> {
        self.allocated
    }

    /// What its owner should know.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }
}
