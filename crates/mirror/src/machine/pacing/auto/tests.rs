//! Auto mode's decisions one by one, scripted, on a virtual clock.

use blockmirror_block::{ByteRange, Geometry};

use super::*;
use crate::machine::{Admission, Core, Done, Moved, Next, Work};
use crate::options::{MirrorOptions, SyncMode};
use crate::progress::Progress;
use crate::state::JobState;

const M: u64 = 1 << 20;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn core_of(options: MirrorOptions) -> Core {
    let mut config = Config::new(&options.copy_mode(CopyMode::Auto), 65_536, 64 * M, Geometry::plain());
    config.live = true;
    Core::new(config).unwrap()
}

/// A guest that dirties `dirt` bytes and a job that copies `copied` bytes each millisecond, `from..to`.
fn play(core: &mut Core, from: u64, to: u64, dirt: u64, copied: u64) -> Vec<Event> {
    for at in from..to {
        core.on_timer(ms(at));
        core.counters.dirtied(dirt, true);
        core.counters.passed_over(copied);
    }
    core.take_events().into_iter().filter(|event| matches!(event, Event::CopyMode { .. })).collect()
}

/// With something dirty, and no first pass.
fn tail() -> Core {
    let mut core = core_of(MirrorOptions::new().sync(SyncMode::None));
    core.mark_dirty(ByteRange::new(0, M));
    core
}

fn modes(events: &[Event]) -> Vec<CopyMode> {
    let mode = |event: &Event| match event {
        Event::CopyMode { mode, .. } => Some(*mode),
        _ => None,
    };
    events.iter().filter_map(mode).collect()
}

#[test]
fn a_guest_that_keeps_even_is_made_to_write_through_and_the_event_says_why() {
    let mut core = tail();
    let events = play(&mut core, 0, 1000, 900, 1000);
    let Some(Event::CopyMode { mode, reason }) = events.first() else { panic!("{events:?}") };
    assert_eq!((*mode, events.len()), (CopyMode::WriteBlocking, 1));
    assert_eq!(
        reason.to_string(),
        "1048576 bytes are left, 900000 bytes/s become dirty and 1000000 bytes/s are copied"
    );
    assert!(core.progress(ms(1000)).writes_through);
}

#[test]
fn a_guest_that_falls_behind_does_not_write_through() {
    let mut core = tail();
    assert_eq!(play(&mut core, 0, 5000, 800, 1000), []);
    let progress = core.progress(ms(5000));
    assert_eq!((progress.copy_rate, progress.dirty_rate), (1_000_000, 800_000));
    assert_eq!(
        (progress.convergence, progress.eta),
        (Convergence::Converging, Some(Duration::from_nanos(5_242_880_000)))
    );
    assert!(!progress.writes_through);
}

#[test]
fn nothing_is_decided_during_the_first_pass_or_a_pause() {
    let mut core = core_of(MirrorOptions::new());
    assert_eq!(play(&mut core, 0, 3000, 2000, 1000), [], "the bulk is copied in background");
    assert_eq!(core.progress(ms(3000)).convergence, Convergence::NotConverging);
    let mut core = tail();
    core.pause().unwrap();
    assert_eq!(play(&mut core, 0, 3000, 2000, 1000), []);
    core.resume().unwrap();
    assert_eq!(play(&mut core, 3000, 3200, 2000, 1000), [], "what was before the pause does not count");
    assert_eq!(modes(&play(&mut core, 3200, 3400, 2000, 1000)), [CopyMode::WriteBlocking]);
}

#[test]
fn a_stalled_target_sends_the_job_back_for_longer_each_time() {
    let mut core = tail();
    let mut at = 0;
    let mut stays = Vec::new();
    for _ in 0..7 {
        let began = at;
        while modes(&play(&mut core, at, at + 50, 2000, 1000)).is_empty() {
            at += 50;
        }
        at += 50;
        stays.push((at - began) / 1000);
        // A write that gets no answer.
        let id = core.on_guest_write(ByteRange::new(2 * M, 2 * M + 4096));
        assert_eq!(core.guest_admit(id), Admission::SourceAndTarget);
        assert_eq!(play(&mut core, at, at + 150, 0, 1000), []);
        let events = play(&mut core, at + 150, at + 300, 0, 1000);
        let [Event::CopyMode { mode: CopyMode::Background, reason }] = &events[..] else {
            panic!("{events:?}")
        };
        assert!(matches!(reason, ModeReason::TargetStalls { bound, .. } if *bound == ms(200)), "{reason}");
        let other = core.on_guest_write(ByteRange::new(4 * M, 4 * M + 4096));
        assert_eq!(core.guest_admit(other), Admission::SourceOnly, "others do not wait for it");
        core.guest_finished(other, true, None);
        core.guest_finished(id, true, Some(Ok(())));
        at += 300;
    }
    assert_eq!(stays, [0, 0, 1, 3, 7, 15, 31], "a second, two, four");
}

/// READY once needed an instant without dirt, which a guest that always has a write under way never leaves.
#[test]
fn a_guest_that_never_pauses_does_not_delay_ready() {
    assert_eq!(with_a_busy_guest(CopyMode::Background).state, JobState::Running);
    let progress = with_a_busy_guest(CopyMode::Auto);
    assert_eq!(progress.state, JobState::Ready);
    assert!(progress.writes_through, "{progress:?}");
}

/// Three seconds with a guest that always has a write under way.
fn with_a_busy_guest(mode: CopyMode) -> Progress {
    let mut core = tail();
    core.change(mode).unwrap();
    let mut guest = None;
    for at in 0..3000 {
        let now = ms(at);
        if let Some(id) = guest.take() {
            core.on_timer(now);
            let admission = core.guest_admit(id);
            assert_ne!(admission, Admission::JobEnded);
            if admission == Admission::Wait {
                guest = Some(id);
            } else {
                core.guest_finished(id, true, (admission == Admission::SourceAndTarget).then_some(Ok(())));
            }
        }
        if guest.is_none() {
            guest = Some(core.on_guest_write(ByteRange::at(at % 7 * 8192, 4096)));
        }
        // One operation takes a millisecond.
        if let Next::Do(action) = core.next(now) {
            let done = match action.work {
                Work::Scan { range, .. } => Done::Scanned(vec![crate::scan::CopyExtent {
                    range,
                    action: crate::scan::CopyAction::Copy { target_zero: false },
                    below: false,
                }]),
                Work::Copy { range, .. } => Done::Copied(Moved { copied: range.len(), ..Moved::default() }),
                _ => Done::Flushed,
            };
            core.on_completion(now + Duration::from_micros(500), action.id, Ok(done));
        }
    }
    core.progress(ms(3000))
}

#[test]
fn a_mode_that_is_asked_for_counts_and_auto_begins_with_how_things_are() {
    let mut core = tail();
    play(&mut core, 0, 1000, 2000, 1000);
    core.change(CopyMode::Background).unwrap();
    assert_eq!(play(&mut core, 1000, 3000, 2000, 1000), []);
    core.change(CopyMode::WriteBlocking).unwrap();
    core.change(CopyMode::Auto).unwrap();
    assert!(core.progress(ms(3000)).writes_through);
    assert_eq!(play(&mut core, 3000, 5000, 0, 1000), [], "no change without a reason");
}

#[cfg(feature = "serde")]
#[test]
fn figures_and_reasons_serialize_as_json() {
    let mut core = tail();
    play(&mut core, 0, 1000, 250, 1000);
    let progress = serde_json::to_value(core.progress(ms(1000))).unwrap();
    let shown = |name: &str| progress[name].to_string();
    insta::assert_snapshot!(
        ["state", "copy-mode", "writes-through", "copy-rate", "dirty-rate", "convergence", "eta", "guest-delay", "elapsed"]
            .map(shown)
            .join(" "),
        @r#""running" "auto" false 1000000 250000 "converging" 1.398101333 null 1.0"#
    );
    let reason = ModeReason::TargetStalls { delay: ms(300), bound: ms(200) };
    insta::assert_snapshot!(serde_json::to_string(&reason).unwrap(), @r#"{"kind":"target-stalls","delay":0.3,"bound":0.2}"#);
}
