//! The objects that say to programs where something stands: one a line, under `--progress=json` and
//! `ctl watch --json`. `docs/schemas/progress.json` is their schema.

use std::time::Duration;

use serde_json::{Map, Value};

/// Changes when a member gets another name or another meaning, not when one is added.
const VERSION: u32 = 1;

/// An object in the making. What is not known is left out.
#[derive(Debug)]
pub(crate) struct Object(Map<String, Value>);

impl Object {
    /// One about `event`: `progress`, `message` or `end`.
    pub(crate) fn new(event: &str) -> Self {
        Self(Map::new()).with("version", VERSION).with("event", event)
    }

    pub(crate) fn with(self, name: &str, value: impl Into<Value>) -> Self {
        self.with_some(name, Some(value))
    }

    pub(crate) fn with_some(mut self, name: &str, value: Option<impl Into<Value>>) -> Self {
        if let Some(value) = value {
            self.0.insert(name.to_owned(), value.into());
        }
        self
    }

    /// The members of `value`, if it is an object.
    pub(crate) fn with_all(mut self, value: Value) -> Self {
        if let Value::Object(members) = value {
            self.0.extend(members);
        }
        self
    }

    /// `elapsed`: seconds, to the millisecond.
    pub(crate) fn after(self, elapsed: Duration) -> Self {
        self.with("elapsed", Duration::from_millis(elapsed.as_millis() as u64).as_secs_f64())
    }

    /// The whole line.
    pub(crate) fn line(self) -> String {
        format!("{}\n", Value::Object(self.0))
    }
}
