//! What guests must be spared: auto mode, the latency budget and the speed limit, on devices that take time.

use super::*;
use crate::progress::Convergence;

const MODES: [CopyMode; 3] = [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto];
const GRANULARITIES: [u64; 3] = [64 << 10, 1 << 20, 64 << 20];

fn is_ready(event: &Event) -> bool {
    *event == Event::Ready
}

/// The modes that a job in auto mode went over to.
fn modes(model: &ThroughputModel) -> Vec<CopyMode> {
    let mode = |(_, event): &(Duration, Event)| match event {
        Event::CopyMode { mode, .. } => Some(*mode),
        _ => None,
    };
    model.events.iter().filter_map(mode).collect()
}

#[test]
fn auto_becomes_ready_and_leaves_the_guest_three_fifths_of_its_throughput() {
    for device in [DeviceModel::PARALLEL, DeviceModel::SERIAL] {
        for granularity in GRANULARITIES {
            let setup =
                |mode| Setup { len: 64 << 20, spread: 64 << 20, ..Setup::new(mode, granularity, device) };
            let mut model = ThroughputModel::new(setup(CopyMode::Auto));
            model.run(Duration::from_secs(12), is_ready);
            assert!(model.ready().is_some(), "{device:?} {granularity}: {:?}", model.progress());
            assert!(model.share() >= 0.6, "{device:?} {granularity}: {}", model.share());
            assert_eq!(modes(&model), [CopyMode::WriteBlocking]);
            assert!(model.amplification() < 2.0);
            // The same in background, to show that it is auto mode that does it.
            let long_enough = model.now + us(400_000);
            let mut model = ThroughputModel::new(setup(CopyMode::Background));
            model.run(long_enough, is_ready);
            assert_eq!(model.ready(), None);
            assert_eq!(model.progress().convergence, Convergence::NotConverging);
        }
    }
}

#[test]
fn a_budget_bounds_what_copies_add_to_writes() {
    let setup = Setup {
        len: 256 << 20,
        spread: 256 << 20,
        ..Setup::new(CopyMode::WriteBlocking, 65_536, DeviceModel::PARALLEL)
    };
    let mut free = ThroughputModel::new(setup.clone());
    free.run(Duration::from_secs(5), is_ready);
    let options = setup.options.clone().latency_budget(us(300));
    let mut bound = ThroughputModel::new(Setup { options, ..setup });
    bound.run(Duration::from_secs(5), is_ready);
    assert!(free.ready().is_some() && bound.ready().is_some());
    // Source and target take 200 us.
    assert!(free.percentile(9900) > us(800), "{:?}", free.percentile(9900));
    assert!(bound.percentile(9900) <= us(200 + 300), "{:?}", bound.percentile(9900));
}

/// A stall holds the writes that wait for the target then, and none after.
#[test]
fn writes_go_through_again_after_a_stall() {
    let second = Duration::from_secs(1);
    let mut setup = Setup {
        len: 256 << 20,
        spread: 256 << 20,
        ..Setup::new(CopyMode::Auto, 65_536, DeviceModel::PARALLEL)
    };
    let mut model = ThroughputModel::new(setup.clone());
    model.run(second * 5, |event| matches!(event, Event::CopyMode { .. }));
    let from = model.now + us(10_000);
    setup.stall = Some((from, from + second));
    let mut model = ThroughputModel::new(setup);
    model.run(second * 12, is_ready);
    assert_eq!(modes(&model), [CopyMode::WriteBlocking, CopyMode::Background, CopyMode::WriteBlocking]);
    assert!(model.ready().is_some());
    let long = model.latencies.iter().filter(|&&latency| latency > second / 10).count();
    assert!(long <= model.setup.depth, "{long} writes waited");
}

/// The job moves as much as it may, never more than a slice ahead, and no write waits because copies do.
#[test]
fn a_speed_limit_is_kept_to_and_the_guest_does_not_pay_for_it() {
    for mode in MODES {
        for (speed, spread) in [(40_000_000, 1 << 30), (40_000_000, 1 << 20), (1_000_000, 65_536)] {
            let slow = DeviceModel { latency: us(1000), ..DeviceModel::PARALLEL };
            let mut setup = Setup::new(mode, 65_536, slow);
            setup.options = setup.options.speed(speed);
            setup.depth = 4;
            setup.spread = spread;
            let mut model = ThroughputModel::new(setup);
            model.run(Duration::from_secs(5), |_| false);
            let mut moved = 0;
            let mut ahead = i64::MIN;
            for (at, range) in &model.operations {
                moved += range.len();
                ahead = ahead.max(moved as i64 - (at.as_secs_f64() * speed as f64) as i64);
            }
            let mean = moved as f64 / model.now.as_secs_f64();
            assert!((mean / speed as f64 - 1.0).abs() < 0.02, "{mode} {speed}: {mean}");
            assert!(ahead <= speed as i64 / 10, "{mode} {speed}: {ahead} bytes ahead");
            let longest = model.latencies.iter().max().unwrap();
            assert!(*longest < Duration::from_millis(12), "{mode} {speed}: {longest:?}");
        }
    }
}
