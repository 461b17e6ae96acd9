//! What is noted about images that another program reads, and `--via`.
//!
//! Called before a command runs, and by a copy. What must hold: only images whose format is not given are
//! looked at, and only `--via` changes what is opened. The server is handed the format that was found here,
//! so that it probes nothing.

use std::ffi::OsString;

use blockmirror_block::BlockDevice;
use blockmirror_image::{Detected, Format, PROBE_LEN, detect, is_uri};

use super::{images, is_captive};
use crate::args::{Command, CopyArgs, Via};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::foreign::{self, Reader};
use crate::quote::in_brackets;

/// Notes which of the images that `command` reads are read as raw and hold something else.
pub(crate) fn note_guesses(console: &mut Console<'_>, command: &mut Command) {
    if images::access(command).is_some_and(|access| access.limits.limits.is_some()) {
        // No image is opened before the process is confined.
        return;
    }
    if matches!(command, Command::Info(_) | Command::Inspect(_)) {
        // They open one file, once; `inspect` has findings of its own.
        return;
    }
    for (path, format) in images::sources(command) {
        let Some(reader) = format.is_none().then(|| Reader::of(path)).flatten() else { continue };
        let what = match reader {
            Reader::Qemu { by_footer: false, .. } => continue,
            Reader::Qemu { format, .. } => format!("ends as a {format} image does"),
            Reader::Filter(name) | Reader::None(name) => format!("begins as a {name} file does"),
        };
        let advice = match reader.command(path) {
            Some(words) => format!("{} reads what is in it", in_brackets(&words)),
            None => "unpack it first".to_owned(),
        };
        console.note(format_args!("{}: it is read as raw, and {what}; {advice}", path.display()));
    }
}

/// Notes that a copy of what a captive server exports, `disk`, is one of an image in another format, if that
/// is not what was asked for.
pub(crate) fn note_content(console: &mut Console<'_>, args: &CopyArgs, disk: &dyn BlockDevice) {
    let Some(name) = args.names.first() else { return };
    let mut head = vec![0; PROBE_LEN.min(usize::try_from(disk.len()).unwrap_or(PROBE_LEN))];
    // What cannot be read, the copy reports.
    if args.source_format.is_some() || !is_captive(&name.path) || disk.read_at(&mut head, 0).is_err() {
        return;
    }
    let (format, advice) = match detect(&head) {
        Detected::Known(Format::Raw) => return,
        Detected::Known(format) => (format.as_str(), format!("-f {format} reads what is in it")),
        Detected::Foreign(format) => (format, "-f raw says that it is meant so".to_owned()),
        _ => return,
    };
    let path = name.path.display();
    console.note(format_args!("{path}: it is copied as raw, and begins as a {format} image does; {advice}"));
}

/// Replaces the images that `command` reads and qemu-nbd can read by servers, which `add` adds, if it asks
/// for that.
pub(super) fn settle(
    console: &mut Console<'_>,
    command: &mut Command,
    add: &mut dyn FnMut(Vec<OsString>) -> Outcome<OsString>,
) -> Outcome<()> {
    let Some(access) = images::access(command) else { return Ok(()) };
    let Some(Via::QemuNbd) = access.via else { return Ok(()) };
    if access.limits.limits.is_some_and(|limits| limits.sandbox) {
        return Err(Failure::usage(
            "--limits: --via: no server is started from the sandbox; untrusted,no-sandbox goes without it",
        ));
    }
    let mut is_used = false;
    let mut all: Vec<_> = images::sources(command);
    all.retain(|(_, format)| format.is_none());
    let is_alone = all.len() == 1;
    let is_missing = all.iter().any(|(path, _)| !is_uri(path) && foreign::open(path).is_err());
    for (path, format) in all {
        let Some(reader) = Reader::of(path) else { continue };
        // The end of a disk is its guest's to write; beside another image it may not be what is meant.
        let Reader::Qemu { format: found, by_footer } = reader else { continue };
        if let Some(words) = reader.command(path).filter(|_| is_alone || !by_footer) {
            console.note(format_args!("{}: qemu-nbd reads it, as {found}", path.display()));
            *path = add(words)?.into();
            *format = Some(Format::Raw);
            is_used = true;
        }
    }
    // The command says why an image cannot be opened.
    match is_used || is_missing {
        true => Ok(()),
        false => Err(Failure::usage(
            "--via: no image is in a format that qemu-nbd reads in our place, or its format is given",
        )),
    }
}
