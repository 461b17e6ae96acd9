//! `blockmirror commit`: the work is that of [`Commit`].

use blockmirror_block::size::human_size;
use blockmirror_image::{self as image, FileId, OpenOptions};
use blockmirror_ops::{Commit, CommitOutcome, Error};

use crate::args::{ChainArgs, CommitArgs};
use crate::console::Console;
use crate::copy::watch;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::Phase;
use crate::voice::Finished;
use crate::{lock_policy, qemu_words};

pub(crate) fn run(console: &mut Console<'_>, args: &CommitArgs) -> Outcome {
    console.keep_out_of(FileId::of(&args.chain.file));
    let commit = Commit::new(args.chain.name())
        .access(access(&args.chain).cache(args.cache))
        .allow(lock_policy::allowed_of_chain(&args.chain)?)
        .keep(args.keep)
        .speed(args.rate);
    let commit = match &args.base {
        Some(base) => commit.base(base),
        None => commit,
    };
    let open = commit.open().map_err(|error| failure("commit", error))?;
    console.keep_out_of(open.files());
    for note in open.notes() {
        console.note(note);
    }
    let between = open.layers_between();
    if between > 0 {
        let base = open.base().display();
        console.note(format_args!("{base}: {between} image(s) above it show a mixture from now on"));
    }
    let interrupt = Interrupt::watch()?;
    let base = open.base().to_owned();
    let job = open.start().map_err(|error| failure("commit", error))?;
    let mut meter = Meter::new(console, &args.progress, Phase::Commit);
    watch(console, job.control(), &base, &mut meter, &interrupt, &mut |_, _| ());
    let outcome = job.finish().map_err(|error| {
        let failure = failure("commit", error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    })?;
    if !args.progress.quiet {
        let text = console.voice.finished(Finished::Committed, one_line(&text(args, &outcome)) + "\n");
        console.report(&text);
    }
    Ok(Exit::Done)
}

/// How the files of a chain that changes are opened.
pub(crate) fn access(args: &ChainArgs) -> OpenOptions {
    OpenOptions::new().lock(lock_policy::lock(args.lock)).claim(!args.force)
}

/// `error` of `command`, with what the command line has for it.
pub(crate) fn failure(command: &str, error: Error) -> Failure {
    match error {
        // Of an image that would stand on itself.
        Error::Image(image::Error::Create { path, why }) => {
            Failure::failed(format_args!("{command}: {}: {why}", path.display()))
        }
        Error::Image(error) => error.into(),
        error => {
            let in_qemu = qemu_words::of_chain(&error);
            Failure { in_qemu, ..Failure::failed(format_args!("{command}: {error}")) }
        }
    }
}

fn text(args: &CommitArgs, outcome: &CommitOutcome) -> String {
    let copy = &outcome.copy;
    format!(
        "committed {} to {}: {}: {} copied, {} zeroed, {} skipped, in {:.2} s",
        args.chain.file.display(),
        outcome.base.display(),
        human_size(outcome.len),
        human_size(copy.copied),
        human_size(copy.zeroed),
        human_size(copy.skipped),
        copy.elapsed.as_secs_f64()
    )
}
