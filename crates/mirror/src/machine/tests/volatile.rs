//! Targets that forget what was not flushed.

use super::*;

fn volatile() -> Geometry {
    let mut geometry = Geometry::plain();
    geometry.forgetful = true;
    geometry
}

/// A disk copied for hours to a server that was lost for a moment was copied again from the start: nothing
/// had been flushed.
#[test]
fn what_a_volatile_target_lost_is_what_was_written_since_a_second_ago() {
    let mut core = core_with(8 * M, MirrorOptions::new(), volatile());
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
        core.on_completion(now, action.id, result);
    }
    let periodic_flushes = log.iter().filter(|work| **work == Work::PeriodicFlush).count();
    // After the third, the sixth; the flush at the end takes two along. The policy, which is to report, was
    // not asked.
    assert_eq!((periodic_flushes, copied), (2, 8 + 2), "{log:?}");
    assert_eq!(errors(&mut core), []);
    assert!(core.take_result().unwrap().is_ok());
}

/// To make durable what was written takes a thread, not the job: other operations go on.
#[test]
fn a_periodic_flush_delays_no_operation_and_is_alone() {
    let mut core = core_with(8 * M, MirrorOptions::new(), volatile());
    let mut now = Duration::ZERO;
    for _ in 0..2 {
        let action = next(&mut core, &mut now).unwrap();
        core.on_completion(now, action.id, Ok(honest(action.work)));
    }
    now = Duration::from_secs(1);
    let secure = next(&mut core, &mut now).unwrap();
    assert_eq!(secure.work, Work::PeriodicFlush);
    let copy = next(&mut core, &mut now).unwrap();
    assert!(matches!(copy.work, Work::Copy { .. }));
    now = Duration::from_secs(9);
    core.on_completion(now, copy.id, Ok(honest(copy.work)));
    assert!(matches!(next(&mut core, &mut now).unwrap().work, Work::Copy { .. }));
    // It took eight seconds: the next one is not before twenty-four more have passed.
    core.on_completion(now, secure.id, Ok(Done::Flushed));
    now = Duration::from_secs(32);
    assert!(matches!(next(&mut core, &mut now).unwrap().work, Work::Copy { .. }));
    now = Duration::from_secs(33);
    assert_eq!(next(&mut core, &mut now).unwrap().work, Work::PeriodicFlush);
}

/// Answers to scans that were under way when the target lost something are not trusted, but those to later
/// ones are: where many scans were under way, one after the other, all were thrown away for ever.
#[test]
fn scans_begun_after_a_loss_count_while_earlier_ones_are_under_way() {
    let mut core = core_with(8 * M, MirrorOptions::new(), volatile());
    let mut now = Duration::ZERO;
    // A first copy, to have something that can be lost.
    let first = next(&mut core, &mut now).unwrap();
    let Work::Scan { range, .. } = first.work else { panic!("{first:?}") };
    let action = CopyAction::Copy { target_zero: false };
    let begin = ByteRange::new(0, M);
    core.on_completion(
        now,
        first.id,
        Ok(Done::Scanned(vec![CopyExtent { range: begin, action, below: false }])),
    );
    let early = next(&mut core, &mut now).unwrap();
    assert!(matches!(early.work, Work::Scan { range: rest, .. } if rest == ByteRange::new(M, range.end())));
    let copy = next(&mut core, &mut now).unwrap();
    core.on_completion(now, copy.id, Ok(honest(copy.work)));
    now = Duration::from_secs(1);
    let secure = next(&mut core, &mut now).unwrap();
    assert_eq!(secure.work, Work::PeriodicFlush);
    core.on_completion(now, secure.id, Err(failure(Operation::Write, ErrorKind::WritesLost)));
    let late = next(&mut core, &mut now).unwrap();
    assert!(matches!(late.work, Work::Scan { range, .. } if range == begin), "{late:?}");
    core.on_completion(now, late.id, Ok(honest(late.work)));
    let copy = next(&mut core, &mut now).unwrap();
    assert!(matches!(copy.work, Work::Copy { range, .. } if range == begin), "{copy:?}");
    core.on_completion(now, early.id, Ok(honest(early.work)));
    let again = next(&mut core, &mut now).unwrap();
    assert!(matches!(again.work, Work::Scan { range, .. } if range.start() == M), "{again:?}");
}

/// Zeros in a copy under way are left out where the target was found to read as zeros. If the target has lost
/// that zeroing since, the copy counts for nothing, although it succeeds.
#[test]
fn a_copy_under_way_that_leaves_zeros_out_is_done_again_after_a_loss() {
    let mut core = core_with(2 * M, MirrorOptions::new(), volatile());
    let mut now = Duration::ZERO;
    let scan = next(&mut core, &mut now).unwrap();
    let halves = [(ByteRange::new(0, M), false), (ByteRange::new(M, 2 * M), true)];
    let extents = halves.map(|(range, target_zero)| CopyExtent {
        range,
        action: CopyAction::Copy { target_zero },
        below: false,
    });
    core.on_completion(now, scan.id, Ok(Done::Scanned(extents.to_vec())));
    let first = next(&mut core, &mut now).unwrap();
    core.on_completion(now, first.id, Ok(honest(first.work)));
    let second = next(&mut core, &mut now).unwrap();
    assert!(matches!(second.work, Work::Copy { target_zero: true, .. }), "{second:?}");
    now = Duration::from_secs(1);
    let secure = next(&mut core, &mut now).unwrap();
    assert_eq!(secure.work, Work::PeriodicFlush);
    core.on_completion(now, secure.id, Err(failure(Operation::Write, ErrorKind::WritesLost)));
    core.on_completion(now, second.id, Ok(honest(second.work)));
    let mut copied = Vec::new();
    while let Some(action) = next(&mut core, &mut now) {
        if let Work::Copy { range, .. } = action.work {
            copied.push(range);
        }
        core.on_completion(now, action.id, Ok(honest(action.work)));
    }
    let again = copied.iter().map(|range| range.intersect(ByteRange::new(M, 2 * M)).len()).sum::<u64>();
    assert_eq!(again, M, "{copied:?}");
}
