//! Throughput model of a guest that is mirrored: the core on a virtual clock, with devices that take time.
//!
//! A closed loop: the guest keeps a number of small random writes in flight and begins the next as soon as
//! one ends. A device moves bytes at its bandwidth and answers each request after a fixed latency, a number
//! of requests at once; it stores nothing. Workers perform the core's actions. The same guest on the source
//! alone is the reference.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::time::Duration;

use blockmirror_block::testing::Rng;
use blockmirror_block::{ByteRange, Geometry};

use crate::machine::config::Config;
use crate::machine::{Action, Admission, Cloned, Core, Done, Moved, Next, TargetWriter, Work};
use crate::options::{CopyMode, MirrorOptions};
#[cfg(test)]
use crate::progress::Progress;
use crate::progress::{Event, ModeReason};
use crate::scan::{CopyAction, CopyExtent};

const BLOCK: u64 = 4096;

fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

/// Performance of a device.
#[derive(Clone, Copy, Debug)]
struct DeviceModel {
    /// Requests that are served at once.
    channels: usize,
    /// What each takes, besides the time for its bytes.
    latency: Duration,
    /// Bytes per second, all requests together.
    bandwidth: u64,
}

impl DeviceModel {
    /// 100 microseconds per request, any number of them at once.
    const PARALLEL: Self = Self { channels: 1024, latency: Duration::from_micros(100), bandwidth: 4 << 30 };
    /// 100 microseconds per request, one after another.
    const SERIAL: Self = Self { channels: 1, ..Self::PARALLEL };
}

struct Device {
    model: DeviceModel,
    moved: Duration,
    /// When each channel is free.
    free: BinaryHeap<Reverse<Duration>>,
    /// Nothing is answered before this.
    stalled_until: Duration,
}

impl Device {
    fn new(model: DeviceModel) -> Self {
        let free = (0..model.channels).map(|_| Reverse(Duration::ZERO)).collect();
        Self { model, moved: Duration::ZERO, free, stalled_until: Duration::ZERO }
    }

    /// When a request that comes now is answered.
    fn request(&mut self, now: Duration, bytes: u64) -> Duration {
        self.moved = self.moved.max(now) + Duration::from_nanos(bytes * 1_000_000_000 / self.model.bandwidth);
        let Reverse(free) = self.free.pop().unwrap();
        let end = self.moved.max(free) + self.model.latency;
        self.free.push(Reverse(end));
        end.max(self.stalled_until)
    }
}

/// Parameters of the model.
#[derive(Clone, Debug)]
struct Setup {
    options: MirrorOptions,
    granularity: u64,
    len: u64,
    source: DeviceModel,
    target: DeviceModel,
    /// Latency of an extent query on either side; it is no request of the device.
    query: Duration,
    /// Writes that the guest keeps under way.
    depth: usize,
    /// The guest writes in the first so many bytes.
    spread: u64,
    threads: usize,
    /// The target answers nothing during this time.
    stall: Option<(Duration, Duration)>,
}

impl Setup {
    fn new(mode: CopyMode, granularity: u64, device: DeviceModel) -> Self {
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

    fn config(&self) -> Config {
        let mut config = Config::new(&self.options, self.granularity, self.len, Geometry::plain());
        config.live = true;
        config
    }

    /// Writes per second of the guest alone.
    fn unmirrored(&self) -> f64 {
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
enum ModelEvent {
    /// A thread has read what it copies.
    HasRead(usize),
    /// A thread is done.
    Done(usize),
    /// A guest's write has reached the source, or both.
    Source(usize),
    Target(usize),
    /// A wake-up was asked for.
    Wake,
}

struct Slot {
    ticket: u64,
    begun: Duration,
    range: ByteRange,
    admission: Admission,
    /// A wake-up at its admission timeout was asked for.
    wakes: bool,
}

/// The model's state.
struct ThroughputModel {
    setup: Setup,
    core: Core,
    now: Duration,
    rng: Rng,
    source: Device,
    target: Device,
    agenda: BinaryHeap<Reverse<(Duration, u64, ModelEvent)>>,
    sequence: u64,
    threads: Vec<Option<Action>>,
    slots: Vec<Slot>,
    woken_at: Option<Duration>,
    /// Time that each write took.
    latencies: Vec<Duration>,
    events: Vec<(Duration, Event)>,
    /// Begin and length of each data operation.
    operations: Vec<(Duration, ByteRange)>,
}

impl ThroughputModel {
    fn new(setup: Setup) -> Self {
        let core = Core::new(setup.config()).unwrap();
        let mut model = Self {
            core,
            now: Duration::ZERO,
            rng: Rng::from_state(7),
            source: Device::new(setup.source),
            target: Device::new(setup.target),
            agenda: BinaryHeap::new(),
            sequence: 0,
            threads: vec![None; setup.threads],
            slots: Vec::new(),
            woken_at: None,
            latencies: Vec::new(),
            events: Vec::new(),
            operations: Vec::new(),
            setup,
        };
        for _ in 0..model.setup.depth {
            let slot = model.begin();
            model.slots.push(slot);
        }
        model
    }

    fn begin(&mut self) -> Slot {
        let at = self.rng.below(self.setup.spread / BLOCK) * BLOCK;
        let range = ByteRange::at(at, BLOCK);
        self.core.on_timer(self.now);
        let ticket = self.core.on_guest_write(range);
        Slot { ticket, begun: self.now, range, admission: Admission::Wait, wakes: false }
    }

    fn later(&mut self, at: Duration, what: ModelEvent) {
        self.sequence += 1;
        self.agenda.push(Reverse((at, self.sequence, what)));
    }

    /// Runs until `end`, or until `enough` says so.
    fn run(&mut self, end: Duration, enough: impl Fn(&Event) -> bool) {
        loop {
            self.admit();
            self.dispatch();
            let mut stop = false;
            for event in self.core.take_events() {
                stop |= enough(&event);
                self.events.push((self.now, event));
            }
            if stop || self.now >= end {
                return;
            }
            let Some(Reverse((at, _, what))) = self.agenda.pop() else { return };
            if let Some((from, to)) = self.setup.stall
                && at >= from
            {
                self.target.stalled_until = to;
            }
            self.now = at;
            self.on_event(what);
        }
    }

    fn admit(&mut self) {
        self.core.on_timer(self.now);
        for index in 0..self.slots.len() {
            if self.slots[index].admission != Admission::Wait {
                continue;
            }
            let admission = self.core.guest_admit(self.slots[index].ticket);
            self.slots[index].admission = admission;
            if admission == Admission::Wait {
                if let Some(admission_timeout) = self.core.admission_timeout()
                    && !std::mem::replace(&mut self.slots[index].wakes, true)
                {
                    self.later(self.slots[index].begun + admission_timeout, ModelEvent::Wake);
                }
            } else {
                let range = self.slots[index].range;
                let moved = |action: &Action| match action.work {
                    Work::Copy { range: copied, .. } => copied.overlaps(range),
                    _ => false,
                };
                let under_a_copy = self.threads.iter().flatten().any(moved);
                assert!(admission != Admission::SourceAndTarget || !under_a_copy, "{range}");
                let at = self.source.request(self.now, BLOCK);
                self.later(at, ModelEvent::Source(index));
            }
        }
    }

    fn dispatch(&mut self) {
        while let Some(thread) = self.threads.iter().position(Option::is_none) {
            match self.core.next(self.now) {
                Next::Do(action) => {
                    self.threads[thread] = Some(action);
                    let (at, what) = match action.work {
                        Work::Scan { .. } => (self.now + self.setup.query * 2, ModelEvent::Done(thread)),
                        Work::Copy { range, .. } => {
                            self.operations.push((self.now, range));
                            (self.source.request(self.now, range.len()), ModelEvent::HasRead(thread))
                        }
                        _ => (self.target.request(self.now, 0), ModelEvent::Done(thread)),
                    };
                    self.later(at, what);
                }
                Next::Wait(until) => {
                    if let Some(until) = until
                        && self.woken_at.replace(until) != Some(until)
                    {
                        assert!(until > self.now, "waiting for the past spins");
                        self.later(until, ModelEvent::Wake);
                    }
                    return;
                }
                Next::Finished => return,
            }
        }
    }

    fn on_event(&mut self, what: ModelEvent) {
        match what {
            ModelEvent::Wake => {}
            ModelEvent::HasRead(thread) => {
                let Some(Action { work: Work::Copy { range, .. }, .. }) = self.threads[thread] else {
                    return;
                };
                let at = self.target.request(self.now, range.len());
                self.later(at, ModelEvent::Done(thread));
            }
            ModelEvent::Done(thread) => {
                let Some(action) = self.threads[thread].take() else { return };
                let done = match action.work {
                    Work::Scan { range, .. } => Done::Scanned(vec![CopyExtent {
                        range,
                        action: CopyAction::Copy { target_zero: false },
                        below: false,
                    }]),
                    Work::Copy { range, .. } => {
                        Done::Copied(Moved { copied: range.len(), ..Moved::default() })
                    }
                    Work::Clone { range, .. } => {
                        Done::Cloned(Cloned { end: range.end(), ..Cloned::default() })
                    }
                    Work::Zero { .. } => Done::Zeroed,
                    Work::Flush | Work::PeriodicFlush => Done::Flushed,
                    Work::End(_) => Done::Ended,
                };
                self.core.on_completion(self.now, action.id, Ok(done));
            }
            ModelEvent::Source(index) if self.slots[index].admission == Admission::SourceAndTarget => {
                self.core.on_timer(self.now);
                self.core.guest_at_target(self.slots[index].ticket, TargetWriter::Tap);
                let at = self.target.request(self.now, BLOCK);
                self.later(at, ModelEvent::Target(index));
            }
            ModelEvent::Source(index) => self.end(index, false),
            ModelEvent::Target(index) => self.end(index, true),
        }
    }

    fn end(&mut self, index: usize, both: bool) {
        self.core.on_timer(self.now);
        self.core.guest_finished(self.slots[index].ticket, true, both.then_some(Ok(())));
        self.latencies.push(self.now - self.slots[index].begun);
        self.slots[index] = self.begin();
    }

    #[cfg(test)]
    fn progress(&self) -> Progress {
        self.core.progress(self.now)
    }

    /// When the job became ready.
    fn ready(&self) -> Option<Duration> {
        self.events.iter().find(|(_, event)| *event == Event::Ready).map(|(at, _)| *at)
    }

    fn percentile(&self, hundredths: usize) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() * hundredths / 10_000).copied().unwrap_or_default()
    }

    /// The guest's writes per second so far, relative to its rate alone.
    fn share(&self) -> f64 {
        self.latencies.len() as f64 / self.now.as_secs_f64() / self.setup.unmirrored()
    }

    /// Bytes copied more than once, per byte that the guest has written.
    fn amplification(&self) -> f64 {
        let copied: u64 = self.operations.iter().map(|(_, range)| range.len()).sum();
        let written = self.latencies.len() as u64 * BLOCK;
        copied.saturating_sub(self.setup.len) as f64 / written.max(1) as f64
    }

    /// The figures so far.
    fn report(&self) -> ThroughputReport {
        let switches = self.events.iter().filter_map(|(at, event)| match event {
            Event::CopyMode { mode, reason } => Some((*at, *mode, *reason)),
            _ => None,
        });
        ThroughputReport {
            ready: self.ready(),
            share: self.share(),
            p50: self.percentile(5000),
            p99: self.percentile(9900),
            longest: self.latencies.iter().max().copied().unwrap_or_default(),
            amplification: self.amplification(),
            switches: switches.collect(),
        }
    }
}

/// Devices of which each request takes 100 microseconds and which move 4 GiB/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Devices {
    /// They serve any number of requests at once.
    Parallel,
    /// They serve one request after another.
    Serial,
}

/// A guest's throughput and latency while it was mirrored. `Display` gives a line for people.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ThroughputReport {
    /// When the job became ready, if it did.
    pub ready: Option<Duration>,
    /// The guest's writes per second from the start to that time, as a part of its rate without a mirror.
    pub share: f64,
    /// What half of its writes took at most.
    pub p50: Duration,
    /// What 99 of 100 took at most.
    pub p99: Duration,
    /// What the longest took.
    pub longest: Duration,
    /// Bytes copied more than once, per byte that the guest wrote.
    pub amplification: f64,
    /// The changes of auto mode: when, to which copy mode, and why.
    pub switches: Vec<(Duration, CopyMode, ModeReason)>,
}

impl fmt::Display for ThroughputReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ready {
            Some(at) => write!(f, "ready after {:5.2} s", at.as_secs_f64())?,
            None => write!(f, "never ready        ")?,
        }
        write!(
            f,
            "  guest {:5.1} %  p50 {:5} us  p99 {:5} us  longest {:6} us  copied again {:.2}",
            self.share * 100.0,
            self.p50.as_micros(),
            self.p99.as_micros(),
            self.longest.as_micros(),
            self.amplification,
        )
    }
}

/// Mirrors a disk of 1 GiB while a guest keeps 16 random writes of 4 KiB under way, for at most 12 seconds of
/// virtual time.
pub fn model_throughput(mode: CopyMode, granularity: u64, devices: Devices) -> ThroughputReport {
    let device = match devices {
        Devices::Parallel => DeviceModel::PARALLEL,
        Devices::Serial => DeviceModel::SERIAL,
    };
    let mut run = ThroughputModel::new(Setup::new(mode, granularity, device));
    run.run(Duration::from_secs(12), |event| *event == Event::Ready);
    run.report()
}

#[cfg(test)]
mod tests;
