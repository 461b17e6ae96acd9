//! A job as a monitor tells of it: `query-jobs` and, where it moves data, `query-block-jobs`.

use blockmirror_qmp::{Client, ClientError};
use serde_json::{Map, Value, json};

/// A job.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) id: String,
    /// Every member of the answer, by QMP's own names.
    pub(super) fields: Map<String, Value>,
}

/// All jobs.
pub(super) fn list(client: &mut Client) -> Result<Vec<Job>, ClientError> {
    let jobs = client.execute("query-jobs", json!({}))?;
    let moving = client.execute("query-block-jobs", json!({}))?;
    let objects = |answer: Value| match answer {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    let moving = objects(moving);
    let jobs = objects(jobs).into_iter().filter_map(|job| {
        let Value::Object(mut fields) = job else { return None };
        let id = fields.get("id")?.as_str()?.to_owned();
        let more =
            moving.iter().filter_map(Value::as_object).find(|more| more.get("device") == fields.get("id"));
        for (key, value) in more.into_iter().flatten() {
            fields.entry(key.as_str()).or_insert_with(|| value.clone());
        }
        Some(Job { id, fields })
    });
    Ok(jobs.collect())
}

impl Job {
    fn text(&self, key: &str) -> &str {
        self.fields.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.fields.get(key).and_then(Value::as_u64)
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.fields.get(key).and_then(Value::as_bool)
    }

    /// `mirror`, `commit`, `stream`, ...
    pub(super) fn kind(&self) -> &str {
        self.text("type")
    }

    /// `running`, `ready`, ...
    pub(super) fn status(&self) -> &str {
        self.text("status")
    }

    pub(super) fn error(&self) -> Option<&str> {
        self.fields.get("error").and_then(Value::as_str)
    }

    /// What is done, in bytes or whatever the job counts in.
    pub(super) fn done(&self) -> u64 {
        self.number("current-progress").unwrap_or(0)
    }

    /// What there is to do; grows.
    pub(super) fn total(&self) -> u64 {
        self.number("total-progress").unwrap_or(0)
    }

    pub(super) fn left(&self) -> u64 {
        self.total().saturating_sub(self.done())
    }

    pub(super) fn is_paused(&self) -> bool {
        matches!(self.status(), "paused" | "standby")
    }

    /// Why an error has stopped it, if one has.
    pub(super) fn stopped_by(&self) -> Option<&'static str> {
        match self.text("io-status") {
            "nospace" => Some("no space left"),
            "failed" => Some("I/O error"),
            _ => None,
        }
    }

    /// The part that is done, as percents with one digit. 100 only if all of it is.
    pub(super) fn percent(&self) -> String {
        if self.left() == 0 {
            return "100.0 %".into();
        }
        let tenths = u128::from(self.done()) * 1000 / u128::from(self.total());
        format!("{}.{} %", tenths / 10, tenths % 10)
    }

    /// Whether what is left becomes less, in the daemon's own judgement if it has one.
    pub(super) fn converging(&self) -> Option<&str> {
        self.fields.get("converging").and_then(Value::as_str)
    }
}
