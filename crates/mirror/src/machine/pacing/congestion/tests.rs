//! The window's rules one by one.

use blockmirror_block::{ByteRange, Geometry};

use super::*;
use crate::machine::{Action, Admission, Core, Done, Moved, Next, Work};
use crate::options::{CopyMode, MirrorOptions};
use crate::scan::{CopyAction, CopyExtent};

fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

fn core_of(options: MirrorOptions) -> Core {
    let mut config = Config::new(&options, 65_536, 1 << 30, Geometry::plain());
    config.live = true;
    Core::new(config).unwrap()
}

fn depth(core: &Core) -> usize {
    core.pacing.depth(&core.config, core.guest_state())
}

/// Eight writes one after another, each taking `time`.
fn writes(core: &mut Core, now: &mut Duration, time: Duration, count: u32) {
    for _ in 0..count {
        let id = core.on_guest_write(ByteRange::at(0, 4096));
        assert_ne!(core.guest_admit(id), Admission::Wait);
        *now += time;
        core.on_timer(*now);
        core.guest_finished(id, true, None);
    }
}

#[test]
fn a_probe_lasts_until_the_baseline_is_known() {
    let mut core = core_of(MirrorOptions::new().copy_mode(CopyMode::Auto));
    let mut now = us(0);
    let Next::Do(scan) = core.next(now) else { panic!() };
    let range = ByteRange::new(0, 1 << 20);
    let extent = CopyExtent { range, action: CopyAction::Copy { target_zero: false }, below: false };
    core.on_completion(now, scan.id, Ok(Done::Scanned(vec![extent])));
    let (_scan, copy) = (core.next(now), core.next(now));
    let Next::Do(Action { id: copy, work: Work::Copy { range, .. } }) = copy else { panic!("{copy:?}") };
    writes(&mut core, &mut now, us(500), 1);
    assert!(matches!(core.next(now), Next::Wait(_)));
    core.on_completion(now, copy, Ok(Done::Copied(Moved { copied: range.len(), ..Moved::default() })));
    writes(&mut core, &mut now, us(70), 1);
    writes(&mut core, &mut now, us(100), 31);
    assert!(matches!(core.next(now), Next::Wait(Some(until)) if until == MAX_PROBE));
    writes(&mut core, &mut now, us(100), 1);
    core.on_timer(now);
    assert_eq!(
        core.pacing.congestion.baseline[0].unwrap().mean,
        us(100),
        "neither the write beside the copy nor the first one counts"
    );
    assert!(matches!(core.next(now), Next::Do(_)));
}

#[test]
fn a_probe_ends_without_guest_writes() {
    let mut core = core_of(MirrorOptions::new().copy_mode(CopyMode::Auto));
    core.on_guest_write(ByteRange::at(0, 4096));
    assert!(matches!(core.next(us(0)), Next::Wait(Some(until)) if until == MAX_PROBE));
    assert!(matches!(core.next(MAX_PROBE), Next::Do(_)));
    assert!(core.pacing.congestion.baseline[0].is_none());
}

#[test]
fn without_a_budget_there_is_no_probe() {
    let mut core = core_of(MirrorOptions::new().copy_mode(CopyMode::WriteBlocking));
    core.on_guest_write(ByteRange::at(0, 4096));
    assert!(matches!(core.next(us(0)), Next::Do(_)));
    assert_eq!(core.pacing.share_of_window(&core.config, core.guest_state()), u64::MAX);
}

#[test]
fn the_window_shrinks_while_writes_take_half_as_long_again_and_grows_when_not() {
    let mut core = core_of(MirrorOptions::new().copy_mode(CopyMode::Auto));
    let mut now = us(0);
    writes(&mut core, &mut now, us(100), ENOUGH + 1);
    let mut windows = Vec::new();
    for time in [100, 100, 140, 160, 300, 100, 100] {
        writes(&mut core, &mut now, us(time), 600_000 / time as u32 / 10);
        core.pacing.congestion.adjust(&core.config, false);
        windows.push(core.pacing.congestion.window >> 10);
    }
    assert!(windows[0] > 1024 && windows[1] > windows[0], "{windows:?}");
    assert!(windows[3] < windows[2] && windows[4] < windows[3] / 2 + windows[3] / 8, "{windows:?}");
    assert!(windows[5] > windows[4], "{windows:?}");
    for _ in 0..20 {
        core.pacing.congestion.adjust(&core.config, true);
    }
    assert!(core.pacing.congestion.is_at_minimum(&core.config));
    assert_eq!((depth(&core), core.pacing.share_of_window(&core.config, core.guest_state())), (1, 65_536));
}

#[test]
fn a_budget_that_was_asked_for_counts_instead_of_the_half() {
    let mut core = core_of(MirrorOptions::new().latency_budget(us(1000)));
    let mut now = us(0);
    writes(&mut core, &mut now, us(100), ENOUGH + 1);
    let before = core.pacing.congestion.window;
    writes(&mut core, &mut now, us(1000), 100);
    core.pacing.congestion.adjust(&core.config, false);
    assert!(core.pacing.congestion.window > before, "ten times as long, but within the budget");
    let before = core.pacing.congestion.window;
    writes(&mut core, &mut now, us(100), 98);
    writes(&mut core, &mut now, us(1101), 2);
    core.pacing.congestion.adjust(&core.config, false);
    assert!(core.pacing.congestion.window < before);
}

#[test]
fn the_job_takes_half_as_many_places_as_the_guest_until_it_knows_what_writes_take() {
    for (budget, unknown, known) in [(Some(us(20_000)), 5, 3), (None, 16, 16)] {
        let mut core = core_of(MirrorOptions::new().latency_budget(budget));
        assert_eq!(depth(&core), 16, "no guest writes");
        core.pacing.congestion.window = 1 << 30;
        let tickets: Vec<_> = (0..10).map(|i| core.on_guest_write(ByteRange::at(i * 8192, 512))).collect();
        assert_eq!(depth(&core), unknown);
        for id in tickets {
            core.guest_admit(id);
            core.guest_finished(id, true, None);
        }
        core.on_timer(MAX_PROBE);
        core.pacing.congestion.window = core.config.operation * 3;
        assert_eq!(depth(&core), known);
        for step in 2..7 {
            core.on_timer(MAX_PROBE * step);
        }
        assert_eq!(depth(&core), 16, "no guest has written of late");
    }
}
