//! `human-monitor-command`: the verbs of QEMU's other monitor, for people, that mirror work uses.
//!
//! A verb is another spelling of a command: it makes the command's arguments and calls the command's own
//! function. Jobs are named after their device, as there. What a verb has to say, errors included, is the
//! text that the command returns.

mod line;
mod qemu_io;
mod size;

use std::fmt::Write;
use std::sync::Arc;

use blockmirror_qmp::Session;
use blockmirror_qmp::schema::{Command, Type};
use serde_json::{Map, Value, json};

use self::line::{Param, ParamKind};
use super::{Commands, Handler, Services, chain, drive_mirror, job};
use crate::Reply;
use crate::arguments::{Arguments, arguments};

arguments! {
    struct LineArgs {
        command_line: String = "command-line", "the line";
        _cpu_index: Option<i64> = "cpu-index", "without effect: there are no CPUs";
    }
}

static HUMAN_MONITOR_COMMAND: Command = Command::new(
    "human-monitor-command",
    "Runs a line of the monitor for people: `drive_mirror`, `block_job_set_speed`, `block_job_cancel`, \
     `block_job_pause`, \
     `block_job_resume`, `block_job_complete`, `block_stream`, `info block-jobs`, `qemu-io`, `help`. Jobs \
     have the name of \
     their device.",
    LineArgs::MEMBERS,
)
.differs("there are no other verbs")
.returns(Type::Str, "what there is to say, nothing if all is well; errors come here too");

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add_quick(&HUMAN_MONITOR_COMMAND, |services, session, args: LineArgs| {
        let text = run(services, session, &args.command_line);
        // Lines end as on a terminal.
        Ok(Value::String(text.replace('\n', "\r\n")))
    });
}

/// Does what a verb says; returns what there is to say.
type Action = fn(&Arc<Services>, &Session, Map<String, Value>) -> Reply<String>;

struct Verb {
    /// One word, or `info` and another.
    name: &'static str,
    /// Its parameters for people.
    synopsis: &'static str,
    help: &'static str,
    params: &'static [Param],
    action: Action,
}

const fn flag(name: &'static str, letter: char) -> Param {
    Param { name, kind: ParamKind::Flag(letter), optional: false }
}

const DEVICE: Param = Param { name: "device", kind: ParamKind::Device, optional: false };

static VERBS: [Verb; 9] = [
    Verb {
        name: "block_job_cancel",
        synopsis: "[-f] device",
        help: "ends a job and keeps its target if it is ready, gives it up otherwise (-f: in any case)",
        params: &[flag("force", 'f'), DEVICE],
        action: |services, session, args| call(job::cancel, services, session, args),
    },
    Verb {
        name: "block_job_complete",
        synopsis: "device",
        help: "ends a job that is ready; a mirror goes over to its target",
        params: &[DEVICE],
        action: |services, session, args| call(job::complete, services, session, args),
    },
    Verb {
        name: "block_job_pause",
        synopsis: "device",
        help: "pauses a job",
        params: &[DEVICE],
        action: |services, session, args| call(job::pause, services, session, args),
    },
    Verb {
        name: "block_job_resume",
        synopsis: "device",
        help: "lets a paused job go on",
        params: &[DEVICE],
        action: |services, session, args| call(job::resume, services, session, args),
    },
    Verb {
        name: "block_job_set_speed",
        synopsis: "device speed",
        help: "changes how fast a job goes, in MiB per second or with a suffix (B, K, M, G)",
        params: &[DEVICE, Param { name: "speed", kind: ParamKind::Size, optional: false }],
        action: |services, session, args| call(job::set_speed, services, session, args),
    },
    Verb {
        name: "block_stream",
        synopsis: "device [speed [base]]",
        help: "brings up into an image what its backing files hold",
        params: &[
            DEVICE,
            Param { name: "speed", kind: ParamKind::Size, optional: true },
            Param { name: "base", kind: ParamKind::Text, optional: true },
        ],
        action: |services, session, args| call_alone(chain::stream, services, session, with_job_id(args)),
    },
    Verb {
        name: "drive_mirror",
        synopsis: "[-n] [-f] device target [format]",
        help: "copies a device to an image while it is written (-n: the image is there, -f: with what \
         backing files hold)",
        params: &[
            flag("reuse", 'n'),
            flag("full", 'f'),
            DEVICE,
            Param { name: "target", kind: ParamKind::Text, optional: false },
            Param { name: "format", kind: ParamKind::Text, optional: true },
        ],
        action: mirror,
    },
    Verb {
        name: "info block-jobs",
        synopsis: "",
        help: "shows the jobs",
        params: &[],
        action: |services, _, _| Ok(list_jobs(services)),
    },
    Verb {
        name: "qemu-io",
        synopsis: "[-d] device \"command\"",
        help: "reads, writes, discards or flushes as the tool does (-d: refused, there are no devices of a \
         guest)",
        params: &[
            flag("qdev", 'd'),
            DEVICE,
            Param { name: "command", kind: ParamKind::Text, optional: false },
        ],
        action: |services, _, args| {
            let _nodes = services.context.lock_nodes(&args, false);
            qemu_io::run(&services.context, &qemu_io::QemuIoArgs::parse(&args)?)
        },
    },
];

fn call<A: Arguments>(
    handler: Handler<A>,
    services: &Arc<Services>,
    session: &Session,
    args: Map<String, Value>,
) -> Reply<String> {
    handler(services, session, A::parse(&args)?).map(|_| String::new())
}

/// The same for a command that runs alone on its nodes.
fn call_alone<A: Arguments>(
    handler: Handler<A>,
    services: &Arc<Services>,
    session: &Session,
    args: Map<String, Value>,
) -> Reply<String> {
    let _nodes = services.context.lock_nodes(&args, false);
    call(handler, services, session, args)
}

fn with_job_id(mut args: Map<String, Value>) -> Map<String, Value> {
    let device = args.get(DEVICE.name).cloned().unwrap_or_default();
    args.insert("job-id".to_owned(), device);
    args
}

fn mirror(services: &Arc<Services>, session: &Session, args: Map<String, Value>) -> Reply<String> {
    let mut args = with_job_id(args);
    let mode = if args.remove("reuse").is_some() { "existing" } else { "absolute-paths" };
    let sync = if args.remove("full").is_some() { "full" } else { "top" };
    args.insert("mode".to_owned(), json!(mode));
    args.insert("sync".to_owned(), json!(sync));
    call_alone(drive_mirror::start, services, session, args)
}

fn list_jobs(services: &Services) -> String {
    let mut text = String::new();
    for info in services.jobs.block_infos() {
        let kind = info["type"].as_str().unwrap_or_default();
        let device = info["device"].as_str().unwrap_or_default();
        let what = match kind {
            "stream" => format!("Streaming device {device}"),
            _ => format!("Type {kind}, device {device}"),
        };
        let figure = |name: &str| info[name].as_u64().unwrap_or_default();
        let (offset, len, speed) = (figure("offset"), figure("len"), figure("speed"));
        // Writing to a string does not fail.
        let _ = writeln!(text, "{what}: Completed {offset} of {len} bytes, speed limit {speed} bytes/s");
    }
    if text.is_empty() { "No active jobs\n".to_owned() } else { text }
}

/// Runs a line; returns the text that its user sees.
fn run(services: &Arc<Services>, session: &Session, line: &str) -> String {
    let line = line.trim_start();
    let (word, rest) = first_word(line);
    if word.is_empty() {
        return String::new();
    }
    if matches!(word, "help" | "?") {
        return help(rest.trim());
    }
    let (second, after) = first_word(rest.trim_start());
    let name = if word == "info" { format!("info {second}") } else { word.to_owned() };
    if name == "info " {
        return help("info");
    }
    let Some(verb) = VERBS.iter().find(|verb| verb.name == name) else {
        let end = line.len() - if word == "info" { after.len() } else { rest.len() };
        return format!("unknown command: '{}'\n", &line[..end]);
    };
    let short = verb.name.strip_prefix("info ").unwrap_or(verb.name);
    let rest = if word == "info" { after } else { rest };
    let result = match line::arguments(short, verb.params, rest) {
        Ok(arguments) => (verb.action)(services, session, arguments),
        Err(text) => return format!("{text}Try \"help {}\" for more information\n", verb.name),
    };
    result.unwrap_or_else(|error| format!("Error: {}\n", error.desc))
}

fn first_word(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| c.is_ascii_whitespace()).unwrap_or(text.len()))
}

/// What the verbs that `name` begins with, or all, do.
fn help(name: &str) -> String {
    let mut words = name.split_ascii_whitespace();
    let name = match (words.next(), words.next()) {
        (Some("info"), Some(second)) => format!("info {second}"),
        (first, _) => first.unwrap_or_default().to_owned(),
    };
    let wanted = |verb: &&Verb| {
        name.is_empty() || verb.name == name || (name == "info" && verb.name.starts_with("info "))
    };
    let mut text = String::new();
    for verb in VERBS.iter().filter(wanted) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} {} -- {}", verb.name, verb.synopsis, verb.help);
    }
    if text.is_empty() { format!("unknown command: '{name}'\n") } else { text }
}
