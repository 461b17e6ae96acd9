//! What guests must be spared: auto mode, the latency budget and the speed limit, on devices that take time.

use super::*;
use crate::progress::Convergence;

const MODES: [CopyMode; 3] = [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto];
const GRANULARITIES: [u64; 3] = [64 << 10, 1 << 20, 64 << 20];

fn is_ready(event: &Event) -> bool {
    *event == Event::Ready
}

/// The modes that a job in auto mode went over to.
fn modes(play: &Play) -> Vec<CopyMode> {
    let mode = |(_, event): &(Duration, Event)| match event {
        Event::CopyMode { mode, .. } => Some(*mode),
        _ => None,
    };
    play.events.iter().filter_map(mode).collect()
}

#[test]
fn auto_becomes_ready_and_leaves_the_guest_three_fifths_of_its_throughput() {
    for device in [Speed::PARALLEL, Speed::SERIAL] {
        for granularity in GRANULARITIES {
            let scene =
                |mode| Scene { len: 64 << 20, spread: 64 << 20, ..Scene::new(mode, granularity, device) };
            let mut play = Play::new(scene(CopyMode::Auto));
            play.run(Duration::from_secs(12), is_ready);
            assert!(play.ready().is_some(), "{device:?} {granularity}: {:?}", play.progress());
            assert!(play.share() >= 0.6, "{device:?} {granularity}: {}", play.share());
            assert_eq!(modes(&play), [CopyMode::WriteBlocking]);
            assert!(play.amplification() < 2.0);
            // The same in background, to show that it is auto mode that does it.
            let long_enough = play.now + us(400_000);
            let mut play = Play::new(scene(CopyMode::Background));
            play.run(long_enough, is_ready);
            assert_eq!(play.ready(), None);
            assert_eq!(play.progress().convergence, Convergence::NotConverging);
        }
    }
}

#[test]
fn a_budget_bounds_what_copies_add_to_writes() {
    let scene = Scene {
        len: 256 << 20,
        spread: 256 << 20,
        ..Scene::new(CopyMode::WriteBlocking, 65_536, Speed::PARALLEL)
    };
    let mut free = Play::new(scene.clone());
    free.run(Duration::from_secs(5), is_ready);
    let options = scene.options.clone().latency_budget(us(300));
    let mut bound = Play::new(Scene { options, ..scene });
    bound.run(Duration::from_secs(5), is_ready);
    assert!(free.ready().is_some() && bound.ready().is_some());
    // Source and target take 200 us.
    assert!(free.percentile(9900) > us(800), "{:?}", free.percentile(9900));
    assert!(bound.percentile(9900) <= us(200 + 300), "{:?}", bound.percentile(9900));
}

/// A stall holds the writes that wait for the target then, and none after.
#[test]
fn a_target_that_stalls_is_left_alone_and_taken_up_again() {
    let second = Duration::from_secs(1);
    let mut scene =
        Scene { len: 256 << 20, spread: 256 << 20, ..Scene::new(CopyMode::Auto, 65_536, Speed::PARALLEL) };
    let mut play = Play::new(scene.clone());
    play.run(second * 5, |event| matches!(event, Event::CopyMode { .. }));
    let from = play.now + us(10_000);
    scene.stall = Some((from, from + second));
    let mut play = Play::new(scene);
    play.run(second * 12, is_ready);
    assert_eq!(modes(&play), [CopyMode::WriteBlocking, CopyMode::Background, CopyMode::WriteBlocking]);
    assert!(play.ready().is_some());
    let long = play.latencies.iter().filter(|&&latency| latency > second / 10).count();
    assert!(long <= play.scene.depth, "{long} writes waited");
}

/// The job moves as much as it may, never more than a slice ahead, and no write waits because copies do.
#[test]
fn a_speed_limit_is_kept_to_and_the_guest_does_not_pay_for_it() {
    for mode in MODES {
        for (speed, spread) in [(40_000_000, 1 << 30), (40_000_000, 1 << 20), (1_000_000, 65_536)] {
            let slow = Speed { latency: us(1000), ..Speed::PARALLEL };
            let mut scene = Scene::new(mode, 65_536, slow);
            scene.options = scene.options.speed(speed);
            scene.depth = 4;
            scene.spread = spread;
            let mut play = Play::new(scene);
            play.run(Duration::from_secs(5), |_| false);
            let mut moved = 0;
            let mut ahead = i64::MIN;
            for (at, range) in &play.operations {
                moved += range.len();
                ahead = ahead.max(moved as i64 - (at.as_secs_f64() * speed as f64) as i64);
            }
            let mean = moved as f64 / play.now.as_secs_f64();
            assert!((mean / speed as f64 - 1.0).abs() < 0.02, "{mode} {speed}: {mean}");
            assert!(ahead <= speed as i64 / 10, "{mode} {speed}: {ahead} bytes ahead");
            let longest = play.latencies.iter().max().unwrap();
            assert!(*longest < Duration::from_millis(12), "{mode} {speed}: {longest:?}");
        }
    }
}
