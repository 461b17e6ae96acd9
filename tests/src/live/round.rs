//! One job on one tap, start to end, and the judgement of both disks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockmirror_mirror::{Error, MirrorJob};

use super::control::{Control, Ended, Seen};
use super::images::{Disk, Images};
use super::plan::{Aim, Plan, Trouble};
use super::world::World;
use blockmirror_block::testing::Rng;
use blockmirror_testing::Outcome;

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Pivot,
    Keep,
    Cancelled,
    Failed,
}

/// What a job leaves behind.
pub(super) struct Left {
    pub(super) end: End,
    pub(super) ended: Ended,
    /// The disk behind the tap.
    pub(super) disk: Disk,
    /// The other one.
    pub(super) other: Disk,
}

/// Mirrors the tap, which stands before `source`, onto `target`. All writers write before, meanwhile, and
/// after; in between they stop for the judge.
pub(super) fn run(
    world: &World,
    images: &Images,
    plan: &Plan,
    source: Disk,
    target: Disk,
    rng: &mut Rng,
) -> Outcome<Left> {
    world.pace.store(plan.pace, Ordering::Relaxed);
    world.recording.store(false, Ordering::SeqCst);
    world.faulty.store(plan.trouble != Trouble::None, Ordering::Relaxed);
    let job = MirrorJob::attach(&world.tap, target.device(), plan.options.clone())?;
    if MirrorJob::attach(&world.tap, target.device(), plan.options.clone()).is_ok() {
        return Err("two jobs on one tap".into());
    }
    let control = Control {
        world,
        job: job.control().clone(),
        plan,
        source: &source,
        target: &target,
        rng: Rng::new(rng.next(), 1),
        seen: Seen::default(),
    };
    let ended = control.run()?;
    let result = job.wait();
    // A little more, so that something has come after the end.
    if !world.gate.is_closed() {
        std::thread::sleep(std::time::Duration::from_millis(rng.below(5)));
    }
    world.gate.open();
    world.quiesce()?;

    let pivoted = Arc::ptr_eq(&world.tap.device(), &target.device());
    let end = match &result {
        Ok(_) if pivoted => End::Pivot,
        Ok(_) => End::Keep,
        Err(Error::Cancelled) => End::Cancelled,
        Err(_) => End::Failed,
    };
    let fits = match (end, ended.asked) {
        (_, None) => true,
        (End::Pivot, asked) => asked == Some(Aim::Pivot),
        (End::Keep, asked) => asked == Some(Aim::Keep),
        (End::Cancelled | End::Failed, _) => !pivoted && plan.trouble != Trouble::None,
    };
    if !fits || (end == End::Failed && plan.trouble == Trouble::None) {
        return Err(format!("ended as {end:?} ({result:?}), asked was {:?}", ended.asked).into());
    }
    if let Ok(outcome) = &result
        && !outcome.given_up.is_empty()
    {
        return Err(format!("a job on a tap gave up {:?}", outcome.given_up).into());
    }

    let (disk, other) = if pivoted { (target, source) } else { (source, target) };
    world.verify(&format!("the disk after {end:?}"), disk.image())?;
    if end == End::Keep {
        // From the file, which must be complete without a word from here.
        images.reopen(&other, |copy| world.verify_cut("the copy, opened again", copy, ended.window))?;
        world.verify_cut("the copy", other.image(), ended.window)?;
    }
    world.tap.device().flush()?;
    images.reopen(&disk, |image| world.verify("the disk, flushed and opened again", image))?;
    world.settle(disk.image())?;
    for model in &world.models {
        model.lock().forget();
    }
    Ok(Left { end, ended, disk, other })
}
