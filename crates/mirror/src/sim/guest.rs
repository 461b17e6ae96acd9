//! The guest: writers that go through the steps of a write (admitted, source, target, finished), each at its
//! own pace.

use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_block::{self as block, BlockDevice, ByteRange};

use super::workers::{unfailing, write, zero};
use crate::machine::{Admission, AdmissionView, Core, TargetWriter};
use crate::tap::discard;

/// The guest's workload.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    /// Writes under way together.
    pub(super) writers: usize,
    /// One turn in so many begins a new write.
    pub(super) begin_one_in: u64,
    /// Where it writes; anywhere if empty.
    pub(super) hot: ByteRange,
    /// The longest write is one of these.
    pub(super) longest: &'static [u64],
    /// No zeroing, no discards.
    pub(super) only_data: bool,
    /// The writers hold tickets, and ask again where a write would wait.
    pub(super) tickets: bool,
    /// They sleep until they are woken.
    pub(super) sleeps: bool,
    /// Reads keep the old disk in use for a time after a pivot.
    pub(super) reads: bool,
    /// One step in so many is the last of its write, which never ends; 0 for none.
    pub(super) leak_one_in: u64,
    /// One turn in so many begins a copy-up into the source; 0 for none.
    pub(super) copy_up_one_in: u64,
}

impl Workload {
    pub(super) fn random() -> Self {
        Self {
            writers: 4,
            begin_one_in: 6,
            hot: ByteRange::default(),
            longest: &[1, 512, 4096, 20_000],
            only_data: false,
            tickets: false,
            sleeps: false,
            reads: false,
            leak_one_in: 0,
            copy_up_one_in: 0,
        }
    }

    pub(super) fn writer(&self) -> TargetWriter {
        if self.tickets { TargetWriter::TicketHolder } else { TargetWriter::Tap }
    }
}

#[derive(Clone, Debug)]
enum Payload {
    Data(Vec<u8>),
    Zeros,
    Discard,
}

/// A write between its beginning and its end.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) ticket: u64,
    pub(super) range: ByteRange,
    payload: Payload,
    pub(super) admission: Admission,
    pub(super) source: Option<bool>,
    /// The target's result: `Some(None)` if the write was left to the job.
    pub(super) target: Option<Option<block::Result<()>>>,
    /// Its next step is not taken before this.
    pub(super) not_before: Duration,
    pub(super) asleep: Option<Sleep>,
    /// It waits for its regions in the log, of which it has asked by this number.
    pub(super) logs: bool,
    pub(super) request: Option<u64>,
}

/// A caller that was refused and does not ask: until the view of the core is another, or this time.
#[derive(Debug)]
pub(super) struct Sleep {
    view: AdmissionView,
    until: Option<Duration>,
}

/// Callers whose sleep is over ask again. The others would be refused: none sleeps beside an open door.
pub(super) fn wake_callers(writes: &mut [Write], core: &Core, now: Duration) {
    for write in writes {
        if write.asleep.as_ref().is_some_and(|sleep| sleep.is_over(core, now)) {
            write.asleep = None;
        }
        if write.asleep.is_some() {
            assert!(core.guest_would_wait(write.range), "a caller sleeps on: {}", write.range);
        }
    }
}

impl Sleep {
    pub(super) fn new(core: &Core, now: Duration, within: Option<Duration>) -> Self {
        Self { view: core.admission_view(), until: within.map(|within| now + within) }
    }

    fn is_over(&self, core: &Core, now: Duration) -> bool {
        core.admission_view() != self.view || self.until.is_some_and(|until| until <= now)
    }
}

impl Write {
    /// A write somewhere on a disk of `len` bytes, not known to any job yet.
    pub(super) fn random(rng: &mut Rng, len: u64, workload: &Workload) -> Self {
        let within = if workload.hot.is_empty() { ByteRange::new(0, len) } else { workload.hot };
        let longest = rng.pick(workload.longest);
        let range = rng.byte_range(within, longest);
        let payload = match if workload.only_data { 2 } else { rng.below(6) } {
            0 => Payload::Zeros,
            1 => Payload::Discard,
            _ => Payload::Data(rng.nonzero_bytes(range.len())),
        };
        Self {
            ticket: 0,
            range,
            payload,
            admission: Admission::Wait,
            source: None,
            target: None,
            not_before: Duration::ZERO,
            asleep: None,
            logs: false,
            request: None,
        }
    }

    /// Performs it, or if it is to fail no more than a part of it.
    pub(super) fn put(&self, rng: &mut Rng, disk: &MemoryDisk, fails: bool) {
        let happens = self.happens(rng, fails);
        match &self.payload {
            Payload::Data(bytes) => write(disk, &bytes[..happens.len() as usize], happens),
            Payload::Zeros => zero(disk, happens),
            Payload::Discard => unfailing(disk.discard(happens)),
        }
    }

    /// Performs it at the target after the source; if there is a `failure`, no more than a part of it.
    pub(super) fn put_at_target(
        &mut self,
        rng: &mut Rng,
        source: &MemoryDisk,
        target: &MemoryDisk,
        failure: Option<block::Error>,
    ) {
        let done = match self.payload {
            Payload::Discard => {
                let happens = self.happens(rng, failure.is_some());
                discard::repeat(source, target, happens).map(unfailing)
            }
            _ => {
                self.put(rng, target, failure.is_some());
                Some(())
            }
        };
        self.target = Some(done.map(|()| failure.map_or(Ok(()), Err)));
    }

    fn happens(&self, rng: &mut Rng, fails: bool) -> ByteRange {
        let range = self.range;
        match rng.below(3) {
            _ if !fails => range,
            0 => ByteRange::at(range.start(), 0),
            1 => range,
            _ => ByteRange::new(range.start(), range.start() + range.len() / 2),
        }
    }
}
