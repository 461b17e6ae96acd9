//! Conversions that survive their process: the checkpoint, and the interrupted copy that it leads to.
//!
//! [`CheckpointOptions`] asks for one, [`PlannedCheckpoint::find`] finds what an earlier run has left, and
//! [`super::resume`] goes on with that. The log is kept by [`super::recorder`]; what makes two conversions
//! the same says [`super::identity`].
//!
//! Must hold: a copy is gone on with only by a conversion of the same source, as it was, to the same target
//! with the same options; nothing is removed, and no file is written over, that is not the checkpoint's
//! own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::{self as block, ErrorKind, Storage};
use blockmirror_checkpoint::{self as checkpoint, Checkpoint, Identity};
use blockmirror_file::{FileOptions, FileStorage};
use blockmirror_image::{Leftover, LockMode, Target};

use super::error::ConvertError;
use super::identity::{self, IN_PLACE, PARTIAL, WHERE};
use super::resume_check::ResumeCheck;

/// Bytes of data from one checkpoint to the next when the caller does not say: 384 MiB. Twice as much, with
/// the regions of the operations in flight, is less than 1 GiB for any disk up to 8 TiB.
pub const DEFAULT_CHECKPOINT_INTERVAL: u64 = 384 << 20;

/// Why there is no digest of what is copied, which is no whole disk.
pub(super) const ONLY_THE_TOP: &str = "only the top of the source is copied, from or to what is no file";

/// Where the checkpoint of a conversion is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Beside the temporary file of the target.
    Beside,
    File(PathBuf),
}

/// That a conversion keeps a checkpoint, so that another one goes on where it was killed or failed.
///
/// The target must be written as a whole, and lie in one file, block device or export. A conversion that
/// finds the checkpoint of another with the same source, target and options goes on with that. A block device
/// and an export have a checkpoint in a file that is [named](Self::file) only: it has a digest of each region
/// that is done, by which a conversion sees whether source and target still hold what was copied
/// ([`ResumeCheck`]).
///
/// At most twice the interval is copied again, and a region for each operation in flight: copies wait for a
/// flush.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointOptions {
    pub(super) place: Place,
    pub(super) interval: u64,
    pub(super) restart: bool,
    pub(super) check: ResumeCheck,
}

impl CheckpointOptions {
    /// In a file beside the temporary one, where a later run finds it by the target's name. A conversion that
    /// cannot have a checkpoint goes without.
    pub fn beside() -> Self {
        let (interval, check) = (DEFAULT_CHECKPOINT_INTERVAL, ResumeCheck::Sample);
        Self { place: Place::Beside, interval, restart: false, check }
    }

    /// In the file `path`. A conversion that cannot have a checkpoint is refused.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { place: Place::File(path.into()), ..Self::beside() }
    }

    /// Bytes of data from one checkpoint to the next, each of which costs a flush of the target; no less than
    /// one operation copies. Default: [`DEFAULT_CHECKPOINT_INTERVAL`].
    #[must_use]
    pub fn interval(mut self, bytes: u64) -> Self {
        self.interval = bytes;
        self
    }

    /// Discards what an interrupted run has left, and begins anew. Default: false.
    #[must_use]
    pub fn restart(mut self, restart: bool) -> Self {
        self.restart = restart;
        self
    }

    /// How much of what an interrupted run has copied is read again before the conversion goes on. Default:
    /// [`ResumeCheck::Sample`].
    #[must_use]
    pub fn check(mut self, check: ResumeCheck) -> Self {
        self.check = check;
        self
    }
}

impl CheckpointOptions {
    /// Whether the checkpoint would be kept in the file `path`.
    pub(super) fn is_file(&self, path: &Path) -> bool {
        let same =
            |file: &PathBuf| absolute(file).is_ok_and(|file| absolute(path).is_ok_and(|path| path == file));
        matches!(&self.place, Place::File(file) if same(file))
    }
}

/// An interrupted copy of the target, which can be gone on with unless something has changed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Interrupted {
    /// Its temporary file; the target, if that is written in place.
    pub partial: PathBuf,
    /// Its checkpoint.
    pub checkpoint: PathBuf,
    /// Bytes of the disk that need not be copied again.
    pub done: u64,
    /// Bytes of the disk.
    pub len: u64,
    /// Why it cannot be gone on with.
    pub changed: Option<String>,
    /// The number of its temporary file, unless it is written in place.
    pub(super) number: Option<u32>,
    pub(super) stamp: String,
}

/// Whether what a conversion has copied so far can be gone on with if its process ends now. Asked without
/// waiting for anything, by whatever ends the process.
#[derive(Clone, Debug, Default)]
pub struct Resumable(Arc<AtomicBool>);

impl Resumable {
    /// Whether it can.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, resumable: bool) {
        self.0.store(resumable, Ordering::Relaxed);
    }
}

/// The checkpoint of a conversion whose target is not open yet.
#[derive(Debug)]
pub(super) struct PlannedCheckpoint {
    pub(super) options: CheckpointOptions,
    pub(super) identity: Identity,
    /// How its file is locked.
    pub(super) lock: LockMode,
    /// Whether the source would show that it was written; otherwise digests of what was copied do.
    pub(super) source_shows_writes: bool,
    /// Whether the copy is verified once it is complete.
    pub(super) verifies: bool,
}

impl PlannedCheckpoint {
    /// What an earlier run has left for `target`: of several the one that can be gone on with.
    pub(super) fn find(&self, target: &Path) -> Result<Option<Interrupted>, ConvertError> {
        let leftovers = Target::leftovers_of(target);
        let file = match &self.options.place {
            Place::File(file) => file,
            Place::Beside => {
                let read = |leftover: &Leftover| {
                    let path = leftover.sidecar_path()?;
                    // One that was not begun, or is damaged, is no more than a file that was left behind.
                    Some(self.describe(target, path, &self.open(path).ok()?, &leftovers))
                };
                let mut all: Vec<_> = leftovers.iter().filter_map(read).collect();
                all.sort_by_key(|found| found.changed.is_some());
                return Ok(all.into_iter().next());
            }
        };
        match fs::metadata(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Ok(meta) if meta.is_file() && meta.len() == 0 => Ok(None),
            // Another kind of file, or no leave to look: opening it says so.
            _ => match self.open(file) {
                Ok(log) => Ok(Some(self.describe(target, file, &log, &leftovers))),
                Err(checkpoint::Error::NotBegun { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Opens the log in `path` for reading.
    fn open(&self, path: &Path) -> Result<Checkpoint, checkpoint::Error> {
        Checkpoint::open(Arc::new(self.open_file(path, false)?))
    }

    /// Opens the file `path`, which is there. What it says about the copy is believed: another user must not
    /// have made it.
    pub(super) fn open_file(&self, path: &Path, writable: bool) -> block::Result<FileStorage> {
        // The temporary file is locked, too; a file system may have no locks.
        let file = FileOptions::new().lock(self.lock).writable(writable).open(path)?;
        if file.is_own()? {
            return Ok(file);
        }
        let refused = block::Error::new(ErrorKind::PermissionDenied, "open checkpoint");
        Err(refused.because("it is a file of another user, or has several names").in_file(file.name()))
    }

    /// Why a copy with this `log` is not gone on with by one that verifies nothing: an interrupted
    /// verification would be passed over.
    pub(super) fn lacks_verification(&self, log: &Checkpoint) -> Option<String> {
        let lacks = log.requires_verification() && !self.verifies;
        lacks.then(|| "it was to be verified, and is not to be any more (--verify)".to_owned())
    }

    fn describe(&self, target: &Path, path: &Path, log: &Checkpoint, leftovers: &[Leftover]) -> Interrupted {
        let entry = |key| log.identity().get(key);
        let in_place = entry(IN_PLACE);
        let number = entry(PARTIAL).map(|digits| u32::from_str_radix(digits, 16).unwrap_or_default());
        let partial = leftovers.iter().find(|leftover| Some(leftover.number()) == number);
        let differs = self.identity.first_difference(log.identity(), &WHERE);
        let changed = match (differs, partial) {
            (Some(key), _) => Some(identity::explain(&key)),
            (None, None) if in_place.is_none() => Some("its temporary file is gone, or in use".to_owned()),
            (None, _) => self.lacks_verification(log),
        };
        Interrupted {
            partial: match (in_place, partial) {
                (Some(_), _) => target.to_owned(),
                (None, Some(partial)) => partial.path().to_owned(),
                (None, None) => path.to_owned(),
            },
            checkpoint: path.to_owned(),
            done: log.marked_bytes(),
            len: log.disk_len(),
            changed,
            number: if in_place.is_some() { None } else { number.or(Some(0)) },
            stamp: identity::stamp(log.identity()).to_owned(),
        }
    }
}
