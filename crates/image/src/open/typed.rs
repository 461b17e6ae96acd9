//! What an image stands on by the options of its own name, in place of its header: `backing` of `json:` and
//! `--image-opts`.
//!
//! Called by the opener of the chain, and by what describes one. It is typed, so it is opened wherever it
//! lies; what it names itself is judged by its own directory.

use std::path::{Path, PathBuf};

use blockmirror_block::{Error as BlockError, ErrorKind};

use super::{ChainOpener, OpenOptions, refuse};
use crate::disk_image::Image;
use crate::error::{Error, Result};
use crate::protocol_id::ProtocolId;
use crate::reference::{ReferenceRefusal, Role};

impl OpenOptions {
    /// What the image `above` stands on by its own name: its path, and how it is opened, for reading, as the
    /// top of a chain of its own; `None` if the name does not say it. `files` are those of the chain so far.
    ///
    /// # Errors
    /// It is part of the chain already, or the chain is too deep.
    pub(crate) fn typed_backing(
        &self,
        above: &Path,
        files: &[ProtocolId],
    ) -> Result<Option<(PathBuf, Self)>> {
        let Some(name) = &self.node.backing else { return Ok(None) };
        let refused = |reason| refuse(above, Role::Backing, &name.path, reason);
        let Some(max_depth) = self.max_depth.checked_sub(1).filter(|depth| *depth > 0) else {
            return Err(refused(ReferenceRefusal::TooDeep(self.max_depth)));
        };
        if ProtocolId::of(&name.path).is_some_and(|id| files.contains(&id)) {
            return Err(refused(ReferenceRefusal::Cycle));
        }
        let policy = self.policy.for_typed(&name.path);
        let policy = policy.map_err(|cause| Error::Directory { path: name.path.clone(), cause })?;
        let options = Self {
            format: name.format,
            writable: false,
            claim: false,
            node: name.node.clone(),
            snapshot: None,
            policy,
            max_depth,
            commit_base: None,
            compress: false,
            ..self.clone()
        };
        Ok(Some((name.path.clone(), options)))
    }
}

impl ChainOpener<'_> {
    /// Opens for reading what the image `above` stands on by its own name, with what lies below that, as a
    /// chain of its own.
    pub(super) fn open_typed_backing(&mut self, above: &Path) -> Result<Option<Image>> {
        if !self.options.with_backing {
            return Ok(None);
        }
        let Some((path, options)) = self.options.typed_backing(above, &self.files)? else { return Ok(None) };
        if self.options.commit_base.is_some() {
            let why = "a commit into a backing file that is typed is not supported";
            let unsupported = BlockError::new(ErrorKind::Unsupported, "open");
            return Err(unsupported.in_file(above.display().to_string()).because(why).into());
        }
        let image = options.open(&path)?;
        if image.files.iter().any(|file| self.files.contains(file)) {
            return Err(refuse(above, Role::Backing, &path, ReferenceRefusal::Cycle));
        }
        self.files.extend(image.files.iter().cloned());
        self.stamps.extend(image.stamps.iter().cloned());
        self.layers.extend(image.layers.iter().cloned());
        self.notes.extend(image.notes.iter().cloned());
        Ok(Some(image))
    }
}
