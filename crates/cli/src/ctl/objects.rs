//! `watch --json`: where a job stands, as the objects of `--progress=json` with the id of the job.
//!
//! Called by [`super::watch`]; time is an argument. One object a second for each job, one for each other
//! state, and one for the end.

use std::time::Duration;

use serde_json::{Value, json};

use super::end::{End, Follow};
use super::job::Job;
use super::rates::{Outlook, Rates};
use crate::failure::one_line;
use crate::progress::Object;

const INTERVAL: Duration = Duration::from_secs(1);

/// What was last said of a job.
#[derive(Default)]
pub(super) struct Objects {
    rates: Rates,
    /// When, and the state.
    said: Option<(Duration, String)>,
    ended: bool,
}

impl Objects {
    /// The line about a job, if one is due.
    pub(super) fn next(&mut self, follow: &Follow, now: Duration) -> Option<String> {
        if let Some(end) = &follow.end {
            let is_new = !std::mem::replace(&mut self.ended, true);
            return is_new.then(|| ended(&follow.job, end, now));
        }
        let job = &follow.job;
        let pace = self.rates.pace(job, now);
        let is_due =
            self.said.as_ref().is_none_or(|(at, state)| now >= *at + INTERVAL || state != job.status());
        if !is_due {
            return None;
        }
        self.said = Some((now, job.status().to_owned()));
        let (eta, converging) = match pace.outlook {
            Outlook::Unknown => (None, None),
            Outlook::Equal => (Some(0), Some("equal")),
            Outlook::In(time) => {
                (Some(time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0))), Some("yes"))
            }
            Outlook::NotConverging => (None, Some("no")),
        };
        let object = figures(Object::new("progress"), job, job.status());
        let object = object.with_some("rate", pace.copied).with_some("dirty-rate", pace.written);
        let object = object.with_some("eta", eta).with_some("converging", converging);
        let object = object.with_some("writes-through", job.flag("writes-through"));
        let object = object.with_some("io-status", job.fields.get("io-status").cloned());
        Some(object.after(now).line())
    }
}

fn ended(job: &Job, end: &End, now: Duration) -> String {
    let (state, error) = match end {
        End::Completed => ("completed", None),
        End::Failed(error) => ("failed", Some(error)),
        End::Cancelled => ("cancelled", None),
        End::Unknown => ("unknown", None),
    };
    let error: Option<Value> = error.map(|error| json!({ "class": "failed", "message": one_line(error) }));
    figures(Object::new("end"), job, state).after(now).with_some("error", error).line()
}

fn figures(object: Object, job: &Job, state: &str) -> Object {
    let object = object.with("job", one_line(&job.id)).with("phase", one_line(job.kind()));
    let object = object.with("state", one_line(state));
    object.with("done", job.done()).with("total", job.total()).with("left", job.left())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow(fields: Value) -> Follow {
        Follow::new(Job { id: "m".into(), fields: fields.as_object().cloned().unwrap_or_default() })
    }

    fn parsed(line: Option<String>) -> Value {
        serde_json::from_str(&line.unwrap()).unwrap()
    }

    #[test]
    fn a_job_is_an_object_a_second_and_one_at_its_end() {
        let mut objects = Objects::default();
        let running = json!({"type": "mirror", "status": "running", "current-progress": 5,
                             "total-progress": 10, "converging": "yes", "eta-ms": 1500, "copy-rate": 7,
                             "dirty-rate": 3, "writes-through": false, "io-status": "ok"});
        let job = follow(running.clone());
        let want = json!({"version": 1, "event": "progress", "job": "m", "phase": "mirror", "state": "running",
                          "done": 5, "total": 10, "left": 5, "rate": 7, "dirty-rate": 3, "eta": 2,
                          "converging": "yes", "writes-through": false, "io-status": "ok", "elapsed": 0.25});
        assert_eq!(parsed(objects.next(&job, Duration::from_millis(250))), want);
        assert_eq!(objects.next(&job, Duration::from_millis(1200)), None);
        assert!(objects.next(&job, Duration::from_millis(1250)).is_some());
        let mut paused = running;
        paused["status"] = "paused".into();
        paused["io-status"] = "nospace".into();
        let said = parsed(objects.next(&follow(paused), Duration::from_millis(1260)));
        assert_eq!((&said["state"], &said["io-status"]), (&"paused".into(), &"nospace".into()));
        let failed = json!({"type": "mirror", "status": "concluded", "current-progress": 5,
                            "total-progress": 10, "error": "No\nspace"});
        let said = parsed(objects.next(&follow(failed.clone()), Duration::from_secs(2)));
        let want = json!({"version": 1, "event": "end", "job": "m", "phase": "mirror", "state": "failed",
                          "done": 5, "total": 10, "left": 5, "elapsed": 2.0,
                          "error": {"class": "failed", "message": "No\\nspace"}});
        assert_eq!(said, want);
        assert_eq!(objects.next(&follow(failed), Duration::from_secs(3)), None);
    }
}
