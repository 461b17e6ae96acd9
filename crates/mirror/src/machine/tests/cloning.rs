//! Clones: what cannot be cloned is copied, what was not reached is cloned next, and a mark that comes
//! meanwhile makes the job copy once more.

use std::time::Duration;

use super::super::*;
use super::{M, core, drive, failure, honest};
use crate::options::{MirrorOptions, OnError};
use crate::scan::{CopyAction, CopyExtent};

fn shared(range: ByteRange) -> Done {
    let action = CopyAction::Clone { target_zero: true };
    Done::Scanned(vec![CopyExtent { range, action, below: false }])
}

fn cloned(end: u64, rest: &[ByteRange]) -> Done {
    Done::Cloned(Cloned { end, rest: rest.to_vec(), calls: 1 })
}

#[test]
fn what_cannot_be_cloned_is_copied_and_what_was_not_reached_is_cloned_next() {
    let mut core = core(8 * M, MirrorOptions::new());
    let mut now = Duration::ZERO;
    let log = drive(&mut core, &mut now, |work| {
        Ok(match work {
            Work::Scan { range, .. } => shared(range),
            // The first stops half-way, and leaves two pieces.
            Work::Clone { range, .. } if range.start() == 0 => {
                assert_eq!(range.end(), 8 * M, "a clone is not cut as copies are");
                cloned(4 * M, &[ByteRange::new(0, 4096), ByteRange::new(M, 2 * M)])
            }
            Work::Clone { range, .. } => cloned(range.end(), &[]),
            work => honest(work),
        })
    });
    let copies: Vec<_> = log
        .iter()
        .filter_map(|work| match work {
            Work::Copy { range, target_zero, .. } => Some((range.start(), range.end(), *target_zero)),
            _ => None,
        })
        .collect();
    assert_eq!(copies.iter().map(|copy| copy.1 - copy.0).sum::<u64>(), M + 4096, "{copies:?}");
    assert!(copies.iter().all(|copy| !copy.2), "a clone that fails may have written: zeros are not left out");
    assert!(core.take_result().unwrap().is_ok());
    let progress = core.progress(now);
    assert_eq!((progress.shared, progress.copied), (7 * M - 4096, M + 4096));
    assert_eq!((progress.clone_calls, progress.offset), (2, 8 * M));
}

#[test]
fn a_mark_during_a_clone_makes_the_job_copy_again() {
    let mut core = core(M, MirrorOptions::new());
    let mut now = Duration::ZERO;
    let (mut scans, mut clones) = (0, 0);
    loop {
        match core.next(now) {
            Next::Do(action) => {
                let done = match action.work {
                    Work::Scan { range, .. } => {
                        scans += 1;
                        // Marked after the scan and before the clone: the clone takes it along.
                        core.mark_dirty(ByteRange::new(0, 4096));
                        shared(range)
                    }
                    Work::Clone { range, .. } => {
                        clones += 1;
                        if clones == 1 {
                            core.mark_dirty(ByteRange::new(8192, 12288));
                        }
                        cloned(range.end(), &[])
                    }
                    work => honest(work),
                };
                core.on_completion(now, action.id, Ok(done));
            }
            Next::Wait(Some(until)) => now = until,
            Next::Wait(None) | Next::Finished => break,
        }
        assert!(scans < 10, "no end");
        if scans == 2 {
            // The second scan is for what was marked during the clone.
            assert_eq!(clones, 1);
            break;
        }
    }
    assert_eq!((scans, clones), (2, 1));
}

#[test]
fn a_range_that_failed_is_copied() {
    let mut core = core(M, MirrorOptions::new().on_source_error(OnError::Ignore));
    let mut now = Duration::ZERO;
    let mut clones = 0;
    let log = drive(&mut core, &mut now, |work| {
        Ok(match work {
            Work::Scan { range, .. } => shared(range),
            Work::Clone { .. } => {
                clones += 1;
                return Err(failure(Operation::Read, block::ErrorKind::Io));
            }
            work => honest(work),
        })
    });
    assert_eq!(clones, 1);
    assert!(log.iter().any(|work| matches!(work, Work::Copy { .. })), "{log:?}");
    assert!(core.take_result().unwrap().is_ok());
    assert_eq!(core.progress(now).copied, M);
}
