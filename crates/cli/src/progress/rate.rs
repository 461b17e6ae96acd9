//! A rate over the last few seconds. Time is an argument.
//!
//! Used by the objects of `--progress=json` and by `ctl watch`.

use std::collections::VecDeque;
use std::time::Duration;

/// How far back figures are compared.
const WINDOW: Duration = Duration::from_secs(4);

/// Figures that follow each other faster are not kept, so that the window holds a bounded number.
const STEP: Duration = Duration::from_millis(100);

/// A figure that grows, over the last few seconds.
#[derive(Debug, Default)]
pub(crate) struct RateWindow {
    /// When, and the figure.
    samples: VecDeque<(Duration, u64)>,
}

impl RateWindow {
    /// Takes the figure of `now`, which is the time since some start.
    pub(crate) fn push(&mut self, now: Duration, figure: u64) {
        if self.samples.back().is_some_and(|(at, _)| *at + STEP > now) {
            return;
        }
        self.samples.push_back((now, figure));
        while self.samples.get(1).is_some_and(|(at, _)| *at + WINDOW <= now) {
            self.samples.pop_front();
        }
    }

    /// What is added per second; `None` before there are two figures.
    pub(crate) fn rate(&self) -> Option<u64> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let nanos = last.0.saturating_sub(first.0).as_nanos();
        let gained = u128::from(last.1.saturating_sub(first.1)) * 1_000_000_000;
        Some(u64::try_from(gained.checked_div(nanos)?).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut window = RateWindow::default();
        assert_eq!(window.rate(), None);
        for millis in 0..10_000 {
            window.push(Duration::from_millis(millis), 1000 + millis * 5);
        }
        assert_eq!(window.rate(), Some(5000));
        assert!(window.samples.len() <= 42, "{}", window.samples.len());
        // What was long ago does not count; a figure that shrinks is no rate.
        for second in 10..20 {
            window.push(Duration::from_secs(second), 7);
        }
        assert_eq!(window.rate(), Some(0));
    }
}
