//! One test per rule about guests and ends, scripted, on a virtual clock.

use std::time::Duration;

use blockmirror_block::{self as block, ErrorKind, Geometry};

use super::*;
use crate::options::{BitmapMode, CopyMode, DEFAULT_FINAL_FLUSH_TIMEOUT, MirrorOptions, OnError, SyncMode};
use crate::progress::IoStatus;
use crate::scan::{CopyAction, CopyExtent};
use crate::state::{Refused, Verb};

const M: u64 = 1 << 20;
const NOW: Duration = Duration::ZERO;

fn core_of(options: MirrorOptions) -> Core {
    let mut config = Config::new(&options, 65_536, M, Geometry::plain());
    config.live = true;
    Core::new(config).unwrap()
}

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

fn next(core: &mut Core) -> Option<Action> {
    match core.next(NOW) {
        Next::Do(action) => Some(action),
        Next::Wait(_) | Next::Finished => None,
    }
}

/// Performs everything that can be done, as honest devices do; what came out.
fn drive(core: &mut Core) -> Vec<Work> {
    let mut log = Vec::new();
    while let Some(action) = next(core) {
        log.push(action.work);
        core.on_completion(NOW, action.id, Ok(honest(action.work)));
    }
    log
}

/// Performs honestly until an action like `stop` is handed out, which is left under way.
fn drive_until(core: &mut Core, stop: impl Fn(Work) -> bool) -> Action {
    loop {
        let action = next(core).unwrap();
        if stop(action.work) {
            return action;
        }
        core.on_completion(NOW, action.id, Ok(honest(action.work)));
    }
}

fn ready(options: MirrorOptions) -> Core {
    let mut core = core_of(options);
    drive(&mut core);
    assert_eq!(core.progress(NOW).state, JobState::Ready);
    core.take_events();
    core
}

fn copies(log: &[Work]) -> Vec<(u64, u64)> {
    let copy = |work: &Work| match work {
        Work::Copy { range, .. } => Some((range.start(), range.end())),
        _ => None,
    };
    log.iter().filter_map(copy).collect()
}

fn begin(core: &mut Core, start: u64, end: u64) -> (u64, Admission) {
    let id = core.on_guest_write(ByteRange::new(start, end));
    (id, core.guest_admit(id))
}

fn blocking() -> MirrorOptions {
    MirrorOptions::new().copy_mode(CopyMode::WriteBlocking)
}

fn io_error() -> block::Error {
    block::Error::new(ErrorKind::Io, "test")
}

/// Rule 1: were it marked when it begins, a copy in between would take the old bytes, and none would follow.
#[test]
fn a_write_is_marked_when_it_has_finished_whether_or_not_it_succeeded() {
    for ok in [true, false] {
        let mut core = ready(MirrorOptions::new());
        let (id, admission) = begin(&mut core, 5000, 5001);
        assert_eq!(admission, Admission::SourceOnly);
        assert!(drive(&mut core).is_empty(), "nothing is dirty yet");
        core.guest_finished(id, ok, None);
        assert_eq!(copies(&drive(&mut core)), [(4096, 8192)]);
    }
}

/// Rule 3: two operations on one range never run together, whichever began first.
#[test]
fn a_write_through_waits_for_the_copy_under_way_and_no_copy_begins_where_one_waits() {
    let mut core = ready(blocking());
    core.mark_dirty(ByteRange::new(0, 8192));
    let copy = drive_until(&mut core, |work| matches!(work, Work::Copy { .. }));
    let (first, admission) = begin(&mut core, 100, 200);
    assert_eq!(admission, Admission::Wait);
    core.mark_dirty(ByteRange::new(0, 4096));
    core.on_completion(NOW, copy.id, Ok(honest(copy.work)));
    assert!(next(&mut core).is_none(), "a write waits there");
    assert_eq!(core.guest_admit(first), Admission::SourceAndTarget);
    assert!(next(&mut core).is_none(), "a write is under way there");
    // The next writer of the same bytes takes its turn; one elsewhere need not.
    let (second, admission) = begin(&mut core, 150, 160);
    assert_eq!(admission, Admission::Wait);
    assert_eq!(begin(&mut core, 9000, 9001).1, Admission::SourceAndTarget);
    core.guest_finished(first, true, Some(Ok(())));
    assert_eq!(core.guest_admit(second), Admission::Wait, "the job was kept waiting: it comes first");
    assert_eq!(copies(&drive(&mut core)), [(0, 4096)]);
    assert_eq!(core.guest_admit(second), Admission::SourceAndTarget);
}

/// Rule 5.
#[test]
fn an_unaligned_write_through_cleans_whole_units_only() {
    let mut core = ready(blocking());
    core.pause().unwrap();
    core.mark_dirty(ByteRange::new(0, 16_384));
    core.resume().unwrap();
    let (id, admission) = begin(&mut core, 4000, 12_300);
    assert_eq!(admission, Admission::SourceAndTarget);
    core.guest_finished(id, true, Some(Ok(())));
    assert_eq!(copies(&drive(&mut core)), [(0, 4096), (12_288, 16_384)], "the cut ends stay dirty");
    // Clean ones stay clean: both sides have the bytes.
    let (id, _) = begin(&mut core, 4000, 4100);
    core.guest_finished(id, true, Some(Ok(())));
    assert!(drive(&mut core).is_empty());
    assert_eq!(core.progress(NOW).mirrored, 8300 + 100);
}

#[test]
fn a_write_through_that_fails_on_either_side_is_copied_again() {
    for (source, target) in [(false, None), (true, Some(Err(io_error()))), (true, None)] {
        let mut core = ready(blocking().on_target_error(OnError::Ignore));
        let (id, _) = begin(&mut core, 4096, 8192);
        core.guest_finished(id, source, target);
        assert_eq!(copies(&drive(&mut core)), [(4096, 8192)]);
    }
}

/// A mark that arrives while a write goes through must outlive it: the two may have reached source and target
/// in different orders.
#[test]
fn a_mark_during_a_write_through_stays() {
    let mut core = ready(blocking());
    let (id, _) = begin(&mut core, 0, 4096);
    core.mark_dirty(ByteRange::new(0, 1));
    core.guest_finished(id, true, Some(Ok(())));
    assert_eq!(copies(&drive(&mut core)), [(0, 4096)]);
}

#[test]
fn what_was_queued_where_the_guest_writes_through_is_left_to_the_guest() {
    let mut core = core_of(blocking().max_in_flight(1));
    let scan = next(&mut core).unwrap();
    // A scan that has looked already, and one whose answer is queued.
    let (early, admission) = begin(&mut core, 0, 4096);
    assert_eq!(admission, Admission::SourceAndTarget, "a scan moves nothing: no need to wait");
    core.guest_finished(early, true, Some(Ok(())));
    let zeros = vec![CopyExtent { range: ByteRange::new(0, M), action: CopyAction::Zero, below: false }];
    core.on_completion(NOW, scan.id, Ok(Done::Scanned(zeros)));
    let (late, _) = begin(&mut core, 8192, 12_288);
    core.guest_finished(late, true, Some(Ok(())));
    let log = drive(&mut core);
    let zeroed = |at| log.iter().any(|work| matches!(work, Work::Zero { range, .. } if range.contains(at)));
    assert!(zeroed(4096) && zeroed(12_288));
    assert!(!zeroed(0) && !zeroed(8192), "old answers would wipe out what the guest wrote: {log:?}");
    let Progress { offset, len, .. } = core.progress(NOW);
    assert_eq!((offset, len), (M, M), "what the guest wrote itself is done, too");
}

#[test]
fn a_paused_job_keeps_its_hands_off_the_target() {
    let mut core = ready(blocking());
    core.pause().unwrap();
    let (id, admission) = begin(&mut core, 0, 512);
    assert_eq!(admission, Admission::SourceOnly);
    core.guest_finished(id, true, None);
    assert!(next(&mut core).is_none());
    assert!(!core.progress(NOW).actively_synced);
    core.resume().unwrap();
    drive(&mut core);
    assert!(core.progress(NOW).actively_synced);
}

/// Rule 4.
#[test]
fn the_guest_is_quiesced_from_the_final_check_to_the_pivot() {
    let mut core = ready(MirrorOptions::new());
    let (old, _) = begin(&mut core, 0, 512);
    core.complete().unwrap();
    assert!(next(&mut core).is_none(), "a write is under way");
    let (new, admission) = begin(&mut core, 8192, 8193);
    assert_eq!(admission, Admission::Wait, "held");
    core.guest_finished(old, true, None);
    let end = drive_until(&mut core, |work| matches!(work, Work::End(_)));
    assert_eq!(end.work, Work::End(Ending::Pivot));
    assert_eq!(core.guest_admit(new), Admission::Wait);
    assert_eq!(core.progress(NOW).offset, M + 4096, "the old write was copied first");
    assert!(next(&mut core).is_none());
    assert_eq!(core.pause(), Err(Refused::State { verb: Verb::Pause, state: JobState::Waiting }));
    core.on_completion(NOW, end.id, Ok(Done::Ended));
    assert_eq!(core.guest_admit(new), Admission::JobEnded);
    assert!(core.take_result().unwrap().is_ok());
}

/// Rules 4 and 10.
#[test]
fn dirt_or_a_failed_flush_at_the_final_check_resumes_the_guest() {
    let mut core = ready(MirrorOptions::new().on_target_error(OnError::Stop));
    core.complete().unwrap();
    let flush = next(&mut core).unwrap();
    assert_eq!(flush.work, Work::Flush);
    let (guest, admission) = begin(&mut core, 0, 1);
    assert_eq!(admission, Admission::Wait);
    core.on_completion(NOW, flush.id, Err(Failure { operation: Operation::Write, error: io_error() }));
    assert_eq!(core.progress(NOW).state, JobState::Standby);
    assert_eq!(core.guest_admit(guest), Admission::SourceOnly);
    core.guest_finished(guest, true, None);
    core.resume().unwrap();
    let flush = drive_until(&mut core, |work| work == Work::Flush);
    core.mark_dirty(ByteRange::new(0, M));
    let (guest, _) = begin(&mut core, 0, 1);
    core.on_completion(NOW, flush.id, Ok(Done::Flushed));
    assert_eq!(core.guest_admit(guest), Admission::SourceOnly, "dirty again: the guest is not quiesced");
    core.guest_finished(guest, true, None);
    let log = drive(&mut core);
    assert_eq!(log.last(), Some(&Work::End(Ending::Pivot)));
    assert!(log[..log.len() - 1].ends_with(&[Work::Flush]), "{log:?}");
}

/// A flush that a pause has overtaken once counted for the next hold, though the guest had written to the
/// target since.
#[test]
fn only_a_flush_that_began_while_the_guest_is_quiesced_counts() {
    let mut core = ready(blocking());
    core.complete().unwrap();
    let early = next(&mut core).unwrap();
    assert_eq!(early.work, Work::Flush);
    core.pause().unwrap();
    core.resume().unwrap();
    let (id, admission) = begin(&mut core, 0, 512);
    assert_eq!(admission, Admission::SourceAndTarget);
    core.guest_finished(id, true, Some(Ok(())));
    assert!(next(&mut core).is_none());
    assert_eq!(begin(&mut core, 0, 1).1, Admission::Wait, "held again");
    core.on_completion(NOW, early.id, Ok(Done::Flushed));
    assert_eq!(next(&mut core).unwrap().work, Work::Flush);
}

/// A thread that has one write open and waits to begin another waited for itself for ever.
#[test]
fn quiescing_has_a_limit_that_doubles() {
    let second = Duration::from_secs(1);
    let mut core = ready(blocking());
    let (open, _) = begin(&mut core, 0, 512);
    core.complete().unwrap();
    assert!(next(&mut core).is_none(), "a write is under way");
    let (other, admission) = begin(&mut core, 4096, 4097);
    assert_eq!((admission, core.overdue_at()), (Admission::Wait, Some(second)));
    assert!(!core.resume_if_overdue(second / 2));
    assert!(core.resume_if_overdue(second));
    assert_eq!(core.guest_admit(other), Admission::SourceAndTarget);
    for id in [open, other] {
        core.guest_finished(id, true, Some(Ok(())));
    }
    // The guest is resumed for as long as it was quiesced.
    assert!(matches!(core.next(second), Next::Wait(Some(until)) if until == 2 * second));
    let Next::Do(flush) = core.next(2 * second) else { panic!("quiesced, and no write is under way") };
    assert_eq!((flush.work, core.overdue_at()), (Work::Flush, Some(4 * second)));
    core.on_completion(3 * second, flush.id, Ok(Done::Flushed));
    let Next::Do(end) = core.next(3 * second) else { panic!("clean and flushed") };
    assert_eq!((end.work, core.overdue_at()), (Work::End(Ending::Pivot), None));
    assert!(!core.resume_if_overdue(9 * second), "not between the final check and the end");
}

/// It once forgot the error and went on.
#[test]
fn what_an_error_has_stopped_is_not_finalized() {
    let mut core = ready(MirrorOptions::new().auto_finalize(false).on_target_error(OnError::Stop));
    core.complete().unwrap();
    drive(&mut core);
    assert_eq!(core.progress(NOW).state, JobState::Pending);
    assert_eq!(core.resume(), Err(Refused::State { verb: Verb::Resume, state: JobState::Pending }));
    core.mark_dirty(ByteRange::new(0, 1));
    let copy = drive_until(&mut core, |work| matches!(work, Work::Copy { .. }));
    core.on_completion(NOW, copy.id, Err(Failure { operation: Operation::Write, error: io_error() }));
    assert_eq!(core.finalize(), Err(Refused::Paused { verb: Verb::Finalize }));
    let progress = core.progress(NOW);
    assert_eq!((progress.state, progress.io_status), (JobState::Pending, IoStatus::Failed));
    assert!(next(&mut core).is_none());
    core.resume().unwrap();
    core.finalize().unwrap();
    let log = drive(&mut core);
    assert_eq!((copies(&log), log.last()), (vec![(0, 4096)], Some(&Work::End(Ending::Pivot))));
}

/// Rule 11.
#[test]
fn ready_comes_after_a_good_flush_and_once() {
    let mut core = core_of(MirrorOptions::new().on_target_error(OnError::Stop));
    let flush = drive_until(&mut core, |work| work == Work::Flush);
    assert_eq!(core.progress(NOW).state, JobState::Running);
    core.on_completion(NOW, flush.id, Err(Failure { operation: Operation::Write, error: io_error() }));
    assert_eq!(core.progress(NOW).state, JobState::Paused);
    core.resume().unwrap();
    let again: u64 = copies(&drive(&mut core)).iter().map(|(start, end)| end - start).sum();
    assert_eq!(again, M, "what the flush may have lost is copied again");
    let progress = core.progress(NOW);
    assert_eq!((progress.state, progress.offset), (JobState::Ready, progress.len));
    core.mark_dirty(ByteRange::new(0, 1));
    drive(&mut core);
    let readies = core.take_events().into_iter().filter(|event| *event == Event::Ready).count();
    assert_eq!(readies, 1);
}

/// Only what was written since the last good flush can be lost in a failed one.
#[test]
fn a_failed_flush_after_ready_copies_only_what_came_since() {
    let mut core = ready(MirrorOptions::new().on_target_error(OnError::Stop));
    core.mark_dirty(ByteRange::new(8192, 8193));
    drive(&mut core);
    core.complete().unwrap();
    let flush = next(&mut core).unwrap();
    core.on_completion(NOW, flush.id, Err(Failure { operation: Operation::Write, error: io_error() }));
    core.resume().unwrap();
    assert_eq!(copies(&drive(&mut core)), [(8192, 12_288)]);
}

#[test]
fn a_job_on_a_tap_never_leaves_a_range_out() {
    let mut core = core_of(MirrorOptions::new().on_source_error(OnError::Ignore));
    let mut now = NOW;
    let mut tries = 0;
    while core.progress(now).state == JobState::Running {
        match core.next(now) {
            Next::Do(Action { id, work: Work::Copy { .. } }) if tries < 40 => {
                tries += 1;
                core.on_completion(now, id, Err(Failure { operation: Operation::Read, error: io_error() }));
            }
            Next::Do(action) => core.on_completion(now, action.id, Ok(honest(action.work))),
            Next::Wait(until) => now = until.unwrap(),
            Next::Finished => panic!("ended"),
        }
    }
    let progress = core.progress(now);
    assert_eq!((progress.state, progress.given_up, progress.copied), (JobState::Ready, 0, M));
}

/// What was promised of the target ("it is zero") does not hold where the guest has been, though nothing was
/// copied there.
#[test]
fn a_promise_about_the_target_ends_with_the_first_write_through() {
    for written_during_scan in [false, true] {
        let mut core = core_of(blocking());
        let scan = next(&mut core).unwrap();
        assert!(matches!(scan.work, Work::Scan { untouched: true, .. }));
        let prefix = CopyExtent { range: ByteRange::new(0, 65_536), action: CopyAction::Skip, below: false };
        core.on_completion(NOW, scan.id, Ok(Done::Scanned(vec![prefix])));
        if written_during_scan {
            let (id, _) = begin(&mut core, M / 2, M / 2 + 1);
            core.guest_finished(id, true, Some(Ok(())));
        }
        let scan = next(&mut core).unwrap();
        let Work::Scan { first_pass: true, untouched, .. } = scan.work else { panic!("{scan:?}") };
        assert_eq!(untouched, !written_during_scan);
    }
}

/// A write through that is under way during a flush may land after it, so the next failed flush may lose it.
#[test]
fn a_write_through_under_way_during_a_flush_is_not_durable_by_it() {
    let mut core = core_of(blocking().on_target_error(OnError::Stop));
    let last_copy =
        drive_until(&mut core, |work| matches!(work, Work::Copy { range, .. } if range.end() == M));
    let (id, admission) = begin(&mut core, 4096, 8192);
    assert_eq!(admission, Admission::SourceAndTarget);
    core.on_completion(NOW, last_copy.id, Ok(honest(last_copy.work)));
    drive(&mut core);
    assert_eq!(core.progress(NOW).state, JobState::Ready, "a guest that keeps writing does not put it off");
    core.guest_finished(id, true, Some(Ok(())));
    core.complete().unwrap();
    let flush = next(&mut core).unwrap();
    core.on_completion(NOW, flush.id, Err(Failure { operation: Operation::Write, error: io_error() }));
    core.resume().unwrap();
    assert_eq!(copies(&drive(&mut core)), [(4096, 8192)]);
}

/// A core whose bitmap said to copy the first 64 KiB, and which is about to be ready: its last flush is in
/// flight.
fn core_with_a_bitmap_at_its_flush() -> (Core, Action) {
    let sync = MirrorOptions::new().sync(SyncMode::Bitmap).bitmap("b", BitmapMode::Always);
    let mut core = core_of(sync);
    let mut map = DirtyBitmap::new(M, 65_536).unwrap();
    map.set(0..1);
    core.seed(&map);
    let flush = drive_until(&mut core, |work| work == Work::Flush);
    (core, flush)
}

fn failed_with(kind: ErrorKind) -> Result<Done, Failure> {
    Err(Failure { operation: Operation::Write, error: block::Error::new(kind, "test") })
}

/// The last step of an aborted job, and what its bitmap keeps.
fn missing_at_the_end(core: &mut Core) -> Vec<ByteRange> {
    let end = next(core).unwrap();
    assert_eq!(end.work, Work::End(Ending::Fail));
    let missing = core.missing();
    core.on_completion(NOW, end.id, Ok(Done::Ended));
    assert!(matches!(core.take_result(), Some(Err(Error::Cancelled))));
    missing
}

#[test]
fn what_no_good_flush_has_covered_stays_in_a_bitmap_that_is_cut() {
    for (in_flight, good) in [(false, false), (false, true), (true, false), (true, true)] {
        let (mut core, flush) = core_with_a_bitmap_at_its_flush();
        if !in_flight {
            core.on_completion(NOW, flush.id, Ok(Done::Flushed));
            assert_eq!(core.progress(NOW).state, JobState::Ready);
            core.mark_dirty(ByteRange::new(0, 65_536));
            for work in drive(&mut core) {
                assert_ne!(work, Work::Flush, "the end was not asked for");
            }
        }
        core.force_cancel().unwrap();
        if in_flight {
            core.on_completion(NOW, flush.id, failed_with(ErrorKind::Cancelled));
        }
        let last = next(&mut core).unwrap();
        assert_eq!(last.work, Work::Flush, "once more, for the bitmap");
        assert!(!core.may_cancel_calls(NOW) && core.may_cancel_calls(NOW + DEFAULT_FINAL_FLUSH_TIMEOUT));
        core.on_completion(NOW, last.id, if good { Ok(Done::Flushed) } else { failed_with(ErrorKind::Io) });
        let missing = if good { vec![] } else { vec![ByteRange::new(0, 65_536)] };
        assert_eq!(missing_at_the_end(&mut core), missing);
    }
}

/// A flush that failed while the job aborted may have lost what it should have covered. Another one
/// succeeded, and the bitmap forgot all of it.
#[test]
fn a_bitmap_that_is_cut_keeps_what_a_failed_flush_may_have_lost() {
    for kind in [ErrorKind::Io, ErrorKind::WritesLost] {
        let (mut core, flush) = core_with_a_bitmap_at_its_flush();
        core.force_cancel().unwrap();
        core.on_completion(NOW, flush.id, failed_with(kind));
        assert_eq!(missing_at_the_end(&mut core), [ByteRange::new(0, 65_536)], "{kind:?}");
    }
}

/// Writers who take turns on one dirty unit once kept the job from it for ever, so that it was never ready.
#[test]
fn writers_in_turns_on_a_dirty_unit_do_not_starve_the_job() {
    let mut core = ready(blocking());
    let (mut one, _) = begin(&mut core, 0, 8);
    core.mark_dirty(ByteRange::new(0, 1));
    for turn in 1..4 {
        let (two, admission) = begin(&mut core, 100 * turn, 100 * turn + 8);
        core.next(NOW);
        assert!(admission == Admission::SourceAndTarget || core.guest_admit(two) == Admission::Wait);
        core.guest_finished(one, true, Some(Ok(())));
        if admission == Admission::Wait {
            assert_eq!(copies(&drive(&mut core)), [(0, 4096)]);
            assert_eq!(core.guest_admit(two), Admission::SourceAndTarget);
            return;
        }
        one = two;
    }
    panic!("the job never had its turn");
}

/// What the guest wrote during one scan says nothing about a later one, though a third has been under way
/// all the time.
#[test]
fn a_scan_is_not_cut_by_writes_that_came_before_it() {
    let mut core = ready(blocking());
    core.mark_dirty(ByteRange::new(0, 4096));
    core.mark_dirty(ByteRange::new(65_536, 65_537));
    let (first, _other) = (next(&mut core).unwrap(), next(&mut core).unwrap());
    assert!(matches!(first.work, Work::Scan { range, .. } if range.start() == 0));
    let (id, _) = begin(&mut core, 0, 100);
    core.guest_finished(id, true, Some(Ok(())));
    core.on_completion(NOW, first.id, Ok(honest(first.work)));
    // A large discard, say, which is left to the job.
    let id = core.on_guest_write(ByteRange::new(0, 100));
    assert_eq!(core.guest_admit(id), Admission::SourceAndTarget);
    core.guest_finished(id, true, None);
    let log = drive(&mut core);
    assert!(copies(&log).contains(&(0, 4096)), "{log:?}");
}

/// A write that failed at the target while the guest was quiesced once stopped the job and left the guest
/// quiesced: all its writes waited for the job to be resumed.
#[test]
fn a_job_that_a_failed_write_stops_resumes_the_guest() {
    let mut core = ready(blocking().on_target_error(OnError::Stop));
    let (under_way, admission) = begin(&mut core, 0, 4096);
    assert_eq!(admission, Admission::SourceAndTarget);
    core.complete().unwrap();
    assert!(next(&mut core).is_none());
    let (later, admission) = begin(&mut core, 8192, 12_288);
    assert_eq!(admission, Admission::Wait, "held");
    core.guest_finished(under_way, true, Some(Err(io_error())));
    assert_eq!(core.progress(NOW).state, JobState::Standby);
    assert_eq!(core.guest_admit(later), Admission::SourceOnly);
}

/// With a low speed the guest was once quiesced until the last bytes had their turn, up to half a mebibyte of
/// them.
#[test]
fn a_speed_limit_does_not_keep_a_quiesced_guest_waiting() {
    let mut core = ready(MirrorOptions::new());
    core.set_speed(NOW, 1).unwrap();
    // Uses the speed up for long.
    core.mark_dirty(ByteRange::new(500_000, 500_001));
    assert_eq!(copies(&drive(&mut core)).len(), 1);
    core.mark_dirty(ByteRange::new(0, 4096));
    core.complete().unwrap();
    let log = drive(&mut core);
    assert_eq!(log.last(), Some(&Work::End(Ending::Pivot)), "{log:?}");
}

/// A tap that panicked while it performed the pivot took the job from `ready` to `concluded`, a move that the
/// state table does not have.
#[test]
fn a_panic_in_the_last_step_aborts_the_job() {
    let mut core = ready(MirrorOptions::new());
    core.complete().unwrap();
    let end = drive_until(&mut core, |work| matches!(work, Work::End(_)));
    core.take_events();
    core.panicked(NOW, end.id);
    assert!(matches!(core.take_result(), Some(Err(Error::Panicked))));
    let states = [JobState::Aborting, JobState::Concluded].map(Event::Status);
    let events = core.take_events();
    assert_eq!((&events[0], &events[2]), (&states[0], &states[1]), "{events:?}");
}

/// An abort before the tap reported that it had moved was refused, and nothing ended the job while the old
/// disk was read.
#[test]
fn an_abort_in_the_last_step_waits_for_no_read() {
    let mut core = ready(MirrorOptions::new());
    core.complete().unwrap();
    let end = drive_until(&mut core, |work| matches!(work, Work::End(_)));
    core.abort(Error::Cancelled);
    assert!(core.take_result().is_none());
    core.guest_has_moved();
    assert!(core.take_result().unwrap().is_ok(), "it has pivoted");
    core.on_completion(NOW, end.id, Ok(Done::StillRead));
    core.on_completion(NOW, end.id, Ok(Done::Ended));
}
