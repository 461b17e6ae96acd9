//! How fast a job goes and when it will be through. A daemon that knows is believed; for others the figures
//! of the last few seconds are compared. Called by `watch`; time is an argument.

use std::time::Duration;

use super::job::Job;
use crate::progress::RateWindow;

/// What is known of a job's pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Pace {
    /// Bytes per second that the job does.
    pub(super) copied: Option<u64>,
    /// Bytes per second that come to be done: what others write.
    pub(super) written: Option<u64>,
    pub(super) outlook: Outlook,
}

/// What becomes of what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Outlook {
    #[default]
    Unknown,
    /// Nothing is left.
    Equal,
    /// That long and nothing is left.
    In(Duration),
    NotConverging,
}

/// The figures of one job over the last few seconds.
#[derive(Debug, Default)]
pub(super) struct Rates {
    done: RateWindow,
    total: RateWindow,
}

impl Rates {
    /// Takes the figures of `now`, which is the time since some start, and tells the pace.
    pub(super) fn pace(&mut self, job: &Job, now: Duration) -> Pace {
        self.done.push(now, job.done());
        self.total.push(now, job.total());
        let measured = self.measured(job);
        let Some(converging) = job.converging() else { return measured };
        let outlook = match (converging, job.number("eta-ms")) {
            ("equal", _) => Outlook::Equal,
            ("yes", Some(eta)) => Outlook::In(Duration::from_millis(eta)),
            ("no", _) => Outlook::NotConverging,
            _ => Outlook::Unknown,
        };
        Pace {
            copied: job.number("copy-rate").or(measured.copied),
            written: job.number("dirty-rate").or(measured.written),
            outlook,
        }
    }

    fn measured(&self, job: &Job) -> Pace {
        let (Some(copied), Some(written)) = (self.done.rate(), self.total.rate()) else {
            return Pace::default();
        };
        // The figures of a pause say nothing of what comes after it.
        if job.is_paused() {
            return Pace::default();
        }
        let outlook = match copied.checked_sub(written) {
            _ if job.left() == 0 => Outlook::Equal,
            None | Some(0) => Outlook::NotConverging,
            Some(gain) => Outlook::In(Duration::from_secs(job.left().div_ceil(gain))),
        };
        Pace { copied: Some(copied), written: Some(written), outlook }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(done: u64, total: u64, more: serde_json::Value) -> Job {
        let mut fields = more.as_object().cloned().unwrap_or_default();
        fields.insert("current-progress".into(), done.into());
        fields.insert("total-progress".into(), total.into());
        Job { id: "m".into(), fields }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn figures_are_compared_where_the_server_has_no_rates() {
        let mut rates = Rates::default();
        assert_eq!(rates.pace(&job(0, 1000, json!({})), Duration::ZERO), Pace::default());
        let pace = rates.pace(&job(100, 1020, json!({})), SECOND);
        let want = Pace { copied: Some(100), written: Some(20), outlook: Outlook::In(12 * SECOND) };
        assert_eq!(pace, want);
        let pace = rates.pace(&job(200, 1400, json!({})), 2 * SECOND);
        assert_eq!(pace.outlook, Outlook::NotConverging);
        // What was long ago does not count.
        for second in 3..20 {
            rates.pace(&job(1400, 1400, json!({})), second * SECOND);
        }
        let pace = rates.pace(&job(1400, 1400, json!({})), 20 * SECOND);
        assert_eq!(pace, Pace { copied: Some(0), written: Some(0), outlook: Outlook::Equal });
        assert_eq!(rates.pace(&job(1, 2, json!({"status": "paused"})), 21 * SECOND), Pace::default());
        // Figures of a server that makes no sense.
        assert_eq!(rates.pace(&job(u64::MAX, 0, json!({})), 22 * SECOND).outlook, Outlook::Equal);
    }

    #[test]
    fn a_daemon_that_knows_is_believed() {
        let pace = |fields| Rates::default().pace(&job(0, 10, fields), SECOND);
        let fields = json!({"converging": "yes", "eta-ms": 1500, "copy-rate": 7, "dirty-rate": 3});
        let want =
            Pace { copied: Some(7), written: Some(3), outlook: Outlook::In(Duration::from_millis(1500)) };
        assert_eq!(pace(fields), want);
        assert_eq!(pace(json!({"converging": "no"})).outlook, Outlook::NotConverging);
        assert_eq!(pace(json!({"converging": "unknown"})).outlook, Outlook::Unknown);
        assert_eq!(pace(json!({"converging": "yes"})).outlook, Outlook::Unknown);
    }
}
