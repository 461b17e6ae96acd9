//! One test per rule of the core, scripted, on a virtual clock.

mod cloning;
mod errors;
mod volatile;
mod zeroing;

use std::time::Duration;

use blockmirror_block::{self as block, ErrorKind, Geometry, ZeroCost};

use super::*;
use crate::options::{MirrorOptions, OnError, SyncMode};
use crate::progress::{ErrorAction, IoStatus};
use crate::scan::{CopyAction, CopyExtent};

const M: u64 = 1 << 20;

fn core_with(len: u64, options: MirrorOptions, geometry: Geometry) -> Core {
    options.check().unwrap();
    let granularity = options.granularity.unwrap_or(65536);
    let mut config = Config::new(&options, granularity, len, geometry);
    config.operation = M;
    Core::new(config).unwrap()
}

fn core(len: u64, options: MirrorOptions) -> Core {
    core_with(len, options, Geometry::plain())
}

fn failure(operation: Operation, kind: ErrorKind) -> Failure {
    Failure { operation, error: block::Error::new(kind, "test") }
}

/// What an honest device answers if everything is data.
fn honest(work: Work) -> Done {
    match work {
        Work::Scan { range, .. } => Done::Scanned(vec![CopyExtent {
            range,
            action: CopyAction::Copy { target_zero: false },
            below: false,
        }]),
        Work::Copy { range, .. } => Done::Copied(Moved { copied: range.len(), ..Moved::default() }),
        Work::Clone { range, .. } => Done::Cloned(Cloned { end: range.end(), ..Cloned::default() }),
        Work::Zero { .. } => Done::Zeroed,
        Work::Flush | Work::PeriodicFlush => Done::Flushed,
        Work::End(_) => Done::Ended,
    }
}

/// The next action; the clock jumps where the core waits for it.
fn next(core: &mut Core, now: &mut Duration) -> Option<Action> {
    loop {
        match core.next(*now) {
            Next::Do(action) => return Some(action),
            Next::Wait(Some(until)) => {
                assert!(until > *now);
                *now = until;
            }
            Next::Wait(None) | Next::Finished => return None,
        }
    }
}

/// Performs one action after the other until nothing can be done; what came out, in order.
fn drive(
    core: &mut Core,
    now: &mut Duration,
    mut device: impl FnMut(Work) -> Result<Done, Failure>,
) -> Vec<Work> {
    let mut log = Vec::new();
    while let Some(action) = next(core, now) {
        log.push(action.work);
        core.on_completion(*now, action.id, device(action.work));
        assert!(log.len() < 1_000_000, "no end");
    }
    log
}

fn copies(log: &[Work]) -> Vec<(u64, u64)> {
    log.iter()
        .filter_map(|work| match work {
            Work::Copy { range, .. } => Some((range.start(), range.end())),
            _ => None,
        })
        .collect()
}

/// The errors among the events.
fn errors(core: &mut Core) -> Vec<(Operation, ErrorAction, ByteRange)> {
    let error = |event| match event {
        Event::Error { operation, action, range, .. } => Some((operation, action, range)),
        _ => None,
    };
    core.take_events().into_iter().filter_map(error).collect()
}

fn take_all(core: &mut Core) -> Vec<Action> {
    let mut all = Vec::new();
    while let Next::Do(action) = core.next(Duration::ZERO) {
        all.push(action);
    }
    all
}

#[test]
fn a_pass_is_one_scan_then_operations_that_meet_at_common_borders_then_a_flush() {
    let mut core = core(3 * M + 100, MirrorOptions::new());
    let log = drive(&mut core, &mut Duration::default(), |work| Ok(honest(work)));
    assert!(matches!(log[0], Work::Scan { first_pass: true, range, .. } if range.len() == 3 * M + 100));
    assert_eq!(copies(&log), [(0, M), (M, 2 * M), (2 * M, 3 * M), (3 * M, 3 * M + 100)]);
    assert_eq!(log.last(), Some(&Work::Flush));
    assert!(core.take_result().unwrap().is_ok());
}

#[test]
fn an_empty_disk_is_flushed_and_done() {
    let mut core = core(0, MirrorOptions::new());
    let log = drive(&mut core, &mut Duration::default(), |work| Ok(honest(work)));
    assert_eq!(log, [Work::Flush]);
    assert!(core.is_concluded());
}

#[test]
fn operations_and_bytes_in_flight_are_limited() {
    let mut few = core(64 * M, MirrorOptions::new().max_in_flight(3));
    let scan = take_all(&mut few).remove(0);
    few.on_completion(Duration::ZERO, scan.id, Ok(honest(scan.work)));
    assert_eq!(take_all(&mut few).len(), 3);

    let mut small = core(64 * M, MirrorOptions::new().buf_size(4 * M).max_in_flight(100));
    let scan = take_all(&mut small).remove(0);
    small.on_completion(Duration::ZERO, scan.id, Ok(honest(scan.work)));
    let quiesced: u64 = take_all(&mut small)
        .iter()
        .map(|a| match a.work {
            Work::Copy { range, .. } => range.len(),
            _ => 0,
        })
        .sum();
    assert_eq!(quiesced, 4 * M);
    assert_eq!(small.progress(Duration::ZERO).in_flight, 4 * M);
}

#[test]
fn what_is_marked_while_it_is_copied_is_copied_again_but_not_at_the_same_time() {
    let mut core = core(M, MirrorOptions::new());
    let now = &mut Duration::default();
    let scan = next(&mut core, now).unwrap();
    core.on_completion(*now, scan.id, Ok(honest(scan.work)));
    let copy = next(&mut core, now).unwrap();
    core.mark_dirty(ByteRange::new(5000, 5001));
    assert!(next(&mut core, now).is_none(), "it is in flight");
    assert_eq!(core.progress(*now).dirtied, 4096);
    core.on_completion(*now, copy.id, Ok(honest(copy.work)));
    let log = drive(&mut core, now, |work| Ok(honest(work)));
    assert_eq!(copies(&log), [(4096, 8192)], "at the finest detail, although the granularity is 64 KiB");
    assert_eq!(core.progress(*now).offset, M + 4096);
}

#[test]
fn what_is_marked_ahead_of_the_first_scan_is_copied_once() {
    let mut core = core(M, MirrorOptions::new());
    core.mark_dirty(ByteRange::new(0, M));
    let log = drive(&mut core, &mut Duration::default(), |work| Ok(honest(work)));
    assert_eq!(copies(&log), [(0, M)]);
}

#[test]
fn what_is_marked_during_the_last_flush_is_copied_and_flushed() {
    let mut core = core(M, MirrorOptions::new());
    let now = &mut Duration::default();
    let flush = loop {
        let action = next(&mut core, now).unwrap();
        if action.work == Work::Flush {
            break action;
        }
        core.on_completion(*now, action.id, Ok(honest(action.work)));
    };
    core.mark_dirty(ByteRange::new(0, 1));
    assert!(next(&mut core, now).is_none(), "nothing begins during the flush");
    core.on_completion(*now, flush.id, Ok(Done::Flushed));
    assert!(!core.is_concluded());
    let log = drive(&mut core, now, |work| Ok(honest(work)));
    assert_eq!((copies(&log), log.last()), (vec![(0, 4096)], Some(&Work::Flush)));
}

#[test]
fn dirty_neighbours_merge_and_what_is_in_flight_is_left_out() {
    let mut core = core(M, MirrorOptions::new());
    let now = &mut Duration::default();
    while let Some(action) = next(&mut core, now) {
        let flush = action.work == Work::Flush;
        if flush {
            core.mark_dirty(ByteRange::new(40960, 45056));
        }
        core.on_completion(*now, action.id, Ok(honest(action.work)));
        if flush {
            break;
        }
    }
    let scan = next(&mut core, now).unwrap();
    core.mark_dirty(ByteRange::new(0, 81920));
    let Work::Scan { range, first_pass: false, .. } = scan.work else { panic!("{scan:?}") };
    assert_eq!(range, ByteRange::new(40960, 45056));
    // Behind it first, then from the start.
    let after = next(&mut core, now).unwrap();
    assert!(matches!(after.work, Work::Scan { range, .. } if range == ByteRange::new(45056, 81920)));
    core.on_completion(*now, after.id, Ok(honest(after.work)));
    let before = next(&mut core, now).unwrap();
    assert!(matches!(before.work, Work::Scan { range, .. } if range == ByteRange::new(0, 40960)));
}

#[test]
fn a_paused_job_finishes_what_is_in_flight_and_stands_still() {
    let mut core = core(64 * M, MirrorOptions::new());
    let scan = take_all(&mut core).remove(0);
    core.on_completion(Duration::ZERO, scan.id, Ok(honest(scan.work)));
    let copies = take_all(&mut core);
    core.pause().unwrap();
    for copy in &copies {
        assert_eq!(core.progress(Duration::ZERO).state, JobState::Paused);
        core.on_completion(Duration::ZERO, copy.id, Ok(honest(copy.work)));
    }
    assert!(take_all(&mut core).is_empty());
    let progress = core.progress(Duration::ZERO);
    assert_eq!((progress.in_flight, progress.offset), (0, 16 * M));
    core.resume().unwrap();
    assert_eq!(take_all(&mut core).len(), 16);
}

#[test]
fn an_aborted_job_waits_for_what_is_in_flight_and_keeps_the_first_reason() {
    let mut core = core(M, MirrorOptions::new());
    let scan = take_all(&mut core).remove(0);
    core.abort(Error::Cancelled);
    core.abort(Error::Panicked);
    assert_eq!(core.progress(Duration::ZERO).state, JobState::Aborting);
    assert!(core.take_result().is_none());
    core.on_completion(Duration::ZERO, scan.id, Err(failure(Operation::Read, ErrorKind::Cancelled)));
    assert!(matches!(core.take_result(), Some(Err(Error::Cancelled))));
    assert!(matches!(core.next(Duration::ZERO), Next::Finished));
}

fn scanned_as_zero(work: Work) -> Option<Done> {
    match work {
        Work::Scan { range, .. } => {
            Some(Done::Scanned(vec![CopyExtent { range, action: CopyAction::Zero, below: false }]))
        }
        _ => None,
    }
}

fn zeros(log: &[Work]) -> Vec<(u64, u64, bool)> {
    log.iter()
        .filter_map(|work| match work {
            Work::Zero { range, metadata_only } => Some((range.start(), range.end(), *metadata_only)),
            _ => None,
        })
        .collect()
}

#[test]
fn whole_clusters_are_zeroed_by_metadata_and_parts_by_data() {
    let mut target = Geometry::plain();
    target.cluster_size = Some(65536);
    target.zero_cost = ZeroCost::Metadata;
    let extent = ByteRange::new(1000, 3 * 65536 + 10);
    let device = |work| match work {
        Work::Scan { range, .. } => Ok(Done::Scanned(
            [
                (ByteRange::new(0, 1000), CopyAction::Skip),
                (extent, CopyAction::Zero),
                (ByteRange::new(extent.end(), range.end()), CopyAction::Skip),
            ]
            .map(|(range, action)| CopyExtent { range, action, below: false })
            .to_vec(),
        )),
        work => Ok(honest(work)),
    };
    let mut core = core_with(M, MirrorOptions::new(), target);
    let log = drive(&mut core, &mut Duration::default(), device);
    assert_eq!(
        zeros(&log),
        [(1000, 65536, false), (65536, 3 * 65536, true), (3 * 65536, 3 * 65536 + 10, false)]
    );

    // The end of the disk ends a cluster.
    let mut core = core_with(100_000, MirrorOptions::new(), target);
    let log = drive(&mut core, &mut Duration::default(), |work| {
        Ok(scanned_as_zero(work).unwrap_or_else(|| honest(work)))
    });
    assert_eq!(zeros(&log), [(0, 100_000, true)]);
}

#[test]
fn a_target_that_turns_out_not_to_zero_by_metadata_is_asked_once() {
    let mut target = Geometry::plain();
    target.zero_cost = ZeroCost::Metadata;
    let mut core = core_with(3 * M, MirrorOptions::new(), target);
    let log = drive(&mut core, &mut Duration::default(), |work| match work {
        Work::Zero { metadata_only: true, .. } => Ok(Done::ZeroUnsupported),
        work => Ok(scanned_as_zero(work).unwrap_or_else(|| honest(work))),
    });
    assert_eq!(zeros(&log), [(0, 3 * M, true), (0, 3 * M, false)]);
    assert_eq!(core.progress(Duration::ZERO).zeroed, 3 * M);
}

#[test]
fn with_top_only_what_the_guest_wrote_since_the_start_is_copied_from_below() {
    let mut core = core(M, MirrorOptions::new().sync(SyncMode::Top).granularity(512));
    core.mark_dirty(ByteRange::new(8192, 8192 + 512));
    let log = drive(&mut core, &mut Duration::default(), |work| match work {
        Work::Scan { range, .. } => Ok(Done::Scanned(vec![CopyExtent {
            range,
            action: CopyAction::Copy { target_zero: false },
            below: true,
        }])),
        work => Ok(honest(work)),
    });
    assert_eq!(copies(&log), [(8192, 8704)]);
    assert_eq!(core.progress(Duration::ZERO).skipped, M - 512);
}

/// Copies for five seconds: the mean speed, and how far the copy was ahead of the speed at worst.
fn five_seconds(speed: u64, granularity: u64) -> (u64, u64) {
    let mut core = core(1 << 40, MirrorOptions::new().granularity(granularity).speed(speed));
    let (mut now, mut sum, mut ahead) = (Duration::ZERO, 0, 0);
    while let Some(action) = next(&mut core, &mut now)
        && now < Duration::from_secs(5)
    {
        if let Work::Copy { range, .. } = action.work {
            sum += range.len();
        }
        let due = u128::from(speed) * now.as_nanos() / 1_000_000_000;
        ahead = ahead.max(sum.saturating_sub(due as u64));
        core.on_completion(now, action.id, Ok(honest(action.work)));
    }
    (sum / 5, ahead)
}

#[test]
fn the_mean_speed_is_within_two_percent_and_no_burst_is_longer_than_a_slice() {
    for (speed, granularity) in
        [(655_360, 65536), (1_000_000, 65536), (10_000_000, 4096), (123_456_789, 65536), (4 << 30, 512)]
    {
        let (mean, ahead) = five_seconds(speed, granularity);
        assert!(mean.abs_diff(speed) * 50 <= speed, "{speed} by {granularity}: {mean}");
        assert!(ahead <= speed / 10 + 1, "{speed} by {granularity}: {ahead} ahead");
    }
}

#[test]
fn a_new_speed_takes_effect_at_once() {
    let mut core = core(1 << 30, MirrorOptions::new().speed(65536));
    let now = Duration::ZERO;
    let wait = loop {
        match core.next(now) {
            Next::Do(action) => core.on_completion(now, action.id, Ok(honest(action.work))),
            Next::Wait(until) => break until.unwrap(),
            Next::Finished => panic!("cannot be over"),
        }
    };
    assert!(wait >= Duration::from_millis(500));
    core.set_speed(now, 0).unwrap();
    assert!(matches!(core.next(now), Next::Do(_)));
}
