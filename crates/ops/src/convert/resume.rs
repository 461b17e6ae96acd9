//! Going on with an interrupted conversion: what is found is taken up, refused or discarded.
//!
//! A step of [`CheckedConvert`]. What must hold: what cannot be gone on with stays, unless the caller asks to
//! begin anew.

use std::path::PathBuf;

use blockmirror_checkpoint::Identity;
use blockmirror_image::{CopyPlace, PreparedImage, Target};

use super::check::{CheckedConvert, TargetKind};
use super::checkpoint::{Interrupted, ONLY_THE_TOP, Place, PlannedCheckpoint, Resumable};
use super::error::ConvertError;
use super::identity;

/// The checkpoint of a conversion whose target is open for writing.
#[derive(Debug)]
pub(super) struct PreparedCheckpoint {
    pub(super) planned: PlannedCheckpoint,
    pub(super) path: PathBuf,
    /// Where the copy is.
    pub(super) copy: CopyPlace,
    /// Whether the checkpoint has a digest of each region: source or target does not show whether it was
    /// written.
    pub(super) digests: bool,
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
        let number = |found: &Option<Interrupted>| found.as_ref().and_then(|found| found.number);
        let mut options = spec.target_options().resume(number(&interrupted)).discard(number(&discarded));
        if interrupted.is_some() {
            // It has taken its room.
            options = options.space(None);
        }
        let mut prepared = PreparedImage::new(&self.target, &(**spec).clone().target(options))?;
        let copy = prepared.place()?;
        let path = match (&planned.options.place, &copy) {
            (Place::Beside, Some(CopyPlace::Partial(partial))) => partial.sidecar.clone(),
            (Place::Beside, _) => return Ok((prepared, None)),
            (Place::File(path), _) => path.clone(),
        };
        let Some(copy) = copy else { return Err(self.no_checkpoint("it lies in several files")) };
        self.check_copy(&prepared, &copy, interrupted.as_ref())?;
        let digests = !planned.source_shows_writes || matches!(copy, CopyPlace::InPlace(_));
        if digests && self.mirror.counted_layers().is_some() {
            // What the layers below decide is not in the target, or need not be.
            return Err(self.no_checkpoint(ONLY_THE_TOP));
        }
        let resumable = Resumable::default();
        resumable.set(interrupted.as_ref().is_some_and(|found| found.done > 0));
        let checkpoint = PreparedCheckpoint { planned, path, copy, digests, interrupted, resumable };
        Ok((prepared, Some(checkpoint)))
    }

    /// Fails if no checkpoint can be kept of the copy in `copy`, or if there is an interrupted one and that
    /// is another.
    fn check_copy(
        &self,
        prepared: &PreparedImage,
        copy: &CopyPlace,
        interrupted: Option<&Interrupted>,
    ) -> Result<(), ConvertError> {
        let in_place = matches!(copy, CopyPlace::InPlace(_));
        if in_place && !prepared.targets().all(Target::can_flush) {
            return Err(self.no_checkpoint("its server has no flush command"));
        }
        let (what, partial) = match copy {
            CopyPlace::Partial(partial) => ("its temporary file is another one", partial.path.clone()),
            CopyPlace::InPlace(_) => {
                ("the target is another file, block device or export", self.target.clone())
            }
            _ => return Err(self.no_checkpoint("nothing says which storage it is")),
        };
        let own = identity::with_place(Identity::new(), copy);
        match interrupted {
            // A new file may have the inode of one that is gone.
            Some(found) if found.number.is_none() != in_place || found.stamp != identity::stamp(&own) => {
                let (target, what) = (self.target.clone(), what.to_owned());
                Err(ConvertError::Changed { target, partial, what })
            }
            _ => Ok(()),
        }
    }

    fn no_checkpoint(&self, why: &'static str) -> ConvertError {
        ConvertError::NoCheckpoint { target: self.target.clone(), why }
    }
}
