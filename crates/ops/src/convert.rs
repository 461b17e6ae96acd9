//! Converting an image as a library call: what `blockmirror convert` and `blockmirror mirror` do.
//!
//! [`Convert`] says what to copy and how; [`Convert::run`] does all of it. A caller that reports between the
//! steps takes them one by one:
//!
//! | step | what has happened | what it gives |
//! |---|---|---|
//! | [`Convert::open_source`] | the source and its chain are open for reading | [`ConvertSource`] |
//! | [`Convert::check`] | names, settings and options are valid | [`CheckedConvert`], with a dry run |
//! | [`CheckedConvert::prepare`] | the target is open for writing, and holds what it held | [`PreparedConvert`] |
//! | [`PreparedConvert::start`] | the target is laid out, and the copy runs | [`ConvertJob`] |
//! | [`ConvertJob::finish`] | the copy is flushed, verified if that is wanted, and has its name | [`ConvertOutcome`] |
//!
//! What must hold: whatever can be refused is refused before the target loses anything; a new file gets its
//! name only when its contents are durable; a failure, a cancellation and a drop remove new files, but for
//! what a checkpoint says can be gone on with, and for a copy that was verified and is not equal to the
//! source.

mod bitmaps;
mod check;
mod checkpoint;
mod error;
mod hashed_source;
mod identity;
mod job;
mod new_target;
mod recorder;
mod reflink;
mod resume;
mod resume_check;
mod room;
mod source;
mod space;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{ByteRange, Visit};
use blockmirror_image::{
    AllowedReferences, CreateSettings, Format, ImageName, NodeOptions, OpenOptions, SnapshotRef,
    TargetOptions,
};
use blockmirror_mirror::{MirrorOptions, OnError, Progress, Reflink, SyncMode};

pub use bitmaps::CopyBitmaps;
pub use check::CheckedConvert;
pub use checkpoint::{CheckpointOptions, DEFAULT_CHECKPOINT_INTERVAL, Interrupted, Resumable};
pub use error::{ConvertError, CopyBitmapsProblem, KeptCopy};
pub use job::{ConvertJob, ConvertOutcome, PreparedConvert};
pub use resume_check::ResumeCheck;
pub use source::ConvertSource;
pub use space::Space;
pub use verify::{Mismatch, Verified, Verify};

/// How often [`Convert::run`] reports progress and looks whether it is cancelled.
const TICK: Duration = Duration::from_millis(50);

/// A conversion of one image, or of several that are concatenated, to another image.
///
/// The default copies the whole chain to a new image in the source's format, locks all files, opens backing
/// files below the directory of the image that names them, and replaces an existing file where that loses
/// nothing.
///
/// ```
/// use std::sync::atomic::AtomicBool;
/// use blockmirror_image::Format;
/// use blockmirror_ops::Convert;
///
/// # let dir = tempfile::tempdir()?;
/// # let (source, target) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
/// # std::fs::write(&source, [1; 4096])?;
/// let cancel = AtomicBool::new(false);
/// let outcome = Convert::new(&source, &target)
///     .target_format(Format::Qcow2)
///     .run(&cancel, |progress| eprintln!("{} of {} bytes", progress.offset, progress.len))?;
/// println!("{} bytes copied", outcome.copy.copied);
/// # assert_eq!(outcome.copy.copied, 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Convert {
    sources: Vec<ImageName>,
    source_range: Option<ByteRange>,
    source_access: OpenOptions,
    snapshot: Option<SnapshotRef>,
    target: PathBuf,
    target_node: NodeOptions,
    target_format: Option<Format>,
    target_access: OpenOptions,
    existing: bool,
    settings: CreateSettings,
    target_file: TargetOptions,
    require_flush: bool,
    target_is_zero: bool,
    allowed: AllowedReferences,
    sync: Option<SyncMode>,
    bitmaps: CopyBitmaps,
    compress: bool,
    checkpoint: Option<CheckpointOptions>,
    reflink: Reflink,
    mirror: MirrorOptions,
    verify: Option<Verify>,
    only: Option<DirtyBitmap>,
}

impl Convert {
    /// Converts the image `source` to a new image at `target`. Either may be the URI of an NBD export.
    pub fn new(source: impl Into<ImageName>, target: impl AsRef<Path>) -> Self {
        Self {
            sources: vec![source.into()],
            source_range: None,
            source_access: OpenOptions::new(),
            snapshot: None,
            target: target.as_ref().to_owned(),
            target_node: NodeOptions::default(),
            target_format: None,
            target_access: OpenOptions::new(),
            existing: false,
            settings: CreateSettings::default(),
            target_file: TargetOptions::new(),
            require_flush: false,
            target_is_zero: false,
            allowed: AllowedReferences::new(),
            sync: None,
            bitmaps: CopyBitmaps::None,
            compress: false,
            checkpoint: None,
            reflink: Reflink::Auto,
            mirror: MirrorOptions::new(),
            verify: None,
            only: None,
        }
    }

    /// Appends the disk of a further source to the one that is copied.
    #[must_use]
    pub fn add_source(mut self, source: impl Into<ImageName>) -> Self {
        self.sources.push(source.into());
        self
    }

    /// Copies these bytes of the source alone, as far as it has them; zeros fill the last sector up. By
    /// default all of it is copied.
    #[must_use]
    pub fn source_range(mut self, range: ByteRange) -> Self {
        self.source_range = Some(range);
        self
    }

    /// Locks, cache mode, NBD options and limits of the sources; nothing else of `options` counts.
    #[must_use]
    pub fn source_access(mut self, options: OpenOptions) -> Self {
        self.source_access = options;
        self
    }

    /// Copies an internal snapshot of the source, of which there must be one only, in place of its disk.
    #[must_use]
    pub fn snapshot(mut self, snapshot: impl Into<Option<SnapshotRef>>) -> Self {
        self.snapshot = snapshot.into();
        self
    }

    /// The target's format. By default a new target has the source's, and that of an existing one is
    /// detected.
    #[must_use]
    pub fn target_format(mut self, format: impl Into<Option<Format>>) -> Self {
        self.target_format = format.into();
        self
    }

    /// Locks, cache mode and NBD options of the target; nothing else of `options` counts.
    #[must_use]
    pub fn target_access(mut self, options: OpenOptions) -> Self {
        self.target_access = options;
        self
    }

    /// The options of a new target, as [`CreateSettings::parse`] reads them.
    #[must_use]
    pub fn settings(mut self, settings: CreateSettings) -> Self {
        self.settings = settings;
        self
    }

    /// How a file that has the target's name is replaced or written, and whether a block device in use is.
    #[must_use]
    pub fn target_file(mut self, options: TargetOptions) -> Self {
        self.target_file = options;
        self
    }

    /// Writes into an image that exists and is not shorter than the source, as `qemu-img convert -n` does;
    /// what lies past the source's end stays as it is.
    #[must_use]
    pub fn existing_image(mut self, existing: bool) -> Self {
        self.existing = existing;
        self
    }

    /// With [`existing_image`](Self::existing_image): what the target's name says besides path and format.
    #[must_use]
    pub fn target_node(mut self, node: NodeOptions) -> Self {
        self.target_node = node;
        self
    }

    /// Refuses a target that cannot make data durable: an NBD server without a flush command.
    #[must_use]
    pub fn require_flush(mut self, require: bool) -> Self {
        self.require_flush = require;
        self
    }

    /// Assumes that an existing target reads as zeros.
    #[must_use]
    pub fn target_is_zero(mut self, zero: bool) -> Self {
        self.target_is_zero = zero;
        self
    }

    /// The files that images may name, besides those below their own directories and those named here.
    #[must_use]
    pub fn allow(mut self, allowed: AllowedReferences) -> Self {
        self.allowed = allowed;
        self
    }

    /// What to copy. By default [`SyncMode::Top`] if the target gets a backing file, else
    /// [`SyncMode::Full`].
    #[must_use]
    pub fn sync(mut self, sync: impl Into<Option<SyncMode>>) -> Self {
        self.sync = sync.into();
        self
    }

    /// Which persistent bitmaps of the source the target gets, with their names, granularity and whether they
    /// record. By default none.
    #[must_use]
    pub fn bitmaps(mut self, bitmaps: CopyBitmaps) -> Self {
        self.bitmaps = bitmaps;
        self
    }

    /// Stores the data of the target compressed, a cluster at a time, by the compression type of the image;
    /// what does not become smaller is stored plainly. For qcow2 without a data file and without
    /// preallocation.
    #[must_use]
    pub fn compress(mut self, compress: bool) -> Self {
        self.compress = compress;
        self
    }

    /// Keeps a checkpoint, by which a conversion that is killed or fails is gone on with by the next one. The
    /// temporary file of the target and the checkpoint stay then ([`ConvertError::Interrupted`]). By default
    /// there is none.
    #[must_use]
    pub fn checkpoint(mut self, options: impl Into<Option<CheckpointOptions>>) -> Self {
        self.checkpoint = options.into();
        self
    }

    /// The options of the mirror job that copies. Its sync mode, its reflinks and what it assumes of the
    /// target follow from the rest.
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

    /// Continues where the source cannot be read; the outcome lists those ranges.
    #[must_use]
    pub fn salvage(mut self) -> Self {
        self.mirror = self.mirror.on_source_error(OnError::Ignore);
        self
    }

    /// Reads the target again once it is copied and flushed, and compares it with the source, before a new
    /// image gets its name. By default it does not.
    #[must_use]
    pub fn verify(mut self, verify: impl Into<Option<Verify>>) -> Self {
        self.verify = verify.into();
        self
    }

    /// Copies these ranges of the source and nothing else, to an image that exists
    /// ([`existing_image`](Self::existing_image)), as [`MirrorOptions::only`] does: where a copy differs, for
    /// instance ([`Mismatch::ranges`]). By default all of it is copied.
    #[must_use]
    pub fn only(mut self, ranges: impl Into<Option<DirtyBitmap>>) -> Self {
        self.only = ranges.into();
        self
    }

    /// Converts: all steps, one after the other. `progress` is called some times a second; once `cancel` is
    /// true, the conversion ends with an error ([`ConvertError::is_cancelled`]).
    ///
    /// A job that an error policy pauses waits until it is cancelled; take the steps to resume it.
    ///
    /// # Errors
    /// [`ConvertError`]. New files are gone then, and an existing one that would have been replaced is
    /// unchanged.
    pub fn run(
        &self,
        cancel: &AtomicBool,
        mut progress: impl FnMut(&Progress),
    ) -> Result<ConvertOutcome, ConvertError> {
        let cancelled = || cancel.load(Ordering::Relaxed);
        let job = self.check(self.open_source()?)?.prepare()?.start(&cancelled)?;
        loop {
            let over = job.control().wait_timeout(TICK);
            progress(&job.control().progress());
            if over {
                return job.finish_with(&mut |_| match cancelled() {
                    true => Visit::Break(()),
                    false => Visit::Continue(()),
                });
            }
            if cancelled() {
                job.control().cancel();
            }
        }
    }

    /// What images may name: the files named here, too.
    fn allowed(&self) -> AllowedReferences {
        let mut allowed = self.allowed.clone();
        for source in &self.sources {
            allowed = allowed.file(&source.path);
        }
        allowed.file(&self.target)
    }
}
