//! The last steps of a conversion: the target is laid out, the job copies, the copy becomes durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::Visit;
use blockmirror_image::{self as image, FileId, Format, Image, NewImage, Note, PreparedImage, Target};
use blockmirror_mirror::{
    self as mirror, CheckpointSink, GranularityChoice, MirrorControl, MirrorJob, MirrorOptions,
};

use super::bitmaps::Selected;
use super::check::{CheckedConvert, TargetKind};
use super::error::KeptCopy;
use super::new_target::NewTarget;
use super::recorder::Recorder;
use super::resume::PreparedCheckpoint;
use super::room::PlannedSpace;
use super::source::in_units;
use super::verify::{Copied, Observer, Verdict, Verification, Verified};
use super::{ConvertError, ConvertSource, Interrupted, Resumable};

/// A conversion whose target is open for writing and holds what it held. Dropping it removes new files.
#[derive(Debug)]
#[must_use = "dropping it removes new files"]
pub struct PreparedConvert {
    pub(super) source: ConvertSource,
    pub(super) target: PathBuf,
    pub(super) kind: Kind,
    pub(super) mirror: MirrorOptions,
    bitmaps: Selected,
    pub(super) compress: bool,
    verify: Option<Verification>,
    pub(super) space: Option<PlannedSpace>,
}

#[derive(Debug)]
pub(super) enum Kind {
    Existing(Box<Image>),
    New(Box<NewTarget>),
}

impl CheckedConvert {
    /// Opens the target for writing. It still holds what it held.
    ///
    /// # Errors
    /// [`ConvertError`]; new files are gone then.
    pub fn prepare(mut self) -> Result<PreparedConvert, ConvertError> {
        let prepared = match &self.kind {
            TargetKind::Existing => {
                let image = self.open_existing(true)?;
                self.check_flush(image.device().geometry().can_flush)?;
                self.bitmaps.check_existing(&self.source, &image)?;
                PreparedConvert::existing(self, image)
            }
            TargetKind::New { backing, .. } => {
                let backing =
                    backing.as_ref().map(|(name, format)| self.open_backing(name, *format)).transpose()?;
                let (prepared, checkpoint) = self.prepare_new()?;
                self.check_flush(prepared.targets().all(Target::can_flush))?;
                PreparedConvert::new(self, prepared, checkpoint, backing)
            }
        };
        Ok(prepared)
    }

    fn check_flush(&self, can_flush: bool) -> Result<(), ConvertError> {
        if can_flush || !self.require_flush {
            return Ok(());
        }
        Err(ConvertError::NoFlush { target: self.target.clone() })
    }
}

impl PreparedConvert {
    fn existing(checked: CheckedConvert, image: Image) -> Self {
        let CheckedConvert { source, target, mirror, bitmaps, compress, verify, space, .. } = checked;
        let kind = Kind::Existing(Box::new(image));
        Self { source, target, kind, mirror, bitmaps, compress, verify, space }
    }

    fn new(
        checked: CheckedConvert,
        prepared: PreparedImage,
        checkpoint: Option<PreparedCheckpoint>,
        backing: Option<Image>,
    ) -> Self {
        let CheckedConvert { source, target, open, mirror, bitmaps, compress, verify, space, .. } = checked;
        let open = open.compress(compress);
        let kind = Kind::New(Box::new(NewTarget { prepared, checkpoint, backing, open }));
        Self { source, target, kind, mirror, bitmaps, compress, verify, space }
    }

    /// The new image, unless the target exists.
    pub fn new_image(&self) -> Option<&PreparedImage> {
        match &self.kind {
            Kind::New(new) => Some(&new.prepared),
            Kind::Existing(_) => None,
        }
    }

    /// The files that will be written.
    pub fn files(&self) -> Vec<FileId> {
        match &self.kind {
            Kind::Existing(image) => image.own_files().collect(),
            Kind::New(new) => new.prepared.targets().filter_map(Target::file).collect(),
        }
    }

    /// Temporary files, for callers that must remove them without running destructors.
    pub fn partial_paths(&self) -> Vec<PathBuf> {
        self.new_image().into_iter().flat_map(|new| new.targets().filter_map(Target::partial_path)).collect()
    }

    /// The interrupted copy that is gone on with.
    pub fn resumes(&self) -> Option<&Interrupted> {
        match &self.kind {
            Kind::New(new) => new.checkpoint.as_ref()?.interrupted.as_ref(),
            Kind::Existing(_) => None,
        }
    }

    /// Whether the copy goes on with disks that do not show whether they were written since: block devices,
    /// exports, what is written in place. A sample of them is read then
    /// ([`ResumeCheck`](super::ResumeCheck)).
    pub fn resumes_unseen(&self) -> bool {
        match &self.kind {
            Kind::New(new) => {
                new.checkpoint.as_ref().is_some_and(|kept| kept.digests && kept.interrupted.is_some())
            }
            Kind::Existing(_) => false,
        }
    }

    /// If the copy keeps a checkpoint: whether it can be gone on with, from now to its end. Its temporary
    /// files must not be removed then when the process ends.
    pub fn resumable(&self) -> Option<Resumable> {
        match &self.kind {
            Kind::New(new) => new.checkpoint.as_ref().map(|checkpoint| checkpoint.resumable.clone()),
            Kind::Existing(_) => None,
        }
    }

    /// What the owner of an existing target should know.
    pub fn notes(&self) -> &[Note] {
        match &self.kind {
            Kind::Existing(image) => image.notes(),
            Kind::New(_) => &[],
        }
    }

    /// The bytes of an existing target past the end of the source, which stay as they are.
    pub fn bytes_past_end(&self) -> u64 {
        match &self.kind {
            Kind::Existing(image) => image.device().len().saturating_sub(self.source.device().len()),
            Kind::New(_) => 0,
        }
    }

    /// Lays out a new target and starts to copy. What is written in place loses its old contents. `stop` is
    /// asked while the target is laid out, at least every 64 MiB.
    ///
    /// # Errors
    /// [`ConvertError`]; new files are gone then.
    pub fn start(self, stop: &(dyn Fn() -> bool + Sync)) -> Result<ConvertJob, ConvertError> {
        self.start_with(stop, &mut |_, _| {})
    }

    /// The same; `on_read` gets how many bytes of how many that an interrupted run had copied have been read
    /// again, before and after each region.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_with(
        self,
        stop: &(dyn Fn() -> bool + Sync),
        on_read: &mut dyn FnMut(u64, u64),
    ) -> Result<ConvertJob, ConvertError> {
        let Self { source, target, kind, mut mirror, bitmaps, compress, verify, .. } = self;
        let (image, new, recorder, no_checkpoint, unread) = match kind {
            Kind::Existing(image) => (*image, None, None, None, 0),
            Kind::New(new) => {
                let copies = compress || verify.as_ref().is_some_and(Verification::sees_all_bytes);
                let begun = new.begin(&source, &target, mirror, copies, stop, on_read)?;
                mirror = begun.mirror;
                (begun.image, Some(begun.new), begun.recorder, begun.no_checkpoint, begun.unread)
            }
        };
        if new.as_ref().is_some_and(NewImage::reads_as_zeros) {
            // Zeros that are written again would give back what was preallocated.
            mirror = mirror.target_is_zero(true);
        }
        let unit = image.device().geometry().cluster_size.filter(|_| compress);
        let from = match &recorder {
            Some(recorder) => recorder.source(source.device()),
            None => Arc::clone(source.device()),
        };
        let disks = (from, Arc::clone(image.device()));
        let (disks, verify) = match verify {
            Some(verify) => {
                let (disks, observer) = verify.observe(disks)?;
                (disks, Some((verify, observer)))
            }
            None => (disks, None),
        };
        let (from, to) = (in_units(&disks.0, unit), in_units(&disks.1, unit));
        let checkpoints = recorder.as_ref().map(|recorder| recorder.checkpoints());
        match MirrorJob::start_with_checkpoints(from, to, mirror, checkpoints) {
            Ok(job) => Ok(ConvertJob {
                job,
                source,
                image,
                recorder,
                no_checkpoint,
                unread,
                new,
                target,
                bitmaps,
                verify,
            }),
            Err(cause) => Err(not_started(target, cause, new.as_ref(), image.format())),
        }
    }
}

/// Why the job for `target`, which has been laid out if it is `new`, was not started.
fn not_started(
    target: PathBuf,
    cause: mirror::Error,
    new: Option<&NewImage>,
    format: Format,
) -> ConvertError {
    match new {
        Some(new) if new.has_lost_contents() => ConvertError::Copy { target, cause, incomplete: true },
        Some(_) => ConvertError::Start(cause),
        None => ConvertError::refused(cause, format),
    }
}

/// A running conversion. Dropping it cancels the copy and removes new files.
#[derive(Debug)]
#[must_use = "dropping it cancels the copy"]
pub struct ConvertJob {
    // In this order: the job ends before its images close, and those before the files go.
    job: MirrorJob,
    verify: Option<(Verification, Observer)>,
    source: ConvertSource,
    image: Image,
    recorder: Option<Arc<Recorder>>,
    no_checkpoint: Option<ConvertError>,
    unread: u64,
    new: Option<NewImage>,
    target: PathBuf,
    bitmaps: Selected,
}

/// A conversion that has succeeded.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConvertOutcome {
    /// The target's format.
    pub format: Format,
    /// The length of the disk.
    pub len: u64,
    /// Whether the copy is durable: its server may have no flush command.
    pub durable: bool,
    /// What the job has done, and which ranges it has left out.
    pub copy: mirror::Outcome,
    /// Bytes of the disk that an interrupted run had copied.
    pub resumed: u64,
    /// What was verified, if that was wanted.
    pub verified: Option<Verified>,
}

impl ConvertJob {
    /// The handle of the mirror job: progress, events, pause and resume, cancel.
    pub fn control(&self) -> &MirrorControl {
        self.job.control()
    }

    /// The granularity of the copy, and why.
    pub fn granularity(&self) -> GranularityChoice {
        self.job.granularity()
    }

    /// Why the copy goes without the checkpoint that it would keep beside its target.
    pub fn no_checkpoint(&self) -> Option<&ConvertError> {
        self.no_checkpoint.as_ref()
    }

    /// Regions that an interrupted run had copied, that were to be read again, and that the source cannot
    /// read any more: the copy keeps them.
    pub fn source_unread(&self) -> u64 {
        self.unread
    }

    /// Waits for the copy, makes it durable, verifies it if that is wanted, and gives a new image its name.
    ///
    /// # Errors
    /// [`ConvertError`]; new files are gone then, unless it is [`ConvertError::Mismatch`].
    pub fn finish(self) -> Result<ConvertOutcome, ConvertError> {
        self.finish_with(&mut |_| Visit::Continue(()))
    }

    /// The length of the disk.
    pub fn disk_len(&self) -> u64 {
        self.source.device().len()
    }

    /// Whether the copy is verified once it is complete.
    pub fn verifies(&self) -> bool {
        self.verify.is_some()
    }

    /// The same; `progress` gets the offset up to which the copy is verified, and says whether to go on.
    ///
    /// # Errors
    /// As for [`finish`](Self::finish).
    pub fn finish_with(self, progress: &mut dyn FnMut(u64) -> Visit) -> Result<ConvertOutcome, ConvertError> {
        let Self { job, source, image, recorder, mut new, target, bitmaps, verify, .. } = self;
        let incomplete = new.as_ref().is_none_or(NewImage::has_lost_contents);
        let (format, len) = (image.format(), source.device().len());
        let control = job.control().clone();
        let ended = job.wait();
        let durable = image.device().geometry().can_flush;
        // What fails from here on costs nothing that was copied.
        let kept = recorder.as_ref().zip(new.as_mut());
        let kept = kept.and_then(|(recorder, new)| keep(&control, &image, recorder, new));
        let copied = match ended {
            Ok(copy) => {
                let (source, bitmaps, target) = (&source, &bitmaps, &*target);
                let ending = Ending { source, bitmaps, target, incomplete, recorder: recorder.as_deref() };
                ending.complete(image, new, verify, &copy, progress).map(|verified| (copy, verified))
            }
            Err(cause) => Err(ConvertError::Copy { target: target.clone(), cause, incomplete }),
        };
        // If only the last step has failed, the file has its name, and nothing is to be gone on with.
        // What is wrong must not be gone on with either.
        let can_go_on = matches!(&copied, Err(error) if !matches!(error, ConvertError::Mismatch(_)));
        let kept = kept.filter(|_| can_go_on);
        let leads = |recorder: &Arc<Recorder>| recorder.copy().is_some() && recorder.done() > 0;
        let kept = kept.filter(|_| recorder.as_ref().is_some_and(leads));
        if let Some(recorder) = recorder.as_ref().filter(|_| kept.is_none()) {
            recorder.settle(false);
        }
        let (copy, verified) = copied.map_err(|cause| match kept {
            Some((partial, checkpoint, done)) => {
                let cause = Box::new(cause);
                ConvertError::Interrupted(Box::new(KeptCopy {
                    target,
                    cause,
                    partial,
                    checkpoint,
                    done,
                    len,
                }))
            }
            None => cause,
        })?;
        let resumed = recorder.as_ref().map_or(0, |recorder| recorder.resumed());
        Ok(ConvertOutcome { format, len, durable, copy, resumed, verified })
    }
}

/// What the last steps of a conversion that has copied all need.
struct Ending<'a> {
    source: &'a ConvertSource,
    bitmaps: &'a Selected,
    target: &'a Path,
    /// Whether a failure leaves a part of the copy.
    incomplete: bool,
    recorder: Option<&'a Recorder>,
}

impl Ending<'_> {
    /// Makes the copy durable, verifies it if that is wanted, and gives a new image its name.
    fn complete(
        &self,
        image: Image,
        new: Option<NewImage>,
        verify: Option<(Verification, Observer)>,
        copy: &mirror::Outcome,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<Verified>, ConvertError> {
        let format = image.format();
        self.bitmaps.copy(self.source, &image).map_err(|error| error.incomplete_if(self.incomplete))?;
        let verify = match verify {
            Some((verify, observer)) => {
                let observed = observer.finish(progress).map_err(|error| self.not_verified(error.into()))?;
                Some((verify, observed))
            }
            None => None,
        };
        let closed = image.close().map_err(|error| error.incomplete_if(self.incomplete));
        // What is known to be wrong is marked so, whatever else fails.
        if !verify.as_ref().is_some_and(|(_, observed)| observed.is_unequal()) {
            closed?;
        }
        let mut verified = None;
        if let Some((verify, observed)) = verify {
            let source = &**self.source.device();
            let copied = Copied { source, path: self.target, format, new: new.as_ref(), outcome: copy };
            match verify.run(&copied, observed, progress) {
                Ok(Verdict::Equal(equal)) => verified = Some(equal),
                Ok(Verdict::Differs(unequal)) => {
                    // Before the copy is kept for good: what is wrong must not be gone on with.
                    let checkpoint = self.recorder.and_then(Recorder::invalidate);
                    let mut mismatch = verify.keep(self.target.to_owned(), format, new, unequal);
                    mismatch.checkpoint = checkpoint;
                    return Err(ConvertError::Mismatch(Box::new(mismatch)));
                }
                Err(cause) => return Err(self.not_verified(cause)),
            }
        }
        // Before the copy may be used: a later run must not go on with it.
        self.recorder.map_or(Ok(()), Recorder::retire)?;
        if let Some(new) = new {
            new.persist()?;
        }
        Ok(verified)
    }

    fn not_verified(&self, cause: image::Error) -> ConvertError {
        let target = self.target.to_owned();
        ConvertError::NotVerified { target, cause: Box::new(cause), kept: self.incomplete }
    }
}

/// Has what a job that has ended has copied to `image` stay if the copy does not get its name: where it is,
/// the checkpoint, and how much that is. `None` if it is nothing.
fn keep(
    control: &MirrorControl,
    image: &Image,
    recorder: &Recorder,
    new: &mut NewImage,
) -> Option<(PathBuf, PathBuf, u64)> {
    // Nothing is in flight: a flush covers all that was written.
    let left = control.not_copied();
    if image.device().flush().is_ok() {
        // Without it the record before counts.
        let _ = recorder.record(&left);
    }
    let done = recorder.done();
    recorder.settle(done > 0);
    new.keep(done > 0);
    let copy = recorder.copy().filter(|_| done > 0)?;
    Some((copy.to_owned(), recorder.path().to_owned(), done))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use blockmirror_image::{CreateSettings, CreateSpec, Replacement, TargetOptions};

    use super::*;

    /// The error said that the source was only read, after the old image had gone.
    #[test]
    fn a_job_that_does_not_start_says_what_is_left_of_the_target() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let cause = || mirror::Error::NeedsTap;
        for (replacement, lost) in [(Replacement::Atomic, false), (Replacement::InPlace, true)] {
            fs::write(&path, b"old").unwrap();
            let target = TargetOptions::new().replacement(replacement);
            let spec = CreateSpec::new(Format::Qcow2, 1 << 20, CreateSettings::default()).target(target);
            let new = NewImage::create(&path, &spec).unwrap();
            match not_started(path.clone(), cause(), Some(&new), Format::Qcow2) {
                ConvertError::Copy { incomplete: true, .. } => assert!(lost),
                ConvertError::Start(_) => assert!(!lost),
                other => panic!("{other}"),
            }
        }
        assert!(matches!(not_started(path, cause(), None, Format::Raw), ConvertError::Start(_)));
    }
}
