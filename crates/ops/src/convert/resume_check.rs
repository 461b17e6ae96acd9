//! What of an interrupted copy is read again before another run goes on with it: that source and target still
//! hold what was copied.
//!
//! Called by [`super::PreparedConvert::start`] once the target is open and before it is written. A checkpoint
//! with digests has them compared with source and target; one of files, which show by themselves whether they
//! were written, is checked if that is asked for: source and target are compared with each other.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, ExtentKind, Visit};
use blockmirror_checkpoint::{Checkpoint, Digest};
use blockmirror_hash::{BLOCK, BlockDigest, RunDigest, ZERO_DIGEST, block_digest};
use blockmirror_image::{self as image, differences};

use super::error::ConvertError;
use super::verify::copied_ranges;

/// How much of what an interrupted run has copied is read again before a conversion goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResumeCheck {
    /// Of devices and exports, which do not show whether they were written, one region in a hundred and at
    /// least eight, of those with data and of those of zeros, from all of the disk; all of it if nothing is
    /// left to copy. Of files nothing.
    #[default]
    Sample,
    /// All of it.
    All,
}

/// The least of regions that are read of a copy with digests.
const LEAST: u64 = 8;
/// One region in so many is read.
const PART: u64 = 100;

/// A region that an interrupted run has copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finished {
    pub(super) number: u64,
    pub(super) range: ByteRange,
    pub(super) digest: Option<Digest>,
}

/// What is wrong with a region.
#[derive(Debug)]
pub(super) enum Fault {
    /// It does not hold what was copied: which of the two disks.
    Changed(Finished, &'static str),
    /// It cannot be read of the source any more.
    SourceUnread(Error),
    /// It cannot be read, or the check was stopped.
    Failed(image::Error),
}

impl Fault {
    /// As the error of a conversion to `target`, whose copy is `copy`.
    pub(super) fn of(self, target: &Path, copy: &Path) -> ConvertError {
        match self {
            Self::Changed(region, disk) => ConvertError::Changed {
                target: target.to_owned(),
                partial: copy.to_owned(),
                what: format!(
                    "region {} of the {disk} (bytes {} to {}) is not what was copied",
                    region.number,
                    region.range.start(),
                    region.range.end()
                ),
            },
            Self::SourceUnread(cause) => ConvertError::SourceUnread { target: target.to_owned(), cause },
            Self::Failed(error) => error.into(),
        }
    }
}

impl<E: Into<image::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// The two disks of a copy that is to go on.
pub(super) struct Check<'a> {
    pub(super) source: &'a Arc<dyn BlockDevice>,
    pub(super) target: &'a Arc<dyn BlockDevice>,
    /// How many layers of the source are copied; `None` for all of them.
    pub(super) layers: Option<u32>,
    /// Whether the copy leaves out what cannot be read of the source.
    pub(super) leaves_out: bool,
    /// Asked at least once for each MiB.
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// Gets how many bytes of how many have been read again.
pub(super) type OnRead<'a> = &'a mut dyn FnMut(u64, u64);

impl Check<'_> {
    /// Reads the regions in `finished`: how many of them the source cannot read any more.
    pub(super) fn run(&self, finished: &[Finished], on_read: OnRead<'_>) -> Result<u64, Fault> {
        let all = finished.iter().map(|region| region.range.len()).sum();
        let (mut unread, mut done) = (0, 0);
        for &region in finished {
            on_read(done, all);
            done += region.range.len();
            let read = match region.digest {
                Some(digest) => self.compare_with(region, digest)?,
                None => self.compare(region)?,
            };
            unread += u64::from(!read);
        }
        on_read(done, all);
        Ok(unread)
    }

    /// Both with `digest`; whether the source could be read. Without it the target's alone counts.
    fn compare_with(&self, region: Finished, digest: Digest) -> Result<bool, Fault> {
        let read = match self.digest(&**self.source, region.range) {
            Ok(found) if short(found) != digest => return Err(Fault::Changed(region, "source")),
            Ok(_) => true,
            Err(cause) => self.unread(cause)?,
        };
        match short(self.digest(&**self.target, region.range)?) == digest {
            true => Ok(read),
            false => Err(Fault::Changed(region, "target")),
        }
    }

    /// The source failed with `cause`: whether it was read, if that is no reason to fail.
    fn unread(&self, cause: Error) -> Result<bool, Fault> {
        match cause.kind() {
            ErrorKind::Cancelled => Err(cause.into()),
            _ if self.leaves_out => Ok(false),
            _ => Err(Fault::SourceUnread(cause)),
        }
    }

    /// Source and target with each other, as far as they had to be made equal; whether the source could be
    /// read.
    fn compare(&self, region: Finished) -> Result<bool, Fault> {
        let mut at = region.range.start();
        while at < region.range.end() {
            let rest = ByteRange::new(at, region.range.end());
            let (ranges, end) = copied_ranges(&**self.source, rest, self.layers)?;
            let mut equal = true;
            for range in ranges {
                let go_on = &mut |_| if (self.stop)() { Visit::Break(()) } else { Visit::Continue(()) };
                match differences(&**self.source, &**self.target, range, go_on, &mut |_| equal = false) {
                    Ok(true) => {}
                    Ok(false) => return Err(stopped().into()),
                    Err(_) if !equal => break,
                    // It does not say which of the two has failed.
                    Err(error) => {
                        return match self.digest(&**self.source, region.range) {
                            Ok(_) => Err(error.into()),
                            Err(cause) => self.unread(cause),
                        };
                    }
                }
            }
            if !equal {
                return Err(Fault::Changed(region, "target"));
            }
            at = end;
        }
        Ok(true)
    }

    fn digest(&self, disk: &dyn BlockDevice, region: ByteRange) -> Result<BlockDigest, Error> {
        let mut digest = RunDigest::new();
        let mut bytes = Vec::new();
        for block in region.pieces(BLOCK) {
            if (self.stop)() {
                return Err(stopped());
            }
            digest.block(if is_zero(disk, block)? {
                ZERO_DIGEST
            } else {
                bytes.resize(block.len() as usize, 0);
                disk.read_at(&mut bytes, block.start())?;
                block_digest(&bytes)
            });
        }
        Ok(digest.finish())
    }
}

/// What a checkpoint keeps of the digest of a region.
pub(super) fn short(digest: BlockDigest) -> Digest {
    let (short, _) = digest.as_chunks();
    short[0]
}

/// Whether `disk` says that `range` is zero, as far as its first extents tell.
fn is_zero(disk: &dyn BlockDevice, range: ByteRange) -> Result<bool, Error> {
    let mut zero = range.start();
    disk.extents(range, &mut |extent| {
        if extent.kind == ExtentKind::Data {
            return Visit::Break(());
        }
        zero = extent.range.end();
        Visit::Continue(())
    })?;
    Ok(zero >= range.end())
}

fn stopped() -> Error {
    Error::new(ErrorKind::Cancelled, "resume").because("interrupted")
}

/// Which regions of a checkpoint with digests are read again: a sample of those with data, and one of those
/// of zeros, which say nothing of a target that holds nothing. The same as long as the checkpoint has the
/// same marks: what was refused once is refused again. Its id is random, and so is the choice.
pub(super) fn sample(log: &Checkpoint) -> Vec<u64> {
    let marked = (0..log.regions().len()).filter(|region| log.regions().get(*region));
    let (zero, data): (Vec<u64>, Vec<u64>) =
        marked.partition(|region| log.digest(*region) == Some(short(ZERO_DIGEST)));
    let mut random = |nth: u64, below: u64| {
        let mut hasher = DefaultHasher::new();
        (log.id(), log.marked_bytes(), nth).hash(&mut hasher);
        hasher.finish() % below
    };
    let mut chosen = spread(&data, &mut random);
    chosen.extend(spread(&zero, &mut random));
    chosen
}

/// One of each run of about a hundred of `regions`, and at least eight; `random` is asked for a number below
/// its second argument.
fn spread(regions: &[u64], random: &mut dyn FnMut(u64, u64) -> u64) -> Vec<u64> {
    let count = regions.len() as u64;
    let picks = count.div_ceil(PART).max(LEAST).min(count);
    // At most 2^20 regions, so that the product does not overflow.
    let first = |pick: u64| pick * count / picks;
    let mut pick = |pick: u64| first(pick) + random(pick, first(pick + 1) - first(pick));
    (0..picks).map(|nth| regions[pick(nth) as usize]).collect()
}

#[cfg(test)]
mod tests {
    use blockmirror_block::WriteFlags;
    use blockmirror_block::testing::{
        Fault as DiskFault, FaultDisk, Faults, MemoryDisk, MemoryStorage, OpKind,
    };
    use blockmirror_checkpoint::Identity;

    use super::*;

    #[test]
    fn one_region_in_a_hundred_is_read_and_at_least_eight_from_all_over() {
        for (marked, want) in [(0, 0), (3, 3), (8, 8), (500, 8), (801, 9), (100_000, 1000)] {
            let regions: Vec<u64> = (0..marked).map(|region| 2 * region + 1).collect();
            for extreme in [0, u64::MAX] {
                let found = spread(&regions, &mut |_, below| extreme.min(below - 1));
                assert_eq!(found.len() as u64, want, "{marked}");
                for (region, pick) in found.iter().zip(0..) {
                    let part = (pick * marked / want)..((pick + 1) * marked / want);
                    assert!(part.contains(&(region / 2)) && region % 2 == 1, "{region}, {pick}");
                }
            }
        }
    }

    fn log(regions: u64, data: &[u64]) -> Checkpoint {
        let storage = Arc::new(MemoryStorage::new());
        let made = Checkpoint::create_with_digests(storage, regions * BLOCK, BLOCK, Identity::new());
        let (mut log, all) = (made.unwrap(), 0..regions);
        let mut digest = |region| if data.contains(&region) { [7; 16] } else { [0; 16] };
        log.mark_with(std::slice::from_ref(&all), &mut digest).unwrap();
        log
    }

    /// The few regions that hold something were missed among those of zeros, which any blank target has; and
    /// what was refused passed with the next sample.
    #[test]
    fn a_sample_has_data_and_stays_the_same_for_the_same_marks() {
        let log = log(1000, &[1, 2, 500]);
        let found = sample(&log);
        assert!([1, 2, 500].iter().all(|region| found.contains(region)), "{found:?}");
        assert_eq!(found.len(), 3 + 10);
        assert!((0..50).all(|_| sample(&log) == found));
    }

    fn finished(disk: &dyn BlockDevice, number: u64, digest: bool) -> Finished {
        let range = ByteRange::at(number * 2 * BLOCK, 2 * BLOCK);
        let mut of = RunDigest::new();
        for block in range.pieces(BLOCK) {
            let mut bytes = vec![0; BLOCK as usize];
            disk.read_at(&mut bytes, block.start()).unwrap();
            of.block(block_digest(&bytes));
        }
        Finished { number, range, digest: digest.then(|| short(of.finish())) }
    }

    /// Whatever has changed of the one or the other is seen, at both ends of a region.
    #[test]
    fn a_region_that_has_changed_is_named() {
        let disks = || {
            let disk = MemoryDisk::new(6 * BLOCK);
            disk.write_at(&vec![5; 3 * BLOCK as usize], BLOCK, WriteFlags::NONE).unwrap();
            Arc::new(disk)
        };
        for (changed, digests, want) in
            [(0, true, "source"), (1, true, "target"), (0, false, "target"), (1, false, "target")]
        {
            for at in [2 * BLOCK, 4 * BLOCK - 1] {
                let both = [disks(), disks()];
                let regions = [0, 1, 2].map(|number| finished(&*both[0], number, digests));
                both[changed].write_at(&[9], at, WriteFlags::NONE).unwrap();
                let [source, target] = both.map(|disk| disk as Arc<dyn BlockDevice>);
                let (source, target) = (&source, &target);
                let check = Check { source, target, layers: None, leaves_out: false, stop: &|| false };
                let mut read = Vec::new();
                match check.run(&regions, &mut |done, all| read.push((done, all))) {
                    Err(Fault::Changed(region, disk)) => assert_eq!((region.number, disk), (1, want)),
                    other => panic!("{other:?}"),
                }
                assert_eq!(read, [(0, 6 * BLOCK), (2 * BLOCK, 6 * BLOCK)]);
                check.run(&[regions[0], regions[2]], &mut |_, _| {}).unwrap();
                let stopped = Check { stop: &|| true, ..check };
                assert!(matches!(stopped.run(&regions, &mut |_, _| {}), Err(Fault::Failed(_))));
            }
        }
    }

    #[test]
    fn a_region_that_cannot_be_read_is_no_region_that_has_changed() {
        let disk = Arc::new(MemoryDisk::new(2 * BLOCK));
        disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
        let faults = Faults::new();
        let faulty: Arc<dyn BlockDevice> = Arc::new(FaultDisk::new(Arc::clone(&disk) as _, faults.clone()));
        let disk: Arc<dyn BlockDevice> = disk;
        for region in [true, false].map(|digest| finished(&*disk, 0, digest)) {
            let check = |source, target, leaves_out| {
                Check { source, target, layers: None, leaves_out, stop: &|| false }
                    .run(&[region], &mut |_, _| {})
            };
            faults.inject(DiskFault::on(OpKind::Read).forever());
            assert!(matches!(check(&faulty, &disk, false), Err(Fault::SourceUnread(_))));
            assert!(matches!(check(&faulty, &disk, true), Ok(1)));
            assert!(matches!(check(&disk, &faulty, true), Err(Fault::Failed(_))));
            faults.heal();
            assert!(matches!(check(&faulty, &disk, true), Ok(0)));
        }
    }
}
