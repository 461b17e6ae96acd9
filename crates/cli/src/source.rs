//! The source of a copy: an image, or several whose disks follow each other.
//!
//! Opened by `copy`, asked by `target`. Each image is judged by its own directory.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_filter::Concat;
use blockmirror_image::{Backing, Format, Image, OpenOptions, ReferencePolicy};
use serde_json::{Value, json};

use crate::access;
use crate::args::CopyArgs;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::target::allow_typed;

/// What a copy is made of.
pub(crate) struct Source {
    first: Image,
    more: Vec<Image>,
    device: Arc<dyn BlockDevice>,
    /// The policy that the first image was opened under.
    policy: ReferencePolicy,
}

impl Source {
    /// Opens what `args` names, and says what its owner should know.
    pub(crate) fn open(console: &mut Console<'_>, args: &CopyArgs) -> Outcome<Self> {
        let (mut images, mut policies) = (Vec::new(), Vec::new());
        for name in &args.names {
            let policy = allow_typed(access::policy(&name.path, &args.access)?, args);
            let image = OpenOptions::new()
                .format(name.format)
                .part(name.part)
                .lock(access::lock_of_source(&args.access))
                .nbd(access::nbd(&args.access))
                .cache(args.source_cache)
                .policy(policy.clone())
                .open(&name.path)?;
            for note in image.notes() {
                console.note(note);
            }
            images.push(image);
            policies.push(policy);
        }
        let mut images = images.into_iter();
        // The command line has one at least.
        let (Some(first), Some(policy)) = (images.next(), policies.into_iter().next()) else {
            return Err(Failure::usage("copy: the source is missing"));
        };
        let more: Vec<_> = images.collect();
        let device = match &*more {
            [] => Arc::clone(first.device()),
            more => {
                let devices = std::iter::once(&first).chain(more).map(|image| Arc::clone(image.device()));
                Arc::new(Concat::new(devices)?)
            }
        };
        Ok(Self { first, more, device, policy })
    }

    fn images(&self) -> impl Iterator<Item = &Image> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// The disk.
    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Whether it is made of several images.
    pub(crate) fn is_several(&self) -> bool {
        !self.more.is_empty()
    }

    /// The format, if all images have the same.
    pub(crate) fn format(&self) -> Option<Format> {
        let format = self.first.format();
        self.more.iter().all(|image| image.format() == format).then_some(format)
    }

    /// The layer below, of a single image.
    pub(crate) fn backing(&self) -> Option<&Backing> {
        self.first.backing().filter(|_| !self.is_several())
    }

    /// The policy for what the source names.
    pub(crate) fn policy(&self) -> &ReferencePolicy {
        &self.policy
    }

    /// The path of the image, or of the first.
    pub(crate) fn path(&self) -> &Path {
        self.first.path()
    }

    /// The image that `path` is a file of.
    pub(crate) fn user_of(&self, path: &Path) -> Option<&Image> {
        self.images().find(|image| image.uses(path))
    }

    /// The image that a write to `target` changes.
    pub(crate) fn written_by(&self, target: &Image) -> Option<&Image> {
        self.images().find(|image| target.writes_into(image))
    }

    /// Whether some of its bytes come from a server, which may have them in a file of this host.
    pub(crate) fn may_be_served(&self) -> bool {
        self.images().any(Image::may_be_served)
    }

    /// Bytes that its files occupy, if they tell.
    pub(crate) fn allocated_bytes(&self) -> Option<u64> {
        self.images().try_fold(0_u64, |sum, image| sum.checked_add(image.allocated_bytes()?))
    }
}

/// The names of the sources for people.
pub(crate) fn shown(args: &CopyArgs) -> String {
    let names: Vec<_> = args.names.iter().map(|name| name.path.to_string_lossy()).collect();
    names.join(" + ")
}

/// The names of the sources as a member for programs.
pub(crate) fn member(args: &CopyArgs) -> (&'static str, Value) {
    match &*args.names {
        [only] => ("source", json!(only.path.to_string_lossy())),
        all => ("sources", all.iter().map(|name| json!(name.path.to_string_lossy())).collect()),
    }
}
