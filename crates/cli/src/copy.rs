//! `blockmirror mirror` and `blockmirror convert`: one conversion, two sets of defaults.
//!
//! The work is that of [`Convert`]; here are its options, what is printed between its steps, and the exit
//! codes of its errors.

use std::path::Path;
use std::time::Duration;

use blockmirror_image::{BackingSettingsError, Error, FileId, Format, join_name};
use blockmirror_mirror::{
    self as mirror, ErrorKind, IoStatus, JobState, MirrorControl, MirrorOptions, Progress, SyncMode,
};
use blockmirror_ops::{CheckedConvert, Convert, ConvertError, ConvertJob, CopyBitmaps};
use blockmirror_ops::{CopyBitmapsProblem, PreparedConvert};

use crate::args::{ConvertArgs, CopyArgs, MirrorArgs, OnError, Sync, View};
use crate::console::Console;
use crate::create::{backing_failure, parse_options, set_once};
use crate::failure::{Detail, Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::plan::Planned;
use crate::progress::{Phase, Reading};
use crate::ranges::{self, RangesFile};
use crate::report;
use crate::run_report::RunLog;
use crate::{captive, checkpoint, confine, lock_policy, prompt, qemu_words, space, target, verify};

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
    let how = How { sync: Some(args.sync.unwrap_or(Sync::Full)), format, compress: false };
    copy(console, &args.copy, how)
}

/// A new target is raw, and with a backing file gets what lies above the source's.
pub(crate) fn convert(console: &mut Console<'_>, args: &ConvertArgs) -> Outcome {
    let format = match args.copy.target_format {
        Some(format) => TargetFormat::Given(format),
        None if args.copy.no_create => TargetFormat::Found,
        None => TargetFormat::Given(Format::Raw),
    };
    copy(console, &args.copy, How { sync: args.sync, format, compress: args.compress })
}

/// In what the two commands differ.
#[derive(Clone, Copy)]
struct How {
    /// Without it the target's backing file decides what is copied.
    sync: Option<Sync>,
    format: TargetFormat,
    compress: bool,
}

fn copy(console: &mut Console<'_>, args: &CopyArgs, how: How) -> Outcome {
    if args.output.output.picture().is_some() && !args.dry_run {
        let why = "a copy is not drawn; --dry-run or --report FILE.html is";
        return Err(Failure::usage(format_args!("--output=svg, html: {why}")));
    }
    console.keep_out_of(FileId::of(&args.target));
    let How { sync, format, compress } = how;
    let mut convert = conversion(console, args, sync)?.compress(compress);
    // As early as the format is known, so that mistakes cost nothing.
    if let TargetFormat::Given(format) = format {
        let Some(complete) = with_settings(console, convert, args, format)? else { return Ok(Exit::Done) };
        convert = complete;
    }
    let source = convert.open_source().map_err(|error| failure(args, error))?;
    for note in source.notes() {
        console.note(note);
    }
    captive::note_content(console, args, &**source.device());
    if let TargetFormat::Source = format {
        let no_format = || failure(args, ConvertError::NoFormat { target: args.target.clone() });
        let format = source.format().ok_or_else(no_format)?;
        let Some(complete) = with_settings(console, convert, args, format)? else { return Ok(Exit::Done) };
        convert = complete;
    }
    if let Some(file) = &args.verify.only {
        convert = convert.only(ranges::read(file, source.device().len())?);
    }
    let convert = convert.checkpoint(checkpoint::wanted(console, args, source.device().len()));
    let checked = convert.check(source).map_err(|error| failure(args, error))?;
    checkpoint::check(args, checked.keeps_checkpoint())?;
    for name in checked.skipped_bitmaps() {
        let text = console.voice.skipped_bitmap(name);
        console.complain(text);
    }
    let interrupt = Interrupt::watch()?;
    if args.dry_run {
        let plan = checked.plan(&|| interrupt.requested()).map_err(|error| match error {
            ConvertError::Start(_) if interrupt.requested() => Failure::failed(error).exit(interrupt.exit()),
            ConvertError::Start(_) => Failure::failed(error),
            error => failure(args, error),
        })?;
        let text = Planned::new(args, &checked, plan).text(&console.shown_names)?;
        console.print(&text)?;
        return Ok(Exit::Done);
    }
    let mut run = RunLog::begin(args, &interrupt)?;
    let outcome = perform(console, args, checked, &interrupt, run.as_mut());
    match run {
        Some(run) => run.finish(console, args, outcome),
        None => outcome,
    }
}

/// Makes the copy, which `run` sees.
fn perform(
    console: &mut Console<'_>,
    args: &CopyArgs,
    checked: CheckedConvert,
    interrupt: &Interrupt,
    run: Option<&mut RunLog>,
) -> Outcome {
    let checked = checkpoint::settle(console, args, checked, interrupt)?;
    let prepared = checked.prepare().map_err(|error| failure(args, error))?;
    // What is written in place keeps one only if that is named.
    checkpoint::check(args, prepared.resumable().is_some())?;
    checkpoint::announce(console, args, &prepared);
    let ranges = args.verify.ranges.as_deref();
    let ranges = ranges.map(|path| RangesFile::create(path, interrupt)).transpose()?;
    announce(console, args, &prepared, interrupt);
    space::check(console, args, &prepared, interrupt)?;
    confine::narrow(args, &prepared)?;
    let partial = prepared.partial_paths();
    let resumes = prepared.resumes().is_some_and(|found| found.done > 0);
    let started = start(console, args, prepared, interrupt);
    let job = started.map_err(|error| {
        if resumes {
            return checkpoint::not_gone_on(&error, interrupt);
        }
        let failure = failure(args, error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    })?;
    checkpoint::begun(console, args, &job);
    if let Some(why) = job.no_checkpoint() {
        interrupt.remove_at_end(partial);
        console.note(format_args!("{}: the copy goes without a checkpoint: {why}", args.target.display()));
    }
    follow(console, args, job, ranges, interrupt, run)
}

/// Starts the job; shows how far what an interrupted one has copied has been read again.
fn start(
    console: &mut Console<'_>,
    args: &CopyArgs,
    prepared: PreparedConvert,
    interrupt: &Interrupt,
) -> Result<ConvertJob, ConvertError> {
    let mut meter = None;
    let started = prepared.start_with(&|| interrupt.requested(), &mut |done, all| {
        let meter = meter.get_or_insert_with(|| Meter::new(console, &args.progress, Phase::Resume));
        meter.show(console, &Reading::of_pass(done, all), interrupt.progress_wanted());
    });
    if let Some(mut meter) = meter {
        meter.finish(console);
    }
    started
}

/// What the command line asks for, but for the options of a new target.
fn conversion(console: &Console<'_>, args: &CopyArgs, sync: Option<Sync>) -> Outcome<Convert> {
    let mut allowed = lock_policy::allowed(&args.access)?;
    if let Some(backing) = args.backing.as_ref().and_then(|name| join_name(&args.target, name.as_ref())) {
        allowed = allowed.file(backing);
    }
    let mut sources = args.names.iter().cloned();
    let first = sources.next().ok_or_else(|| Failure::usage(ConvertError::NoSource))?;
    if args.no_sync && args.target_cache.writes_through() {
        let cache = args.target_cache.as_str();
        return Err(Failure::usage(format_args!("--no-sync: cannot be combined with -t {cache}")));
    }
    let target_access = lock_policy::of_target(&args.access).cache(args.target_cache).no_sync(args.no_sync);
    if args.no_create && args.backing_format.is_some() && args.backing.is_none() {
        return Err(Failure::usage("-F: no backing file is named"));
    }
    // What a target that exists stands on shows the rest.
    let sync = sync.or((args.no_create && args.backing.is_some()).then_some(Sync::Top));
    let convert = Convert::new(first, &args.target)
        .snapshot(args.source_snapshot.clone())
        .source_access(lock_policy::of_source(&args.access).cache(args.source_cache))
        .target_access(target_access)
        .target_format(args.target_format)
        .target_node(args.target_node.clone())
        .target_file(args.existing.options(None))
        .existing_image(args.no_create)
        .require_flush(args.require_flush)
        .target_is_zero(args.target_is_zero)
        .allow(allowed)
        .reflink(args.reflink.choice(args.sparse_size.is_some())?)
        .verify(verify::mode(args))
        .bitmaps(match (args.bitmaps, args.skip_broken_bitmaps) {
            (false, _) => CopyBitmaps::None,
            (true, false) => CopyBitmaps::All,
            (true, true) => CopyBitmaps::Consistent,
        })
        .sync(sync.map(|sync| match sync {
            Sync::Full => SyncMode::Full,
            Sync::Top => SyncMode::Top,
        }))
        .mirror(job_options(console, args)?);
    Ok(sources.fold(convert, Convert::add_source))
}

/// `convert` with what `-O`, `-o`, `-B` and `-F` say about a target of `format`; `None` if `-o` asked for
/// help, which has then been printed.
fn with_settings(
    console: &mut Console<'_>,
    convert: Convert,
    args: &CopyArgs,
    format: Format,
) -> Outcome<Option<Convert>> {
    let parsed = parse_options(console, format, &args.target_options);
    let parsed = parsed.map_err(|failure| failure.named_in_qemu(&args.target))?;
    let Some(mut settings) = parsed else { return Ok(None) };
    settings.allocated_as_qemu = args.existing.allocated_as_qemu;
    settings.blank_data_file = args.existing.blank_data_file;
    set_once(&mut settings.backing_file, args.backing.clone(), "backing_file", "-B")?;
    set_once(&mut settings.backing_format, args.backing_format, "backing_fmt", "-F")?;
    Ok(Some(convert.target_format(format).settings(settings)))
}

/// Says what is about to be written where that is not as usual. What is printed later goes into none of the
/// files, and a signal that ends the process at once removes the temporary ones.
fn announce(console: &mut Console<'_>, args: &CopyArgs, prepared: &PreparedConvert, interrupt: &Interrupt) {
    if let Some(new) = prepared.new_image() {
        if args.target_format.is_none() && new.format() == Format::Raw {
            target::raw_despite_name(&args.target).into_iter().for_each(|note| console.note(note));
        }
        let resumable = prepared.resumable();
        let removed = resumable.is_none().then_some(interrupt);
        if let Some(resumable) = resumable {
            interrupt.keeps(resumable);
        }
        return target::announce(console, new, removed);
    }
    console.keep_out_of(prepared.files());
    for note in prepared.notes() {
        console.note(note);
    }
    let rest = prepared.bytes_past_end();
    if rest > 0 {
        let target = args.target.display();
        console.note(format_args!("{target}: it is {rest} bytes longer than the source; they are kept"));
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
        .on_target_error(policy(console, args.on_target_error, "--on-target-error")?);
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
    if console.has_lines() {
        let why = "a paused copy waits for an answer, and --progress=json asks nothing";
        return Err(Failure::usage(format_args!("{option}={name}: {why}")));
    }
    Err(Failure::usage(format_args!(
        "{option}={name}: a paused copy needs a terminal to be resumed from, and there is none"
    )))
}

/// Follows the copy to its end, and reports what came of it.
fn follow(
    console: &mut Console<'_>,
    args: &CopyArgs,
    job: ConvertJob,
    ranges: Option<RangesFile>,
    interrupt: &Interrupt,
    mut run: Option<&mut RunLog>,
) -> Outcome {
    if !args.progress.quiet && args.output.output == View::Human {
        let text = console.voice.copying(job.granularity());
        console.report(&text);
    }
    let mut meter = Meter::new(console, &args.progress, Phase::Copy);
    if let Some(run) = &mut run {
        run.granularity(job.granularity());
    }
    let mut seen = |progress: &Progress, events: &[mirror::Event]| {
        if let Some(run) = &mut run {
            run.take(progress, events);
        }
    };
    let declined = watch(console, job.control(), &args.target, &mut meter, interrupt, &mut seen);
    if let Some(run) = run.filter(|_| job.verifies()) {
        run.event("copied; the copy is verified");
    }
    match verify::finish(console, args, job, interrupt) {
        Ok(outcome) => {
            let exit = report::conclude(console, args, &outcome)?;
            ranges.map_or(Ok(()), RangesFile::finish)?;
            Ok(exit)
        }
        Err(ConvertError::Copy { target, cause, incomplete }) => {
            let exit = if interrupt.requested() { interrupt.exit() } else { Exit::Failed };
            let detail = cause.device_error().map(|error| Box::new(Detail::of(error)));
            let failed = match declined {
                Some(why) => {
                    let left = if incomplete { "; the target is incomplete" } else { "" };
                    Failure::failed(format_args!("copy: {}: {why}{left}", target.display()))
                }
                None => {
                    let in_qemu = qemu_words::of_copy(&cause);
                    let failed = Failure::failed(ConvertError::Copy { target, cause, incomplete });
                    Failure { in_qemu, ..failed }
                }
            };
            Err(Failure { detail, ..failed }.exit(exit))
        }
        Err(error @ ConvertError::Interrupted(_)) => Err(match declined {
            Some(_) => checkpoint::failure(&error, None),
            None => checkpoint::failure(&error, Some(interrupt)),
        }),
        Err(ConvertError::Mismatch(mismatch)) => Err(verify::failed(console, &mismatch, ranges, interrupt)),
        Err(error @ ConvertError::NotVerified { .. }) if interrupt.requested() => {
            Err(Failure::failed(error).exit(interrupt.exit()))
        }
        Err(error) => Err(failure(args, error)),
    }
}

/// Follows the job until it is over: hands what there is to see to `seen`, shows progress, asks when it is
/// stopped, cancels it when a signal comes. Returns the error after which the user did not want to go on.
pub(crate) fn watch(
    console: &mut Console<'_>,
    control: &MirrorControl,
    target: &Path,
    meter: &mut Meter,
    interrupt: &Interrupt,
    seen: &mut dyn FnMut(&Progress, &[mirror::Event]),
) -> Option<String> {
    let mut reason = String::new();
    let mut declined = None;
    loop {
        let over = control.wait_timeout(TICK);
        let events = control.events();
        let progress = control.progress();
        seen(&progress, &events);
        for event in events {
            if let mirror::Event::Error { action: mirror::ErrorAction::Stop, message, .. } = event {
                reason = message;
            }
        }
        let reading = Reading::of_copy(&progress);
        if over {
            meter.last(console, &reading);
            return declined;
        }
        meter.show(console, &reading, interrupt.progress_wanted());
        if interrupt.requested() {
            control.cancel();
        } else if progress.state == JobState::Paused && progress.io_status != IoStatus::Ok {
            meter.finish(console);
            let said = match progress.io_status {
                IoStatus::NoSpace => format!("{reason}; {}", space::missing(target, reading.work_left)),
                _ => reason.clone(),
            };
            if prompt::ask_to_resume(console, &said, interrupt) {
                // If it goes on by itself by now, all the better.
                let _ = control.resume();
            } else {
                declined = Some(reason.clone());
                control.cancel();
            }
        }
    }
}

/// Whether `error` is about the format of `path`.
fn is_about_format(error: &Error, path: &Path) -> bool {
    matches!(error, Error::ForeignFormat { path: foreign, .. } if foreign == path)
}

/// `error` with the options that the command line has for it.
fn failure(args: &CopyArgs, error: ConvertError) -> Failure {
    let detail = error.device_error().map(|error| Box::new(Detail::of(error)));
    Failure { detail, ..in_words(args, error) }
}

fn in_words(args: &CopyArgs, error: ConvertError) -> Failure {
    match error {
        // A hint about the source's format would mislead.
        ConvertError::Image(error) if is_about_format(&error, &args.target) => {
            Failure::failed(format_args!("{error}; -O raw writes to it as raw"))
        }
        ConvertError::Image(error) => error.into(),
        ConvertError::Settings(error) => {
            let in_qemu = qemu_words::of_new(&args.target, &error);
            Failure { in_qemu, ..Failure::from(error).exit(Exit::Usage) }
        }
        ConvertError::Backing { why: BackingSettingsError::NoFormat, .. } => {
            let failure = backing_failure(&args.target, BackingSettingsError::NoFormat);
            failure.in_qemu("Use of backing file requires explicit backing format")
        }
        ConvertError::Backing { why, .. } => backing_failure(&args.target, why),
        ConvertError::Size { len, .. } => {
            Failure::usage(format_args!("-o size: the target has the size of the source, {len} bytes"))
        }
        ConvertError::NoFormat { .. } => {
            Failure::usage("the sources have different formats; give the target's with -O")
        }
        ConvertError::SeveralSources { with_backing, .. } => {
            let what = if with_backing { "a backing file" } else { "--sync=top" };
            Failure::usage(format_args!("{what} cannot be combined with several sources")).in_qemu(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            )
        }
        ConvertError::Bitmaps { why: CopyBitmapsProblem::SeveralSources, .. } => Failure::usage(error),
        ConvertError::Bitmaps { why: CopyBitmapsProblem::Format(format), .. } => {
            Failure::failed(&error).in_qemu(format_args!("Format driver '{format}' does not support bitmaps"))
        }
        ConvertError::Bitmaps { why: CopyBitmapsProblem::Inconsistent(ref name), .. } => {
            Failure::failed(format_args!("{error}; --skip-broken-bitmaps leaves it out"))
                .in_qemu(qemu_words::inconsistent_bitmap(name))
        }
        ConvertError::SnapshotOfSeveral { .. } => {
            Failure::usage("-l: a snapshot cannot be combined with several sources")
        }
        ConvertError::Changed { .. } => checkpoint::failure(&error, None),
        ConvertError::NoCheckpoint { .. } => Failure::usage(error),
        ConvertError::NoWholeHash { why, .. } => {
            Failure::usage(format_args!("--verify=hash: {why}, and a hash verifies the whole disk"))
        }
        ConvertError::NotSharedVerified { mode, .. } => Failure::usage(format_args!(
            "--verify={}: cannot be combined with --reflink=always: it sees only what is copied",
            mode.as_str()
        )),
        ConvertError::BackingName { .. } => Failure::failed(format_args!("{error}; name another with -B")),
        ConvertError::NoFlush { .. } => {
            Failure::failed(format_args!("{error}, which --require-flush requires"))
        }
        ConvertError::Start(mirror::Error::SizeMismatch { .. }) => {
            Failure::failed(error).in_qemu("output file is smaller than input file")
        }
        ConvertError::Start(mirror::Error::TargetReadOnly { .. } | mirror::Error::NothingShared { .. }) => {
            Failure::failed(error)
        }
        ConvertError::Start(refused) if refused.kind() == ErrorKind::InvalidInput => Failure::usage(refused),
        error => Failure::failed(error),
    }
}
