//! `blockmirror mirror` and `blockmirror convert`: one copy, two sets of defaults.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_image::size::human_size;
use blockmirror_image::{CreateSettings, FileId, Format};
use blockmirror_mirror::{
    self as mirror, Error, ErrorKind, IoStatus, JobState, MirrorControl, MirrorJob, MirrorOptions, Plan,
    SyncMode,
};
use serde_json::{Value, json};

use crate::args::{ConvertArgs, CopyArgs, MirrorArgs, OnError, Output, Sync};
use crate::console::Console;
use crate::create::parse_options;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::progress::{Meter, Reading};
use crate::source::{self, Source};
use crate::target::{Target, TargetSpec};
use crate::{json, pause};

const TICK: Duration = Duration::from_millis(20);

/// Where the target's format comes from.
#[derive(Clone, Copy)]
enum TargetFormat {
    Given(Format),
    /// The same as the source's.
    Source,
    /// Whatever the existing target has.
    Found,
}

/// The target has the source's format, and everything is copied.
pub(crate) fn mirror(console: &mut Console<'_>, args: &MirrorArgs) -> Outcome {
    let format = match args.copy.target_format {
        Some(format) => TargetFormat::Given(format),
        None if args.copy.no_create => TargetFormat::Found,
        None => TargetFormat::Source,
    };
    copy(console, &args.copy, Some(args.sync.unwrap_or(Sync::Full)), format)
}

/// The target is raw, and with a backing file gets what lies above the source's.
pub(crate) fn convert(console: &mut Console<'_>, args: &ConvertArgs) -> Outcome {
    let format = TargetFormat::Given(args.copy.target_format.unwrap_or(Format::Raw));
    copy(console, &args.copy, args.sync, format)
}

/// Copies. Without `sync` it is the target's backing file that decides what.
fn copy(console: &mut Console<'_>, args: &CopyArgs, sync: Option<Sync>, format: TargetFormat) -> Outcome {
    console.keep_out_of(FileId::of(&args.target));
    let options = job_options(console, args)?;
    // As early as the format is known, so that mistakes cost nothing.
    let mut settings = CreateSettings::default();
    if let TargetFormat::Given(format) = format {
        let Some(parsed) = parse_options(console, format, &args.target_options)? else {
            return Ok(Exit::Done);
        };
        settings = parsed;
    }
    let has_backing = args.backing.is_some() || settings.backing_file.is_some();
    if args.names.len() > 1 && (has_backing || sync == Some(Sync::Top)) {
        let what = if has_backing { "a backing file" } else { "--sync=top" };
        return Err(Failure::usage(format_args!("{what} makes no sense with several sources")));
    }
    let source = Source::open(console, args)?;
    let sync = sync.unwrap_or(if has_backing { Sync::Top } else { Sync::Full });
    // Without a backing file the top image decides everything.
    let sync = if sync == Sync::Top && source.backing().is_some() { SyncMode::Top } else { SyncMode::Full };
    let options = options.sync(sync);
    let format = match format {
        TargetFormat::Given(format) => Some(format),
        TargetFormat::Found => None,
        TargetFormat::Source => {
            let Some(format) = source.format() else {
                return Err(Failure::usage("the sources have several formats; -O says the target's"));
            };
            let Some(parsed) = parse_options(console, format, &args.target_options)? else {
                return Ok(Exit::Done);
            };
            settings = parsed;
            Some(format)
        }
    };
    let spec = TargetSpec::new(args, &source, format, settings, sync)?;
    let interrupt = Interrupt::watch()?;
    if args.dry_run {
        let plan = spec.plan(&source, &options, &interrupt)?;
        console.print(&planned(args, &plan)?)?;
        return Ok(Exit::Done);
    }
    let target = spec.open(console, &source, &interrupt)?;
    // Zeros that are written again would give back what was preallocated.
    let options = options.target_is_zero(args.target_is_zero || target.reads_as_zeros());
    let job = MirrorJob::start(Arc::clone(source.device()), Arc::clone(target.device()), options)
        .map_err(failed)?;
    if !args.progress.quiet && args.output.output == Output::Human {
        console.report(&format!("granularity: {}\n", job.granularity()));
    }
    let mut meter = Meter::new(console, &args.progress, "done");
    let declined = watch(console, job.control(), &mut meter, &interrupt);
    let ended = job.wait();
    meter.finish(console);
    match ended {
        Ok(outcome) => conclude(console, args, target, source.device().len(), &outcome),
        Err(error) => {
            let exit = if interrupt.requested() { interrupt.exit() } else { Exit::Failed };
            let why = declined.unwrap_or_else(|| error.to_string());
            let left = if target.vanishes() { "" } else { "; the target is incomplete" };
            Err(Failure::failed(format_args!("copy: {}: {why}{left}", args.target.display())).exit(exit))
        }
    }
}

/// The options of the job, checked as far as they can be before a file was looked at.
fn job_options(console: &Console<'_>, args: &CopyArgs) -> Outcome<MirrorOptions> {
    let mut options = MirrorOptions::new()
        .granularity(args.granularity)
        .speed(args.speed)
        .buf_size(args.buf_size)
        .on_source_error(match args.salvage {
            true => mirror::OnError::Ignore,
            false => policy(console, args.on_source_error, "--on-source-error")?,
        })
        .on_target_error(policy(console, args.on_target_error, "--on-target-error")?)
        .target_is_zero(args.target_is_zero)
        .longer_target(args.no_create);
    if let Some(operations) = args.parallel {
        options = options.max_in_flight(operations.into());
    }
    if let Some(bytes) = args.sparse_size {
        // Without a search for zeros the target is allocated in full, as qemu-img's is.
        options = options.min_zero_run(bytes).allocate(bytes == 0);
    }
    options.check().map_err(Failure::usage)?;
    Ok(options)
}

fn policy(console: &Console<'_>, asked: OnError, option: &str) -> Outcome<mirror::OnError> {
    let name = match asked {
        OnError::Report => return Ok(mirror::OnError::Report),
        OnError::Ignore => return Ok(mirror::OnError::Ignore),
        OnError::Auto if console.can_ask => return Ok(mirror::OnError::Enospc),
        OnError::Auto => return Ok(mirror::OnError::Report),
        OnError::Stop if console.can_ask => return Ok(mirror::OnError::Stop),
        OnError::Enospc if console.can_ask => return Ok(mirror::OnError::Enospc),
        OnError::Stop => "stop",
        OnError::Enospc => "enospc",
    };
    Err(Failure::usage(format_args!(
        "{option}={name}: a paused copy waits to be resumed, and there is no terminal to ask at"
    )))
}

/// Follows the job until it is over: shows progress, asks when it is stopped, cancels it when a signal comes.
/// Returns the error after which the user did not want to go on.
fn watch(
    console: &mut Console<'_>,
    control: &MirrorControl,
    meter: &mut Meter,
    interrupt: &Interrupt,
) -> Option<String> {
    let mut reason = String::new();
    let mut declined = None;
    loop {
        let over = control.wait_timeout(TICK);
        for event in control.events() {
            if let mirror::Event::Error { action: mirror::ErrorAction::Stop, message, .. } = event {
                reason = message;
            }
        }
        let progress = control.progress();
        let reading = Reading {
            offset: progress.offset,
            len: progress.len,
            copied: progress.copied,
            zeroed: progress.zeroed,
            skipped: progress.skipped,
        };
        if over {
            meter.last(console, &reading);
            return declined;
        }
        meter.show(console, &reading, interrupt.progress_wanted());
        if interrupt.requested() {
            control.cancel();
        } else if progress.state == JobState::Paused && progress.io_status != IoStatus::Ok {
            meter.finish(console);
            if pause::ask_to_resume(console, &reason, interrupt) {
                // If it goes on by itself by now, all the better.
                let _ = control.resume();
            } else {
                declined = Some(reason.clone());
                control.cancel();
            }
        }
    }
}

fn failed(error: Error) -> Failure {
    match error.kind() {
        ErrorKind::InvalidInput
            if !matches!(error, Error::SizeMismatch { .. } | Error::TargetReadOnly { .. }) =>
        {
            Failure::usage(error)
        }
        _ => Failure::failed(format_args!("copy: {error}")),
    }
}

/// Gives the target its name and tells what was done.
fn conclude(
    console: &mut Console<'_>,
    args: &CopyArgs,
    target: Target,
    len: u64,
    outcome: &mirror::Outcome,
) -> Outcome {
    let format = target.image().format();
    let durable = target.device().geometry().can_flush;
    target.finish()?;
    if !durable {
        console.note(format_args!(
            "{}: its server has no command to flush: the copy is not known to be durable",
            args.target.display()
        ));
    }
    let complete = outcome.given_up.is_empty();
    for range in &outcome.given_up {
        let (start, end) = (range.range.start(), range.range.end());
        console.complain(format_args!(
            "given up: {}: bytes {start} to {end}: {}",
            args.target.display(),
            range.message
        ));
    }
    if args.output.output == Output::Json {
        let given_up: Vec<_> = outcome
            .given_up
            .iter()
            .map(|range| {
                json!({ "start": range.range.start(), "length": range.range.len(), "message": range.message })
            })
            .collect();
        let (name, value) = source::member(args);
        let mut out = json!({
            (name): value,
            "target": args.target.to_string_lossy(),
            "target-format": format.as_str(),
            "len": len,
            "copied": outcome.copied,
            "zeroed": outcome.zeroed,
            "skipped": outcome.skipped,
            "given-up": given_up,
            "elapsed": outcome.elapsed.as_secs_f64(),
        });
        add_granularity(&mut out, outcome.granularity)?;
        console.report(&(json::pretty(&out) + "\n"));
    } else if !args.progress.quiet {
        let lost: u64 = outcome.given_up.iter().map(|range| range.range.len()).sum();
        let lost = if complete { String::new() } else { format!("{} given up, ", human_size(lost)) };
        let line = format!(
            "{} -> {} ({format}): {}: {} copied, {} zeroed, {} skipped, {lost}in {:.2} s",
            source::shown(args),
            args.target.display(),
            human_size(len),
            human_size(outcome.copied),
            human_size(outcome.zeroed),
            human_size(outcome.skipped),
            outcome.elapsed.as_secs_f64()
        );
        console.report(&(one_line(&line) + "\n"));
    }
    Ok(if complete { Exit::Done } else { Exit::Incomplete })
}

/// Adds `granularity` in bytes and the reason for it.
fn add_granularity(out: &mut Value, choice: mirror::GranularityChoice) -> Outcome<()> {
    let choice = serde_json::to_value(choice).map_err(Failure::failed)?;
    if let (Value::Object(out), Value::Object(choice)) = (out, choice) {
        out.extend(choice);
    }
    Ok(())
}

fn planned(args: &CopyArgs, plan: &Plan) -> Outcome<String> {
    let (source, target) = (source::shown(args), args.target.to_string_lossy());
    if args.output.output == Output::Human {
        let heading = one_line(&format!("dry run: {source} -> {target}: {}", human_size(plan.len)));
        return Ok(format!("{heading}\n{plan}\n"));
    }
    let (name, value) = source::member(args);
    let mut out = json!({ (name): value, "target": target });
    let plan = serde_json::to_value(plan).map_err(Failure::failed)?;
    if let (Value::Object(out), Value::Object(plan)) = (&mut out, plan) {
        out.extend(plan);
    }
    Ok(json::pretty(&out) + "\n")
}
