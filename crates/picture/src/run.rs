//! What is kept of a run: samples over time and events, both bounded.
//!
//! [`RunRecord`] is filled while a copy runs, [`RunReport`] adds how it ended and makes the page. When the
//! samples are full every second one is dropped and they are taken half as often, so that they always span
//! the whole run. Figures of work are sums, so that a rate between two samples is exact whatever lay between.

use std::time::Duration;

/// The most samples that are kept.
pub const SAMPLES: usize = 480;

/// The most events that are kept; later ones are counted.
pub const EVENTS: usize = 200;

/// At first samples are this far apart.
const STEP: Duration = Duration::from_millis(50);

/// Where a copy stands at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Since the start.
    pub at: Duration,
    /// Bytes that have been copied, shared, zeroed or given up.
    pub done: u64,
    /// Bytes that are left.
    pub left: u64,
    /// Bytes per second that the guest makes dirty, if there is one.
    pub dirty_rate: Option<u64>,
}

/// What is kept of a run.
#[derive(Clone, Debug)]
pub struct RunRecord {
    samples: Vec<Sample>,
    /// The latest one, which the samples may not have.
    last: Option<Sample>,
    step: Duration,
    events: Vec<(Duration, String)>,
    more_events: u64,
}

impl Default for RunRecord {
    fn default() -> Self {
        Self::new()
    }
}

impl RunRecord {
    /// Of a run that begins.
    pub fn new() -> Self {
        Self { samples: Vec::new(), last: None, step: STEP, events: Vec::new(), more_events: 0 }
    }

    /// Takes where the copy stands. Samples come in order of time, as often as the caller likes.
    pub fn sample(&mut self, sample: Sample) {
        self.last = Some(sample);
        if self.samples.last().is_some_and(|kept| sample.at < kept.at + self.step) {
            return;
        }
        if self.samples.len() == SAMPLES {
            let mut odd = false;
            self.samples.retain(|_| {
                odd = !odd;
                odd
            });
            self.step *= 2;
            return self.sample(sample);
        }
        self.samples.push(sample);
    }

    /// Takes that something has happened.
    pub fn event(&mut self, at: Duration, what: impl Into<String>) {
        if self.events.len() < EVENTS {
            self.events.push((at, what.into()));
        } else {
            self.more_events += 1;
        }
    }

    /// The samples, the latest included.
    pub(crate) fn samples(&self) -> Vec<Sample> {
        let last = self.last.filter(|last| self.samples.last().is_some_and(|kept| kept.at < last.at));
        self.samples.iter().copied().chain(last).collect()
    }

    pub(crate) fn events(&self) -> &[(Duration, String)] {
        &self.events
    }

    pub(crate) fn more_events(&self) -> u64 {
        self.more_events
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// All was copied.
    Completed,
    /// It ended, and not all is as it should be.
    Incomplete,
    /// It failed.
    Failed,
    /// It was ended by a signal, or cancelled.
    Interrupted,
    /// It goes on, and is not watched any more.
    Running,
}

/// A run that is over: the figures of a page.
#[derive(Clone, Debug)]
pub struct RunReport<'a> {
    /// What was done, for example `copy`.
    pub command: &'a str,
    /// What it was about, for example `disk.raw → disk.qcow2`.
    pub subject: &'a str,
    /// How it ended.
    pub ending: Ending,
    /// Why, if there is something to say.
    pub message: Option<&'a str>,
    /// How long it took.
    pub elapsed: Duration,
    /// Names and values of what else is known.
    pub facts: &'a [(&'a str, String)],
    /// What was seen meanwhile.
    pub record: &'a RunRecord,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn samples_are_bounded_and_span_the_run() {
        let mut record = RunRecord::new();
        for tick in 0..100_000 {
            record.sample(Sample { at: Duration::from_millis(tick * 20), done: tick, ..Sample::default() });
            assert!(record.samples().len() <= SAMPLES + 1);
        }
        let samples = record.samples();
        assert!(samples.len() > SAMPLES / 3, "{}", samples.len());
        assert_eq!((samples[0].done, samples.last().unwrap().done), (0, 99_999));
        let gaps: Vec<_> = samples.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
        let longest = gaps.iter().max().unwrap();
        assert!(*longest <= 3 * record.step, "{longest:?}");
    }

    #[test]
    fn events_are_bounded_and_counted() {
        let mut record = RunRecord::new();
        for number in 0..EVENTS + 5 {
            record.event(Duration::ZERO, number.to_string());
        }
        assert_eq!((record.events().len(), record.more_events()), (EVENTS, 5));
        assert!(RunRecord::new().samples().is_empty());
    }
}
