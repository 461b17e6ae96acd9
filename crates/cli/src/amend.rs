//! `blockmirror amend`.

use blockmirror_block::{ErrorKind, Visit};
use blockmirror_image::{
    AmendSettings, Error, FileId, Format, OpenOptions, OptionError, amend, amend_option_help,
};

use crate::args::AmendArgs;
use crate::console::Console;
use crate::create::{wants_help, wrong_option};
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::{Phase, Reading};
use crate::voice::Finished;
use crate::{lock_policy, qemu_words};

pub(crate) fn run(console: &mut Console<'_>, args: &AmendArgs) -> Outcome {
    if wants_help(&args.options) {
        let format = args.format.unwrap_or(Format::Qcow2);
        let text = console.voice.option_help(format, &amend_option_help(format));
        console.print(&text)?;
        return Ok(Exit::Done);
    }
    let Some(path) = &args.file else {
        return Err(Failure::usage("amend: the name of the image is missing"));
    };
    let mut settings = AmendSettings::default();
    for text in &args.options {
        settings.parse(text).map_err(|error| {
            let in_qemu = match &error {
                OptionError::BadValue { key, value, .. } if key == "compat" => {
                    Some(format!("Unknown compatibility level {value}"))
                }
                error => qemu_words::of_option(error),
            };
            let known = amend_option_help(args.format.unwrap_or(Format::Qcow2));
            Failure { in_qemu, ..wrong_option(&error, &known) }
        })?;
    }
    if settings == AmendSettings::default() {
        return Err(Failure::usage("amend: -o names no option"));
    }
    settings.allow_shrink(args.shrink);
    console.keep_out_of(FileId::of(path));
    let options = OpenOptions::new()
        .format(args.format)
        .node(args.node.clone())
        .lock(lock_policy::lock(args.lock))
        .claim(!args.force)
        .cache(args.cache)
        .policy(lock_policy::allowed_dirs(&args.allow_backing)?.policy_for(path)?);
    let interrupt = Interrupt::watch()?;
    let mut meter = Meter::new(console, &args.progress, Phase::Amend);
    let amended = amend(path, &options, &settings, &mut |done, total| {
        meter.show(console, &Reading::of_pass(done, total), interrupt.progress_wanted());
        if interrupt.requested() { Visit::Break(()) } else { Visit::Continue(()) }
    });
    meter.finish(console);
    let cancelled = |error: &Error| error.device_error().is_some_and(|e| e.kind() == ErrorKind::Cancelled);
    let notes = match amended {
        Err(error) if cancelled(&error) => {
            let message = format_args!("amend: {}: interrupted; it can be repeated", path.display());
            return Err(Failure::failed(message).exit(interrupt.exit()));
        }
        Err(error @ Error::WouldShrink { .. }) => {
            return Err(Failure::usage(format_args!("{error}; --shrink allows it")));
        }
        amended => amended?,
    };
    for note in notes {
        console.note(note);
    }
    if !args.progress.quiet {
        let own = one_line(&format!("amended {}", path.display())) + "\n";
        let text = console.voice.finished(Finished::Other, own);
        console.report(&text);
    }
    Ok(Exit::Done)
}
