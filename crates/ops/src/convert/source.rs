//! The source of a conversion: an image, or several whose disks are concatenated.
//!
//! Opened by [`Convert::open_source`]. Each image is judged by its own directory.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ByteRange};
use blockmirror_filter::{Concat, NullDisk, WholeUnits, Window};
use blockmirror_image::{Backing, Format, Image, Note, ReferencePolicy, join_name};

use super::{Convert, ConvertError};

/// The length of an image is a multiple of this.
const SECTOR: u64 = 512;

/// The open source of a [`Convert`].
#[derive(Debug)]
pub struct ConvertSource {
    first: Image,
    more: Vec<Image>,
    device: Arc<dyn BlockDevice>,
    /// The policy that the first image was opened under.
    policy: ReferencePolicy,
}

impl Convert {
    /// Opens the source and its backing chain for reading.
    ///
    /// # Errors
    /// [`ConvertError`]; nothing has been written.
    pub fn open_source(&self) -> Result<ConvertSource, ConvertError> {
        self.check_several()?;
        let mut allowed = self.allowed();
        let backing = self.settings.backing_file.as_ref();
        if let Some(backing) = backing.and_then(|name| join_name(&self.target, name.as_ref())) {
            allowed = allowed.file(backing);
        }
        let mut images = Vec::new();
        let mut policies = Vec::new();
        for name in &self.sources {
            let policy = allowed.policy_for(&name.path)?;
            let options = self.source_access.clone().format(name.format).node(name.node.clone());
            let options = options.snapshot(self.snapshot.clone());
            images.push(options.writable(false).claim(false).policy(policy.clone()).open(&name.path)?);
            policies.push(policy);
        }
        let mut images = images.into_iter();
        let (Some(first), Some(policy)) = (images.next(), policies.into_iter().next()) else {
            return Err(ConvertError::NoSource);
        };
        let more: Vec<_> = images.collect();
        let device = match &*more {
            [] => Arc::clone(first.device()),
            more => {
                let devices = std::iter::once(&first).chain(more).map(|image| Arc::clone(image.device()));
                Arc::new(Concat::new(devices)?)
            }
        };
        let device = match self.source_range {
            Some(range) => part(device, range)?,
            None => device,
        };
        Ok(ConvertSource { first, more, device, policy })
    }
}

/// `range` of `device`, filled up to whole sectors, which an image has.
fn part(device: Arc<dyn BlockDevice>, range: ByteRange) -> Result<Arc<dyn BlockDevice>, ConvertError> {
    let part: Arc<dyn BlockDevice> = Arc::new(Window::new(device, range));
    let rest = part.len().next_multiple_of(SECTOR) - part.len();
    if rest == 0 {
        return Ok(part);
    }
    let zeros = Arc::new(NullDisk::new(rest).read_zeroes(true));
    Ok(Arc::new(Concat::new([part, zeros])?))
}

impl ConvertSource {
    pub(super) fn images(&self) -> impl Iterator<Item = &Image> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// The image, if it is one alone.
    pub(super) fn single(&self) -> Option<&Image> {
        self.more.is_empty().then_some(&self.first)
    }

    /// The disk.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// The format, if all images have the same.
    pub fn format(&self) -> Option<Format> {
        let format = self.first.format();
        self.more.iter().all(|image| image.format() == format).then_some(format)
    }

    /// What the owner of the images should know.
    pub fn notes(&self) -> impl Iterator<Item = &Note> {
        self.images().flat_map(Image::notes)
    }

    /// The layer below, of a single image.
    pub(super) fn backing(&self) -> Option<&Backing> {
        self.first.backing().filter(|_| self.more.is_empty())
    }

    /// The policy for what the source names.
    pub(super) fn policy(&self) -> &ReferencePolicy {
        &self.policy
    }

    /// The path of the image, or of the first.
    pub(super) fn path(&self) -> &Path {
        self.first.path()
    }

    /// The image that `path` is a file of.
    pub(super) fn user_of(&self, path: &Path) -> Option<&Image> {
        self.images().find(|image| image.uses(path))
    }

    /// The image that a write to `target` changes.
    pub(super) fn written_by(&self, target: &Image) -> Option<&Image> {
        self.images().find(|image| target.writes_into(image))
    }

    /// Whether some of its bytes come from a server, which may have them in a file of this host.
    pub(super) fn may_be_served(&self) -> bool {
        self.images().any(Image::may_be_served)
    }

    /// The bytes that its files occupy, if all of them say so.
    pub(super) fn allocated_bytes(&self) -> Option<u64> {
        self.images().try_fold(0_u64, |sum, image| sum.checked_add(image.allocated_bytes()?))
    }
}

/// `device`, with its extents in whole units of a target that takes no parts of them.
pub(super) fn in_units(device: &Arc<dyn BlockDevice>, unit: Option<u64>) -> Arc<dyn BlockDevice> {
    match unit {
        Some(unit) => Arc::new(WholeUnits::new(Arc::clone(device), unit)),
        None => Arc::clone(device),
    }
}
