//! What is drawn for one job.

use std::num::NonZeroUsize;
use std::time::Duration;

use blockmirror_mirror::{BitmapMode, CopyMode, MirrorOptions, OnError, SyncMode};

use super::images::{Base, Format, ImageKind};
use blockmirror_block::testing::Rng;

/// How the job is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    Pivot,
    Keep,
    /// Given up at any time, ready or not.
    Abort,
}

/// Which faults happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    None,
    /// The target fails above its format.
    Disk,
    /// The target fails below its format.
    Storage,
    /// The source cannot be read now and then.
    Source,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) target: ImageKind,
    /// The target holds something else first.
    pub(super) soiled: bool,
    pub(super) aim: Aim,
    pub(super) trouble: Trouble,
    pub(super) options: MirrorOptions,
    pub(super) auto_dismiss: bool,
    /// Microseconds that a writer rests after an operation.
    pub(super) pace: u64,
    pub(super) text: String,
}

pub(super) const MODES: [CopyMode; 3] = [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto];
pub(super) const SPEEDS: [u64; 6] = [0, 0, 0, 200 << 20, 50 << 20, 8 << 20];

impl Plan {
    /// A job from an image of kind `source`, whose contents go onto a new one.
    pub(super) fn draw(rng: &mut Rng, source: ImageKind) -> Self {
        let mut target = ImageKind::draw(rng);
        let sync = if rng.chance(25) { SyncMode::Top } else { SyncMode::Full };
        let qcow2 = matches!(target.format, Format::Qcow2 { .. });
        if sync == SyncMode::Top && source.base != Base::Nothing {
            // What the top does not decide must show through.
            target.base = source.base;
            if !qcow2 {
                target.format = Format::Qcow2 { cluster: 65536, extended: false, v2: false };
            }
        } else if qcow2 && rng.chance(20) {
            target.base = Base::Garbage;
        }
        let soiled = rng.chance(25) && !(sync == SyncMode::Top && source.base != Base::Nothing);
        let options = MirrorOptions::new().sync(sync);
        Self::finish(rng, options, target, soiled)
    }

    /// A job that brings `target` up to date by the bitmap `name`.
    pub(super) fn incremental(rng: &mut Rng, target: ImageKind, name: &str) -> Self {
        let mode = rng.pick(&[BitmapMode::OnSuccess, BitmapMode::Always, BitmapMode::Never]);
        let sync = if mode == BitmapMode::OnSuccess { SyncMode::Incremental } else { SyncMode::Bitmap };
        let options = MirrorOptions::new().sync(sync).bitmap(name, mode);
        Self::finish(rng, options, target, false)
    }

    fn finish(rng: &mut Rng, mut options: MirrorOptions, target: ImageKind, soiled: bool) -> Self {
        let aim =
            rng.pick(&[Aim::Pivot, Aim::Pivot, Aim::Pivot, Aim::Keep, Aim::Keep, Aim::Keep, Aim::Abort]);
        let trouble = match rng.below(20) {
            0..2 => Trouble::Disk,
            2..4 => Trouble::Storage,
            4 => Trouble::Source,
            _ => Trouble::None,
        };
        let policy = |rng: &mut Rng| {
            rng.pick(&[OnError::Report, OnError::Stop, OnError::Stop, OnError::Ignore, OnError::Enospc])
        };
        let (auto_finalize, auto_dismiss) = (rng.chance(75), rng.chance(75));
        let granularity = rng.pick(&[0, 512, 4096, 65536, 65536, 1 << 20, 64 << 20]);
        let threads = NonZeroUsize::new(rng.below(7) as usize);
        options = options
            .granularity(granularity)
            .buf_size(rng.pick(&[0, 0, 65_536, 300_000, 4 << 20]))
            .max_in_flight(rng.pick(&[1, 2, 16, 64]))
            .threads(threads)
            .speed(rng.pick(&SPEEDS))
            .copy_mode(rng.pick(&MODES))
            .latency_budget(rng.pick(&[
                None,
                None,
                Some(Duration::from_millis(1)),
                Some(Duration::from_millis(20)),
            ]))
            .unmap(rng.chance(70))
            .min_zero_run(rng.pick(&[0, 4096, 4096, 65536]))
            .on_source_error(if trouble == Trouble::Source { OnError::Ignore } else { policy(rng) })
            .on_target_error(policy(rng))
            .auto_finalize(auto_finalize)
            .auto_dismiss(auto_dismiss);
        let pace = rng.pick(&[0, 0, 50, 500]);
        let text = format!("{aim:?} {trouble:?} soiled={soiled} pace={pace} {target:?} {options:?}");
        Self { target, soiled, aim, trouble, options, auto_dismiss, pace, text }
    }
}
