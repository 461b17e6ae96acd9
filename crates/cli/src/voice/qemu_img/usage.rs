//! What `qemu-img` says to a command line that it does not understand, and where help was asked for.

use std::ffi::OsString;

use blockmirror_image::UnknownFormat;
use clap::Error;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::super::Explained;
use super::{definition, help};
use crate::failure::Failure;

/// What `error`, of the command line `words`, comes to.
pub(super) fn explain(error: &Error, words: &[OsString]) -> Explained {
    let command = command_of(words);
    let message = match error.kind() {
        ErrorKind::DisplayHelp => return Explained::Print(help::text(command.as_deref())),
        ErrorKind::DisplayVersion => return Explained::Print(help::version()),
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            tried("Not enough arguments", None)
        }
        ErrorKind::InvalidSubcommand => {
            return Explained::Fail(definition::unknown(&text(error, ContextKind::InvalidSubcommand)));
        }
        ErrorKind::UnknownArgument => {
            unknown_argument(&text(error, ContextKind::InvalidArg), command.as_deref())
        }
        ErrorKind::MissingRequiredArgument => missing(command.as_deref()),
        ErrorKind::ArgumentConflict if is_about(error, "--target-options") => {
            "-o has no effect when skipping image creation".to_owned()
        }
        _ => wrong_value(error, command.as_deref(), words),
    };
    Explained::Fail(Failure::usage(message))
}

/// The first word that is no option.
fn command_of(words: &[OsString]) -> Option<String> {
    let mut words = words.iter().skip(1).filter_map(|word| word.to_str());
    words.find(|word| !word.starts_with('-')).map(ToOwned::to_owned)
}

fn tried(what: &str, command: Option<&str>) -> String {
    let command = command.map(|name| format!("{name} ")).unwrap_or_default();
    format!("{what}\nTry 'qemu-img {command}--help' for more info")
}

/// The part of an error of `kind`, as it was typed.
fn text(error: &Error, kind: ContextKind) -> String {
    match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.first().cloned().unwrap_or_default(),
        _ => String::new(),
    }
}

/// Whether the option `name` is one of those that cannot be used together.
fn is_about(error: &Error, name: &str) -> bool {
    [ContextKind::InvalidArg, ContextKind::PriorArg].iter().any(|kind| text(error, *kind).starts_with(name))
}

/// An option that there is not, or one positional argument too many.
fn unknown_argument(argument: &str, command: Option<&str>) -> String {
    match argument.strip_prefix('-') {
        Some(long) if long.starts_with('-') => tried(&format!("unrecognized option '{argument}'"), command),
        Some(short) => tried(&format!("invalid option -- '{short}'"), command),
        None => missing(command),
    }
}

/// The positional arguments are too few or too many.
fn missing(command: Option<&str>) -> String {
    let what = match command {
        Some("convert") => return "Must specify image file name".to_owned(),
        Some("create") => "Expecting image file name",
        Some("resize") => "Expecting image file name and size",
        Some("compare") => "Expecting two image file names",
        _ => "Expecting one image file name",
    };
    tried(what, command)
}

fn wrong_value(error: &Error, command: Option<&str>, words: &[OsString]) -> String {
    let argument = text(error, ContextKind::InvalidArg);
    let name = argument.split(' ').next().unwrap_or_default();
    let value = text(error, ContextKind::InvalidValue);
    let source = std::error::Error::source(error);
    if source.is_some_and(|source| source.is::<UnknownFormat>()) {
        // What is made has a format, what is opened has a driver.
        let is_new = name == "--target-format" || command == Some("create") && name == "--format";
        let file = words.last().map(|word| word.to_string_lossy()).unwrap_or_default();
        return match (is_new, command) {
            (true, Some("create")) => format!("{file}: Unknown file format '{value}'"),
            (true, _) => format!("Unknown file format '{value}'"),
            _ if name == "--backing-format" => format!("Invalid format name: '{value}'"),
            _ => format!("Could not open '{file}': Unknown driver '{value}'"),
        };
    }
    match (name, source) {
        ("--output", _) => tried(&format!("--output expects 'human' or 'json' not '{value}'"), command),
        ("[SIZE]", _) if value.starts_with('-') => {
            "Invalid image size specified. Must be between 0 and 9223372036854775807.".to_owned()
        }
        ("[SIZE]" | "<[+|-]SIZE>", _) => format!("Invalid image size specified: '{value}'."),
        (name, Some(source)) => format!("{name}: {source}"),
        _ => {
            let rendered = error.render().to_string();
            let what: Vec<_> = rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            tried(what.join(" ").trim_start_matches("error: "), command)
        }
    }
}
