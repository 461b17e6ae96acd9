//! Going on with an interrupted conversion: what is found is taken up, refused or discarded.
//!
//! A step of [`CheckedConvert`]. What must hold: what cannot be gone on with stays, unless the caller asks to
//! begin anew.

use std::path::PathBuf;

use blockmirror_image::{PartialFile, PreparedImage};

use super::check::{CheckedConvert, TargetKind};
use super::checkpoint::{Interrupted, Place, PlannedCheckpoint, Resumable};
use super::error::ConvertError;

/// The checkpoint of a conversion whose target is open for writing.
#[derive(Debug)]
pub(super) struct PreparedCheckpoint {
    pub(super) planned: PlannedCheckpoint,
    pub(super) path: PathBuf,
    pub(super) partial: PartialFile,
    /// What is gone on with.
    pub(super) interrupted: Option<Interrupted>,
    pub(super) resumable: Resumable,
}

impl PreparedCheckpoint {
    /// Whether the copy goes without it where it cannot be begun.
    pub(super) fn is_optional(&self) -> bool {
        self.planned.options.place == Place::Beside && self.interrupted.is_none()
    }
}

impl CheckedConvert {
    /// What an earlier run has left that kept a checkpoint where this one does, whether or not it can be
    /// gone on with.
    ///
    /// # Errors
    /// [`ConvertError::Checkpoint`] if the file that was named as checkpoint is none, or is in use.
    pub fn interrupted(&self) -> Result<Option<Interrupted>, ConvertError> {
        match &self.checkpoint {
            Some(planned) => planned.find(&self.target),
            None => Ok(None),
        }
    }

    /// Whether the conversion keeps a checkpoint, unless its target turns out to be written in place.
    pub fn keeps_checkpoint(&self) -> bool {
        self.checkpoint.is_some()
    }

    /// Begins anew, whatever an earlier run has left: that is discarded.
    #[must_use]
    pub fn restart(mut self) -> Self {
        if let Some(planned) = &mut self.checkpoint {
            planned.options.restart = true;
        }
        self
    }

    /// Opens the target, with what is to be gone on with, and the checkpoint.
    pub(super) fn prepare_new(
        &mut self,
    ) -> Result<(PreparedImage, Option<PreparedCheckpoint>), ConvertError> {
        let TargetKind::New { spec, .. } = &self.kind else { return Err(ConvertError::NoSource) };
        let Some(planned) = self.checkpoint.take() else {
            return Ok((PreparedImage::new(&self.target, spec)?, None));
        };
        let found = planned.find(&self.target)?;
        let (interrupted, discarded) = if planned.options.restart { (None, found) } else { (found, None) };
        if let Some(Interrupted { changed: Some(what), partial, .. }) = interrupted {
            return Err(ConvertError::Changed { target: self.target.clone(), partial, what });
        }
        let number = |found: &Option<Interrupted>| found.as_ref().map(|found| found.number);
        let mut options = spec.target_options().resume(number(&interrupted)).discard(number(&discarded));
        if interrupted.is_some() {
            // It has taken its room.
            options = options.space(None);
        }
        let mut prepared = PreparedImage::new(&self.target, &(**spec).clone().target(options))?;
        let Some(partial) = prepared.partial_file()? else {
            return match &planned.options.place {
                Place::Beside => Ok((prepared, None)),
                Place::File(_) => Err(self.no_checkpoint("it is not written to a new file")),
            };
        };
        if interrupted.as_ref().is_some_and(|found| found.stamp != partial.stamp.to_string()) {
            let (target, what) = (self.target.clone(), "its temporary file is another one".to_owned());
            return Err(ConvertError::Changed { target, partial: partial.path, what });
        }
        let path = match &planned.options.place {
            Place::Beside => partial.sidecar.clone(),
            Place::File(path) => path.clone(),
        };
        let resumable = Resumable::default();
        resumable.set(interrupted.as_ref().is_some_and(|found| found.done > 0));
        Ok((prepared, Some(PreparedCheckpoint { planned, path, partial, interrupted, resumable })))
    }

    fn no_checkpoint(&self, why: &'static str) -> ConvertError {
        ConvertError::NoCheckpoint { target: self.target.clone(), why }
    }
}
