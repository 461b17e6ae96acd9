//! Targeted scenarios: each aims at one known bug of mirrors and has its number in the list of them.
//!
//! Each is a live schedule or a copy with other probabilities.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};

use super::environment::{Environment, Faults, LatencyModel};
use super::live::{self, ScenarioParams};
use super::{End, Trace, copy};
use crate::options::{CopyMode, OnError, SyncMode};
use crate::state::Verb;

const SLOW: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(50)];
const JITTER: [Duration; 2] = [Duration::ZERO, Duration::from_millis(5)];
const NO_TIME: [Duration; 2] = [Duration::ZERO; 2];

/// A live job over a small full disk; nothing fails or interferes.
fn quiet(rng: &mut Rng, len: u64) -> ScenarioParams {
    let mut params = loop {
        let params = ScenarioParams::random(rng);
        // Without a promise about the target and without a backing file, the disks can be replaced.
        if params.environment.options.sync == SyncMode::Full && params.bitmap.is_none() {
            break params;
        }
    };
    let mut fresh = |name: &str| {
        let disk = MemoryDisk::new(len).with_geometry(params.environment.target.geometry()).named(name);
        let bytes = rng.nonzero_bytes(len);
        let written = disk.write_at(&bytes, 0, WriteFlags::NONE);
        assert!(written.is_ok());
        Arc::new(disk)
    };
    (params.environment.source, params.environment.target) = (fresh("source"), fresh("target"));
    params.environment.options.target_is_zero = false;
    params.environment.config.sync = SyncMode::Full;
    params.environment.config.len = len;
    params.environment.config.speed = 0;
    params.environment.config.auto_finalize = true;
    params.environment.latency = LatencyModel::default();
    params.environment.faults = Faults::default();
    params.workload.only_data = true;
    params.pre_attach_writes = Vec::new();
    params.verbs = &[Verb::Resume];
    params.fatal = 0;
    params.steps = 800;
    params
}

/// 1: the mark must not come before the bytes.
pub(super) fn hot(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = quiet(&mut rng, 20_000);
    params.environment.latency = LatencyModel { source: SLOW, target: JITTER, stalls: 0 };
    params.environment.config.copy_mode = CopyMode::Background;
    params.workload.writers = 8;
    params.workload.begin_one_in = 2;
    params.workload.hot = ByteRange::new(4096, 8192);
    params.workload.longest = &[64];
    live::run_params(rng, &params, trace)
}

/// 2: the bit must not be cleared after the bytes were read.
pub(super) fn rewrite(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = quiet(&mut rng, 20_000);
    params.environment.latency = LatencyModel { source: NO_TIME, target: SLOW, stalls: 100 };
    params.environment.config.copy_mode = CopyMode::Background;
    params.workload.begin_one_in = 3;
    live::run_params(rng, &params, trace)
}

/// 3: two operations on one granule must not overtake each other.
pub(super) fn reorder(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = quiet(&mut rng, 30_000);
    params.environment.latency = LatencyModel { source: JITTER, target: SLOW, stalls: 20 };
    params.environment.config.max_in_flight = 16;
    params.environment.config.operation = params.environment.config.detail;
    params.environment.config.buffer = 16 * params.environment.config.detail;
    params.workload.writers = 8;
    params.workload.begin_one_in = 2;
    params.workload.hot = ByteRange::new(8192, 12_000);
    params.workload.longest = &[1, 512, 3000];
    params.verbs = &[Verb::Change];
    live::run_params(rng, &params, trace)
}

/// 4: the final check and the end are one step for the guest.
pub(super) fn final_check(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = quiet(&mut rng, 12_000);
    params.environment.latency = LatencyModel { source: JITTER, target: JITTER, stalls: 0 };
    params.environment.config.auto_finalize = rng.one_in(2);
    params.workload.writers = 8;
    params.workload.begin_one_in = 2;
    params.workload.longest = &[1, 512];
    let ends: [&[Verb]; 2] = [&[Verb::Complete, Verb::Finalize], &[Verb::Cancel, Verb::Finalize]];
    params.verbs = rng.pick(&ends);
    live::run_params(rng, &params, trace)
}

/// 5: what a write covers only in part stays dirty.
pub(super) fn unaligned(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = quiet(&mut rng, 40_000);
    params.environment.config.copy_mode = CopyMode::WriteBlocking;
    // Slow enough that the guest meets dirty granules.
    params.environment.config.speed = 50_000;
    params.workload.begin_one_in = 2;
    params.workload.longest = &[1, 100, 700, 5000];
    params.verbs = &[Verb::Change, Verb::Pause, Verb::Resume];
    live::run_params(rng, &params, trace)
}

/// 7: what reads as zero at the source must read as zero at the target, which is full of old bytes.
pub(super) fn prefilled(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut environment = loop {
        let environment = Environment::random(&mut rng);
        if environment.options.sync == SyncMode::Full {
            break environment;
        }
    };
    environment.options.target_is_zero = false;
    environment.config.zero_by_metadata = rng.one_in(2);
    let old = vec![0x2a; environment.target.len() as usize];
    let written = environment.target.write_at(&old, 0, WriteFlags::NONE);
    assert!(written.is_ok());
    copy::run_in(rng, &environment, 10, trace)
}

/// 8: lengths, granules and clusters that do not fit each other, written to the last byte.
pub(super) fn odd(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let len = rng.pick(&[1, 511, 512, 1000, 4097, 65_535, 66_048]);
    let mut params = quiet(&mut rng, len);
    params.workload.hot = ByteRange::new(len.saturating_sub(600), len);
    params.workload.only_data = false;
    live::run_params(rng, &params, trace)
}

/// 10: after a failure the range is dirty again, and the policy decides.
pub(super) fn errors(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = ScenarioParams::random(&mut rng);
    params.environment.faults.one_in = rng.pick(&[3, 10, 30]);
    params.environment.faults.fills = rng.pick(&[0, 30]);
    const GO_ON: [OnError; 3] = [OnError::Ignore, OnError::Stop, OnError::Ignore];
    params.environment.config.on_source_error = rng.pick(&GO_ON);
    params.environment.config.on_target_error = rng.pick(&GO_ON);
    params.fatal = 0;
    live::run_params(rng, &params, trace)
}

/// 11: READY and the end come after a flush that succeeded; one that failed may have lost what came before
/// it.
pub(super) fn flush(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = quiet(&mut rng, 10_000);
    params.environment.faults.one_in = 4;
    params.environment.config.on_source_error = OnError::Ignore;
    params.environment.config.on_target_error = rng.pick(&[OnError::Ignore, OnError::Stop]);
    params.workload.writers = 2;
    params.workload.begin_one_in = 20;
    params.verbs = &[Verb::Complete, Verb::Cancel, Verb::Resume, Verb::Resume];
    live::run_params(rng, &params, trace)
}

/// 12: a paused job makes no progress, whatever the guest does, and its events are true.
pub(super) fn paused(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = ScenarioParams::random(&mut rng);
    params.verbs = &[Verb::Pause, Verb::Pause, Verb::Resume, Verb::Complete, Verb::SetSpeed, Verb::Dismiss];
    live::run_params(rng, &params, trace)
}

/// Writers that hold tickets: they poll for admission, some never end, and no abort waits for those. Beside
/// them data is copied up into the source, which no end overtakes.
pub(super) fn tickets(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = loop {
        let params = ScenarioParams::random(&mut rng);
        // Often with a bitmap that has to cover what an aborted job leaves.
        if params.environment.config.cut_bitmap || rng.one_in(20) {
            break params;
        }
    };
    let config = &mut params.environment.config;
    config.copy_mode = rng.pick(&[CopyMode::WriteBlocking, CopyMode::WriteBlocking, CopyMode::Background]);
    config.asked_budget = rng.pick(&[None, Some(Duration::from_millis(20))]);
    params.workload.tickets = true;
    params.workload.copy_up_one_in = 20;
    params.workload.leak_one_in = rng.pick(&[0, 200, 1000]);
    params.workload.writers = 6;
    params.workload.begin_one_in = 3;
    params.fatal = 10;
    live::run_params(rng, &params, trace)
}

/// Callers that never wait: what is refused sleeps until it is woken, or for the time that the answer gives.
/// They keep no job from ending, in any mode.
pub(super) fn queues(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = ScenarioParams::random(&mut rng);
    let config = &mut params.environment.config;
    config.asked_budget =
        rng.pick(&[None, None, Some(Duration::from_millis(20)), Some(Duration::from_secs(3))]);
    let detail = config.detail;
    params.workload.hot = match rng.below(2) {
        0 => ByteRange::default(),
        _ => ByteRange::new(0, config.len.min(rng.pick(&[2, 8]) * detail)),
    };
    params.workload.tickets = true;
    params.workload.sleeps = true;
    params.workload.reads = true;
    params.workload.writers = rng.pick(&[1, 8, 32]);
    params.workload.begin_one_in = 2;
    params.fatal = 40;
    live::run_params(rng, &params, trace)
}

/// Writers that wait for each other and for the job, which keeps out of their way: one of them can always
/// proceed.
pub(super) fn crowd(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut params = ScenarioParams::random(&mut rng);
    let environment = &mut params.environment;
    environment.config.copy_mode = CopyMode::WriteBlocking;
    environment.config.on_source_error = OnError::Ignore;
    environment.config.on_target_error = OnError::Ignore;
    environment.faults.one_in = rng.pick(&[0, 10, 30]);
    params.workload.hot =
        ByteRange::new(0, environment.config.len.min(rng.pick(&[2, 8, 32]) * environment.config.detail));
    params.workload.writers = 12;
    params.workload.begin_one_in = 2;
    params.workload.longest = &[1, 512, 9000];
    params.verbs = &[Verb::SetSpeed];
    live::run_params(rng, &params, trace)
}

/// A job with a log: any verb at any time, in few regions and with less room than there are.
pub(super) fn log(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed ^ 0x106);
    let mut params = loop {
        let params = ScenarioParams::random(&mut rng);
        // All of the disk is copied, and nothing was written before the job: the log is attached first.
        if params.environment.options.sync == SyncMode::Full
            && params.bitmap.is_none()
            && params.environment.len() > 0
        {
            break params;
        }
    };
    params.pre_attach_writes = Vec::new();
    params.environment.config.sync = SyncMode::Full;
    let all = [ByteRange::new(0, params.environment.len())];
    let interval = rng.pick(&[1 << 12, 1 << 15, 1 << 18]);
    params.environment.config = params.environment.config.clone().with_log(&all, interval).unwrap();
    params.log = Some((512 << rng.below(8), 1 + rng.index(8)));
    live::run_params(rng, &params, trace)
}
