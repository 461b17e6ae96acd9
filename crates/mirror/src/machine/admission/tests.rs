//! Writers of the guest beside the job, scripted.

use std::time::Duration;

use blockmirror_block::Geometry;

use super::*;
use crate::machine::config::Config;
use crate::machine::{Action, Done, Moved, Next, Work};
use crate::options::{CopyMode, MirrorOptions, OnError};
use crate::progress::Operation;
use crate::scan::{CopyAction, CopyExtent};

const G: u64 = 1 << 30;
const NOW: Duration = Duration::ZERO;

fn core_of(options: &MirrorOptions) -> Core {
    let mut config = Config::new(options, 65_536, G, Geometry::plain());
    config.live = true;
    Core::new(config).unwrap()
}

fn next(core: &mut Core) -> Action {
    match core.next(NOW) {
        Next::Do(action) => action,
        wait => panic!("{wait:?}"),
    }
}

fn scanned(range: ByteRange) -> Done {
    Done::Scanned(vec![CopyExtent { range, action: CopyAction::Copy { target_zero: false }, below: false }])
}

fn copied(range: ByteRange) -> Done {
    Done::Copied(Moved { copied: range.len(), ..Moved::default() })
}

fn write_through(core: &mut Core, range: ByteRange) {
    let id = core.on_guest_write(range);
    assert_eq!(core.guest_admit(id), Admission::SourceAndTarget);
    core.guest_finished(id, true, Some(Ok(())));
}

/// With a speed limit the whole disk waited in the queue while the guest wrote all over it. Each write cut it
/// once more and looked at every piece: after some seconds a guest was at a twentieth of its speed.
#[test]
fn a_guest_that_writes_all_over_the_disk_leaves_few_pieces() {
    let mut core = core_of(&MirrorOptions::new().copy_mode(CopyMode::WriteBlocking).speed(1 << 20));
    let scan = next(&mut core);
    core.on_completion(NOW, scan.id, Ok(scanned(ByteRange::new(0, G))));
    let mut now = NOW;
    for i in 0..20_000_u64 {
        write_through(&mut core, ByteRange::at(i * 7919 % (G / 8192) * 8192, 4096));
        // The copy gets on a little.
        now += Duration::from_millis(1);
        while let Next::Do(action) = core.next(now) {
            match action.work {
                Work::Scan { range, .. } => core.on_completion(now, action.id, Ok(scanned(range))),
                Work::Copy { range, .. } => core.on_completion(now, action.id, Ok(copied(range))),
                work => panic!("{work:?}"),
            }
        }
    }
    let (queued, in_progress) = core.work.pieces();
    assert!(queued <= 8192 && in_progress <= 8192 + 32, "{queued} pieces are queued of {in_progress}");
    assert!(core.progress(now).copied > 16 << 20);
}

/// What the guest does wakes a thread only if that may find something to do.
#[test]
fn a_thread_is_woken_for_news_and_not_while_the_speed_limit_holds() {
    let mut core = core_of(&MirrorOptions::new().speed(1 << 20));
    let scan = next(&mut core);
    core.on_completion(NOW, scan.id, Ok(scanned(ByteRange::new(0, G))));
    while let Next::Do(action) = core.next(NOW) {
        let Work::Copy { range, .. } = action.work else { panic!("{action:?}") };
        core.on_completion(NOW, action.id, Ok(copied(range)));
    }
    assert!(core.guest_makes_no_work(), "the slice is spent");
    core.set_speed(NOW, 0).unwrap();
    while let Next::Do(action) = core.next(NOW) {
        let done = match action.work {
            Work::Copy { range, .. } => copied(range),
            _ => Done::Flushed,
        };
        core.on_completion(NOW, action.id, Ok(done));
    }
    assert!(core.lifecycle.has_been_ready() && core.guest_makes_no_work(), "there is nothing to do");
    core.change(CopyMode::WriteBlocking).unwrap();
    let range = ByteRange::new(0, 4096);
    let write = |core: &mut Core, target| {
        let id = core.on_guest_write(range);
        assert_eq!(core.guest_admit(id), Admission::SourceAndTarget);
        core.guest_finished(id, true, target);
        core.guest_makes_no_work()
    };
    // Once each of a guest's writes woke a thread, which looked and went to sleep again.
    assert!(write(&mut core, Some(Ok(()))), "both have it");
    assert!(!write(&mut core, None), "the target is to get it");
}

/// All threads once copied a whole slice in its first milliseconds, in pieces as long as the granularity, and
/// the guest waited for them.
#[test]
fn a_slice_is_copied_bit_by_bit() {
    let mut core = core_of(&MirrorOptions::new().speed(100 << 20));
    core.config.granularity = 64 << 20;
    let scan = next(&mut core);
    core.on_completion(NOW, scan.id, Ok(scanned(ByteRange::new(0, G))));
    let quota = core.config.speed / 10;
    let mut begun = 0;
    for ms in [0, 15, 30, 45, 60] {
        let now = Duration::from_millis(ms);
        while let Next::Do(action) = core.next(now) {
            let Work::Copy { range, .. } = action.work else { panic!("{action:?}") };
            begun += range.len();
            core.on_completion(now, action.id, Ok(copied(range)));
        }
        let fair = quota * ms / 75;
        assert!((fair..=fair + quota / 32).contains(&begun), "{begun} of {quota} after {ms} ms");
    }
}

/// Does what can be done at `now`, as honest devices do.
fn drive(core: &mut Core, now: Duration) -> Vec<Work> {
    let mut log = Vec::new();
    while let Next::Do(action) = core.next(now) {
        let done = match action.work {
            Work::Scan { range, .. } => scanned(range),
            Work::Copy { range, .. } => copied(range),
            _ => Done::Flushed,
        };
        log.push(action.work);
        core.on_completion(now, action.id, Ok(done));
    }
    log
}

/// One writer is where the job has to go and keeps it waiting; one that comes later must wait for the job;
/// one that comes after that must wait for the second, beside the job's place but in the same piece of work.
/// All must get there.
fn all_have_their_turn(core: &mut Core, now: Duration, writes: [(u64, u64); 3]) {
    let mut ids = Vec::new();
    for (start, end) in writes {
        ids.push(core.on_guest_write(ByteRange::new(start, end)));
        let admission = core.guest_admit(ids[ids.len() - 1]);
        assert_eq!(admission == Admission::SourceAndTarget, ids.len() == 1, "{start}..{end}");
        drive(core, now);
    }
    core.guest_finished(ids[0], true, Some(Ok(())));
    for &id in &ids[1..] {
        drive(core, now);
        assert_eq!(
            core.guest_admit(id),
            Admission::SourceAndTarget,
            "the job and the writers wait for each other"
        );
        core.guest_finished(id, true, Some(Ok(())));
    }
    drive(core, now);
    assert!(core.lifecycle.has_been_ready());
}

/// A range that waited for another try was not taken while a writer was about anywhere in it, who waited for
/// a writer who waited for the job: neither the job nor the guest ever went on.
#[test]
fn a_part_of_what_has_failed_is_tried_again_beside_a_writer() {
    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking).on_target_error(OnError::Ignore);
    let mut core = core_of(&options);
    let scan = next(&mut core);
    core.on_completion(NOW, scan.id, Ok(scanned(ByteRange::new(0, G))));
    let copy = next(&mut core);
    assert!(matches!(copy.work, Work::Copy { range, .. } if range.len() == 512 << 10), "{copy:?}");
    let error = block::Error::new(block::ErrorKind::Io, "test");
    core.on_completion(NOW, copy.id, Err(Failure { operation: Operation::Write, error }));
    all_have_their_turn(&mut core, Duration::from_secs(1), [(100, 200), (4000, 4200), (4150, 4300)]);
}

/// The same where what is left begins or ends inside a unit of the bitmap.
#[test]
fn a_part_of_a_unit_is_copied_beside_a_writer_of_the_rest() {
    let mut core = core_of(&MirrorOptions::new().copy_mode(CopyMode::WriteBlocking));
    let scan = next(&mut core);
    let extent = |start, end, action| CopyExtent { range: ByteRange::new(start, end), action, below: false };
    let copy = CopyAction::Copy { target_zero: false };
    let extents =
        vec![extent(0, 1000, copy), extent(1000, 3000, CopyAction::Skip), extent(3000, G, CopyAction::Skip)];
    core.on_completion(NOW, scan.id, Ok(Done::Scanned(extents)));
    all_have_their_turn(&mut core, NOW, [(100, 200), (900, 2000), (1500, 1600)]);
}

/// A write that was woken for another's sake once waited for the whole budget again.
#[test]
fn a_write_that_is_woken_waits_for_the_rest_of_its_budget() {
    let ms = Duration::from_millis;
    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking).latency_budget(ms(20));
    let mut core = core_of(&options);
    let scan = next(&mut core);
    let range = ByteRange::new(0, 1 << 20);
    core.on_completion(NOW, scan.id, Ok(scanned(range)));
    while !core.work.operations().moves(range) {
        next(&mut core);
    }
    let id = core.on_guest_write(ByteRange::at(0, 4096));
    assert_eq!(core.guest_admit(id), Admission::Wait, "a copy has its bytes");
    assert_eq!(core.admission_time_left(id), Some(ms(20)));
    core.on_timer(ms(19));
    assert_eq!(core.guest_admit(id), Admission::Wait);
    assert_eq!(core.admission_time_left(id), Some(ms(1)));
    core.on_timer(ms(20));
    assert_eq!(core.guest_admit(id), Admission::SourceOnly);
}
