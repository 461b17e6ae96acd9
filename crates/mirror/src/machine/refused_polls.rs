//! Guest writes that were refused because their caller does not wait: since when.
//!
//! Such a caller asks again and again. Each time is a new write to the core, so its wait for the job would
//! begin anew each time, and no latency budget would ever end it. A refused write is forgotten but for its
//! range and the time of the first refusal; the next write to the same range takes both over.
//!
//! Must hold: memory is bounded, whatever is asked. A refusal that is not followed by another soon is void.

use std::time::Duration;

use blockmirror_block::ByteRange;

/// Refusals that are remembered; the oldest is dropped first. As many as a device has requests in flight: of
/// more writes than this, asked for in turn, none would ever have waited.
const MAX_REFUSALS: usize = 1024;
/// A caller that has not asked again for so long has given up.
const EXPIRY: Duration = Duration::from_secs(1);
/// A caller that has not given up asks again within this time.
pub(super) const ASK_WITHIN: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug)]
struct Refusal {
    range: ByteRange,
    since: Duration,
    last: Duration,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct RefusedPolls {
    refusals: Vec<Refusal>,
}

impl RefusedPolls {
    /// A write to `range` is refused at `now`, and has been since `since`.
    pub(super) fn refuse(&mut self, range: ByteRange, since: Duration, now: Duration) {
        self.refusals.retain(|other| other.range != range && other.counts_at(now));
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.remove(0);
        }
        self.refusals.push(Refusal { range, since, last: now });
    }

    /// Since when writes to `range` have been refused, if they have.
    pub(super) fn since(&self, range: ByteRange) -> Option<Duration> {
        self.refusals.iter().find(|refusal| refusal.range == range).map(|refusal| refusal.since)
    }

    /// The same; forgets it.
    pub(super) fn take(&mut self, range: ByteRange, now: Duration) -> Option<Duration> {
        let index = self.refusals.iter().position(|refusal| refusal.range == range)?;
        let refusal = self.refusals.remove(index);
        refusal.counts_at(now).then_some(refusal.since)
    }
}

impl Refusal {
    fn counts_at(&self, now: Duration) -> bool {
        now.saturating_sub(self.last) < EXPIRY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_refusal_counts_from_the_first_until_its_caller_has_given_up() {
        let (mut polls, range) = (RefusedPolls::default(), ByteRange::new(0, 512));
        assert_eq!(polls.take(range, MS), None);
        polls.refuse(range, MS, MS);
        polls.refuse(range, MS, 900 * MS);
        assert_eq!(polls.take(ByteRange::new(0, 513), 1000 * MS), None);
        assert_eq!(polls.take(range, 1800 * MS), Some(MS));
        assert_eq!(polls.take(range, 1800 * MS), None, "it was taken");
        polls.refuse(range, MS, MS);
        assert_eq!(polls.take(range, 1001 * MS), None, "nothing was asked for a second");
    }

    #[test]
    fn memory_is_bounded() {
        let mut polls = RefusedPolls::default();
        for at in 0..2000 {
            polls.refuse(ByteRange::at(at * 512, 512), MS, MS);
        }
        assert_eq!(polls.refusals.len(), MAX_REFUSALS);
        assert_eq!(polls.take(ByteRange::at(1999 * 512, 512), MS), Some(MS));
    }
}
