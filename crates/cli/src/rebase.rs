//! `blockmirror rebase`: the work is that of [`Rebase`].

use std::time::Duration;

use blockmirror_block::size::human_size;
use blockmirror_image::{FileId, LockMode};
use blockmirror_ops::{Error, JobControl, Rebase};

use crate::args::RebaseArgs;
use crate::commit::{access, failure};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::lock_policy;
use crate::meter::Meter;
use crate::progress::{Phase, Reading};
use crate::voice::Finished;

const TICK: Duration = Duration::from_millis(20);

pub(crate) fn run(console: &mut Console<'_>, args: &RebaseArgs) -> Outcome {
    let file = args.chain.file.display();
    console.keep_out_of(FileId::of(&args.chain.file));
    let lock = match lock_policy::lock(args.chain.lock) {
        LockMode::Exclusive if args.force_share => LockMode::Shared,
        lock => lock,
    };
    let rebase = Rebase::new(args.chain.name())
        .header_only(args.header_only)
        .unchecked(args.unchecked)
        .compress(args.compress)
        .allocate_zeros(args.allocate_zeros)
        .access(access(&args.chain).cache(args.cache))
        .backing_access(access(&args.chain).claim(false).lock(lock).cache(args.backing_cache))
        .allow(lock_policy::allowed_of_chain(&args.chain)?);
    let backing = args.backing.as_deref().filter(|name| !name.is_empty());
    let rebase = match (backing, args.backing_format.clone()) {
        (Some(name), Some(format)) => rebase.onto(name, format),
        (Some(name), None) => {
            let message = format_args!("rebase: {file}: the format of {name} is missing; give it with -F");
            return Err(Failure::usage(message).in_qemu(format_args!(
                "Could not change the backing file to '{name}': backing format must be specified"
            )));
        }
        (None, _) => rebase,
    };
    let open = rebase.open().map_err(|error| {
        let no_clusters = args.compress && matches!(error, Error::NotLayered { .. });
        let failure = failure("rebase", error);
        if no_clusters { failure.in_qemu("Compression not supported for this file format") } else { failure }
    })?;
    console.keep_out_of(open.files());
    for note in open.notes() {
        console.note(note);
    }
    let interrupt = Interrupt::watch()?;
    let job = open.start().map_err(|error| failure("rebase", error))?;
    let mut meter = Meter::new(console, &args.progress, Phase::Rebase);
    watch(console, job.control(), &mut meter, &interrupt);
    let outcome = job.wait().map_err(|error| {
        let failure = failure("rebase", error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    })?;
    if !args.progress.quiet {
        let on = backing.unwrap_or("no backing file");
        let moved = human_size(outcome.moved);
        let text =
            format!("rebased {file} onto {on}: {moved} copied, in {:.2} s", outcome.elapsed.as_secs_f64());
        let text = console.voice.finished(Finished::Other, one_line(&text) + "\n");
        console.report(&text);
    }
    Ok(Exit::Done)
}

/// Follows the job until it is over: shows progress, and cancels it when a signal comes.
fn watch(console: &mut Console<'_>, control: &JobControl, meter: &mut Meter, interrupt: &Interrupt) {
    loop {
        let over = control.wait_timeout(TICK);
        let progress = control.progress();
        let reading = Reading::of_pass(progress.offset, progress.len);
        if over {
            return meter.last(console, &reading);
        }
        meter.show(console, &reading, interrupt.progress_wanted());
        if interrupt.requested() {
            // Refused if it is over, which is as good.
            let _ = control.force_cancel();
        }
    }
}
