//! Whether a new target will find the space that it takes: asked before anything is written.
//!
//! What is needed is what `measure` counts: the tables of the image, and the data of the source that is to be
//! copied. It is an estimate from above: the copy leaves out zeros inside of data. Samples of the data say
//! whether there are some; then it is a guess. What must hold: nothing is made, and nothing fails here; what
//! cannot be found out is not said.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use blockmirror_block::zero::is_zero;
use blockmirror_block::{BlockDevice, ByteRange, ExtentKind, Visit};
use blockmirror_image::{Decision, FreeSpace, Image, InPlace, Target};
use blockmirror_mirror::{Plan, PlanTarget, plan_until};

use super::check::{CheckedConvert, TargetKind};
use super::job::{Kind, PreparedConvert};
use super::source::in_units;

/// What a target takes, and what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Space {
    /// Bytes that the new target takes at most.
    pub needed: u64,
    /// Bytes that there are for it.
    pub free: u64,
    /// Why more may fit, or less, if that is so.
    pub guess: Option<&'static str>,
}

impl Space {
    /// Whether the target fits, by these figures.
    pub fn fits(&self) -> bool {
        self.needed <= self.free
    }
}

impl PreparedConvert {
    /// What a new target takes and what there is for it; `None` if it fits whatever the source holds, if
    /// blocks may be shared in place of being copied, or if it is not known. The source's extents are looked
    /// at only where all of the disk would not fit; `stop` is asked between bounded queries.
    pub fn space(&self, stop: &dyn Fn() -> bool) -> Option<Space> {
        let planned = self.space.as_ref()?;
        let Kind::New(new) = &self.kind else { return None };
        let target = new.prepared.targets().next()?;
        let unit = new.prepared.cluster_size();
        let free = FreeSpace::of(&self.target).ok()??;
        let there = match (target.in_place(), target.partial_path()) {
            // Its length is looked at when it is laid out.
            (Some(InPlace::BlockDevice), _) if unit.is_none() => return None,
            // Its space is given back at the start.
            (Some(_), _) => free.occupied,
            // An interrupted run has written a part.
            (None, partial) => partial
                .and_then(|partial| fs::metadata(partial).ok())
                .map_or(0, |partial| partial.blocks().saturating_mul(512)),
        };
        let bytes = free.bytes.saturating_add(there);
        if planned.whole <= bytes || planned.shares && free.shares_blocks && self.reads_from(free.device) {
            return None;
        }
        let guess = if self.compress { Some("compressed data takes less") } else { free.guess };
        if planned.allocates {
            return Some(Space { needed: planned.whole, free: bytes, guess });
        }
        let source = in_units(self.source.device(), unit);
        let backing = new.backing.as_ref().map(|image| &**image.device());
        let target = PlanTarget::New { cluster_size: unit, backing };
        let plan = plan_until(&*source, target, &self.mirror, &mut |_| match stop() {
            true => Visit::Break(()),
            false => Visit::Continue(()),
        });
        let data = plan.ok()?.copy;
        let needed = planned.tables.saturating_add(data).min(planned.whole);
        if guess.is_some() || needed <= bytes {
            return Some(Space { needed, free: bytes, guess });
        }
        // So much may be zeros and escape the samples.
        let is_close = needed - needed / 32 <= bytes;
        let zeros =
            (is_close || self.has_zeros(stop)).then_some("zeros that the source holds as data take no space");
        Some(Space { needed, free: bytes, guess: zeros })
    }

    /// Whether one of the samples of the source's data is zero. What cannot be read is no sample.
    fn has_zeros(&self, stop: &dyn Fn() -> bool) -> bool {
        let source = &**self.source.device();
        let places = sample_places(source, stop);
        let mut block = vec![0; SAMPLE as usize];
        places.into_iter().any(|at| {
            let len = (source.len() - at).min(SAMPLE) as usize;
            !stop() && source.read_at(&mut block[..len], at).is_ok() && is_zero(&block[..len])
        })
    }

    /// Whether a file of the source lies in the file system `device`.
    fn reads_from(&self, device: Option<u64>) -> bool {
        let mut paths = self.source.images().map(Image::path);
        paths.any(|path| fs::metadata(path).is_ok_and(|meta| Some(meta.dev()) == device))
    }
}

impl CheckedConvert {
    /// What a new target takes by `plan` at most, and what there is for it; `None` if that is not known.
    /// Nothing is read: zeros inside the data count.
    pub fn planned_space(&self, plan: &Plan) -> Option<Space> {
        let planned = self.space.as_ref()?;
        let TargetKind::New { spec, .. } = &self.kind else { return None };
        let free = FreeSpace::of(&self.target).ok()??;
        let there = match Target::decide(&self.target, spec.target_options()).ok()? {
            Decision::InPlace(InPlace::BlockDevice) if spec.cluster_size().is_none() => return None,
            Decision::InPlace(_) => free.occupied,
            _ => 0,
        };
        let data = if planned.allocates { planned.whole } else { plan.allocation() };
        let guess = match (self.compress, planned.shares && free.shares_blocks) {
            (true, _) => "compressed data takes less",
            (false, true) => "blocks that are shared with the source take no space",
            (false, false) => free.guess.unwrap_or("zeros that the source holds as data take no space"),
        };
        Some(Space {
            needed: planned.tables.saturating_add(data).min(planned.whole),
            free: free.bytes.saturating_add(there),
            guess: Some(guess),
        })
    }
}

/// Bytes of a sample: the shortest run of zeros that copies look for.
const SAMPLE: u64 = 4096;

/// Samples at most.
const SAMPLES: u64 = 512;

/// Places in the data of `source`, evenly spread over it. Those before the end of the extents that are known
/// are given if they fail.
fn sample_places(source: &dyn BlockDevice, stop: &dyn Fn() -> bool) -> Vec<u64> {
    let whole = ByteRange::new(0, source.len());
    let each = |visit: &mut dyn FnMut(ByteRange)| {
        let _ = source.extents(whole, &mut |extent| {
            if extent.kind == ExtentKind::Data {
                visit(extent.range);
            }
            if stop() { Visit::Break(()) } else { Visit::Continue(()) }
        });
    };
    let mut data = 0;
    each(&mut |range| data += range.len());
    let step = data.div_ceil(SAMPLES).next_multiple_of(SAMPLE).max(SAMPLE);
    let (mut places, mut skipped) = (Vec::new(), 0);
    each(&mut |range| {
        let mut at = range.start() + skipped;
        while at < range.end() && (places.len() as u64) < SAMPLES {
            places.push(at);
            at += step;
        }
        skipped = at.saturating_sub(range.end());
    });
    places
}

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::MemoryDisk;

    use super::*;

    #[test]
    fn samples_are_spread_over_the_data() {
        let disk = MemoryDisk::new(64 << 20);
        let places = sample_places(&disk, &|| false);
        assert!(places.len() as u64 <= SAMPLES && places.iter().all(|at| *at < 64 << 20), "{places:?}");
        assert!(sample_places(&MemoryDisk::new(0), &|| false).is_empty());
    }
}
