//! Scenarios that lean on one known way to get a mirror wrong, each with the number it has in the list of
//! them.
//!
//! Every one is a live schedule or a copy whose dice were loaded.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};

use super::live::{self, Piece};
use super::rng::Rng;
use super::world::{Faults, Tempo, World};
use super::{End, Trace, copy};
use crate::options::{CopyMode, OnError, SyncMode};
use crate::state::Verb;

const SLOW: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(50)];
const JITTER: [Duration; 2] = [Duration::ZERO, Duration::from_millis(5)];
const NO_TIME: [Duration; 2] = [Duration::ZERO; 2];

/// A live job over a small full disk; nothing fails or interferes.
fn quiet(rng: &mut Rng, len: u64) -> Piece {
    let mut piece = loop {
        let piece = Piece::random(rng);
        // Without a promise about the target and without a backing file, the disks can be replaced.
        if piece.world.options.sync == SyncMode::Full && piece.bitmap.is_none() {
            break piece;
        }
    };
    let mut fresh = |name: &str| {
        let disk = MemoryDisk::new(len).with_geometry(piece.world.target.geometry()).named(name);
        let bytes = rng.bytes(len);
        let written = disk.write_at(&bytes, 0, WriteFlags::NONE);
        assert!(written.is_ok());
        Arc::new(disk)
    };
    (piece.world.source, piece.world.target) = (fresh("source"), fresh("target"));
    piece.world.options.target_is_zero = false;
    piece.world.config.sync = SyncMode::Full;
    piece.world.config.len = len;
    piece.world.config.speed = 0;
    piece.world.config.auto_finalize = true;
    piece.world.tempo = Tempo::default();
    piece.world.faults = Faults::default();
    piece.habits.only_data = true;
    piece.strangers = Vec::new();
    piece.verbs = &[Verb::Resume];
    piece.fatal = 0;
    piece.steps = 800;
    piece
}

/// 1: the mark must not come before the bytes.
pub(super) fn hot(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = quiet(&mut rng, 20_000);
    piece.world.tempo = Tempo { source: SLOW, target: JITTER, stalls: 0 };
    piece.world.config.copy_mode = CopyMode::Background;
    piece.habits.writers = 8;
    piece.habits.rests = 2;
    piece.habits.hot = ByteRange::new(4096, 8192);
    piece.habits.longest = &[64];
    live::run(rng, &piece, trace)
}

/// 2: the bit must not be cleared after the bytes were read.
pub(super) fn rewrite(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = quiet(&mut rng, 20_000);
    piece.world.tempo = Tempo { source: NO_TIME, target: SLOW, stalls: 100 };
    piece.world.config.copy_mode = CopyMode::Background;
    piece.habits.rests = 3;
    live::run(rng, &piece, trace)
}

/// 3: two operations on one granule must not overtake each other.
pub(super) fn reorder(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = quiet(&mut rng, 30_000);
    piece.world.tempo = Tempo { source: JITTER, target: SLOW, stalls: 20 };
    piece.world.config.max_in_flight = 16;
    piece.world.config.operation = piece.world.config.detail;
    piece.world.config.buffer = 16 * piece.world.config.detail;
    piece.habits.writers = 8;
    piece.habits.rests = 2;
    piece.habits.hot = ByteRange::new(8192, 12_000);
    piece.habits.longest = &[1, 512, 3000];
    piece.verbs = &[Verb::Change];
    live::run(rng, &piece, trace)
}

/// 4: the last look and the end are one step for the guest.
pub(super) fn last_look(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = quiet(&mut rng, 12_000);
    piece.world.tempo = Tempo { source: JITTER, target: JITTER, stalls: 0 };
    piece.world.config.auto_finalize = rng.one_in(2);
    piece.habits.writers = 8;
    piece.habits.rests = 2;
    piece.habits.longest = &[1, 512];
    let ends: [&[Verb]; 2] = [&[Verb::Complete, Verb::Finalize], &[Verb::Cancel, Verb::Finalize]];
    piece.verbs = rng.pick(&ends);
    live::run(rng, &piece, trace)
}

/// 5: what a write covers only in part stays dirty.
pub(super) fn unaligned(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = quiet(&mut rng, 40_000);
    piece.world.config.copy_mode = CopyMode::WriteBlocking;
    // Slow enough that the guest meets dirty granules.
    piece.world.config.speed = 50_000;
    piece.habits.rests = 2;
    piece.habits.longest = &[1, 100, 700, 5000];
    piece.verbs = &[Verb::Change, Verb::Pause, Verb::Resume];
    live::run(rng, &piece, trace)
}

/// 7: what reads as zero at the source must read as zero at the target, which is full of old bytes.
pub(super) fn prefilled(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut world = loop {
        let world = World::random(&mut rng);
        if world.options.sync == SyncMode::Full {
            break world;
        }
    };
    world.options.target_is_zero = false;
    world.config.zero_by_metadata = rng.one_in(2);
    let old = vec![0x2a; world.target.len() as usize];
    let written = world.target.write_at(&old, 0, WriteFlags::NONE);
    assert!(written.is_ok());
    copy::run(rng, &world, 10, trace)
}

/// 8: lengths, granules and clusters that do not fit each other, written to the last byte.
pub(super) fn odd(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let len = rng.pick(&[1, 511, 512, 1000, 4097, 65_535, 66_048]);
    let mut piece = quiet(&mut rng, len);
    piece.habits.hot = ByteRange::new(len.saturating_sub(600), len);
    piece.habits.only_data = false;
    live::run(rng, &piece, trace)
}

/// 10: after a failure the range is dirty again, and the policy decides.
pub(super) fn errors(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = Piece::random(&mut rng);
    piece.world.faults.one_in = rng.pick(&[3, 10, 30]);
    piece.world.faults.fills = rng.pick(&[0, 30]);
    const GO_ON: [OnError; 3] = [OnError::Ignore, OnError::Stop, OnError::Ignore];
    piece.world.config.on_source_error = rng.pick(&GO_ON);
    piece.world.config.on_target_error = rng.pick(&GO_ON);
    piece.fatal = 0;
    live::run(rng, &piece, trace)
}

/// 11: READY and the end come after a flush that succeeded; one that failed may have lost what came before
/// it.
pub(super) fn flush(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = quiet(&mut rng, 10_000);
    piece.world.faults.one_in = 4;
    piece.world.config.on_source_error = OnError::Ignore;
    piece.world.config.on_target_error = rng.pick(&[OnError::Ignore, OnError::Stop]);
    piece.habits.writers = 2;
    piece.habits.rests = 20;
    piece.verbs = &[Verb::Complete, Verb::Cancel, Verb::Resume, Verb::Resume];
    live::run(rng, &piece, trace)
}

/// 12: a paused job stands still, whatever the guest does, and tells no tales.
pub(super) fn paused(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = Piece::random(&mut rng);
    piece.verbs = &[Verb::Pause, Verb::Pause, Verb::Resume, Verb::Complete, Verb::SetSpeed, Verb::Dismiss];
    live::run(rng, &piece, trace)
}

/// Writers that wait for each other and for the job, which keeps out of their way: one of them can always
/// proceed.
pub(super) fn crowd(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::new(seed);
    let mut piece = Piece::random(&mut rng);
    let world = &mut piece.world;
    world.config.copy_mode = CopyMode::WriteBlocking;
    world.config.on_source_error = OnError::Ignore;
    world.config.on_target_error = OnError::Ignore;
    world.faults.one_in = rng.pick(&[0, 10, 30]);
    piece.habits.hot = ByteRange::new(0, world.config.len.min(rng.pick(&[2, 8, 32]) * world.config.detail));
    piece.habits.writers = 12;
    piece.habits.rests = 2;
    piece.habits.longest = &[1, 512, 9000];
    piece.verbs = &[Verb::SetSpeed];
    live::run(rng, &piece, trace)
}
