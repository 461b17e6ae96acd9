//! What an image stands on by the options of its own name, in place of its header: `backing` of `json:` and
//! `--image-opts`.
//!
//! Called by the opener of the chain. It is typed, so it is opened wherever it lies; what it names itself is
//! judged by its own directory.

use std::path::Path;

use blockmirror_block::{Error as BlockError, ErrorKind};

use super::{ChainOpener, OpenOptions, refuse};
use crate::disk_image::Image;
use crate::error::{Error, Result};
use crate::protocol_id::ProtocolId;
use crate::reference::{ReferenceRefusal, Role};

impl ChainOpener<'_> {
    /// Opens for reading what the image `above` stands on by its own name, with what lies below that, as a
    /// chain of its own.
    pub(super) fn open_typed_backing(&mut self, above: &Path) -> Result<Option<Image>> {
        let name = match &self.options.node.backing {
            Some(name) if self.options.with_backing => &**name,
            _ => return Ok(None),
        };
        let refused = |reason| refuse(above, Role::Backing, &name.path, reason);
        let Some(depth) = self.options.max_depth.checked_sub(1).filter(|depth| *depth > 0) else {
            return Err(refused(ReferenceRefusal::TooDeep(self.options.max_depth)));
        };
        if ProtocolId::of(&name.path).is_some_and(|id| self.files.contains(&id)) {
            return Err(refused(ReferenceRefusal::Cycle));
        }
        if self.options.commit_base.is_some() {
            let why = "a commit into a backing file that is typed is not supported";
            let unsupported = BlockError::new(ErrorKind::Unsupported, "open");
            return Err(unsupported.in_file(above.display().to_string()).because(why).into());
        }
        let policy = self.options.policy.for_typed(&name.path);
        let policy = policy.map_err(|cause| Error::Directory { path: name.path.clone(), cause })?;
        let options = OpenOptions {
            format: name.format,
            writable: false,
            claim: false,
            node: name.node.clone(),
            snapshot: None,
            policy,
            max_depth: depth,
            commit_base: None,
            compress: false,
            ..self.options.clone()
        };
        let image = options.open(&name.path)?;
        if image.files.iter().any(|file| self.files.contains(file)) {
            return Err(refused(ReferenceRefusal::Cycle));
        }
        self.files.extend(image.files.iter().cloned());
        self.stamps.extend(image.stamps.iter().cloned());
        self.layers.extend(image.layers.iter().cloned());
        self.notes.extend(image.notes.iter().cloned());
        Ok(Some(image))
    }
}
