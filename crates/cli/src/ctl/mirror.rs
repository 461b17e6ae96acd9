//! `mirror`: opens or creates the target, starts the job, and ends it if that was asked for.
//!
//! What must hold: nothing that was opened for the target stays open without a job, unless the users of the
//! source are on it. Once the job has been started, a failure here leaves it alone.

use std::path::Path;

use blockmirror_qmp::Client;
use serde_json::{Map, Value};

use super::added::{Added, Names};
use super::end::{self, End};
use super::job::list;
use super::node::{self, Node, nodes};
use super::start::{Reached, Started, arguments, job_id};
use super::target::{self, Target};
use crate::args::{CompleteArgs, CopyMode, CtlMirrorArgs, JobArgs, JobSync};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::quote::shell_word;

pub(super) fn mirror(
    console: &mut Console<'_>,
    client: &mut Client,
    socket: &Path,
    args: &CtlMirrorArgs,
) -> Outcome {
    // From before anything is added: a signal that comes then is no reason to leave it.
    let interrupt = Interrupt::watch()?;
    if args.log.is_some() && args.sync != JobSync::Full {
        return Err(Failure::usage("--log: only a mirror with --sync full has a log"));
    }
    let device = node::find(client, &args.device)?;
    let (there, jobs) = (nodes(client)?, list(client)?);
    let is_free = |id: &str| Names::of_job(id).are_free(&there, &jobs);
    let id = job_id(client, args.job.job_id.as_deref(), "mirror", is_free)?;
    let names = Names::of_job(&id);
    names.check("--job-id", &id)?;
    if !is_free(&id) {
        let node = &names.node;
        return Err(Failure::usage(format_args!(
            "--job-id: '{id}': what an earlier job has opened is there: {node}"
        )));
    }
    let given = arguments(&id, &args.device, &args.job)?;
    let mut added = Added::default();
    let started = target::open(client, &mut added, args, &device, &names).and_then(|target| match interrupt
        .requested()
    {
        true => Err(Failure::failed("interrupted; no job was started").exit(interrupt.exit())),
        false => start(client, args, given, &target).map(|()| target),
    });
    let target = match started {
        Ok(target) => target,
        Err(failure) => {
            added.remove(console, client);
            return Err(failure);
        }
    };
    follow(console, client, &Started { socket, id, interrupt }, args, (&device, &target))
}

/// Starts the job, with `arguments` and what else `args` say.
fn start(
    client: &mut Client,
    args: &CtlMirrorArgs,
    mut arguments: Map<String, Value>,
    target: &Target,
) -> Outcome<()> {
    arguments.insert("target".into(), target.node.as_str().into());
    arguments.insert("sync".into(), args.sync.name().into());
    if let Some(granularity) = args.granularity {
        arguments.insert("granularity".into(), granularity.into());
    }
    if let Some(mode) = args.copy_mode {
        arguments.insert("copy-mode".into(), mode.name().into());
    }
    if let Some(log) = &args.log {
        arguments.insert("x-log".into(), target::absolute(log)?.into());
    }
    client.execute("blockdev-mirror", arguments.into())?;
    Ok(())
}

/// Waits as long as `args` ask for, and ends the job as they say.
fn follow(
    console: &mut Console<'_>,
    client: &mut Client,
    started: &Started<'_>,
    args: &CtlMirrorArgs,
    (device, target): (&Node, &Target),
) -> Outcome {
    match (target.is_overwritten, &args.log) {
        (false, _) => {}
        (true, None) => console.note(format_args!("{}: it exists, and is overwritten", args.target)),
        (true, Some(_)) => console.note(format_args!(
            "{}: it exists, and is overwritten; if a mirror has had the log before, only where that says so",
            args.target
        )),
    }
    if args.log.is_some() {
        say_how_it_goes_on(console, started, args, target)?;
    }
    let what = format!("{} -> {}", device.name, target.shown);
    if !(args.job.wait || args.pivot || args.keep_source) {
        started.say_started(console, &what);
        say_ends(console, started, "when it is ready, end it by one of");
        return Ok(Exit::Done);
    }
    let reached = started.wait(console, client)?;
    match reached {
        Reached::Ready if args.pivot || args.keep_source => {
            console.report(&format!("{}: {}\n", started.id, one_line(&format!("ready: {what}"))));
            let jobs = JobArgs { jobs: vec![started.id.clone()] };
            // That closes the target where the job has not pivoted.
            let complete = CompleteArgs { jobs, keep_source: args.keep_source, wait: true };
            end::complete_until(console, client, &complete, &started.interrupt)
        }
        Reached::Ready => {
            console.report(&format!("{}: {}\n", started.id, one_line(&format!("ready: {what}"))));
            say_ends(console, started, "end it by one of");
            Ok(Exit::Done)
        }
        // Another client has ended it, and knows how.
        Reached::Over(End::Completed, verdict) => {
            console.report(&format!("{}\n", one_line(&verdict)));
            Ok(Exit::Done)
        }
        Reached::Over(end, verdict) => {
            console.complain(verdict);
            if end != End::Unknown {
                Added::close_target(console, client, &started.id)?;
            }
            Ok(Exit::Failed)
        }
    }
}

/// Prints the command that goes on with the mirror in another process of the server, from any directory.
fn say_how_it_goes_on(
    console: &mut Console<'_>,
    started: &Started<'_>,
    args: &CtlMirrorArgs,
    target: &Target,
) -> Outcome<()> {
    let Some(log) = &args.log else { return Ok(()) };
    let word = |word: &dyn std::fmt::Display| shell_word(&word.to_string());
    let (socket, log) = (word(&target::absolute(started.socket)?), target::absolute(log)?);
    let to = word(target.path.as_ref().unwrap_or(&args.target));
    let mut line = format!("blockmirror ctl {socket} mirror {} {to}", word(&args.device));
    let mut option = |name: &str, value: Option<&dyn std::fmt::Display>| {
        if let Some(value) = value {
            line += &format!(" --{name} {}", word(value));
        }
    };
    // A new file is an existing one then.
    option("target-format", target.format.as_ref().map(|format| format as _));
    option("job-id", Some(&started.id));
    option("speed", args.job.speed.as_ref().map(|speed| speed as _));
    option("granularity", args.granularity.as_ref().map(|bytes| bytes as _));
    option("copy-mode", args.copy_mode.map(CopyMode::name).as_ref().map(|mode| mode as _));
    option("reconnect-delay", args.reconnect_delay.as_ref().map(|seconds| seconds as _));
    option("log", Some(&log));
    let flags = [(args.job.wait, " --wait"), (args.pivot, " --pivot"), (args.keep_source, " --keep-source")];
    flags.iter().filter(|(given, _)| *given).for_each(|(_, flag)| line += flag);
    console.report(&format!(
        "{}: if the daemon dies, start it again, and before it exports the disk\n  {line}\n",
        started.id
    ));
    Ok(())
}

fn say_ends(console: &mut Console<'_>, started: &Started<'_>, heading: &str) {
    let rows = [
        ("complete", "users of the source switch to the target"),
        ("complete --keep-source", "the target is a copy of that point in time"),
        ("abort", "the target is unusable"),
    ];
    started.say_ends(console, heading, &rows);
}
