//! Errors of both disks: policies, tries, what is given up, and flushes that fail.

use super::super::work::{MAX_GIVEN_UP, MAX_TRIES};
use super::*;

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
            let scan = next(&mut core, now).unwrap();
            core.on_completion(*now, scan.id, Ok(honest(scan.work)));
            let copy = next(&mut core, now).unwrap();
            core.on_completion(*now, copy.id, Err(failure(side, kind)));
            assert_eq!(core.work.left(), M, "dirty again, whatever the policy");
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
    let scan = take_all(&mut core).remove(0);
    core.on_completion(Duration::ZERO, scan.id, Ok(honest(scan.work)));
    let copies = take_all(&mut core);
    core.on_completion(Duration::ZERO, copies[0].id, Err(failure(Operation::Write, ErrorKind::NoSpace)));
    core.on_completion(Duration::ZERO, copies[1].id, Err(failure(Operation::Write, ErrorKind::Io)));
    core.on_completion(Duration::ZERO, copies[2].id, Ok(honest(copies[2].work)));
    assert!(take_all(&mut core).is_empty(), "stopped");
    assert_eq!(core.progress(Duration::ZERO).io_status, IoStatus::NoSpace);
    core.resume().unwrap();
    assert_eq!(core.progress(Duration::ZERO).io_status, IoStatus::Ok);
    core.on_completion(Duration::ZERO, copies[3].id, Ok(honest(copies[3].work)));
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
fn ignore_leaves_one_small_range_out_after_ten_delayed_tries() {
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
                core.on_completion(now, action.id, result);
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
        core.on_completion(now, action.id, result);
    }
    assert_eq!(tries, 2 * MAX_TRIES - 1);
    assert_eq!(core.given_up().len(), 1);
}

#[test]
fn the_list_of_failed_ranges_is_capped() {
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
    assert_eq!(core.take_events().len(), outbox::MAX_EVENTS, "events are capped as well");
}

/// A block that the full list had no room for counted as copied: a checkpoint had it for good.
#[test]
fn what_is_lost_past_the_cap_of_the_list_is_not_copied() {
    let len = (MAX_GIVEN_UP as u64 + 10) * 8192;
    let mut core = core(len, MirrorOptions::new().on_source_error(OnError::Ignore));
    let device = |work| match work {
        Work::Copy { range, by_block: true, .. } => {
            let bad = range.pieces(4096).filter(|block| block.start() % 8192 == 0);
            let lost = bad.map(|block| (block, failure(Operation::Read, ErrorKind::Io).error));
            Ok(Done::Salvaged(Moved::default(), lost.collect()))
        }
        Work::Copy { .. } => Err(failure(Operation::Read, ErrorKind::Io)),
        work => Ok(honest(work)),
    };
    drive(&mut core, &mut Duration::default(), device);
    let error = core.take_result().unwrap().unwrap_err();
    assert!(matches!(error, Error::TooManyGivenUp { limit: MAX_GIVEN_UP, .. }), "{error}");
    assert_eq!(core.given_up().len(), MAX_GIVEN_UP);
    let left = core.not_copied();
    for lost in (0..len).step_by(8192).map(|at| ByteRange::new(at, at + 4096)) {
        assert!(left.iter().any(|range| range.contains_range(lost)), "{lost:?} counts as copied");
    }
}

#[test]
fn a_scan_that_fails_narrows_down_to_the_fault() {
    let mut core = core(1 << 40, MirrorOptions::new().on_source_error(OnError::Ignore));
    let bad = 77 << 30;
    let device = |work| match work {
        Work::Scan { range, .. } if range.contains(bad) => Err(failure(Operation::Read, ErrorKind::Io)),
        Work::Scan { range, .. } => {
            Ok(Done::Scanned(vec![CopyExtent { range, action: CopyAction::Skip, below: false }]))
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
