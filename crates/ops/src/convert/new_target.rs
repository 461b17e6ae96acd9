//! A new target: laid out, or taken up where an interrupted run has left it, and its checkpoint.
//!
//! Called by [`super::PreparedConvert::start`]. What must hold: what is taken up is checked before anything
//! in it is changed.

use std::path::Path;
use std::sync::Arc;

use blockmirror_image::{Image, NewImage, OpenOptions, PreparedImage};
use blockmirror_mirror::MirrorOptions;

use super::recorder::Recorder;
use super::resume::PreparedCheckpoint;
use super::resume_check::{Check, OnRead};
use super::{ConvertError, ConvertSource, reflink};

/// A new image before it is written.
#[derive(Debug)]
pub(super) struct NewTarget {
    pub(super) prepared: PreparedImage,
    pub(super) checkpoint: Option<PreparedCheckpoint>,
    /// The backing file stays locked until the image itself is open.
    pub(super) backing: Option<Image>,
    pub(super) open: OpenOptions,
}

/// A new image that is open, and holds nothing, or what an interrupted run has copied.
pub(super) struct Begun {
    pub(super) image: Image,
    pub(super) new: NewImage,
    pub(super) recorder: Option<Arc<Recorder>>,
    /// Why it goes without the checkpoint that it would keep beside it.
    pub(super) no_checkpoint: Option<ConvertError>,
    /// What is left to copy.
    pub(super) mirror: MirrorOptions,
    /// Regions that were copied and that the source cannot read any more.
    pub(super) unread: u64,
}

impl NewTarget {
    /// Lays the image out, or takes it up; `copies`: all bytes pass through a compressor or a verification.
    /// `on_read` is called while what was copied is read again.
    pub(super) fn begin(
        self,
        source: &ConvertSource,
        target: &Path,
        mut mirror: MirrorOptions,
        copies: bool,
        stop: &(dyn Fn() -> bool + Sync),
        on_read: OnRead<'_>,
    ) -> Result<Begun, ConvertError> {
        let Self { mut prepared, checkpoint, backing, open } = self;
        let hashed = checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.digests);
        reflink::check_new(source, &prepared, &mirror, copies || hashed)?;
        let optional = checkpoint.as_ref().is_some_and(PreparedCheckpoint::is_optional);
        let begin = |checkpoint| Recorder::begin(checkpoint, &mut prepared, source.device(), target);
        let (recorder, no_checkpoint) = match checkpoint.map(begin).transpose() {
            Err(why) if optional => (None, Some(why)),
            recorder => (recorder?, None),
        };
        let taken_up = recorder.as_ref().and_then(|recorder| Some((recorder, recorder.left()?)));
        let Some((recorder, left)) = taken_up else {
            let new = prepared.write_until(stop)?;
            let image = opened(&new, &open)?;
            drop(backing);
            return Ok(Begun { image, new, recorder, no_checkpoint, mirror, unread: 0 });
        };
        // Zeros that are written must not give back what was preallocated; those that are left may not be
        // there.
        mirror = mirror.unmap(!prepared.is_preallocated()).only(left).target_is_zero(false);
        let new = prepared.take_up()?;
        let (checked, mut unread) = (recorder.checked(), 0);
        if !checked.is_empty() {
            let image = new.read_back(&open)?;
            let layers = mirror.counted_layers();
            let (source, leaves_out) = (source.device(), mirror.ignores_source_errors());
            let check = Check { source, target: image.device(), layers, leaves_out, stop };
            unread = check.run(&checked, on_read).map_err(|fault| fault.of(target, recorder.place()))?;
        }
        new.mend_crash()?;
        let image = opened(&new, &open)?;
        drop(backing);
        let recorder = Some(Arc::clone(recorder));
        Ok(Begun { image, new, recorder, no_checkpoint, mirror, unread })
    }
}

fn opened(new: &NewImage, open: &OpenOptions) -> Result<Image, ConvertError> {
    let lost = new.has_lost_contents();
    Ok(new.open(open).map_err(|error| error.incomplete_if(lost))?)
}
