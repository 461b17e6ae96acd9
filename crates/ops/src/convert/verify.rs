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

use self::written_target::{Found, WrittenTarget};
pub(super) use full::copied_ranges;
pub use mismatch::{Mismatch, Verify};

use super::hashed_source::HashedSource;

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
    Differs(Unequal),
}

/// Where a target is not the source.
#[derive(Debug)]
pub(super) struct Unequal {
    pub(super) ranges: DirtyBitmap,
    /// Why the rest was not compared.
    pub(super) incomplete: Option<image::Error>,
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
    Readback(Found),
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
    /// whether to go on. Once a difference is known no failure and no stop makes it unknown again.
    pub(super) fn run(
        &self,
        copied: &Copied<'_>,
        observed: Observed,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Verdict, image::Error> {
        let len = copied.source.len();
        let mut unequal = empty_bitmap(len)?;
        let compared = match observed {
            Observed::Readback(Found { unequal: found, bytes, failed }) => {
                unequal = found;
                failed.map_or(Ok((bytes, None)), |failed| Err(failed.into()))
            }
            Observed::Full => {
                let target = self.read_back(copied)?;
                let bytes = full::compare(copied, &**target.device(), self, &mut unequal, progress);
                return self.verdict(unequal, bytes.map(|bytes| (bytes, None)));
            }
            Observed::Hash(source) => {
                let hash = self.compare_hashes(copied, &source, &mut unequal, progress);
                hash.map(|hash| (len, Some(hash)))
            }
        };
        if unequal.is_clean() || compared.is_err() {
            return self.verdict(unequal, compared);
        }
        // In whole blocks or writes it stays known.
        let (ranges, incomplete) = match self.read_back(copied) {
            Ok(target) => refine(copied.source, &**target.device(), unequal, progress),
            Err(error) => (unequal, Some(error)),
        };
        Ok(Verdict::Differs(Unequal { ranges, incomplete }))
    }

    /// `compared`: the bytes that were, and the hash.
    fn verdict(
        &self,
        ranges: DirtyBitmap,
        compared: Result<(u64, Option<DiskHash>), image::Error>,
    ) -> Result<Verdict, image::Error> {
        match (ranges.is_clean(), compared) {
            (true, Ok((bytes, hash))) => Ok(Verdict::Equal(Verified { mode: self.mode, bytes, hash })),
            (true, Err(error)) => Err(error),
            (false, compared) => Ok(Verdict::Differs(Unequal { ranges, incomplete: compared.err() })),
        }
    }

    /// Adds to `unequal` the blocks of the target that are not those of the source when it was copied; the
    /// hash of the target.
    fn compare_hashes(
        &self,
        copied: &Copied<'_>,
        source: &HashedSource,
        unequal: &mut DirtyBitmap,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<DiskHash, image::Error> {
        for range in source.unstable() {
            unequal.set(range.start()..range.end());
        }
        let of_source = source.digests(&mut || progress(0))?.ok_or_else(stopped)?;
        let target = self.read_back(copied)?;
        let target = Window::new(Arc::clone(target.device()), ByteRange::new(0, copied.source.len()));
        let of_target = BlockDigests::of(&target, &HashOptions::new(), progress)?.ok_or_else(stopped)?;
        for range in of_source.differing(&of_target) {
            unequal.set(range.start()..range.end());
        }
        Ok(of_target.hash())
    }

    /// Keeps the target, which is `unequal` to the source, and marks it.
    pub(super) fn keep(
        &self,
        target: PathBuf,
        format: Format,
        new: Option<NewImage>,
        unequal: Unequal,
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
        let incomplete = unequal.incomplete.map(|error| error.to_string());
        Mismatch { target, kept, ranges: unequal.ranges, incomplete, checkpoint: None }
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
    /// Ends the observation while the target is still open for writing, and drops it. `progress` is as for
    /// [`Verification::run`]. Fails only if nothing is known to be unequal.
    pub(super) fn finish(self, progress: &mut dyn FnMut(u64) -> Visit) -> Result<Observed, Error> {
        Ok(match self {
            Self::Full => Observed::Full,
            Self::Hash(source) => Observed::Hash(source),
            Self::Readback(target) => Observed::Readback(target.finish(progress)?),
        })
    }
}

impl Observed {
    /// Whether the target is known not to be the source.
    pub(super) fn is_unequal(&self) -> bool {
        matches!(self, Self::Readback(found) if !found.unequal.is_clean())
    }
}

/// The sectors that differ in the ranges of `coarse`; all of a range in which none differs by now, and of
/// one that cannot be read to its end. Then, or once `progress` breaks, the rest stays as it is, and the
/// error says why.
fn refine(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    coarse: DirtyBitmap,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> (DirtyBitmap, Option<image::Error>) {
    let mut unequal = match empty_bitmap(source.len()) {
        Ok(empty) => empty,
        Err(error) => return (coarse, Some(error.into())),
    };
    let mut failed = None;
    for run in coarse.runs() {
        let mut any = false;
        if failed.is_none() {
            let range = ByteRange::new(run.start, run.end.min(source.len()));
            let all = differences(source, target, range, progress, &mut |found| {
                any = true;
                unequal.set(found.start()..found.end());
            });
            failed = all
                .map_err(image::Error::from)
                .and_then(|all| if all { Ok(()) } else { Err(stopped()) })
                .err();
        }
        if !any || failed.is_some() {
            unequal.set(run);
        }
    }
    (unequal, failed)
}

/// A bitmap of a disk of `len` bytes, as fine as can be afforded.
fn empty_bitmap(len: u64) -> Result<DirtyBitmap, Error> {
    DirtyBitmap::new(len, affordable_granularity(len))
        .map_err(|error| Error::new(ErrorKind::InvalidInput, "verify").because(error.to_string()))
}

fn stopped() -> image::Error {
    Error::new(ErrorKind::Cancelled, "verify").because("interrupted").into()
}

#[cfg(test)]
mod tests {
    use blockmirror_block::WriteFlags;
    use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};

    use super::*;

    /// The block was known to be wrong, and a stop or a bad sector while its sectors were looked for made it
    /// a copy that was not verified.
    #[test]
    fn a_block_that_is_known_to_differ_stays_so_when_its_sectors_cannot_be_found() {
        const MIB: u64 = 1 << 20;
        let (source, target) = (MemoryDisk::new(8 * MIB), Arc::new(MemoryDisk::new(8 * MIB)));
        target.write_at(&[1; 512], MIB, WriteFlags::NONE).unwrap();
        target.write_at(&[1; 512], 5 * MIB, WriteFlags::NONE).unwrap();
        let mut coarse = empty_bitmap(8 * MIB).unwrap();
        coarse.set(MIB..2 * MIB);
        coarse.set(5 * MIB..6 * MIB);
        let faults = Faults::new();
        let faulty = FaultDisk::new(Arc::clone(&target) as _, faults.clone());
        let mut go_on = |_| Visit::Continue(());
        let (found, failed) = refine(&source, &faulty, coarse.clone(), &mut go_on);
        assert!(failed.is_none());
        assert_eq!(found.runs().collect::<Vec<_>>(), [MIB..MIB + 512, 5 * MIB..5 * MIB + 512]);
        let (found, failed) = refine(&source, &faulty, coarse.clone(), &mut |_| Visit::Break(()));
        assert!(failed.unwrap().device_error().unwrap().kind() == ErrorKind::Cancelled);
        assert_eq!(found.runs().collect::<Vec<_>>(), coarse.runs().collect::<Vec<_>>());
        faults.inject(Fault::on(OpKind::Read));
        let (found, failed) = refine(&source, &faulty, coarse.clone(), &mut go_on);
        assert!(failed.is_some());
        assert_eq!(found.runs().collect::<Vec<_>>(), coarse.runs().collect::<Vec<_>>());
    }
}
