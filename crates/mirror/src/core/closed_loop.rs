//! How a guest fares while it is mirrored: the core on a virtual clock, with devices that take time.
//!
//! Nothing is stored, only timed: a device moves bytes one request after another at its bandwidth, and answers each after a
//! fixed latency, so many at once. A guest keeps a number of small random writes under way and begins the next as soon as one
//! ends. As many threads as a job has perform what the core hands out. The same guest on the source alone is the measure.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use blockmirror_block::{ByteRange, Geometry};

use super::config::Config;
use super::sim::rng::Rng;
use super::{Action, Admission, Core, Done, Moved, Next, Work};
use crate::options::{CopyMode, MirrorOptions};
use crate::progress::{Event, Progress};
use crate::survey::{Need, Segment};

const BLOCK: u64 = 4096;

fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

/// What a device is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speed {
    /// Requests that are served at once.
    pub(super) channels: usize,
    /// What each takes, besides the time for its bytes.
    pub(super) latency: Duration,
    /// Bytes per second, all requests together.
    pub(super) bandwidth: u64,
}

impl Speed {
    /// 100 microseconds per request, any number of them at once.
    pub(super) const PARALLEL: Self =
        Self { channels: 1024, latency: Duration::from_micros(100), bandwidth: 4 << 30 };
    /// 100 microseconds per request, one after another.
    pub(super) const SERIAL: Self = Self { channels: 1, ..Self::PARALLEL };
}

struct Device {
    speed: Speed,
    moved: Duration,
    /// When each channel is free.
    free: BinaryHeap<Reverse<Duration>>,
    /// Nothing is answered before this.
    stalled_until: Duration,
}

impl Device {
    fn new(speed: Speed) -> Self {
        let free = (0..speed.channels).map(|_| Reverse(Duration::ZERO)).collect();
        Self { speed, moved: Duration::ZERO, free, stalled_until: Duration::ZERO }
    }

    /// When a request that comes now is answered.
    fn request(&mut self, now: Duration, bytes: u64) -> Duration {
        self.moved = self.moved.max(now) + Duration::from_nanos(bytes * 1_000_000_000 / self.speed.bandwidth);
        let Reverse(free) = self.free.pop().unwrap();
        let end = self.moved.max(free) + self.speed.latency;
        self.free.push(Reverse(end));
        end.max(self.stalled_until)
    }
}

/// What is played.
#[derive(Clone, Debug)]
pub(super) struct Scene {
    pub(super) options: MirrorOptions,
    pub(super) granularity: u64,
    pub(super) len: u64,
    pub(super) source: Speed,
    pub(super) target: Speed,
    /// What a look at the allocation takes on either side; no request of the device.
    pub(super) query: Duration,
    /// Writes that the guest keeps under way.
    pub(super) depth: usize,
    /// The guest writes in the first so many bytes.
    pub(super) spread: u64,
    pub(super) threads: usize,
    /// The target answers nothing during this time.
    pub(super) stall: Option<(Duration, Duration)>,
}

impl Scene {
    pub(super) fn new(mode: CopyMode, granularity: u64, device: Speed) -> Self {
        let len = 1 << 30;
        Self {
            options: MirrorOptions::new().copy_mode(mode),
            granularity,
            len,
            source: device,
            target: device,
            query: us(10),
            depth: 16,
            spread: len,
            threads: 16,
            stall: None,
        }
    }

    pub(super) fn config(&self) -> Config {
        let mut config = Config::new(&self.options, self.granularity, self.len, Geometry::plain());
        config.live = true;
        config
    }

    /// Writes per second of the guest alone.
    pub(super) fn unmirrored(&self) -> f64 {
        let mut device = Device::new(self.source);
        let mut writes: BinaryHeap<_> =
            (0..self.depth).map(|_| Reverse(device.request(Duration::ZERO, BLOCK))).collect();
        let mut now = Duration::ZERO;
        let n = 20_000;
        for _ in 0..n {
            let Reverse(at) = writes.pop().unwrap();
            now = at;
            writes.push(Reverse(device.request(now, BLOCK)));
        }
        f64::from(n) / now.as_secs_f64()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    /// A thread has read what it copies.
    HasRead(usize),
    /// A thread is done.
    Done(usize),
    /// A guest's write has reached the source, or both.
    Source(usize),
    Target(usize),
    /// Somebody asked to be woken.
    Wake,
}

struct Slot {
    ticket: u64,
    begun: Duration,
    range: ByteRange,
    admission: Admission,
    /// It will be asked again when its patience ends.
    alarm: bool,
}

/// The play.
pub(super) struct Play {
    pub(super) scene: Scene,
    pub(super) core: Core,
    pub(super) now: Duration,
    rng: Rng,
    source: Device,
    target: Device,
    agenda: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    sequence: u64,
    threads: Vec<Option<Action>>,
    slots: Vec<Slot>,
    woken_at: Option<Duration>,
    /// Time that each write took.
    pub(super) latencies: Vec<Duration>,
    pub(super) events: Vec<(Duration, Event)>,
    /// Begin and length of each data operation.
    pub(super) operations: Vec<(Duration, ByteRange)>,
}

impl Play {
    pub(super) fn new(scene: Scene) -> Self {
        let core = Core::new(scene.config()).unwrap();
        let mut play = Self {
            core,
            now: Duration::ZERO,
            rng: Rng::new(7),
            source: Device::new(scene.source),
            target: Device::new(scene.target),
            agenda: BinaryHeap::new(),
            sequence: 0,
            threads: vec![None; scene.threads],
            slots: Vec::new(),
            woken_at: None,
            latencies: Vec::new(),
            events: Vec::new(),
            operations: Vec::new(),
            scene,
        };
        for _ in 0..play.scene.depth {
            let slot = play.begin();
            play.slots.push(slot);
        }
        play
    }

    fn begin(&mut self) -> Slot {
        let at = self.rng.below(self.scene.spread / BLOCK) * BLOCK;
        let range = ByteRange::at(at, BLOCK);
        self.core.tick(self.now);
        let ticket = self.core.guest_begin(range, true);
        Slot { ticket, begun: self.now, range, admission: Admission::Wait, alarm: false }
    }

    fn later(&mut self, at: Duration, what: Happening) {
        self.sequence += 1;
        self.agenda.push(Reverse((at, self.sequence, what)));
    }

    /// Plays until `end`, or until `enough` says so.
    pub(super) fn run(&mut self, end: Duration, enough: impl Fn(&Event) -> bool) {
        loop {
            self.let_in();
            self.hand_out();
            let mut stop = false;
            for event in self.core.take_events() {
                stop |= enough(&event);
                self.events.push((self.now, event));
            }
            if stop || self.now >= end {
                return;
            }
            let Some(Reverse((at, _, what))) = self.agenda.pop() else { return };
            if let Some((from, to)) = self.scene.stall
                && at >= from
            {
                self.target.stalled_until = to;
            }
            self.now = at;
            self.happen(what);
        }
    }

    fn let_in(&mut self) {
        self.core.tick(self.now);
        for index in 0..self.slots.len() {
            if self.slots[index].admission != Admission::Wait {
                continue;
            }
            let admission = self.core.guest_admit(self.slots[index].ticket);
            self.slots[index].admission = admission;
            if admission == Admission::Wait {
                if let Some(patience) = self.core.patience()
                    && !std::mem::replace(&mut self.slots[index].alarm, true)
                {
                    self.later(self.slots[index].begun + patience, Happening::Wake);
                }
            } else {
                let range = self.slots[index].range;
                let moved = |action: &Action| match action.work {
                    Work::Copy { range: copied, .. } => copied.overlaps(range),
                    _ => false,
                };
                let under_a_copy = self.threads.iter().flatten().any(moved);
                assert!(admission != Admission::Both || !under_a_copy, "{range}");
                let at = self.source.request(self.now, BLOCK);
                self.later(at, Happening::Source(index));
            }
        }
    }

    fn hand_out(&mut self) {
        while let Some(thread) = self.threads.iter().position(Option::is_none) {
            match self.core.next(self.now) {
                Next::Do(action) => {
                    self.threads[thread] = Some(action);
                    let (at, what) = match action.work {
                        Work::Survey { .. } => (self.now + self.scene.query * 2, Happening::Done(thread)),
                        Work::Copy { range, .. } => {
                            self.operations.push((self.now, range));
                            (self.source.request(self.now, range.len()), Happening::HasRead(thread))
                        }
                        _ => (self.target.request(self.now, 0), Happening::Done(thread)),
                    };
                    self.later(at, what);
                }
                Next::Wait(until) => {
                    if let Some(until) = until
                        && self.woken_at.replace(until) != Some(until)
                    {
                        assert!(until > self.now, "waiting for the past spins");
                        self.later(until, Happening::Wake);
                    }
                    return;
                }
                Next::Finished => return,
            }
        }
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Wake => {}
            Happening::HasRead(thread) => {
                let Some(Action { work: Work::Copy { range, .. }, .. }) = self.threads[thread] else {
                    return;
                };
                let at = self.target.request(self.now, range.len());
                self.later(at, Happening::Done(thread));
            }
            Happening::Done(thread) => {
                let Some(action) = self.threads[thread].take() else { return };
                let done = match action.work {
                    Work::Survey { range, .. } => Done::Surveyed(vec![Segment {
                        range,
                        need: Need::Copy { target_zero: false },
                        below: false,
                    }]),
                    Work::Copy { range, .. } => {
                        Done::Copied(Moved { copied: range.len(), ..Moved::default() })
                    }
                    Work::Zero { .. } => Done::Zeroed,
                    Work::Flush => Done::Flushed,
                    Work::End(_) => Done::Ended,
                };
                self.core.finished(self.now, action.id, Ok(done));
            }
            Happening::Source(index) if self.slots[index].admission == Admission::Both => {
                self.core.tick(self.now);
                self.core.guest_at_target(self.slots[index].ticket);
                let at = self.target.request(self.now, BLOCK);
                self.later(at, Happening::Target(index));
            }
            Happening::Source(index) => self.end(index, false),
            Happening::Target(index) => self.end(index, true),
        }
    }

    fn end(&mut self, index: usize, both: bool) {
        self.core.tick(self.now);
        self.core.guest_finished(self.slots[index].ticket, true, both.then_some(Ok(())));
        self.latencies.push(self.now - self.slots[index].begun);
        self.slots[index] = self.begin();
    }

    pub(super) fn progress(&self) -> Progress {
        self.core.progress(self.now)
    }

    /// When the job became ready.
    pub(super) fn ready(&self) -> Option<Duration> {
        self.events.iter().find(|(_, event)| *event == Event::Ready).map(|(at, _)| *at)
    }

    pub(super) fn percentile(&self, hundredths: usize) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() * hundredths / 10_000).copied().unwrap_or_default()
    }

    /// The guest's writes per second so far, of what it does alone.
    pub(super) fn share(&self) -> f64 {
        self.latencies.len() as f64 / self.now.as_secs_f64() / self.scene.unmirrored()
    }

    /// Bytes copied more than once, per byte that the guest has written.
    pub(super) fn amplification(&self) -> f64 {
        let copied: u64 = self.operations.iter().map(|(_, range)| range.len()).sum();
        let written = self.latencies.len() as u64 * BLOCK;
        copied.saturating_sub(self.scene.len) as f64 / written.max(1) as f64
    }

    fn row(&self, name: &str) -> String {
        let ready = self.ready().map_or("never".into(), |at| format!("{:.2} s", at.as_secs_f64()));
        format!(
            "{name:<40} ready {ready:>8}  guest {:>5.1} %  p50 {:>6} us  p99 {:>6} us  max {:>7} us  again {:.2}",
            self.share() * 100.0,
            self.percentile(5000).as_micros(),
            self.percentile(9900).as_micros(),
            self.latencies.iter().max().unwrap().as_micros(),
            self.amplification(),
        )
    }
}

const MODES: [CopyMode; 3] = [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto];
const GRANULARITIES: [u64; 3] = [64 << 10, 1 << 20, 64 << 20];

fn is_ready(event: &Event) -> bool {
    *event == Event::Ready
}

#[test]
#[ignore = "a table to look at: cargo test --release -p blockmirror-mirror closed_loop -- --ignored --nocapture"]
fn table() {
    for (name, speed) in [("parallel", Speed::PARALLEL), ("serial", Speed::SERIAL)] {
        for mode in MODES {
            for granularity in GRANULARITIES {
                let mut play = Play::new(Scene::new(mode, granularity, speed));
                play.run(Duration::from_secs(12), is_ready);
                println!("{}", play.row(&format!("{name} {mode} {} KiB", granularity >> 10)));
                for (at, event) in &play.events {
                    if let Event::CopyMode { mode, reason } = event {
                        println!("    after {:.2} s {mode}: {reason}", at.as_secs_f64());
                    }
                }
            }
        }
    }
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
            assert_eq!(play.progress().convergence, crate::progress::Convergence::NotConverging);
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

/// A stall holds whoever waits for the target then, and nobody after.
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
