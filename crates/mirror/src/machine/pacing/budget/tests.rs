//! The budget's rules one by one.

use blockmirror_block::Geometry;

use super::*;
use crate::machine::{Action, Admission, Core, Done, Moved, Next, Work};
use crate::options::{CopyMode, MirrorOptions};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn max_copy_size(core: &Core, start: u64) -> u64 {
    core.pacing.max_copy_size(&core.config, start, core.guest_state())
}

fn core_of(budget: Option<Duration>) -> Core {
    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking).latency_budget(budget);
    let mut config = Config::new(&options, 65_536, 1 << 30, Geometry::plain());
    config.live = true;
    Core::new(config).unwrap()
}

#[test]
fn a_percentile_is_right_to_a_quarter_of_an_octave() {
    let mut delays = Delays::default();
    assert_eq!(delays.p99(), None);
    for n in 1..=1000 {
        delays.note(Duration::from_micros(n), Duration::from_micros(990));
    }
    assert!(!delays.too_many_over());
    let p99 = delays.p99().unwrap();
    assert!(p99 >= Duration::from_micros(990) && p99 < Duration::from_micros(1240), "{p99:?}");
    delays.note(Duration::MAX, Duration::from_micros(990));
    assert!(delays.too_many_over());
    delays.note(Duration::ZERO, Duration::ZERO);
}

#[test]
fn copies_are_small_where_the_guest_has_been_and_large_elsewhere() {
    let mut core = core_of(Some(ms(4)));
    let most = core.config.operation;
    core.pacing.copied(&core.config, most, ms(3));
    core.pacing.copied(&core.config, most / 2, ms(3));
    let id = core.on_guest_write(ByteRange::at(0, 4096));
    assert_eq!(max_copy_size(&core, 0), most / 4);
    assert_eq!(max_copy_size(&core, 1 << 29), most, "no guest writes");
    for _ in 0..10 {
        core.pacing.copied(&core.config, 65_536, ms(100));
    }
    assert_eq!(max_copy_size(&core, 0), 65_536);
    core.pacing.copied(&core.config, 65_536, Duration::from_micros(100));
    assert_eq!(max_copy_size(&core, 0), 65_536 * 2);
    core.guest_admit(id);
    core.guest_finished(id, true, Some(Ok(())));
    for at in 0..25 {
        core.on_timer(ms(50 * at));
    }
    assert_eq!(max_copy_size(&core, 0), most, "that was long ago");
}

#[test]
fn regions_cover_disks_of_any_length() {
    for len in [0, 1, 1023, 1024, 1025, 2047, u64::MAX / 2] {
        let options = MirrorOptions::new().latency_budget(ms(1));
        let mut core = Core::new(Config::new(&options, 64 << 20, len, Geometry::plain())).unwrap();
        let mut note = |range| core.pacing.guest_begins(&core.config, range, 1);
        note(ByteRange::new(0, len));
        note(ByteRange::new(len, len));
        note(ByteRange::new(len.saturating_sub(1), len));
        assert_eq!(max_copy_size(&core, len), core.config.operation);
    }
}

fn next(core: &mut Core, now: Duration) -> Action {
    match core.next(now) {
        Next::Do(action) => action,
        wait => panic!("{wait:?}"),
    }
}

fn scan_of(range: ByteRange) -> Done {
    let action = crate::scan::CopyAction::Copy { target_zero: false };
    Done::Scanned(vec![crate::scan::CopyExtent { range, action, below: false }])
}

/// A copy that is stuck, a write that wants to go through there, and its admission timeout.
#[test]
fn a_write_waits_for_the_job_as_long_as_the_budget_and_then_goes_to_the_source() {
    let mut core = core_of(Some(ms(4)));
    let scan = next(&mut core, ms(0));
    core.on_completion(ms(0), scan.id, Ok(scan_of(ByteRange::new(0, 1 << 30))));
    let _other_scan_or_copy = next(&mut core, ms(0));
    let id = core.on_guest_write(ByteRange::at(0, 4096));
    assert_eq!(core.guest_admit(id), Admission::Wait);
    core.on_timer(ms(3));
    assert_eq!(core.guest_admit(id), Admission::Wait);
    core.on_timer(ms(4));
    assert_eq!(core.guest_admit(id), Admission::SourceOnly);
    let dirty = core.progress(ms(4)).dirtied;
    core.guest_finished(id, true, None);
    assert_eq!(core.progress(ms(4)).dirtied, dirty + 4096, "the job copies it later");
}

/// A writer kept the job from a dirty unit, so the job goes next and other writers wait; were its copy to
/// wait for the speed limit, they would too.
#[test]
fn what_writers_wait_for_does_not_wait_for_the_speed_limit() {
    let options =
        MirrorOptions::new().copy_mode(CopyMode::WriteBlocking).sync(crate::options::SyncMode::None);
    let mut config = Config::new(&options.speed(1000), 65_536, 1 << 30, Geometry::plain());
    config.live = true;
    let mut core = Core::new(config).unwrap();
    let in_the_way = core.on_guest_write(ByteRange::at(0, 512));
    assert_eq!(core.guest_admit(in_the_way), Admission::SourceAndTarget);
    core.mark_dirty(ByteRange::at(0, 512));
    assert!(matches!(core.next(ms(0)), Next::Wait(None)), "the guest writes there");
    core.mark_dirty(ByteRange::at(1 << 20, 65_536));
    let scan = next(&mut core, ms(0));
    core.on_completion(ms(0), scan.id, Ok(scan_of(ByteRange::at(1 << 20, 65_536))));
    let copy = next(&mut core, ms(0));
    assert!(matches!(copy.work, Work::Copy { .. }));
    core.on_completion(ms(0), copy.id, Ok(Done::Copied(Moved { copied: 65_536, ..Moved::default() })));
    let waits = core.on_guest_write(ByteRange::at(512, 512));
    core.guest_finished(in_the_way, true, Some(Ok(())));
    assert_eq!(core.guest_admit(waits), Admission::Wait, "the job comes first");
    let scan = next(&mut core, ms(0));
    core.on_completion(ms(0), scan.id, Ok(scan_of(ByteRange::at(0, 4096))));
    let copy = next(&mut core, ms(0));
    assert!(matches!(copy.work, Work::Copy { .. }), "64 KiB at 1000 bytes a second are a minute: {copy:?}");
    core.on_completion(ms(0), copy.id, Ok(Done::Copied(Moved { copied: 4096, ..Moved::default() })));
    assert_eq!(core.guest_admit(waits), Admission::SourceAndTarget);
    // In debt as the job is, it makes no write wait for a copy that it may not begin.
    let in_the_way = core.on_guest_write(ByteRange::at(2 << 20, 512));
    assert_eq!(core.guest_admit(in_the_way), Admission::SourceAndTarget);
    core.mark_dirty(ByteRange::at(2 << 20, 512));
    assert!(matches!(core.next(ms(0)), Next::Wait(Some(_))));
    let beside = core.on_guest_write(ByteRange::at((2 << 20) + 512, 512));
    assert_eq!(core.guest_admit(beside), Admission::SourceAndTarget);
    for id in [in_the_way, beside] {
        core.guest_finished(id, true, Some(Ok(())));
    }
    let scan = next(&mut core, ms(0));
    core.on_completion(ms(0), scan.id, Ok(scan_of(ByteRange::at(2 << 20, 4096))));
    assert!(matches!(core.next(ms(0)), Next::Wait(Some(until)) if until > ms(60_000)), "others pay for it");
}

/// Marks on what waits in the queue once made it be copied a second time, so that a guest ahead of the copy
/// made as much work as one behind it.
#[test]
fn what_is_marked_ahead_of_the_copy_is_copied_once_and_what_is_marked_under_it_again() {
    let mut config = Config::new(&MirrorOptions::new(), 65_536, 1 << 20, Geometry::plain());
    config.live = true;
    let mut core = Core::new(config).unwrap();
    let scan = next(&mut core, ms(0));
    core.on_completion(ms(0), scan.id, Ok(scan_of(ByteRange::new(0, 1 << 20))));
    core.mark_dirty(ByteRange::at(1 << 19, 4096));
    let mut copied = Vec::new();
    loop {
        let action = next(&mut core, ms(0));
        let done = match action.work {
            Work::Scan { range, .. } => scan_of(range),
            Work::Copy { range, .. } => {
                if copied.len() == 1 {
                    core.mark_dirty(ByteRange::at(range.start(), 1));
                }
                copied.push((range.start(), range.len()));
                Done::Copied(Moved { copied: range.len(), ..Moved::default() })
            }
            Work::Flush => break,
            work => panic!("{work:?}"),
        };
        core.on_completion(ms(0), action.id, Ok(done));
    }
    assert_eq!(copied, [(0, 1 << 19), (1 << 19, 1 << 19), (1 << 19, 4096)]);
}
