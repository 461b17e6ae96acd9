//! One test per rule of the core, scripted, on a virtual clock.

use std::time::Duration;

use blockmirror_block::{self as block, ErrorKind, Geometry, ZeroCost};

use super::retry::{MAX_GIVEN_UP, MAX_TRIES};
use super::*;
use crate::options::{MirrorOptions, OnError};
use crate::progress::ErrorAction;

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
        Work::Survey { range, .. } => {
            Done::Surveyed(vec![Segment { range, need: Need::Copy { target_zero: false }, below: false }])
        }
        Work::Copy { range, .. } => Done::Copied(Moved { copied: range.len(), ..Moved::default() }),
        Work::Zero { .. } => Done::Zeroed,
        Work::Flush | Work::Secure => Done::Flushed,
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
        core.finished(*now, action.id, device(action.work));
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
fn a_pass_is_one_survey_then_operations_that_meet_at_common_borders_then_a_flush() {
    let mut core = core(3 * M + 100, MirrorOptions::new());
    let log = drive(&mut core, &mut Duration::default(), |work| Ok(honest(work)));
    assert!(matches!(log[0], Work::Survey { first_pass: true, range, .. } if range.len() == 3 * M + 100));
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
    let survey = take_all(&mut few).remove(0);
    few.finished(Duration::ZERO, survey.id, Ok(honest(survey.work)));
    assert_eq!(take_all(&mut few).len(), 3);

    let mut small = core(64 * M, MirrorOptions::new().buf_size(4 * M).max_in_flight(100));
    let survey = take_all(&mut small).remove(0);
    small.finished(Duration::ZERO, survey.id, Ok(honest(survey.work)));
    let held: u64 = take_all(&mut small)
        .iter()
        .map(|a| match a.work {
            Work::Copy { range, .. } => range.len(),
            _ => 0,
        })
        .sum();
    assert_eq!(held, 4 * M);
    assert_eq!(small.progress(Duration::ZERO).in_flight, 4 * M);
}

#[test]
fn what_is_marked_while_it_is_copied_is_copied_again_but_not_at_the_same_time() {
    let mut core = core(M, MirrorOptions::new());
    let now = &mut Duration::default();
    let survey = next(&mut core, now).unwrap();
    core.finished(*now, survey.id, Ok(honest(survey.work)));
    let copy = next(&mut core, now).unwrap();
    core.mark_dirty(ByteRange::new(5000, 5001));
    assert!(next(&mut core, now).is_none(), "it is in flight");
    assert_eq!(core.progress(*now).dirtied, 4096);
    core.finished(*now, copy.id, Ok(honest(copy.work)));
    let log = drive(&mut core, now, |work| Ok(honest(work)));
    assert_eq!(copies(&log), [(4096, 8192)], "at the finest detail, although the granularity is 64 KiB");
    assert_eq!(core.progress(*now).offset, M + 4096);
}

#[test]
fn what_is_marked_ahead_of_the_first_survey_is_copied_once() {
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
        core.finished(*now, action.id, Ok(honest(action.work)));
    };
    core.mark_dirty(ByteRange::new(0, 1));
    assert!(next(&mut core, now).is_none(), "nothing begins during the flush");
    core.finished(*now, flush.id, Ok(Done::Flushed));
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
        core.finished(*now, action.id, Ok(honest(action.work)));
        if flush {
            break;
        }
    }
    let survey = next(&mut core, now).unwrap();
    core.mark_dirty(ByteRange::new(0, 81920));
    let Work::Survey { range, first_pass: false, .. } = survey.work else { panic!("{survey:?}") };
    assert_eq!(range, ByteRange::new(40960, 45056));
    // Behind it first, then from the start.
    let after = next(&mut core, now).unwrap();
    assert!(matches!(after.work, Work::Survey { range, .. } if range == ByteRange::new(45056, 81920)));
    core.finished(*now, after.id, Ok(honest(after.work)));
    let before = next(&mut core, now).unwrap();
    assert!(matches!(before.work, Work::Survey { range, .. } if range == ByteRange::new(0, 40960)));
}

#[test]
fn the_policies_are_those_of_the_table() {
    use ErrorAction::{Ignore, Report, Stop};
    use ErrorKind::{Io, NoSpace};
    for (policy, kind, expected) in [
        (OnError::Report, NoSpace, Report),
        (OnError::Report, Io, Report),
        (OnError::Ignore, NoSpace, Ignore),
        (OnError::Ignore, Io, Ignore),
        (OnError::Stop, NoSpace, Stop),
        (OnError::Stop, Io, Stop),
        (OnError::Enospc, NoSpace, Stop),
        (OnError::Enospc, Io, Report),
        (OnError::Auto, NoSpace, Stop),
        (OnError::Auto, Io, Report),
    ] {
        for side in [Operation::Read, Operation::Write] {
            // The other side's policy must not matter.
            let other = if policy == OnError::Report { OnError::Stop } else { OnError::Report };
            let (source, target) = if side == Operation::Read { (policy, other) } else { (other, policy) };
            let mut core = core(M, MirrorOptions::new().on_source_error(source).on_target_error(target));
            let now = &mut Duration::default();
            let survey = next(&mut core, now).unwrap();
            core.finished(*now, survey.id, Ok(honest(survey.work)));
            let copy = next(&mut core, now).unwrap();
            core.finished(*now, copy.id, Err(failure(side, kind)));
            assert_eq!(core.dirty.dirty_bytes(), M, "dirty again, whatever the policy");
            let events = errors(&mut core);
            let [(operation, action, range)] = events[..] else { panic!("{events:?}") };
            assert_eq!((operation, action, range.len()), (side, expected, M), "{policy:?} {kind:?}");
            let progress = core.progress(*now);
            match expected {
                Report => {
                    let error = core.take_result().unwrap().unwrap_err();
                    assert_eq!(matches!(error, Error::Source(_)), side == Operation::Read, "{error}");
                }
                Stop => {
                    let status = if kind == NoSpace { IoStatus::NoSpace } else { IoStatus::Failed };
                    assert_eq!((progress.state, progress.io_status), (JobState::Paused, status));
                }
                _ => assert_eq!((progress.state, progress.io_status), (JobState::Running, IoStatus::Ok)),
            }
        }
    }
}

#[test]
fn the_io_status_is_that_of_the_first_error_and_resume_forgets_it() {
    let mut core = core(4 * M, MirrorOptions::new().on_target_error(OnError::Stop));
    let survey = take_all(&mut core).remove(0);
    core.finished(Duration::ZERO, survey.id, Ok(honest(survey.work)));
    let copies = take_all(&mut core);
    core.finished(Duration::ZERO, copies[0].id, Err(failure(Operation::Write, ErrorKind::NoSpace)));
    core.finished(Duration::ZERO, copies[1].id, Err(failure(Operation::Write, ErrorKind::Io)));
    core.finished(Duration::ZERO, copies[2].id, Ok(honest(copies[2].work)));
    assert!(take_all(&mut core).is_empty(), "stopped");
    assert_eq!(core.progress(Duration::ZERO).io_status, IoStatus::NoSpace);
    core.resume().unwrap();
    assert_eq!(core.progress(Duration::ZERO).io_status, IoStatus::Ok);
    core.finished(Duration::ZERO, copies[3].id, Ok(honest(copies[3].work)));
    drive(&mut core, &mut Duration::default(), |work| Ok(honest(work)));
    assert!(core.take_result().unwrap().is_ok());
}

/// Fails every copy that touches one of the bytes.
fn bad_at(bad: &[u64]) -> impl Fn(Work) -> Result<Done, Failure> + '_ {
    move |work| match work {
        Work::Copy { range, .. } if bad.iter().any(|&byte| range.contains(byte)) => {
            Err(failure(Operation::Read, ErrorKind::Io))
        }
        work => Ok(honest(work)),
    }
}

#[test]
fn ignore_gives_one_small_range_up_after_ten_paced_tries() {
    let mut core = core(4 * M, MirrorOptions::new().on_source_error(OnError::Ignore));
    let mut now = Duration::ZERO;
    let log = drive(&mut core, &mut now, bad_at(&[M + 50_000]));
    let tries = copies(&log).iter().filter(|(s, e)| (*s..*e).contains(&(M + 50_000))).count();
    assert_eq!(tries, MAX_TRIES as usize);
    assert!(now >= Duration::from_millis(20 + 40 + 80 + 160 + 320 + 4 * 500), "paced: {now:?}");
    let given_up = core.given_up();
    assert_eq!(given_up.len(), 1);
    assert_eq!(given_up[0].range, ByteRange::new(M + 49152, M + 53248), "one unit of 4 KiB, not 1 MiB");
    assert_eq!(given_up[0].message, "test: I/O error");
    let progress = core.progress(now);
    assert_eq!((progress.offset, progress.len, progress.given_up), (4 * M, 4 * M, 4096));
    let actions: Vec<_> = errors(&mut core).into_iter().map(|(_, action, _)| action).collect();
    assert_eq!(actions.len(), MAX_TRIES as usize);
    assert_eq!(actions.last(), Some(&ErrorAction::GiveUp));
    assert!(core.take_result().unwrap().is_ok());
}

#[test]
fn other_ranges_do_not_wait_for_one_that_is_tried_again() {
    let mut core = core(4 * M, MirrorOptions::new().on_source_error(OnError::Ignore));
    let now = Duration::ZERO;
    let mut copied = 0;
    loop {
        match core.next(now) {
            Next::Do(action) => {
                let result = bad_at(&[0])(action.work);
                copied += u64::from(result.is_ok() && matches!(action.work, Work::Copy { .. }));
                core.finished(now, action.id, result);
            }
            Next::Wait(until) => {
                assert_eq!(until, Some(Duration::from_millis(20)));
                break;
            }
            Next::Finished => panic!("cannot be over"),
        }
    }
    assert_eq!(copied, 3);
}

#[test]
fn what_the_guest_writes_anew_gets_new_tries() {
    let mut core = core(4096, MirrorOptions::new().on_source_error(OnError::Ignore));
    let mut now = Duration::ZERO;
    let mut tries = 0;
    while let Some(action) = next(&mut core, &mut now) {
        let result = bad_at(&[0])(action.work);
        if result.is_err() {
            tries += 1;
            if tries == MAX_TRIES {
                core.mark_dirty(ByteRange::new(0, 1));
            }
        }
        core.finished(now, action.id, result);
    }
    assert_eq!(tries, 2 * MAX_TRIES - 1);
    assert_eq!(core.given_up().len(), 1);
}

#[test]
fn the_list_of_what_was_given_up_is_capped() {
    let len = (MAX_GIVEN_UP as u64 + 10) * 8192;
    let mut core = core(len, MirrorOptions::new().on_source_error(OnError::Ignore));
    let device = |work| match work {
        Work::Copy { range, .. } if range.len() > 4096 || range.start() % 8192 == 0 => {
            Err(failure(Operation::Read, ErrorKind::Io))
        }
        work => Ok(honest(work)),
    };
    drive(&mut core, &mut Duration::default(), device);
    let error = core.take_result().unwrap().unwrap_err();
    assert!(matches!(error, Error::TooManyGivenUp { limit: MAX_GIVEN_UP, .. }), "{error}");
    assert_eq!(core.take_events().len(), super::MAX_EVENTS, "events are capped as well");
}

#[test]
fn a_survey_that_fails_narrows_down_to_the_fault() {
    let mut core = core(1 << 40, MirrorOptions::new().on_source_error(OnError::Ignore));
    let bad = 77 << 30;
    let device = |work| match work {
        Work::Survey { range, .. } if range.contains(bad) => Err(failure(Operation::Read, ErrorKind::Io)),
        Work::Survey { range, .. } => {
            Ok(Done::Surveyed(vec![Segment { range, need: Need::Nothing, below: false }]))
        }
        work => Ok(honest(work)),
    };
    let log = drive(&mut core, &mut Duration::default(), device);
    assert!(log.len() < 400, "{} operations", log.len());
    let given_up = core.given_up();
    assert_eq!(given_up.len(), 1);
    assert!(given_up[0].range.contains(bad) && given_up[0].range.len() <= 4096, "{given_up:?}");
    assert!(core.take_result().unwrap().is_ok());
}

#[test]
fn after_a_failed_flush_everything_is_copied_again() {
    let mut core = core(2 * M, MirrorOptions::new().on_target_error(OnError::Stop));
    let mut fail = true;
    let mut device = |work| match work {
        Work::Flush if std::mem::take(&mut fail) => Err(failure(Operation::Write, ErrorKind::Io)),
        work => Ok(honest(work)),
    };
    drive(&mut core, &mut Duration::default(), &mut device);
    assert_eq!(core.progress(Duration::ZERO).state, JobState::Paused);
    core.resume().unwrap();
    let log = drive(&mut core, &mut Duration::default(), device);
    assert_eq!(copies(&log), [(0, M), (M, 2 * M)]);
    assert!(core.take_result().unwrap().is_ok());
}

#[test]
fn a_flush_that_keeps_failing_fails_the_job_even_if_errors_are_ignored() {
    let mut core = core(M, MirrorOptions::new().on_target_error(OnError::Ignore));
    let device = |work| match work {
        Work::Flush => Err(failure(Operation::Write, ErrorKind::Io)),
        work => Ok(honest(work)),
    };
    let log = drive(&mut core, &mut Duration::default(), device);
    assert_eq!(log.iter().filter(|work| **work == Work::Flush).count(), 3);
    assert!(matches!(core.take_result(), Some(Err(Error::Target(_)))));
}

#[test]
fn a_paused_job_finishes_what_is_in_flight_and_stands_still() {
    let mut core = core(64 * M, MirrorOptions::new());
    let survey = take_all(&mut core).remove(0);
    core.finished(Duration::ZERO, survey.id, Ok(honest(survey.work)));
    let copies = take_all(&mut core);
    core.pause().unwrap();
    for copy in &copies {
        assert_eq!(core.progress(Duration::ZERO).state, JobState::Paused);
        core.finished(Duration::ZERO, copy.id, Ok(honest(copy.work)));
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
    let survey = take_all(&mut core).remove(0);
    core.abort(Error::Cancelled);
    core.abort(Error::Panicked);
    assert_eq!(core.progress(Duration::ZERO).state, JobState::Aborting);
    assert!(core.take_result().is_none());
    core.finished(Duration::ZERO, survey.id, Err(failure(Operation::Read, ErrorKind::Cancelled)));
    assert!(matches!(core.take_result(), Some(Err(Error::Cancelled))));
    assert!(matches!(core.next(Duration::ZERO), Next::Finished));
}

fn surveyed_as_zero(work: Work) -> Option<Done> {
    match work {
        Work::Survey { range, .. } => {
            Some(Done::Surveyed(vec![Segment { range, need: Need::Zero, below: false }]))
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
    let segment = ByteRange::new(1000, 3 * 65536 + 10);
    let device = |work| match work {
        Work::Survey { range, .. } => Ok(Done::Surveyed(
            [
                (ByteRange::new(0, 1000), Need::Nothing),
                (segment, Need::Zero),
                (ByteRange::new(segment.end(), range.end()), Need::Nothing),
            ]
            .map(|(range, need)| Segment { range, need, below: false })
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
        Ok(surveyed_as_zero(work).unwrap_or_else(|| honest(work)))
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
        work => Ok(surveyed_as_zero(work).unwrap_or_else(|| honest(work))),
    });
    assert_eq!(zeros(&log), [(0, 3 * M, true), (0, M, false), (M, 2 * M, false), (2 * M, 3 * M, false)]);
    assert_eq!(core.progress(Duration::ZERO).zeroed, 3 * M);
}

#[test]
fn with_top_only_what_the_guest_wrote_since_the_start_is_copied_from_below() {
    let mut core = core(M, MirrorOptions::new().sync(SyncMode::Top).granularity(512));
    core.mark_dirty(ByteRange::new(8192, 8192 + 512));
    let log = drive(&mut core, &mut Duration::default(), |work| match work {
        Work::Survey { range, .. } => {
            Ok(Done::Surveyed(vec![Segment { range, need: Need::Copy { target_zero: false }, below: true }]))
        }
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
        core.finished(now, action.id, Ok(honest(action.work)));
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
            Next::Do(action) => core.finished(now, action.id, Ok(honest(action.work))),
            Next::Wait(until) => break until.unwrap(),
            Next::Finished => panic!("cannot be over"),
        }
    };
    assert!(wait >= Duration::from_millis(500));
    core.set_speed(now, 0).unwrap();
    assert!(matches!(core.next(now), Next::Do(_)));
}

fn forgetful() -> Geometry {
    let mut geometry = Geometry::plain();
    geometry.forgetful = true;
    geometry
}

/// A disk copied for hours to a server that was lost for a moment was copied again from the start: nothing had been flushed.
#[test]
fn what_a_forgetful_target_lost_is_what_was_written_since_a_second_ago() {
    let mut core = core_with(8 * M, MirrorOptions::new(), forgetful());
    let (mut now, mut log) = (Duration::ZERO, Vec::new());
    let mut copied = 0;
    while let Some(action) = next(&mut core, &mut now) {
        log.push(action.work);
        let lost = action.work == Work::Flush && log.iter().filter(|w| **w == Work::Flush).count() == 1;
        if let Work::Copy { .. } = action.work {
            now += Duration::from_millis(400);
            copied += 1;
        }
        let result = if lost {
            Err(failure(Operation::Write, ErrorKind::WritesLost))
        } else {
            Ok(honest(action.work))
        };
        core.finished(now, action.id, result);
    }
    let secured = log.iter().filter(|work| **work == Work::Secure).count();
    // After the third, the sixth; the flush at the end takes two along. The policy, which is to report, was not asked.
    assert_eq!((secured, copied), (2, 8 + 2), "{log:?}");
    assert_eq!(errors(&mut core), []);
    assert!(core.take_result().unwrap().is_ok());
}

/// To make durable what was written takes a thread, not the job: other operations go on.
#[test]
fn securing_holds_nothing_up_and_is_not_done_twice_at_a_time() {
    let mut core = core_with(8 * M, MirrorOptions::new(), forgetful());
    let mut now = Duration::ZERO;
    for _ in 0..2 {
        let action = next(&mut core, &mut now).unwrap();
        core.finished(now, action.id, Ok(honest(action.work)));
    }
    now = Duration::from_secs(1);
    let secure = next(&mut core, &mut now).unwrap();
    assert_eq!(secure.work, Work::Secure);
    let copy = next(&mut core, &mut now).unwrap();
    assert!(matches!(copy.work, Work::Copy { .. }));
    now = Duration::from_secs(9);
    core.finished(now, copy.id, Ok(honest(copy.work)));
    assert!(matches!(next(&mut core, &mut now).unwrap().work, Work::Copy { .. }));
    // It took eight seconds: the next one is not before twenty-four more have passed.
    core.finished(now, secure.id, Ok(Done::Flushed));
    now = Duration::from_secs(32);
    assert!(matches!(next(&mut core, &mut now).unwrap().work, Work::Copy { .. }));
    now = Duration::from_secs(33);
    assert_eq!(next(&mut core, &mut now).unwrap().work, Work::Secure);
}

/// Answers to surveys that were under way when the target lost something are not trusted, but those to later ones are: where
/// many surveys were under way, one after the other, all were thrown away for ever.
#[test]
fn surveys_begun_after_a_loss_count_while_earlier_ones_are_under_way() {
    let mut core = core_with(8 * M, MirrorOptions::new(), forgetful());
    let mut now = Duration::ZERO;
    // A first copy, to have something that can be lost.
    let first = next(&mut core, &mut now).unwrap();
    let Work::Survey { range, .. } = first.work else { panic!("{first:?}") };
    let need = Need::Copy { target_zero: false };
    let begin = ByteRange::new(0, M);
    core.finished(now, first.id, Ok(Done::Surveyed(vec![Segment { range: begin, need, below: false }])));
    let early = next(&mut core, &mut now).unwrap();
    assert!(matches!(early.work, Work::Survey { range: rest, .. } if rest == ByteRange::new(M, range.end())));
    let copy = next(&mut core, &mut now).unwrap();
    core.finished(now, copy.id, Ok(honest(copy.work)));
    now = Duration::from_secs(1);
    let secure = next(&mut core, &mut now).unwrap();
    assert_eq!(secure.work, Work::Secure);
    core.finished(now, secure.id, Err(failure(Operation::Write, ErrorKind::WritesLost)));
    let late = next(&mut core, &mut now).unwrap();
    assert!(matches!(late.work, Work::Survey { range, .. } if range == begin), "{late:?}");
    core.finished(now, late.id, Ok(honest(late.work)));
    let copy = next(&mut core, &mut now).unwrap();
    assert!(matches!(copy.work, Work::Copy { range, .. } if range == begin), "{copy:?}");
    core.finished(now, early.id, Ok(honest(early.work)));
    let again = next(&mut core, &mut now).unwrap();
    assert!(matches!(again.work, Work::Survey { range, .. } if range.start() == M), "{again:?}");
}
