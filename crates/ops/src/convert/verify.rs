//! Verification of a copy: whether the target holds what the source does.
//!
//! Called by the steps of the conversion: [`Verification::observe`] puts what a mode needs between the job
//! and its disks, [`Verification::run`] decides once the copy is flushed, before a new image gets its name.
//! Reads of the target go past the host's page cache.
//!
//! What must hold: the source does not change while it is copied (its lock sees to that), so that any
//! difference is a fault of the copy or of what it lies on. Only what the job had to make equal is compared:
//! not what it has given up, and with sync mode top not what the layers below decide.

mod full;
mod hashed_source;
mod mismatch;
mod written_target;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_bitmap::{DirtyBitmap, affordable_granularity};
use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, Visit};
use blockmirror_filter::Window;
use blockmirror_hash::{BlockDigests, DiskHash, HashOptions};
use blockmirror_image::{self as image, Format, Image, Kept, NewImage, OpenOptions, differences};
use blockmirror_mirror as mirror;

use self::hashed_source::HashedSource;
use self::written_target::WrittenTarget;
pub use mismatch::{Mismatch, Verify};

/// What a verification has found to be equal.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Verified {
    /// How.
    pub mode: Verify,
    /// The bytes of the disk that were verified, zeros that were not read among them.
    pub bytes: u64,
    /// With [`Verify::Hash`]: the hash of source and target.
    pub hash: Option<DiskHash>,
}

/// What a verification has found.
#[derive(Debug)]
pub(super) enum Verdict {
    Equal(Verified),
    /// Where the target is not the source.
    Differs(DirtyBitmap),
}

/// A verification that was asked for.
#[derive(Debug)]
pub(super) struct Verification {
    pub(super) mode: Verify,
    /// How many layers of the source were copied; `None` for the whole chain.
    pub(super) layers: Option<u32>,
    /// What was copied, unless it was the whole disk.
    pub(super) only: Option<DirtyBitmap>,
    /// How the target is opened.
    pub(super) open: OpenOptions,
}

/// What a mode has put between the job and its disks.
#[derive(Debug)]
pub(super) enum Observer {
    Hash(Arc<HashedSource>),
    Readback(Arc<WrittenTarget>),
    Full,
}

/// The two disks of a copy.
pub(super) type Disks = (Arc<dyn BlockDevice>, Arc<dyn BlockDevice>);

/// The copy that is verified.
pub(super) struct Copied<'a> {
    pub(super) source: &'a dyn BlockDevice,
    pub(super) path: &'a Path,
    pub(super) format: Format,
    /// Unless the target existed.
    pub(super) new: Option<&'a NewImage>,
    pub(super) outcome: &'a mirror::Outcome,
}

/// What is known before the target is opened anew.
#[derive(Debug)]
pub(super) enum Observed {
    Hash(Arc<HashedSource>),
    /// What was read back, and where it was wrong.
    Readback(written_target::Found),
    Full,
}

impl Verification {
    /// The disks that the job copies between, and what has been put in front of them.
    pub(super) fn observe(&self, (source, target): Disks) -> Result<(Disks, Observer), Error> {
        Ok(match self.mode {
            Verify::Full => ((source, target), Observer::Full),
            Verify::Hash => {
                let hashed = Arc::new(HashedSource::new(source));
                ((Arc::clone(&hashed) as _, target), Observer::Hash(hashed))
            }
            Verify::Readback => {
                let unequal = empty_bitmap(target.len())?;
                let written = Arc::new(WrittenTarget::new(target, unequal));
                ((source, Arc::clone(&written) as _), Observer::Readback(written))
            }
        })
    }

    /// Whether what is put in front of the disks has to see all bytes, so that no blocks are shared.
    pub(super) fn sees_all_bytes(&self) -> bool {
        self.mode != Verify::Full
    }

    /// Decides; what has written the target is closed. `progress` gets the bytes that are done, and says
    /// whether to go on.
    pub(super) fn run(
        &self,
        copied: &Copied<'_>,
        observed: Observed,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Verdict, image::Error> {
        let (coarse, bytes, hash) = match observed {
            Observed::Readback(found) => (found.unequal, found.bytes, None),
            Observed::Full => {
                let target = self.read_back(copied)?;
                let (unequal, bytes) = full::compare(copied, &**target.device(), self, progress)?;
                return Ok(self.verdict(unequal, bytes, None));
            }
            Observed::Hash(source) => self.compare_hashes(copied, &source, progress)?,
        };
        if coarse.is_clean() {
            return Ok(self.verdict(coarse, bytes, hash));
        }
        let target = self.read_back(copied)?;
        let refined = refine(copied.source, &**target.device(), &coarse, progress)?;
        Ok(self.verdict(refined, bytes, None))
    }

    fn verdict(&self, unequal: DirtyBitmap, bytes: u64, hash: Option<DiskHash>) -> Verdict {
        match unequal.is_clean() {
            true => Verdict::Equal(Verified { mode: self.mode, bytes, hash }),
            false => Verdict::Differs(unequal),
        }
    }

    /// The blocks of the target that are not those of the source when it was copied, and the hash.
    fn compare_hashes(
        &self,
        copied: &Copied<'_>,
        source: &HashedSource,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<(DirtyBitmap, u64, Option<DiskHash>), image::Error> {
        let len = copied.source.len();
        let (of_source, unstable) = source.digests(&mut || progress(0))?.ok_or_else(stopped)?;
        let target = self.read_back(copied)?;
        let target = Window::new(Arc::clone(target.device()), ByteRange::new(0, len));
        let of_target = BlockDigests::of(&target, &HashOptions::new(), progress)?.ok_or_else(stopped)?;
        let mut unequal = empty_bitmap(len)?;
        for range in of_source.differing(&of_target).chain(unstable) {
            unequal.set(range.start()..range.end());
        }
        Ok((unequal, len, Some(of_target.hash())))
    }

    /// Keeps the target, which differs from the source in `ranges`, and marks it.
    pub(super) fn keep(
        &self,
        target: PathBuf,
        format: Format,
        new: Option<NewImage>,
        ranges: DirtyBitmap,
    ) -> Mismatch {
        let kept = match new {
            Some(new) => new.keep_marked(&self.open),
            None => {
                let image = self.open.clone().writable(true).format(format).open(&target);
                match image.and_then(Image::set_corrupt) {
                    Ok(true) => Kept::Corrupt,
                    Ok(false) | Err(_) => Kept::Unmarked,
                }
            }
        };
        Mismatch { target, kept, ranges }
    }

    /// Opens the target anew. An existing image is not locked for a moment: what changes it then is a
    /// mismatch.
    fn read_back(&self, copied: &Copied<'_>) -> Result<Image, image::Error> {
        match copied.new {
            Some(new) => new.read_back(&self.open),
            None => {
                let open = self.open.clone().writable(false).claim(false);
                open.format(copied.format).open(copied.path)
            }
        }
    }
}

impl Observer {
    /// Ends the observation while the target is still open for writing, and drops it.
    pub(super) fn finish(self) -> Result<Observed, Error> {
        Ok(match self {
            Self::Full => Observed::Full,
            Self::Hash(source) => Observed::Hash(source),
            Self::Readback(target) => Observed::Readback(target.finish()?),
        })
    }
}

/// The sectors that differ in the ranges of `coarse`; all of a range in which none differs by now.
fn refine(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    coarse: &DirtyBitmap,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> Result<DirtyBitmap, image::Error> {
    let mut unequal = empty_bitmap(source.len())?;
    for run in coarse.runs() {
        let range = ByteRange::new(run.start, run.end.min(source.len()));
        let mut any = false;
        let all = differences(source, target, range, progress, &mut |found| {
            any = true;
            unequal.set(found.start()..found.end());
        })?;
        if !all {
            return Err(stopped());
        }
        if !any {
            unequal.set(run);
        }
    }
    Ok(unequal)
}

/// A bitmap of a disk of `len` bytes, as fine as can be afforded.
fn empty_bitmap(len: u64) -> Result<DirtyBitmap, Error> {
    DirtyBitmap::new(len, affordable_granularity(len))
        .map_err(|error| Error::new(ErrorKind::InvalidInput, "verify").because(error.to_string()))
}

fn stopped() -> image::Error {
    Error::new(ErrorKind::Cancelled, "verify").because("interrupted").into()
}
