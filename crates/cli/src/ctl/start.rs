//! Starting a job, and following it until it is ready or over.
//!
//! Called by `mirror`, `commit` and `stream`. The job does not depend on the one who waits: a signal ends the
//! wait alone.

use std::path::Path;
use std::time::{Duration, Instant};

use blockmirror_qmp::Client;
use serde_json::{Map, Value};

use super::end::{End, Follow, next};
use super::job::{Job, list};
use super::watch::{ON_TERMINAL, Shown, draw};
use crate::args::NewJobArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::quote::shell_word;

/// A job that was started, and the monitor that it is at.
pub(super) struct Started<'a> {
    pub(super) socket: &'a Path,
    pub(super) id: String,
    /// Watches for signals since before the job was started.
    pub(super) interrupt: Interrupt,
}

/// How far a job is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// It waits to be completed.
    Ready,
    /// It is over, with this for people.
    Over(End, String),
}

/// The arguments that all jobs have in QMP.
pub(super) fn arguments(id: &str, device: &str, args: &NewJobArgs) -> Outcome<Map<String, Value>> {
    let mut arguments = Map::new();
    arguments.insert("job-id".into(), id.into());
    arguments.insert("device".into(), device.into());
    if let Some(speed) = args.speed {
        let speed = i64::try_from(speed).map_err(|_| Failure::usage("--speed: the speed is too large"))?;
        arguments.insert("speed".into(), speed.into());
    }
    Ok(arguments)
}

/// The id that was given, or the first of `mirror0`, `mirror1`, .. for the type `mirror` that no job has and
/// for which `is_free`.
pub(super) fn job_id(
    client: &mut Client,
    given: Option<&str>,
    kind: &str,
    is_free: impl Fn(&str) -> bool,
) -> Outcome<String> {
    if let Some(id) = given {
        return Ok(id.to_owned());
    }
    let jobs = list(client)?;
    Ok(first_free(kind, |id| is_free(id) && !jobs.iter().any(|job| job.id == id)))
}

/// The first of `kind` with a number for which `is_free`.
pub(super) fn first_free(kind: &str, is_free: impl Fn(&str) -> bool) -> String {
    let mut number = 0_u64;
    loop {
        let name = format!("{kind}{number}");
        if is_free(&name) {
            return name;
        }
        number += 1;
    }
}

impl Started<'_> {
    /// A command line for this job.
    pub(super) fn command(&self, verb: &str) -> String {
        let socket = shell_word(&self.socket.to_string_lossy());
        format!("blockmirror ctl {socket} {verb} {}", shell_word(&self.id))
    }

    /// Waits until the job is ready, or over. A terminal shows where it stands meanwhile.
    pub(super) fn wait(&self, console: &mut Console<'_>, client: &mut Client) -> Outcome<Reached> {
        // As it is before anything is known of it: it may be over by now.
        let unknown = Job { id: self.id.clone(), fields: Map::new() };
        let mut following = [Follow::new(unknown)];
        let (mut shown, mut drawn, start) = (Shown::default(), 0, Instant::now());
        let mut limit = Duration::ZERO;
        loop {
            next(client, &mut following, limit, &self.interrupt).map_err(|failure| self.left(failure))?;
            limit = ON_TERMINAL;
            let [follow] = &following;
            if follow.over || follow.job.status() == "ready" {
                break;
            }
            if console.out_is_terminal {
                let (line, _) = shown.line(follow, start.elapsed());
                draw(console, &[&line], drawn)?;
                drawn = 1;
            }
        }
        if drawn > 0 {
            // What follows takes the place of the line.
            console.print("\u{1b}[1A\u{1b}[J")?;
        }
        let [follow] = &following;
        // It may have come while the figures were asked for.
        if !follow.over && self.interrupt.requested() {
            return Err(self.left(Failure::failed("").exit(self.interrupt.exit())));
        }
        Ok(match follow.over {
            true => Reached::Over(follow.end.clone().unwrap_or(End::Unknown), follow.verdict()),
            false => Reached::Ready,
        })
    }

    /// The failure of a wait that a signal has ended.
    fn left(&self, failure: Failure) -> Failure {
        match failure.exit {
            Exit::Signal(_) => {
                let words = format!("interrupted; the job continues: {}", self.command("watch"));
                Failure { message: Some(format!("{}: {words}", self.id)), ..failure }
            }
            _ => failure,
        }
    }

    /// Prints the commands that end the job, each with what it does.
    pub(super) fn say_ends(&self, console: &mut Console<'_>, heading: &str, rows: &[(&str, &str)]) {
        let commands = rows.iter().map(|(verb, what)| (self.command(verb), what)).collect::<Vec<_>>();
        let width = commands.iter().map(|(command, _)| command.chars().count()).max().unwrap_or(0);
        let mut text = format!("{}: {heading}\n", self.id);
        for (command, what) in commands {
            text += &format!("  {command:<width$}  {what}\n");
        }
        console.report(&text);
    }

    /// Prints that the job was started, and how to follow it.
    pub(super) fn say_started(&self, console: &mut Console<'_>, what: &str) {
        console.report(&format!("{}: {}\n", self.id, one_line(&format!("started: {what}"))));
        console.report(&format!("  {}\n", self.command("watch")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_number_is_taken() {
        assert_eq!(first_free("mirror", |_| true), "mirror0");
        assert_eq!(first_free("mirror", |id| id != "mirror0" && id != "mirror1"), "mirror2");
    }

    #[test]
    fn a_command_can_be_pasted() {
        let interrupt = Interrupt::watch().unwrap();
        let started = Started { socket: Path::new("/a b/qmp"), id: "m".into(), interrupt };
        assert_eq!(started.command("complete"), "blockmirror ctl '/a b/qmp' complete m");
    }
}
