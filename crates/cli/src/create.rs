//! `blockmirror create`.

use std::ffi::OsStr;
use std::path::Path;

use blockmirror_image::{
    BackingSettingsError, CreateSettings, CreateSpec, Error, FileId, Format, ImageInfo, OpenOptions,
    OptionError, OptionHelp, Preallocation, PreparedImage, directory_of, find_name, join_name, option_help,
};

use crate::args::CreateArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::suggest::did_you_mean;
use crate::{lock_policy, qemu_words, target};

pub(crate) fn run(console: &mut Console<'_>, args: &CreateArgs) -> Outcome {
    let parsed = parse_options(console, args.format, &args.options).map_err(|failure| match &args.file {
        Some(path) => failure.named_in_qemu(path),
        None => failure,
    });
    let Some(settings) = parsed? else { return Ok(Exit::Done) };
    let Some(path) = &args.file else {
        let missing = Failure::usage("create: the name of the image is missing");
        return Err(missing.in_qemu("Expecting image file name\nTry 'qemu-img create --help' for more info"));
    };
    console.keep_out_of(FileId::of(path));
    let mut settings = settings;
    settings.allocated_as_qemu = args.existing.allocated_as_qemu;
    settings.blank_data_file = args.existing.blank_data_file;
    set_once(&mut settings.size, args.size, "size", "the size")?;
    set_once(&mut settings.backing_file, args.backing.clone(), "backing_file", "-b")?;
    set_once(&mut settings.backing_format, args.backing_format, "backing_fmt", "-F")?;
    let checked = settings.check_backing(args.format);
    // That the backing file is not there is said before that its format is missing.
    if let Err(why) = checked
        && why != BackingSettingsError::NoFormat
    {
        return Err(backing_failure(path, why));
    }
    let backing_size = match &settings.backing_file {
        Some(name) if !args.no_look => Some(backing_size(path, name, settings.backing_format)?),
        _ => None,
    };
    checked.map_err(|why| backing_failure(path, why))?;
    let size = settings.size.or(backing_size).ok_or_else(|| no_size(path))?;
    if !args.quiet {
        let text = console.voice.creating(args, size);
        console.report(&text);
    }
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
    spec.check(path).map_err(|error| new_failure(path, error).exit(Exit::Usage))?;
    let interrupt = Interrupt::watch()?;
    let prepared = PreparedImage::new(path, &spec).map_err(|error| match error {
        Error::ChainUnknown { .. } => Failure::failed(format_args!("{error}; -u does not look")),
        error => new_failure(path, error),
    })?;
    target::announce(console, &prepared, Some(&interrupt));
    let new = prepared.write_until(&|| interrupt.requested()).map_err(|error| {
        let failure = new_failure(path, error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    })?;
    if interrupt.requested() {
        let left = if new.has_lost_contents() { "; the target is incomplete" } else { "" };
        let message = format_args!("create: {}: interrupted{left}", path.display());
        return Err(Failure::failed(message).exit(interrupt.exit()));
    }
    new.persist()?;
    if !args.quiet {
        let text = console.voice.created(path, args.format, size.next_multiple_of(512));
        console.report(&text);
    }
    Ok(Exit::Done)
}

/// An error of making the image `path`.
fn new_failure(path: &Path, error: Error) -> Failure {
    let in_qemu = qemu_words::of_new(path, &error);
    Failure { in_qemu, ..Failure::from(error) }
}

/// Reads the `-o` texts for `format`; `None` if they asked for help, which has then been printed.
pub(crate) fn parse_options(
    console: &mut Console<'_>,
    format: Format,
    texts: &[String],
) -> Outcome<Option<CreateSettings>> {
    if wants_help(texts) {
        let text = console.voice.option_help(format, &option_help(format));
        console.print(&text)?;
        return Ok(None);
    }
    let mut settings = CreateSettings::default();
    for text in texts {
        settings.parse(format, text).map_err(|error| Failure {
            in_qemu: qemu_words::of_option(&error),
            ..wrong_option(&error, &option_help(format))
        })?;
    }
    Ok(Some(settings))
}

/// An `-o` text that is wrong, with what may have been meant of the options `known`.
pub(crate) fn wrong_option(error: &OptionError, known: &[OptionHelp]) -> Failure {
    let meant = match error {
        OptionError::UnknownKey { key, .. } => did_you_mean(key, known.iter().map(|option| option.key)),
        _ => String::new(),
    };
    Failure::usage(format_args!("-o: {error}{meant}"))
}

/// Whether `-o` texts ask for help.
pub(crate) fn wants_help(texts: &[String]) -> bool {
    texts.iter().flat_map(|text| text.split(',')).any(|part| part == "help" || part == "?")
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
    let path = path.display();
    let in_qemu = match why {
        BackingSettingsError::RawImage => "Backing file not supported for file format 'raw'",
        BackingSettingsError::NoFormat => "Backing file specified without backing format",
        _ => "Backing format cannot be used without backing file",
    };
    Failure::usage(format_args!("create: {path}: {why}{hint}")).in_qemu(format_args!("{path}: {in_qemu}"))
}

fn no_size(path: &Path) -> Failure {
    let path = path.display();
    Failure::usage(format_args!("create: {path}: the size is missing"))
        .in_qemu(format_args!("{path}: Image creation needs a size parameter"))
}

/// Length of the disk in the backing file called `name` in the image `path`.
fn backing_size(path: &Path, name: &str, format: Option<Format>) -> Outcome<u64> {
    let file = find_name(path, OsStr::new(name)).map_err(|why| {
        Failure::failed(format_args!(
            "create: {}: it would have the backing file \"{name}\", {why}; -u writes the name unchecked",
            path.display()
        ))
    })?;
    let info = ImageInfo::read(file, &OpenOptions::new().format(format));
    Ok(info
        .map_err(|error| Failure { in_qemu: qemu_words::of_backing(path, &error), ..error.into() })?
        .virtual_size)
}
