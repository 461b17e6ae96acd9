//! A client of a monitor: synchronous, without threads. For tools that steer a daemon, and for tests.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use blockmirror_qmp::Client;
//! use serde_json::json;
//!
//! let mut client = Client::connect("/run/qmp.sock", Client::TIMEOUT)?;
//! for job in client.execute("query-jobs", json!({}))?.as_array().into_iter().flatten() {
//!     println!("{job}");
//! }
//! client.execute("job-pause", json!({"id": "mirror0"}))?;
//! while let Some(event) = client.next_event(Duration::from_secs(60))? {
//!     println!("{} {:?}", event.name, event.data);
//! }
//! # Ok::<(), blockmirror_qmp::ClientError>(())
//! ```
//!
//! What must hold: a server can neither keep a call for longer than its time limit nor make the client hold
//! more than the [limits](crate::json::Limits) of one value and the events that are kept. Whatever it sends
//! is a value or a typed error.

mod error;
mod stream;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use crate::error::{ErrorClass, QmpError};
use crate::json;
use crate::protocol::Version;

pub use error::ClientError;
use stream::{Deadline, Stream};

/// Events kept for [`Client::next_event`] while commands run.
const MAX_EVENTS: usize = 4096;
/// Bytes of text that they take at most.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// An event, as the server sent it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ReceivedEvent {
    /// Its name: `BLOCK_JOB_READY`.
    pub name: String,
    /// What it carries.
    pub data: Map<String, Value>,
    /// When it happened, by the server's clock, if that made sense.
    pub time: Option<SystemTime>,
}

/// A session that has been negotiated. Dropping it hangs up.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    version: Version,
    timeout: Duration,
    last_id: u64,
    /// With the length of each as text.
    events: VecDeque<(ReceivedEvent, usize)>,
    event_bytes: usize,
    dropped_events: u64,
}

impl Client {
    /// A time limit that serves: commands of a healthy server take milliseconds.
    pub const TIMEOUT: Duration = Duration::from_secs(10);

    /// Connects to the unix socket at `path` and negotiates. `timeout` is the limit for that, and for each
    /// command.
    ///
    /// # Errors
    /// No server listens there; or it speaks another protocol, or is silent.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, ClientError> {
        let deadline = Deadline::after(timeout);
        Self::negotiate(Stream::connect(path.as_ref(), timeout)?, timeout, deadline)
    }

    /// Negotiates on a socket that is connected already.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn new(socket: UnixStream, timeout: Duration) -> Result<Self, ClientError> {
        Self::negotiate(Stream::new(socket), timeout, Deadline::after(timeout))
    }

    fn negotiate(mut stream: Stream, timeout: Duration, deadline: Deadline) -> Result<Self, ClientError> {
        let greeting = stream.value("the greeting", deadline)?;
        let version = greeting.get("QMP").and_then(|qmp| Version::from_value(qmp.get("version")?));
        let version = version.ok_or_else(|| {
            stream.hang_up();
            ClientError::Protocol { what: format!("no QMP greeting: {}", excerpt(&greeting)) }
        })?;
        let mut client = Self {
            stream,
            version,
            timeout,
            last_id: 0,
            events: VecDeque::new(),
            event_bytes: 0,
            dropped_events: 0,
        };
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// What the server said it is.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The limit for each command from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Events that were dropped, oldest first, because they were not taken.
    pub fn dropped_events(&self) -> u64 {
        self.dropped_events
    }

    /// Runs a command and returns its answer. `arguments` is an object; [`Value::Null`] and `{}` mean none.
    /// Events that arrive meanwhile are kept for [`next_event`](Self::next_event).
    ///
    /// # Errors
    /// [`ClientError::Command`] is the server's own refusal. After [`ClientError::Timeout`] the command may
    /// still have been carried out, or will be; the session goes on. After any other error it is over.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let deadline = Deadline::after(self.timeout);
        self.last_id += 1;
        let id = self.last_id;
        let mut request = json!({"execute": command, "id": id});
        if arguments.as_object().is_some_and(|members| !members.is_empty()) {
            request["arguments"] = arguments;
        }
        let mut line = json::to_string(&request);
        line.push('\n');
        self.stream.send(line.as_bytes(), command, deadline)?;
        loop {
            let value = self.stream.value(command, deadline)?;
            let Value::Object(mut answer) = value else { return Err(self.nonsense(&value)) };
            if answer.contains_key("event") {
                self.keep(answer)?;
                continue;
            }
            match answer.get("id").map(Value::as_u64) {
                Some(Some(other)) if other == id => {}
                // The answer to a command whose time was over.
                Some(Some(other)) if other < id => continue,
                // Without an id: the server could not read what we sent.
                None if answer.contains_key("error") => {}
                _ => return Err(self.nonsense(&Value::Object(answer))),
            }
            if let Some(error) = answer.get("error") {
                let error = QmpError::new(ErrorClass::from_name(text(error, "class")), text(error, "desc"));
                return Err(ClientError::Command { command: command.into(), error });
            }
            return match answer.shift_remove("return") {
                Some(value) => Ok(value),
                None => Err(self.nonsense(&Value::Object(answer))),
            };
        }
    }

    /// The next event, in the order in which the server sent them; waits for it for at most `timeout`. `None`
    /// if none came.
    ///
    /// # Errors
    /// The session is over: [`ClientError::Closed`] if the server hung up.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<ReceivedEvent>, ClientError> {
        let deadline = Deadline::after(timeout);
        loop {
            if let Some((event, length)) = self.events.pop_front() {
                self.event_bytes = self.event_bytes.saturating_sub(length);
                return Ok(Some(event));
            }
            match self.stream.value("an event", deadline) {
                Ok(Value::Object(members)) if members.contains_key("event") => self.keep(members)?,
                Ok(Value::Object(late)) if late.get("id").and_then(Value::as_u64).is_some() => {}
                Ok(other) => return Err(self.nonsense(&other)),
                Err(ClientError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&mut self, mut members: Map<String, Value>) -> Result<(), ClientError> {
        let length = json::to_string(&Value::Object(members.clone())).len();
        if !members.get("event").is_some_and(Value::is_string) {
            return Err(self.nonsense(&Value::Object(members)));
        }
        let name = members.shift_remove("event").and_then(|name| Some(name.as_str()?.to_owned()));
        let (name, data) = (name.unwrap_or_default(), members.shift_remove("data"));
        let data = match data {
            Some(Value::Object(data)) => data,
            _ => Map::new(),
        };
        let time = members.get("timestamp").and_then(|stamp| {
            let part = |name| stamp.get(name).and_then(Value::as_u64);
            let whole = Duration::from_secs(part("seconds")?);
            let time = whole.checked_add(Duration::from_micros(part("microseconds")?))?;
            SystemTime::UNIX_EPOCH.checked_add(time)
        });
        self.events.push_back((ReceivedEvent { name, data, time }, length));
        self.event_bytes = self.event_bytes.saturating_add(length);
        while self.events.len() > MAX_EVENTS || self.event_bytes > MAX_EVENT_BYTES {
            let Some((_, length)) = self.events.pop_front() else { break };
            self.event_bytes = self.event_bytes.saturating_sub(length);
            self.dropped_events += 1;
        }
        Ok(())
    }

    /// The session is over: what comes next is unknown.
    fn nonsense(&mut self, value: &Value) -> ClientError {
        self.stream.hang_up();
        ClientError::Protocol { what: format!("unexpected: {}", excerpt(value)) }
    }
}

fn text<'a>(object: &'a Value, member: &str) -> &'a str {
    object.get(member).and_then(Value::as_str).unwrap_or_default()
}

/// The beginning of a value, for messages.
fn excerpt(value: &Value) -> String {
    const LENGTH: usize = 100;
    let text = json::to_string(value);
    match text.get(..LENGTH) {
        // It is ASCII.
        Some(beginning) => format!("{beginning}..."),
        None => text,
    }
}
