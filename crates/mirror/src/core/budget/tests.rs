//! The budget's rules one by one.

use blockmirror_block::Geometry;

use super::*;
use crate::core::config::Config;
use crate::options::{CopyMode, MirrorOptions};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
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
    core.note_copy(most, ms(3));
    core.note_copy(most / 2, ms(3));
    let id = core.guest_begin(ByteRange::at(0, 4096), true);
    assert_eq!(core.bearable_size(0), most / 4);
    assert_eq!(core.bearable_size(1 << 29), most, "nobody is there");
    for _ in 0..10 {
        core.note_copy(65_536, ms(100));
    }
    assert_eq!(core.bearable_size(0), 65_536);
    core.note_copy(65_536, Duration::from_micros(100));
    assert_eq!(core.bearable_size(0), 65_536 * 2);
    core.guest_admit(id);
    core.guest_finished(id, true, Some(Ok(())));
    for at in 0..25 {
        core.tick(ms(50 * at));
    }
    assert_eq!(core.bearable_size(0), most, "that was long ago");
}

#[test]
fn regions_cover_disks_of_any_length() {
    for len in [0, 1, 1023, 1024, 1025, 2047, u64::MAX / 2] {
        let options = MirrorOptions::new().latency_budget(ms(1));
        let mut core = Core::new(Config::new(&options, 64 << 20, len, Geometry::plain())).unwrap();
        core.note_guest(ByteRange::new(0, len));
        core.note_guest(ByteRange::new(len, len));
        core.note_guest(ByteRange::new(len.saturating_sub(1), len));
        assert_eq!(core.bearable_size(len), core.config.operation);
    }
}
