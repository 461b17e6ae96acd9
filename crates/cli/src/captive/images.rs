//! Which images a command names, after its names are settled.
//!
//! Called to find out where captive servers stand and what is read by `--via`.

use std::path::PathBuf;

use blockmirror_image::Format;

use crate::args::{AccessArgs, Command, CopyArgs};

/// The images that `command` names, and whether it may write to them.
pub(super) fn named(command: &Command) -> Vec<(PathBuf, bool)> {
    let mut found: Vec<(&PathBuf, bool)> = Vec::new();
    match command {
        Command::Mirror(args) => copy(&args.copy, &mut found),
        Command::Convert(args) => copy(&args.copy, &mut found),
        Command::Create(args) => found.extend(args.file.iter().map(|file| (file, true))),
        Command::Info(args) => found.push((&args.file, false)),
        Command::Inspect(args) => found.push((&args.file, false)),
        Command::Map(args) => found.push((&args.file, false)),
        Command::Measure(args) => found.extend(args.file.iter().map(|file| (file, false))),
        Command::Compare(args) => found.extend([(&args.first, false), (&args.second, false)]),
        Command::Hash(args) => found.extend(args.images.iter().map(|(file, ..)| (file, false))),
        Command::Check(args) => found.push((&args.file, args.repair.is_some())),
        Command::Snapshot(args) => found.push((&args.file, true)),
        Command::Resize(args) => found.push((&args.file, true)),
        Command::Amend(args) => found.extend(args.file.iter().map(|file| (file, true))),
        Command::Bitmap(args) => {
            found.push((&args.file, true));
            found.extend(args.source_file.iter().map(|file| (file, false)));
        }
        Command::Commit(args) => found.push((&args.chain.file, true)),
        Command::Rebase(args) => found.push((&args.chain.file, true)),
        Command::Dd(args) => found.extend([(&args.input, false), (&args.output, true)]),
        Command::Bench(args) => found.push((&args.file, args.write)),
        Command::Serve(args) => found.extend(args.images.iter().map(|image| (&image.path, args.writable))),
        // A plan is a mirror by now.
        Command::Plan(_) | Command::Daemon(_) | Command::Ctl(_) | Command::Help(_) => {}
    }
    found.into_iter().map(|(path, is_written)| (path.clone(), is_written)).collect()
}

fn copy<'a>(args: &'a CopyArgs, found: &mut Vec<(&'a PathBuf, bool)>) {
    found.extend(args.names.iter().map(|name| (&name.path, false)));
    found.push((&args.target, true));
}

/// How `command` opens images, if it has options for that.
pub(super) fn access(command: &mut Command) -> Option<&mut AccessArgs> {
    Some(match command {
        Command::Mirror(args) => &mut args.copy.access,
        Command::Convert(args) => &mut args.copy.access,
        Command::Info(args) => &mut args.access,
        Command::Map(args) => &mut args.access,
        Command::Measure(args) => &mut args.access,
        Command::Compare(args) => &mut args.access,
        Command::Hash(args) => &mut args.access,
        Command::Dd(args) => &mut args.access,
        Command::Bench(args) => &mut args.access,
        Command::Serve(args) => &mut args.access,
        _ => return None,
    })
}

/// The images that `command` reads with the options of [`access`], and their formats as far as they are
/// given.
pub(super) fn sources(command: &mut Command) -> Vec<(&mut PathBuf, &mut Option<Format>)> {
    match command {
        Command::Mirror(args) => copied(&mut args.copy),
        Command::Convert(args) => copied(&mut args.copy),
        Command::Info(args) => vec![(&mut args.file, &mut args.format)],
        Command::Map(args) => vec![(&mut args.file, &mut args.format)],
        Command::Measure(args) => {
            args.file.iter_mut().zip(std::iter::once(&mut args.source_format)).collect()
        }
        Command::Compare(args) => {
            vec![(&mut args.first, &mut args.first_format), (&mut args.second, &mut args.second_format)]
        }
        Command::Hash(args) => args.images.iter_mut().map(|(file, _, format)| (file, format)).collect(),
        Command::Dd(args) => vec![(&mut args.input, &mut args.format)],
        Command::Bench(args) => vec![(&mut args.file, &mut args.format)],
        Command::Serve(args) => {
            args.images.iter_mut().map(|image| (&mut image.path, &mut image.format)).collect()
        }
        _ => Vec::new(),
    }
}

fn copied(args: &mut CopyArgs) -> Vec<(&mut PathBuf, &mut Option<Format>)> {
    args.names.iter_mut().map(|name| (&mut name.path, &mut name.format)).collect()
}
