//! The events that clients are sent, and what sends them: held by whatever has something to report.

use std::sync::OnceLock;

use blockmirror_qmp::Monitors;
use blockmirror_qmp::schema::{Enum, Event, INT, Member, STR, Type, opt, req, value};

use serde_json::Value;

use crate::arguments::Argument;
use crate::schema::{CopyModeArg, JOB_STATUS, JobType};

/// Sends events to all monitors, once it is connected to them: they are made of the commands, and those of
/// what holds this.
#[derive(Debug, Default)]
pub(crate) struct Events(OnceLock<Monitors>);

impl Events {
    /// Events go to `monitors` from now on. Called once.
    pub(crate) fn connect(&self, monitors: Monitors) {
        let _ = self.0.set(monitors);
    }

    /// Sends `event` with the members of `data`.
    pub(crate) fn emit(&self, event: &'static Event, data: Value) {
        if let (Some(monitors), Value::Object(members)) = (self.0.get(), data) {
            monitors.emit(event, members);
        }
    }
}

const EVENT_MEMBERS: [Member; 5] = [
    req("type", JobType::TYPE, "what kind of job"),
    req("device", STR, "its name"),
    req("len", INT, "what there was to do"),
    req("offset", INT, "what is done"),
    req("speed", INT, "bytes per second; 0 is no limit"),
];
static EVENT_DATA: [Member; 5] = EVENT_MEMBERS;
static COMPLETED_DATA: [Member; 6] = {
    let [a, b, c, d, e] = EVENT_MEMBERS;
    [a, b, c, d, e, opt("error", STR, "why it failed")]
};

/// A job has come to another state.
pub(crate) static JOB_STATUS_CHANGE: Event = Event::new(
    "JOB_STATUS_CHANGE",
    "A job has come to another state.",
    &[req("id", STR, "the job"), req("status", Type::Enum(&JOB_STATUS), "the state")],
);
/// A job is ready.
pub(crate) static BLOCK_JOB_READY: Event =
    Event::new("BLOCK_JOB_READY", "A job can be completed.", &EVENT_DATA);
/// A job waits for its end to be allowed.
pub(crate) static BLOCK_JOB_PENDING: Event = Event::new(
    "BLOCK_JOB_PENDING",
    "A job waits for `job-finalize`.",
    &[req("type", JobType::TYPE, "what kind of job"), req("id", STR, "its name")],
);
/// A job has ended.
pub(crate) static BLOCK_JOB_COMPLETED: Event =
    Event::new("BLOCK_JOB_COMPLETED", "A job has ended, well or not.", &COMPLETED_DATA);
/// A job was given up.
pub(crate) static BLOCK_JOB_CANCELLED: Event =
    Event::new("BLOCK_JOB_CANCELLED", "A job was given up; its target is of no use.", &EVENT_DATA);

static OPERATION: Enum = Enum::new(
    "IoOperationType",
    "Which side failed.",
    &[value("read", "the source"), value("write", "the target")],
);
static ACTION: Enum = Enum::new(
    "BlockErrorAction",
    "What happens now.",
    &[value("ignore", "the job goes on"), value("report", "it fails"), value("stop", "it pauses")],
);
/// A request of a job has failed.
pub(crate) static BLOCK_JOB_ERROR: Event = Event::new(
    "BLOCK_JOB_ERROR",
    "A request of a job has failed.",
    &[
        req("device", STR, "the job"),
        req("operation", Type::Enum(&OPERATION), "which side"),
        req("action", Type::Enum(&ACTION), "what happens now"),
        opt("message", STR, "the failure with operation, file and offset, for people").ours(),
    ],
);
/// A mirror in auto mode goes about it in another way.
pub(crate) static BLOCK_JOB_COPY_MODE: Event = Event::new(
    "BLOCK_JOB_COPY_MODE",
    "A mirror with `copy-mode` auto has changed when the target gets what is written.",
    &[
        req("device", STR, "the job"),
        req("copy-mode", CopyModeArg::TYPE, "the mode from now on"),
        req("reason", STR, "why, with figures, for people"),
    ],
)
.ours();

/// An export is gone.
pub(crate) static BLOCK_EXPORT_DELETED: Event =
    Event::new("BLOCK_EXPORT_DELETED", "An export is gone.", &[req("id", STR, "which")]);

/// All events.
pub(crate) static EVENTS: [&Event; 8] = [
    &JOB_STATUS_CHANGE,
    &BLOCK_JOB_READY,
    &BLOCK_JOB_PENDING,
    &BLOCK_JOB_COMPLETED,
    &BLOCK_JOB_CANCELLED,
    &BLOCK_JOB_ERROR,
    &BLOCK_JOB_COPY_MODE,
    &BLOCK_EXPORT_DELETED,
];
