//! Committing an image by its path: what `blockmirror commit` does.
//!
//! | step | what has happened | what it gives |
//! |---|---|---|
//! | [`Commit::open`] | the chain is open, image and base for writing; nothing has changed | [`OpenCommit`] |
//! | [`OpenCommit::start`] | the base is as long as the image, and a mirror job copies | [`RunningCommit`] |
//! | [`RunningCommit::finish`] | the base has everything durably, then the image is emptied | [`CommitOutcome`] |
//!
//! What must hold: at each instant, also after a crash, the image reads as before. Until the end it holds all
//! that it held; what the base gets is what the image shows, in places that the image and the layers between
//! decide; and the image is emptied only when a flush of the base has succeeded.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmirror_image::{
    AllowedReferences, CommitBase, CommitLayer, FileId, Image, ImageName, Note, OpenOptions,
};
use blockmirror_mirror::{self as mirror, MirrorControl, MirrorJob, MirrorOptions, Progress, SyncMode};

use crate::error::Error;

/// How often [`Commit::run`] reports progress and looks whether it is cancelled.
const TICK: Duration = Duration::from_millis(50);

/// A commit of an image that is not in use into a layer of its backing chain.
///
/// The default commits to the image's own backing file, and empties the image then.
///
/// ```
/// use std::sync::atomic::AtomicBool;
/// use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage};
/// use blockmirror_ops::Commit;
///
/// # let dir = tempfile::tempdir()?;
/// # let (base, overlay) = (dir.path().join("base.raw"), dir.path().join("overlay.qcow2"));
/// std::fs::write(&base, [1; 4096])?;
/// let mut settings = CreateSettings::default();
/// settings.parse(Format::Qcow2, "backing_file=base.raw,backing_fmt=raw")?;
/// NewImage::create(&overlay, &CreateSpec::new(Format::Qcow2, 4096, settings))?.persist()?;
///
/// let outcome = Commit::new(&overlay).run(&AtomicBool::new(false), |_| {})?;
/// assert!(outcome.emptied);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Commit {
    image: ImageName,
    base: CommitBase,
    keep: bool,
    access: OpenOptions,
    allowed: AllowedReferences,
    mirror: MirrorOptions,
}

impl Commit {
    /// Commits the image `image` to its backing file.
    pub fn new(image: impl Into<ImageName>) -> Self {
        Self {
            image: image.into(),
            base: CommitBase::Backing,
            keep: false,
            access: OpenOptions::new(),
            allowed: AllowedReferences::new(),
            mirror: MirrorOptions::new(),
        }
    }

    /// Commits to the layer of the chain with this name ([`CommitBase::Named`]). The image and the layers
    /// between are kept; as those between show a mixture from then on, they make no sense any more by
    /// themselves.
    #[must_use]
    pub fn base(mut self, name: impl Into<PathBuf>) -> Self {
        self.base = CommitBase::Named(name.into());
        self
    }

    /// Leaves in the image what was committed.
    #[must_use]
    pub fn keep(mut self, keep: bool) -> Self {
        self.keep = keep;
        self
    }

    /// Locks, cache mode and claims of the files; nothing else of `options` counts.
    #[must_use]
    pub fn access(mut self, options: OpenOptions) -> Self {
        self.access = options;
        self
    }

    /// The files that images may name, besides those below their own directory and those named here.
    #[must_use]
    pub fn allow(mut self, allowed: AllowedReferences) -> Self {
        self.allowed = allowed;
        self
    }

    /// The options of the mirror job that copies. What it copies follows from the rest.
    #[must_use]
    pub fn mirror(mut self, options: MirrorOptions) -> Self {
        self.mirror = options;
        self
    }

    /// The maximum of bytes per second; 0 for no limit.
    #[must_use]
    pub fn speed(mut self, bytes_per_second: u64) -> Self {
        self.mirror = self.mirror.speed(bytes_per_second);
        self
    }

    /// Opens the chain: the base for writing, and the image too if it is to be emptied.
    ///
    /// # Errors
    /// [`Error::Image`], [`Error::NoBacking`], [`Error::NotInChain`], [`Error::ReadOnly`]; nothing has
    /// changed.
    pub fn open(&self) -> Result<OpenCommit, Error> {
        let path = &self.image.path;
        let (allowed, named) = match &self.base {
            CommitBase::Named(base) => (self.allowed.clone().file(base), Some(base)),
            _ => (self.allowed.clone(), None),
        };
        let empties = !self.keep && named.is_none();
        let options = self.access.clone().format(self.image.format).node(self.image.node.clone());
        let options = options.writable(empties);
        let options = options.commit_base(self.base.clone()).policy(allowed.policy_for(path)?);
        let image = options.open(path)?;
        let Some(base) = image.commit_base() else {
            let path = path.clone();
            return Err(match named.filter(|_| image.backing().is_some()) {
                Some(base) => Error::NotInChain { path, base: base.clone() },
                None => Error::NoBacking { path },
            });
        };
        if !base.device.geometry().writable {
            return Err(Error::ReadOnly { name: base.device.name().to_owned() });
        }
        let base = base.clone();
        Ok(OpenCommit { image, base, empties, mirror: self.mirror.clone() })
    }

    /// Commits: all steps, one after the other. `progress` is called some times a second; once `cancel` is
    /// true, the commit ends with an error.
    ///
    /// # Errors
    /// [`Error`]. The image reads as before.
    pub fn run(
        &self,
        cancel: &AtomicBool,
        mut progress: impl FnMut(&Progress),
    ) -> Result<CommitOutcome, Error> {
        let job = self.open()?.start()?;
        loop {
            let over = job.control().wait_timeout(TICK);
            progress(&job.control().progress());
            if over {
                return job.finish();
            }
            if cancel.load(Ordering::Relaxed) {
                job.control().cancel();
            }
        }
    }
}

/// A commit whose files are open. Nothing has changed.
#[derive(Debug)]
pub struct OpenCommit {
    image: Image,
    base: CommitLayer,
    empties: bool,
    mirror: MirrorOptions,
}

impl OpenCommit {
    /// The path of the base.
    pub fn base(&self) -> &Path {
        &self.base.backing.path
    }

    /// How many layers lie between the image and the base.
    pub fn layers_between(&self) -> u32 {
        self.base.depth - 1
    }

    /// The files that will be written.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        let own = self.image.own_files().filter(|_| self.empties);
        own.chain(self.base.files.iter().copied())
    }

    /// What the owner of the images should know.
    pub fn notes(&self) -> &[Note] {
        self.image.notes()
    }

    /// Makes a base that is shorter than the image as long as it, and starts to copy. A base that is longer
    /// keeps what it has past the end of the image.
    ///
    /// # Errors
    /// [`Error::Write`] if the base cannot grow; [`Error::Mirror`].
    pub fn start(self) -> Result<RunningCommit, Error> {
        let Self { image, base, empties, mirror } = self;
        let len = image.device().len();
        if base.device.len() < len {
            base.device.resize(len, false).map_err(Error::Write)?;
        }
        let mirror = mirror.sync(SyncMode::Top).top_layers(base.depth);
        let mirror = mirror.target_is_below(true).longer_target(true);
        let job = MirrorJob::start(Arc::clone(image.device()), Arc::clone(&base.device), mirror)?;
        Ok(RunningCommit { job, image, base, empties })
    }
}

/// A commit that copies. Dropping it cancels it; the image reads as before.
#[derive(Debug)]
#[must_use = "dropping it cancels the commit"]
pub struct RunningCommit {
    // The job ends before its images close.
    job: MirrorJob,
    image: Image,
    base: CommitLayer,
    empties: bool,
}

/// A commit that has succeeded.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CommitOutcome {
    /// The length of the image's disk.
    pub len: u64,
    /// The path of the base.
    pub base: PathBuf,
    /// Whether the image holds nothing any more.
    pub emptied: bool,
    /// What the mirror job has done.
    pub copy: mirror::Outcome,
}

impl RunningCommit {
    /// The handle of the mirror job: progress, events, cancel.
    pub fn control(&self) -> &MirrorControl {
        self.job.control()
    }

    /// Waits until the base has everything durably, and empties the image.
    ///
    /// # Errors
    /// [`Error::Mirror`] with the base written in part; [`Error::Incomplete`] if ranges were left out, as the
    /// job's error policy wants; [`Error::Image`] if the base, or its persistent bitmaps, are not durable;
    /// [`Error::Empty`] where only the last step failed. The image reads as before.
    pub fn finish(self) -> Result<CommitOutcome, Error> {
        let Self { job, image, base, empties } = self;
        let copy = job.wait()?;
        if let Some(range) = copy.given_up.first() {
            return Err(Error::Incomplete { failed: range.message.clone() });
        }
        // The job has ended with a flush; emptying must not depend on that.
        base.close()?;
        if let Some(qcow2) = image.qcow2().filter(|_| empties) {
            qcow2.empty().map_err(Error::Empty)?;
        }
        let (len, base) = (image.device().len(), base.backing.path);
        image.close()?;
        Ok(CommitOutcome { len, base, emptied: empties, copy })
    }
}
