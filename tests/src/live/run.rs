//! The stress: lives of disks, each a chain of jobs, until time is up.

use std::fmt;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_mirror::Tap;

use super::images::{Base, Disk, ImageKind, Images};
use super::layout::Layout;
use super::plan::{Plan, Trouble};
use super::round::{self, End, Left};
use super::world::World;
use super::{WRITERS, writer};
use blockmirror_block::testing::Rng;
use blockmirror_testing::Outcome;
use blockmirror_testing::resident::resident;
use blockmirror_testing::scratch::scratch;

/// The bitmap that incremental jobs start from.
const BITMAP: &str = "since";

/// What to do, and for how long.
#[derive(Clone, Debug)]
pub struct Stress {
    /// What is drawn depends on it.
    pub seed: u64,
    /// No job is begun after so long.
    pub time: Duration,
    /// Length of the disk in bytes, rounded to sectors.
    pub len: u64,
    /// Where the images lie; `None` is the usual scratch folder.
    pub dir: Option<std::path::PathBuf>,
}

/// What happened.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Jobs by their end.
    pub pivots: u64,
    /// Copies kept.
    pub copies: u64,
    /// Jobs given up on request.
    pub cancelled: u64,
    /// Jobs that an error ended.
    pub failed: u64,
    /// Of all, those that had been ready.
    pub ready: u64,
    /// Of all, those that started from a bitmap.
    pub incremental: u64,
    /// Of all, those for which the guest had to rest.
    pub rested: u64,
    /// Of all, those with injected faults.
    pub troubled: u64,
    /// The guest's changes, reads, and bytes written.
    pub changes: u64,
    /// Reads of the guest that were compared.
    pub reads: u64,
    /// Bytes that the guest wrote.
    pub written: u64,
    /// The longest that a request of the guest has taken.
    pub longest: Duration,
    /// Resident memory in bytes when each life was over.
    pub resident: Vec<u64>,
}

impl Report {
    /// Jobs, whatever their end.
    pub fn jobs(&self) -> u64 {
        self.pivots + self.copies + self.cancelled + self.failed
    }

    /// How much more memory was resident in the last quarter than in the second, in the mean, in bytes;
    /// `None` after so few lives that this says nothing.
    pub fn growth(&self) -> Option<u64> {
        let quarter = self.resident.len() / 4;
        if quarter < 4 {
            return None;
        }
        let mean = |part: &[u64]| part.iter().sum::<u64>() / part.len().max(1) as u64;
        let second = self.resident.get(quarter..2 * quarter)?;
        let last = self.resident.get(self.resident.len() - quarter..)?;
        Some(mean(last).saturating_sub(mean(second)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} jobs ({} pivots, {} copies, {} cancelled, {} failed; {} were ready, {} incremental, {} with faults, {} \
             made the guest rest); {} changes, {} reads, {} MiB written; slowest request {} ms; {} MiB resident",
            self.jobs(),
            self.pivots,
            self.copies,
            self.cancelled,
            self.failed,
            self.ready,
            self.incremental,
            self.troubled,
            self.rested,
            self.changes,
            self.reads,
            self.written >> 20,
            self.longest.as_millis(),
            self.resident.last().unwrap_or(&0) >> 20,
        )
    }
}

impl Stress {
    /// Runs until time is up. `tell` hears of each life.
    ///
    /// # Errors
    /// The first thing that is wrong, with the seed and the job.
    pub fn run(&self, mut tell: impl FnMut(&Report)) -> Outcome<Report> {
        let dir = match &self.dir {
            None => scratch()?,
            Some(dir) => tempfile::Builder::new().prefix("blockmirror-").tempdir_in(dir)?,
        };
        let layout = Layout::new(self.len);
        let initial = layout.initial();
        let mut images = Images::new(dir.path(), &initial)?;
        let mut report = Report::default();
        let until = Instant::now() + self.time;
        for life in 0.. {
            if Instant::now() >= until {
                break;
            }
            let mut rng = Rng::new(self.seed, life);
            let life = Life { layout, initial: &initial, until };
            life.live(&mut images, &mut rng, &mut report).map_err(|e| format!("seed {}: {e}", self.seed))?;
            report.resident.push(resident());
            tell(&report);
        }
        Ok(report)
    }
}

struct Life<'a> {
    layout: Layout,
    initial: &'a [u8],
    until: Instant,
}

impl Life<'_> {
    fn live(&self, images: &mut Images, rng: &mut Rng, report: &mut Report) -> Outcome {
        let mut kind = ImageKind::draw(rng);
        if kind.format != super::images::Format::Raw && rng.chance(50) {
            kind.base = Base::Initial;
        }
        let disk = images.make(kind, rng)?;
        if kind.base == Base::Nothing {
            Images::fill(&disk, self.initial)?;
        }
        let world = World::new(Tap::new(disk.device()), self.layout, self.initial.to_vec());
        let seed = rng.next();
        let last = thread::scope(|scope| {
            let world = &world;
            for id in 0..WRITERS {
                scope.spawn(move || writer::write(world, id, seed));
            }
            let done = self.jobs(world, images, disk, rng, report);
            world.gate.end();
            done
        })?;
        world.check_writers()?;
        let counts = &world.counts;
        report.changes += counts.operations.load(Ordering::Relaxed);
        report.reads += counts.reads.load(Ordering::Relaxed);
        report.written += counts.written.load(Ordering::Relaxed);
        report.longest = report.longest.max(Duration::from_micros(counts.longest.load(Ordering::Relaxed)));
        drop(world);
        images.retire("the last disk of a life", last, false)
    }

    /// Job after job; the disk that is left.
    fn jobs(
        &self,
        world: &World,
        images: &mut Images,
        mut disk: Disk,
        rng: &mut Rng,
        report: &mut Report,
    ) -> Outcome<Disk> {
        // A copy that can be brought up to date by the bitmap.
        let mut copy: Option<Disk> = None;
        for number in 0..rng.range(4, 12) {
            if Instant::now() >= self.until {
                break;
            }
            let from_bitmap = copy.is_some() && rng.chance(70);
            let (plan, target) = draw(copy.take_if(|_| from_bitmap), disk.kind, images, rng)?;
            let with = |e: Box<dyn std::error::Error + Send + Sync>| {
                format!("job {number} from {:?}: {}: {e}", disk.kind, plan.text)
            };
            if !from_bitmap && copy.is_none() && rng.chance(30) {
                // Left from a copy that is gone.
                let _ = world.tap.remove_bitmap(BITMAP);
                world.tap.add_bitmap(BITMAP, rng.pick(&[512, 4096, 65536, 1 << 20]))?;
            }
            let text = with(String::new().into());
            let left =
                round::run(world, images, &plan, disk, target, rng).map_err(|e| format!("{text}{e}"))?;
            let Left { end, ended, disk: survivor, other } = left;
            count(report, end, &plan, from_bitmap);
            report.ready += u64::from(ended.was_ready);
            report.rested += u64::from(ended.rested);
            disk = survivor;
            let bitmap = world.tap.bitmap(BITMAP).ok();
            let has_bitmap = bitmap.is_some();
            if let (End::Keep, Some(bitmap)) = (end, bitmap) {
                world.verify_bitmap(&bitmap, &disk, &other).map_err(|e| format!("{text}{e}"))?;
            }
            let good = match end {
                End::Keep => has_bitmap && (from_bitmap || copy.is_none()),
                // What was cut short goes on from what the bitmap says.
                End::Cancelled | End::Failed => from_bitmap && plan.trouble != Trouble::Storage,
                End::Pivot => false,
            };
            if good {
                copy = Some(other);
            } else {
                if from_bitmap {
                    let _ = world.tap.remove_bitmap(BITMAP);
                }
                let broken = plan.trouble == Trouble::Storage && end != End::Pivot;
                images
                    .retire("a disk that is not used any more", other, broken)
                    .map_err(|e| format!("{text}{e}"))?;
            }
            world.gate.open();
        }
        if let Some(copy) = copy {
            images.retire("a copy that is not used any more", copy, false)?;
        }
        world.quiesce()?;
        world.verify("the last disk of a life", disk.image())?;
        Ok(disk)
    }
}

/// The next job and its target: `copy`, to be brought up to date by the bitmap, or a new image.
fn draw(copy: Option<Disk>, source: ImageKind, images: &mut Images, rng: &mut Rng) -> Outcome<(Plan, Disk)> {
    if let Some(copy) = copy {
        return Ok((Plan::incremental(rng, copy.kind, BITMAP), copy));
    }
    let plan = Plan::draw(rng, source);
    let target = images.make(plan.target, rng)?;
    if plan.soiled {
        Images::soil(&target, rng)?;
    }
    Ok((plan, target))
}

fn count(report: &mut Report, end: End, plan: &Plan, from_bitmap: bool) {
    match end {
        End::Pivot => report.pivots += 1,
        End::Keep => report.copies += 1,
        End::Cancelled => report.cancelled += 1,
        End::Failed => report.failed += 1,
    }
    report.incremental += u64::from(from_bitmap);
    report.troubled += u64::from(plan.trouble != Trouble::None);
}
