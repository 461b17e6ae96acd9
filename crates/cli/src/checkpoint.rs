//! Copies that are gone on with after an interruption: when one keeps a checkpoint, and what is asked about
//! an earlier one.
//!
//! The work is that of [`CheckpointOptions`]; called by [`crate::copy`].

use std::path::Path;

use blockmirror_block::size::human_size;
use blockmirror_image::directory_of;
use blockmirror_ops::{
    CheckedConvert, CheckpointOptions, ConvertError, ConvertJob, Interrupted, PreparedConvert, ResumeCheck,
};

use crate::args::{CopyArgs, ResumeHow};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::prompt;

/// A copy of so many bytes, or more, to a new file keeps a checkpoint by itself.
const LARGE: u64 = 10 << 30;

/// `f_type` of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The checkpoint of a copy of `len` bytes.
pub(crate) fn wanted(console: &mut Console<'_>, args: &CopyArgs, len: u64) -> Option<CheckpointOptions> {
    let asked = &args.checkpoint;
    if args.no_sync {
        // A checkpoint says what is durable.
        return None;
    }
    let options = match &asked.checkpoint {
        Some(file) => {
            if is_in_memory(file) {
                let file = file.display();
                console.note(format_args!(
                    "{file}: it lies in memory: the checkpoint does not survive the host"
                ));
            }
            CheckpointOptions::file(file)
        }
        None if len >= LARGE && !asked.only_if_named => CheckpointOptions::beside(),
        None => return None,
    };
    let options = match asked.checkpoint_interval {
        Some(bytes) => options.interval(bytes),
        None => options,
    };
    let check = match asked.resume {
        Some(ResumeHow::Verify) => ResumeCheck::All,
        Some(ResumeHow::Sample) | None => ResumeCheck::Sample,
    };
    Some(options.restart(asked.restart || args.existing.clean).check(check))
}

/// Fails if an option is about a checkpoint, and the copy keeps none: `keeps`.
pub(crate) fn check(args: &CopyArgs, keeps: bool) -> Outcome<()> {
    let asked = &args.checkpoint;
    let option = match (asked.restart, asked.checkpoint_interval, asked.resume) {
        (true, ..) => "--restart",
        (false, Some(_), _) => "--checkpoint-interval",
        (false, None, Some(_)) => "--resume",
        (false, None, None) => return Ok(()),
    };
    match keeps {
        true => Ok(()),
        false => Err(Failure::usage(format_args!(
            "{option}: this copy keeps no checkpoint; --checkpoint FILE asks for one"
        ))),
    }
}

fn is_in_memory(file: &Path) -> bool {
    let system = rustix::fs::statfs(directory_of(file));
    system.is_ok_and(|system| u64::try_from(system.f_type) == Ok(TMPFS_MAGIC))
}

/// What to do about a copy to the same target that was interrupted: asked on a terminal, unless the command
/// line says it. `None` if nothing is to be done.
pub(crate) fn settle(
    console: &mut Console<'_>,
    args: &CopyArgs,
    checked: CheckedConvert,
    interrupt: &Interrupt,
) -> Outcome<CheckedConvert> {
    let decided = args.checkpoint.restart || args.existing.clean || !console.can_ask;
    if decided || args.dry_run {
        return Ok(checked);
    }
    let Some(found) = checked.interrupted().map_err(Failure::failed)? else { return Ok(checked) };
    let target = args.target.display();
    let there = there(&found);
    let answer = match &found.changed {
        None => {
            let question = format!("{target}: an interrupted copy is there: {there}. Go on with it?");
            prompt::ask(
                console,
                &question,
                &[("yes", Answer::Resume), ("restart", Answer::Restart)],
                interrupt,
            )
        }
        Some(what) => {
            let question =
                format!("{target}: an interrupted copy is there, and {what}. Discard it, and begin anew?");
            prompt::ask(console, &question, &[("yes", Answer::Restart)], interrupt)
        }
    };
    match answer {
        Some(Answer::Resume) => Ok(checked),
        Some(Answer::Restart) => Ok(checked.restart()),
        None => {
            let failure =
                Failure::failed(format_args!("copy: {target}: nothing was copied; {}", ways(&found)));
            Err(if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure })
        }
    }
}

#[derive(Clone, Copy)]
enum Answer {
    Resume,
    Restart,
}

/// Says that a copy is gone on with.
pub(crate) fn announce(console: &mut Console<'_>, args: &CopyArgs, prepared: &PreparedConvert) {
    if let Some(found) = prepared.resumes() {
        let (target, partial) = (args.target.display(), found.partial.display());
        let all = matches!(args.checkpoint.resume, Some(ResumeHow::Verify));
        let first = match all {
            true => "; what was copied is read again first",
            false if prepared.resumes_unseen() => {
                "; nothing else may have been written to source or target since: a sample is read, \
                 --resume=verify reads all"
            }
            false => "",
        };
        let there = there(found);
        console.note(format_args!("{target}: going on with an interrupted copy: {there} ({partial}){first}"));
    }
}

/// Says what could not be checked of a copy that is gone on with.
pub(crate) fn begun(console: &mut Console<'_>, args: &CopyArgs, job: &ConvertJob) {
    let unread = job.source_unread();
    if unread > 0 {
        let target = args.target.display();
        console.note(format_args!(
            "{target}: {unread} of the regions that were copied cannot be read of the source any more; the copy keeps them"
        ));
    }
}

/// The failure of a copy that can be gone on with, or of one that cannot be gone on with.
pub(crate) fn failure(error: &ConvertError, interrupt: Option<&Interrupt>) -> Failure {
    match error {
        ConvertError::Interrupted(_) => {
            let failed = Failure::failed(format_args!("{error}: the same command goes on there"))
                .caused_by(error.device_error());
            match interrupt {
                Some(interrupt) if interrupt.requested() => failed.exit(Exit::Resumable),
                _ => failed,
            }
        }
        error => Failure::failed(format_args!("{error}; {WAYS}")).caused_by(error.device_error()),
    }
}

/// The failure of a copy that was to go on and was not begun: what was copied before stays.
pub(crate) fn not_gone_on(error: &ConvertError, interrupt: &Interrupt) -> Failure {
    let failed = |way| Failure::failed(format_args!("{error}; {way}")).caused_by(error.device_error());
    match error {
        _ if interrupt.requested() => failed("the same command goes on there").exit(Exit::Resumable),
        ConvertError::Changed { .. } => failure(error, None),
        ConvertError::SourceUnread { .. } => {
            failed(&*format!("what was copied stays; --salvage goes on without the source there, {WAYS}"))
        }
        _ => failed(&*format!("what was copied stays; {WAYS}")),
    }
}

/// What a copy that is refused before it has gone on leaves as it was, to be followed by what else can be
/// done. Empty if there is nothing.
pub(crate) fn kept(prepared: &PreparedConvert) -> String {
    let found = prepared.resumes().filter(|found| found.done > 0);
    found.map_or_else(String::new, |found| {
        let (done, len, partial) = (found.done, found.len, found.partial.display());
        format!("{done} of {len} bytes are kept in {partial}: the same command goes on there; ")
    })
}

/// How much there is.
fn there(found: &Interrupted) -> String {
    format!("{} of {}", human_size(found.done), human_size(found.len))
}

const WAYS: &str = "--restart begins anew, --clean also removes what other runs have left";

fn ways(found: &Interrupted) -> String {
    format!("{} stays; {WAYS}", found.partial.display())
}
