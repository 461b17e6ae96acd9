//! `commit` and `stream`: jobs on the chain of a disk in use.

use std::path::Path;

use blockmirror_qmp::Client;
use serde_json::{Map, Value};

use super::end::{self, End};
use super::node;
use super::start::{Reached, Started, arguments, job_id};
use crate::args::{CompleteArgs, CtlCommitArgs, CtlStreamArgs, JobArgs};
use crate::console::Console;
use crate::failure::{Exit, Outcome, one_line};
use crate::interrupt::Interrupt;

pub(super) fn commit(
    console: &mut Console<'_>,
    client: &mut Client,
    socket: &Path,
    args: &CtlCommitArgs,
) -> Outcome {
    let interrupt = Interrupt::watch()?;
    // A name that is wrong is answered with those that there are.
    node::find(client, &args.device)?;
    let id = job_id(client, args.job.job_id.as_deref(), "commit", |_| true)?;
    let mut given = arguments(&id, &args.device, &args.job)?;
    name(&mut given, "top-node", args.top.as_deref());
    name(&mut given, "base-node", args.base.as_deref());
    client.execute("block-commit", given.into())?;
    let started = Started { socket, id, interrupt };
    let top = args.top.as_deref().unwrap_or(&args.device);
    let base = args.base.as_deref().unwrap_or("the base");
    if !(args.job.wait || args.pivot) {
        started.say_started(console, &format!("{top} -> {base}"));
        if top == args.device {
            say_ends(console, &started, "when it is ready, end it by one of");
        }
        return Ok(Exit::Done);
    }
    match started.wait(console, client)? {
        Reached::Ready if args.pivot => {
            let jobs = JobArgs { jobs: vec![started.id.clone()] };
            let complete = CompleteArgs { jobs, keep_source: false, wait: true };
            end::complete_until(console, client, &complete, &started.interrupt)
        }
        Reached::Ready => {
            console.report(&format!("{}: {}\n", started.id, one_line(&format!("ready: {top} -> {base}"))));
            say_ends(console, &started, "end it by one of");
            Ok(Exit::Done)
        }
        Reached::Over(end, verdict) => Ok(say_end(console, &end, &verdict)),
    }
}

pub(super) fn stream(
    console: &mut Console<'_>,
    client: &mut Client,
    socket: &Path,
    args: &CtlStreamArgs,
) -> Outcome {
    let interrupt = Interrupt::watch()?;
    node::find(client, &args.device)?;
    let id = job_id(client, args.job.job_id.as_deref(), "stream", |_| true)?;
    let mut given = arguments(&id, &args.device, &args.job)?;
    name(&mut given, "base-node", args.base.as_deref());
    client.execute("block-stream", given.into())?;
    let started = Started { socket, id, interrupt };
    if !args.job.wait {
        let from = args.base.as_deref().map_or("all below it".to_owned(), |base| format!("all above {base}"));
        started.say_started(console, &format!("{from} -> {}", args.device));
        return Ok(Exit::Done);
    }
    Ok(match started.wait(console, client)? {
        Reached::Ready => Exit::Done,
        Reached::Over(end, verdict) => say_end(console, &end, &verdict),
    })
}

fn name(arguments: &mut Map<String, Value>, key: &str, node: Option<&str>) {
    if let Some(node) = node {
        arguments.insert(key.into(), node.into());
    }
}

fn say_end(console: &mut Console<'_>, end: &End, verdict: &str) -> Exit {
    match end {
        End::Completed => {
            console.report(&format!("{}\n", one_line(verdict)));
            Exit::Done
        }
        _ => {
            console.complain(verdict);
            Exit::Failed
        }
    }
}

fn say_ends(console: &mut Console<'_>, started: &Started<'_>, heading: &str) {
    let rows = [
        ("complete", "users of the disk switch to the base"),
        ("abort", "users stay; what was written to the base stays there, and the disk reads as before"),
    ];
    started.say_ends(console, heading, &rows);
}
