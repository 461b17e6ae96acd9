//! `blockmirror ctl`: looks at the jobs of a daemon, starts them and steers them, over QMP.
//!
//! Nothing here is ours alone: it works with whatever QEMU's monitors tell, and shows more where a daemon
//! tells more.

mod added;
mod chain;
mod close;
mod end;
mod job;
mod lists;
mod mirror;
mod node;
mod objects;
mod rates;
mod report;
mod snapshot;
mod start;
mod table;
mod target;
mod watch;

use std::time::Duration;

use blockmirror_qmp::{Client, ClientError};
use serde_json::{Value, json};

use crate::args::{CtlArgs, CtlCommand, Output, SetSpeedArgs};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::json::pretty;
use job::{Job, list};

/// How long a monitor may take to answer. One of QEMU's stands still while its main loop waits for a slow
/// disk.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to greet: what is silent for so long is not a monitor, or talks to another client.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::failed(error)
    }
}

pub(crate) fn run(console: &mut Console<'_>, args: &CtlArgs) -> Outcome {
    let mut client = Client::connect(&args.socket, GREETING_LIMIT).map_err(|error| match error {
        ClientError::Timeout { .. } => Failure::failed(format_args!(
            "{error}; a monitor of QEMU serves one client at a time, and this one may be taken"
        )),
        error => error.into(),
    })?;
    client.set_timeout(TIMEOUT);
    let socket = args.socket.as_path();
    match &args.command {
        CtlCommand::Mirror(args) => return mirror::mirror(console, &mut client, socket, args),
        CtlCommand::Commit(args) => return chain::commit(console, &mut client, socket, args),
        CtlCommand::Stream(args) => return chain::stream(console, &mut client, socket, args),
        CtlCommand::Snapshot(args) => return snapshot::snapshot(console, &mut client, args),
        CtlCommand::Close(args) => close::close(console, &mut client, args)?,
        CtlCommand::Nodes(style) => return lists::list_nodes(console, &mut client, style),
        CtlCommand::Bitmaps(style) => return lists::list_bitmaps(console, &mut client, style),
        CtlCommand::Exports(style) => return lists::list_exports(console, &mut client, style),
        CtlCommand::Jobs(style) => {
            let jobs = list(&mut client)?;
            match style.output {
                Output::Human => console.print(&table::table(&jobs))?,
                Output::Json => {
                    let jobs = jobs.iter().map(|job| Value::Object(job.fields.clone())).collect();
                    console.print(&format!("{}\n", pretty(&jobs)))?;
                }
            }
        }
        CtlCommand::Pause(args) => each(&mut client, &args.jobs, "job-pause")?,
        CtlCommand::Resume(args) => each(&mut client, &args.jobs, "job-resume")?,
        CtlCommand::SetSpeed(args) => set_speed(&mut client, args)?,
        CtlCommand::Complete(args) => return end::complete(console, &mut client, args),
        CtlCommand::Abort(args) => return end::abort(console, &mut client, &args.jobs),
        CtlCommand::Watch(args) => return watch::watch(console, &mut client, socket, args),
    }
    Ok(Exit::Done)
}

fn each(client: &mut Client, names: &[String], command: &str) -> Outcome<()> {
    for job in pick(list(client)?, names)? {
        client.execute(command, json!({"id": job.id})).map_err(|e| of_job(&job, e))?;
    }
    Ok(())
}

fn set_speed(client: &mut Client, args: &SetSpeedArgs) -> Outcome<()> {
    let speed = i64::try_from(args.speed).map_err(|_| Failure::usage("set-speed: the speed is too large"))?;
    for job in pick(list(client)?, args.job.as_slice())? {
        let arguments = json!({"device": job.id, "speed": speed});
        client.execute("block-job-set-speed", arguments).map_err(|e| of_job(&job, e))?;
    }
    Ok(())
}

/// What the server refused, with the job it was about.
fn of_job(job: &Job, error: ClientError) -> Failure {
    match error.refusal() {
        Some(refusal) => Failure::failed(format_args!("{}: {refusal}", job.id)),
        None => error.into(),
    }
}

/// The jobs called `names`; the only one if there are no names.
fn pick(jobs: Vec<Job>, names: &[String]) -> Outcome<Vec<Job>> {
    let there = || jobs.iter().map(|job| job.id.as_str()).collect::<Vec<_>>().join(", ");
    if names.is_empty() {
        return match jobs.len() {
            0 => Err(Failure::failed("there are no jobs")),
            1 => Ok(jobs),
            n => Err(Failure::usage(format_args!("there are {n} jobs, say which: {}", there()))),
        };
    }
    let missing = names.iter().find(|name| !jobs.iter().any(|job| job.id == **name));
    if let Some(missing) = missing {
        return Err(Failure::failed(match jobs.len() {
            0 => format!("no job '{missing}': there are none"),
            _ => format!("no job '{missing}': there is {}", there()),
        }));
    }
    Ok(jobs.into_iter().filter(|job| names.contains(&job.id)).collect())
}
