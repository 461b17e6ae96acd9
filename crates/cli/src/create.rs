//! `blockmirror create`.

use std::ffi::OsStr;
use std::path::Path;

use blockmirror_block::size::human_size;
use blockmirror_image::{
    BackingSettingsError, CreateSettings, CreateSpec, Error, FileId, Format, ImageInfo, OpenOptions,
    OptionHelp, Preallocation, PreparedImage, directory_of, find_name, join_name, option_help,
};

use crate::args::CreateArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::{lock_policy, target};

pub(crate) fn run(console: &mut Console<'_>, args: &CreateArgs) -> Outcome {
    let Some(settings) = parse_options(console, args.format, &args.options)? else { return Ok(Exit::Done) };
    let Some(path) = &args.file else {
        return Err(Failure::usage("create: the name of the image is missing"));
    };
    console.keep_out_of(FileId::of(path));
    let mut settings = settings;
    set_once(&mut settings.size, args.size, "size", "the size")?;
    set_once(&mut settings.backing_file, args.backing.clone(), "backing_file", "-b")?;
    set_once(&mut settings.backing_format, args.backing_format, "backing_fmt", "-F")?;
    settings.check_backing(args.format).map_err(|why| backing_failure(path, why))?;
    let backing_size = match &settings.backing_file {
        Some(name) if !args.no_look => Some(backing_size(path, name, settings.backing_format)?),
        _ => None,
    };
    let size = settings
        .size
        .or(backing_size)
        .ok_or_else(|| Failure::usage(format_args!("create: {}: the size is missing", path.display())))?;
    let backing = settings.backing_file.as_ref().and_then(|name| join_name(path, OsStr::new(name)));
    let space = settings.preallocation.is_some_and(Preallocation::takes_space).then_some(size);
    let mut spec = CreateSpec::new(args.format, size, settings)
        .target(args.existing.options(space))
        .replace_data_file(args.existing.force)
        .unknown_chain(args.no_look)
        .lock(lock_policy::lock(args.lock));
    // A directory that is not there holds nothing to look at.
    if let Some(backing) = backing.filter(|backing| directory_of(backing).is_dir()) {
        spec = spec.policy(lock_policy::allowed_dirs(&args.allow_backing)?.policy_for(&backing)?);
    }
    // Options that do not fit together are a matter of the command line.
    spec.check(path).map_err(|e| Failure::from(e).exit(Exit::Usage))?;
    let interrupt = Interrupt::watch()?;
    let prepared = PreparedImage::new(path, &spec).map_err(|error| match error {
        Error::ChainUnknown { .. } => Failure::failed(format_args!("{error}; -u does not look")),
        error => error.into(),
    })?;
    target::announce(console, &prepared, args.existing.clean, &interrupt);
    let new = prepared.write_until(&|| interrupt.requested()).map_err(|error| {
        let failure = Failure::from(error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    })?;
    if interrupt.requested() {
        let left = if new.has_lost_contents() { "; the target is incomplete" } else { "" };
        let message = format_args!("create: {}: interrupted{left}", path.display());
        return Err(Failure::failed(message).exit(interrupt.exit()));
    }
    new.persist()?;
    if !args.quiet {
        let size = size.next_multiple_of(512);
        let line =
            format!("created {}: {}, {} ({size} bytes)", path.display(), args.format, human_size(size));
        console.report(&(one_line(&line) + "\n"));
    }
    Ok(Exit::Done)
}

/// Reads the `-o` texts for `format`; `None` if they asked for help, which has then been printed.
pub(crate) fn parse_options(
    console: &mut Console<'_>,
    format: Format,
    texts: &[String],
) -> Outcome<Option<CreateSettings>> {
    if wants_help(texts) {
        console.print(&option_list(format, &option_help(format)))?;
        return Ok(None);
    }
    let mut settings = CreateSettings::default();
    for text in texts {
        settings.parse(format, text).map_err(|e| Failure::usage(format_args!("-o: {e}")))?;
    }
    Ok(Some(settings))
}

/// Whether `-o` texts ask for help.
pub(crate) fn wants_help(texts: &[String]) -> bool {
    texts.iter().flat_map(|text| text.split(',')).any(|part| part == "help" || part == "?")
}

/// The help on the options of `format`.
pub(crate) fn option_list(format: Format, options: &[OptionHelp]) -> String {
    let mut out = format!("Options for {format}:\n");
    for option in options {
        let pair = format!("{}={}", option.key, option.values);
        out.push_str(&format!("  {pair:<40}  {}\n", option.help));
    }
    out
}

/// Takes a value from an option of its own, unless `-o` has it as well.
pub(crate) fn set_once<T: PartialEq>(
    setting: &mut Option<T>,
    value: Option<T>,
    key: &str,
    option: &str,
) -> Outcome<()> {
    match (&setting, value) {
        (Some(old), Some(new)) if *old != new => {
            Err(Failure::usage(format_args!("{option} and -o {key} contradict each other")))
        }
        (None, Some(new)) => {
            *setting = Some(new);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Settings about the backing file of `path` that contradict each other.
pub(crate) fn backing_failure(path: &Path, why: BackingSettingsError) -> Failure {
    let hint = if why == BackingSettingsError::NoFormat { "; give it with -F" } else { "" };
    Failure::usage(format_args!("create: {}: {why}{hint}", path.display()))
}

/// Length of the disk in the backing file called `name` in the image `path`.
fn backing_size(path: &Path, name: &str, format: Option<Format>) -> Outcome<u64> {
    let file = find_name(path, OsStr::new(name)).map_err(|why| {
        Failure::failed(format_args!(
            "create: {}: it would have the backing file \"{name}\", {why}; -u writes the name unchecked",
            path.display()
        ))
    })?;
    Ok(ImageInfo::read(file, &OpenOptions::new().format(format))?.virtual_size)
}
