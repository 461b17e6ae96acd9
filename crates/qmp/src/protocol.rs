//! The commands of a monitor and what happens to one request: shape of the request, lookup, arguments,
//! handler, answer. No I/O. Called by the sessions.

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tracing::{debug, error_span, info};

use crate::args::Args;
use crate::error::{ErrorClass, QmpError};
use crate::json::Limits;
use crate::schema::{
    self, ANY, Command, Enum, Event, INT, Object, STR, Spelling, Type, check_members, conforms, opt, req,
    value,
};
use crate::session::Session;

/// What a command does. Called on its session's own thread, or on the thread that reads if it was run out of
/// band.
pub(crate) type Handler = Arc<dyn Fn(&Session, Args) -> Result<Value, QmpError> + Send + Sync>;

/// The version that the greeting and `query-version` tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    major: u32,
    minor: u32,
    micro: u32,
    package: String,
}

impl Version {
    /// The version of QEMU whose protocol is spoken (clients compare it), and the name and version of who
    /// speaks.
    pub fn new(major: u32, minor: u32, micro: u32, package: impl Into<String>) -> Self {
        Self { major, minor, micro, package: package.into() }
    }

    /// The numbers: major, minor, micro.
    pub fn triple(&self) -> (u32, u32, u32) {
        (self.major, self.minor, self.micro)
    }

    /// Who speaks: `blockmirror 0.1.0`. QEMU's own is empty or a distribution's.
    pub fn package(&self) -> &str {
        &self.package
    }

    /// What [`to_value`](Self::to_value) was given.
    pub(crate) fn from_value(value: &Value) -> Option<Self> {
        let part = |name| value.get("qemu")?.get(name)?.as_u64().and_then(|n| u32::try_from(n).ok());
        let package = value.get("package").and_then(Value::as_str).unwrap_or_default();
        Some(Self::new(part("major")?, part("minor")?, part("micro")?, package))
    }

    fn to_value(&self) -> Value {
        json!({
            "qemu": {"micro": self.micro, "minor": self.minor, "major": self.major},
            "package": self.package,
        })
    }
}

static QMP_CAPABILITY: Enum = Enum::new(
    "QMPCapability",
    "What a client may switch on.",
    &[value("oob", "commands out of band, by `exec-oob`")],
);

static QMP_CAPABILITIES: Command = Command::new(
    "qmp_capabilities",
    "Ends the negotiation that each session starts with. Until then no other command works and no event is sent.",
    &[opt("enable", Type::Array(&Type::Enum(&QMP_CAPABILITY)), "capabilities to switch on").default("none")],
);

static VERSION_TRIPLE: Object = Object::new(
    "VersionTriple",
    "A version number.",
    &[
        req("major", INT, "the major number"),
        req("minor", INT, "the minor number"),
        req("micro", INT, "the last number"),
    ],
);

static VERSION_INFO: Object = Object::new(
    "VersionInfo",
    "A version.",
    &[
        req("qemu", Type::Object(&VERSION_TRIPLE), "the version of QEMU whose protocol is spoken"),
        req("package", STR, "who speaks it"),
    ],
);

static QUERY_VERSION: Command = Command::new("query-version", "Tells the version.", &[])
    .returns(Type::Object(&VERSION_INFO), "the version");

static COMMAND_INFO: Object = Object::new("CommandInfo", "A command.", &[req("name", STR, "its name")]);

static QUERY_COMMANDS: Command = Command::new("query-commands", "Lists the commands.", &[])
    .returns(Type::Array(&Type::Object(&COMMAND_INFO)), "the commands, in no order to rely on");

static QUERY_QMP_SCHEMA: Command = Command::new(
    "query-qmp-schema",
    "Describes commands, events and their types. Types are numbered; the numbers change from version to version.",
    &[],
)
.returns(Type::Array(&ANY), "entities, each with `name` and `meta-type`");

struct Entry {
    command: &'static Command,
    handler: Handler,
}

/// Commands with their handlers, and the events there are.
///
/// `qmp_capabilities`, `query-version`, `query-commands` and `query-qmp-schema` are in every table.
pub struct Table {
    version: Version,
    entries: Vec<Entry>,
    by_name: HashMap<&'static str, usize>,
    events: Vec<&'static Event>,
    pub(crate) limits: Limits,
    check_answers: bool,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("version", &self.version)
            .field("commands", &self.by_name.len())
            .finish()
    }
}

impl Table {
    /// A table of the commands that every monitor has.
    pub fn new(version: Version) -> Self {
        let mut table = Self {
            version,
            entries: Vec::new(),
            by_name: HashMap::new(),
            events: Vec::new(),
            limits: Limits::DEFAULT,
            check_answers: false,
        };
        // These four look at the table or the session itself: see `call`.
        for command in [&QMP_CAPABILITIES, &QUERY_VERSION, &QUERY_COMMANDS, &QUERY_QMP_SCHEMA] {
            table.command(command, |_, _| Ok(Value::Null));
        }
        table
    }

    /// Adds a command, or replaces the one of the same name. A handler that has nothing to say returns
    /// [`Value::Null`], which goes out as `{}`.
    pub fn command<F>(&mut self, command: &'static Command, handler: F) -> &mut Self
    where
        F: Fn(&Session, Args) -> Result<Value, QmpError> + Send + Sync + 'static,
    {
        let entry = Entry { command, handler: Arc::new(handler) };
        match self.by_name.get(command.name).and_then(|at| self.entries.get_mut(*at)) {
            Some(old) => *old = entry,
            None => {
                self.by_name.insert(command.name, self.entries.len());
                self.entries.push(entry);
            }
        }
        self
    }

    /// Declares an event: for `query-qmp-schema` and the reference.
    pub fn event(&mut self, event: &'static Event) -> &mut Self {
        self.events.push(event);
        self
    }

    /// What one request of a client may cost at most.
    pub fn limits(&mut self, limits: Limits) -> &mut Self {
        self.limits = limits;
        self
    }

    /// For tests: an answer or event that is not as its schema says is not sent; an error goes out in
    /// place of the answer, `SCHEMA_VIOLATION` in place of the event.
    pub fn check_answers(&mut self, on: bool) -> &mut Self {
        self.check_answers = on;
        self
    }

    /// The commands, in the order in which they were added.
    pub fn commands(&self) -> impl Iterator<Item = &'static Command> + '_ {
        self.entries.iter().map(|entry| entry.command)
    }

    /// The events, in the order in which they were declared.
    pub fn events(&self) -> impl Iterator<Item = &'static Event> + '_ {
        self.events.iter().copied()
    }

    /// What `query-qmp-schema` answers.
    pub fn introspect(&self) -> Value {
        schema::introspect(self.commands(), self.events())
    }

    /// The reference of all commands, events and types, as Markdown.
    pub fn markdown(&self) -> String {
        schema::markdown(self.commands(), self.events())
    }

    pub(crate) fn greeting(&self) -> Value {
        json!({"QMP": {"version": self.version.to_value(), "capabilities": ["oob"]}})
    }

    /// Runs a request that was taken apart by [`Request::new`].
    pub(crate) fn run(&self, session: &Session, request: Request) -> Result<Value, QmpError> {
        let Request { command: name, arguments, oob, .. } = request;
        let not_found = |desc: String| QmpError::new(ErrorClass::CommandNotFound, desc);
        if !session.negotiated() && name != QMP_CAPABILITIES.name {
            return Err(not_found("Expecting capabilities negotiation with 'qmp_capabilities'".into()));
        }
        let entry = self.by_name.get(name.as_str()).and_then(|at| self.entries.get(*at));
        let entry = entry.ok_or_else(|| not_found(format!("The command {name} has not been found")))?;
        if oob && !entry.command.allow_oob {
            return Err(QmpError::generic(format!("The command {name} does not support OOB")));
        }
        let _span = error_span!("command", session = session.id(), command = entry.command.name).entered();
        let began = Instant::now();
        let answer = check_members(entry.command.shape(), arguments, Spelling::Json)
            .and_then(|arguments| self.run_known(session, entry, Args::new(arguments)));
        log_answer(entry.command.name, began.elapsed(), answer.as_ref().err());
        answer
    }

    fn run_known(&self, session: &Session, entry: &Entry, args: Args) -> Result<Value, QmpError> {
        let name = entry.command.name;
        let answer = match name {
            "qmp_capabilities" if session.negotiated() => {
                let desc = "Capabilities negotiation is already complete, command ignored";
                return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
            }
            "qmp_capabilities" => {
                let enabled = args.opt_array("enable")?.unwrap_or_default();
                session.negotiate(enabled.iter().any(|name| name == "oob"));
                Value::Null
            }
            "query-version" => self.version.to_value(),
            "query-commands" => self.commands().map(|command| json!({"name": command.name})).collect(),
            "query-qmp-schema" => self.introspect(),
            // Locks do not poison here, and one broken command must not take its session along.
            _ => catch_unwind(AssertUnwindSafe(|| (entry.handler)(session, args))).unwrap_or_else(|_| {
                Err(QmpError::generic(format!("Internal error: the command {name} panicked")))
            })?,
        };
        let answer = if answer.is_null() { Value::Object(Map::new()) } else { answer };
        if self.check_answers {
            check_answer(entry.command, &answer)?;
        }
        Ok(answer)
    }
}

impl Table {
    /// What goes out for an event: itself, or what is wrong with it.
    pub(crate) fn checked_event(
        &self,
        event: &'static Event,
        data: Map<String, Value>,
    ) -> (&'static str, Map<String, Value>) {
        if !self.check_answers {
            return (event.name, data);
        }
        let declared = self.events.iter().any(|known| std::ptr::eq(*known, event));
        let verdict = match declared {
            true => check_members(event.shape(), data.clone(), Spelling::Json).map(|_| ()),
            false => Err(QmpError::generic("not declared")),
        };
        match verdict {
            Ok(()) => (event.name, data),
            Err(error) => {
                let members = [("event".into(), event.name.into()), ("error".into(), error.desc.into())];
                ("SCHEMA_VIOLATION", Map::from_iter(members))
            }
        }
    }
}

/// Logs the end of a command: its name and its error, never its arguments, which may hold secrets. A command
/// that only looks is asked again and again, and stays below the level of an operator.
fn log_answer(name: &str, elapsed: Duration, error: Option<&QmpError>) {
    /// Characters of an error's text; names in it may be as long as a request.
    const MAX_TEXT: usize = 500;
    let seconds = elapsed.as_secs_f64();
    match error {
        Some(error) => info!(seconds, error = format_args!("{:.MAX_TEXT$}", error.desc), "failed"),
        None if name.starts_with("query-") => debug!(seconds, "done"),
        None => info!(seconds, "done"),
    }
}

fn check_answer(command: &'static Command, answer: &Value) -> Result<(), QmpError> {
    let verdict = match command.returns {
        Some(ty) => conforms(ty, answer),
        None if *answer == json!({}) => Ok(()),
        None => Err(QmpError::generic("nothing was to be answered")),
    };
    verdict.map_err(|error| {
        QmpError::generic(format!(
            "Internal error: the answer of {} is not as its schema says: {error}",
            command.name
        ))
    })
}

/// A request taken apart.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: Option<Value>,
    pub(crate) command: String,
    pub(crate) arguments: Map<String, Value>,
    pub(crate) oob: bool,
}

/// Whether a request asks to be run out of band.
pub(crate) fn is_oob(request: &Value) -> bool {
    request.get("exec-oob").is_some() && request.get("execute").is_none()
}

impl Request {
    /// Takes `request` apart; an error comes with the id, if there is one to echo.
    pub(crate) fn new(request: Value, oob_enabled: bool) -> Result<Self, (Option<Value>, QmpError)> {
        let Value::Object(mut members) = request else {
            return Err((None, QmpError::generic("QMP input must be a JSON object")));
        };
        let id = members.shift_remove("id");
        match Self::parts(members, oob_enabled) {
            Ok((command, arguments, oob)) => Ok(Self { id, command, arguments, oob }),
            Err(desc) => Err((id, QmpError::generic(desc))),
        }
    }

    fn parts(
        members: Map<String, Value>,
        oob_enabled: bool,
    ) -> Result<(String, Map<String, Value>, bool), String> {
        let mut command = None;
        let mut arguments = Map::new();
        for (key, value) in members {
            match (key.as_str(), value) {
                ("execute", value) | ("exec-oob", value) if key == "execute" || oob_enabled => {
                    let Value::String(name) = value else {
                        return Err(format!("QMP input member '{key}' must be a string"));
                    };
                    if command.replace((name, key == "exec-oob")).is_some() {
                        return Err("QMP input member 'execute' clashes with 'exec-oob'".into());
                    }
                }
                ("arguments", Value::Object(given)) => arguments = given,
                ("arguments", _) => return Err("QMP input member 'arguments' must be an object".into()),
                _ => return Err(format!("QMP input member '{key}' is unexpected")),
            }
        }
        let (command, oob) = command.ok_or("QMP input lacks member 'execute'")?;
        Ok((command, arguments, oob))
    }
}

/// The answer to a request, as it goes over the wire but for the line end.
pub(crate) fn answer(id: Option<Value>, outcome: Result<Value, QmpError>) -> Value {
    let mut answer = Map::new();
    match outcome {
        Ok(value) => {
            answer.insert("return".into(), value);
            if let Some(id) = id {
                answer.insert("id".into(), id);
            }
        }
        Err(error) => {
            if let Some(id) = id {
                answer.insert("id".into(), id);
            }
            answer.insert("error".into(), json!({"class": error.class.name(), "desc": error.desc}));
        }
    }
    Value::Object(answer)
}
