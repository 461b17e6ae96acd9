//! Images as the command line names them: paths, URIs, `file:`, `json:` and `--image-opts`.
//!
//! Called once, before a command runs, so that commands know paths and formats only.

use std::path::{Path, PathBuf};

use blockmirror_image::{Format, ImageName, NodeOptions};
use blockmirror_qmp::{json, keyval};
use serde_json::Value;

use crate::args::{ChainArgs, Command, CopyArgs, DdArgs};
use crate::captive;
use crate::dd::Operands;
use crate::failure::{Failure, Outcome};

/// Puts paths and formats in place of the descriptions of images in `command`.
pub(crate) fn settle(command: &mut Command) -> Outcome<()> {
    match command {
        Command::Mirror(args) => copy(&mut args.copy),
        Command::Convert(args) => copy(&mut args.copy),
        Command::Create(args) => {
            args.typed = args.file.clone().unwrap_or_default();
            args.file.as_mut().map_or(Ok(()), new)
        }
        Command::Info(args) => {
            let options = args.access.image_opts;
            image(&mut args.file, &mut args.node, &mut args.format, options, "-f")
        }
        Command::Inspect(args) => image(&mut args.file, &mut args.node, &mut args.format, false, "-f"),
        Command::Map(args) => {
            let options = args.access.image_opts;
            image(&mut args.file, &mut args.node, &mut args.format, options, "-f")
        }
        Command::Measure(args) => {
            let Some(file) = &mut args.file else { return Ok(()) };
            image(file, &mut args.node, &mut args.source_format, args.access.image_opts, "-f")
        }
        Command::Compare(args) => {
            let options = args.access.image_opts;
            args.typed = (args.first.clone(), args.second.clone());
            image(&mut args.first, &mut args.nodes.0, &mut args.first_format, options, "-f")?;
            image(&mut args.second, &mut args.nodes.1, &mut args.second_format, options, "-F")
        }
        Command::Hash(args) => {
            for file in &args.files {
                let found = parse(file, args.format, args.access.image_opts, "-f")?;
                args.images.push((found.path, found.node, found.format));
            }
            Ok(())
        }
        Command::Check(args) => {
            image(&mut args.file, &mut args.node, &mut args.format, args.image_opts, "-f")
        }
        Command::Snapshot(args) => {
            image(&mut args.file, &mut args.node, &mut args.format, args.image_opts, "-f")
        }
        Command::Resize(args) => {
            image(&mut args.file, &mut args.node, &mut args.format, args.image_opts, "-f")
        }
        Command::Amend(args) => match &mut args.file {
            Some(file) => image(file, &mut args.node, &mut args.format, args.image_opts, "-f"),
            None => Ok(()),
        },
        Command::Bitmap(args) => {
            image(&mut args.file, &mut args.node, &mut args.format, args.image_opts, "-f")?;
            let Some(source) = &mut args.source_file else { return Ok(()) };
            image(source, &mut args.source_node, &mut args.source_format, false, "-F")
        }
        Command::Commit(args) => chain(&mut args.chain),
        Command::Rebase(args) => chain(&mut args.chain),
        Command::Dd(args) => dd(args),
        Command::Bench(args) => {
            let options = args.access.image_opts;
            image(&mut args.file, &mut args.node, &mut args.format, options, "-f")
        }
        Command::Serve(args) => {
            for file in &args.files {
                args.images.push(parse(file, args.format, args.access.image_opts, "-f")?);
            }
            Ok(())
        }
        // A plan is a mirror by now.
        Command::Plan(_) | Command::Daemon(_) | Command::Ctl(_) | Command::Help(_) => Ok(()),
    }
}

fn copy(args: &mut CopyArgs) -> Outcome<()> {
    // The last name is the target, wherever options stand between them.
    let mut names = vec![std::mem::take(&mut args.source), std::mem::take(&mut args.target)];
    names.append(&mut args.more);
    args.target = names.pop().unwrap_or_default();
    for name in &names {
        args.names.push(parse(name, args.source_format, args.access.image_opts, "-f")?);
    }
    if args.no_create {
        let options = args.target_image_opts;
        image(&mut args.target, &mut args.target_node, &mut args.target_format, options, "-O")
    } else {
        new(&mut args.target)
    }
}

fn chain(args: &mut ChainArgs) -> Outcome<()> {
    image(&mut args.file, &mut args.node, &mut args.format, args.image_opts, "-f")
}

fn dd(args: &mut DdArgs) -> Outcome<()> {
    let operands = Operands::parse(&args.operands)?;
    (args.input, args.output) = (operands.input, operands.output);
    image(&mut args.input, &mut args.node, &mut args.format, args.access.image_opts, "-f")?;
    new(&mut args.output)
}

/// An image that is there.
fn image(
    name: &mut PathBuf,
    node: &mut NodeOptions,
    format: &mut Option<Format>,
    options: bool,
    letter: &str,
) -> Outcome<()> {
    let found = parse(name, *format, options, letter)?;
    (*name, *node, *format) = (found.path, found.node, found.format);
    Ok(())
}

/// What `name` says, with the format that the option `letter` has given.
fn parse(name: &Path, format: Option<Format>, options: bool, letter: &str) -> Outcome<ImageName> {
    let wrong = |why: &dyn std::fmt::Display| Failure::usage(format_args!("{}: {why}", name.display()));
    let mut found = if options {
        let text = name.to_str().ok_or_else(|| wrong(&"it is not UTF-8"))?;
        let options = keyval::parse(text, None).map_err(|error| wrong(&error))?;
        ImageName::from_options(&options).map_err(|error| wrong(&error))?
    } else if let Some(json) = name.to_str().and_then(|text| text.strip_prefix("json:")) {
        // As QEMU reads it, with single quotes too.
        let Value::Object(options) = json::parse(json).map_err(|error| wrong(&error))? else {
            return Err(wrong(&"it is no JSON object"));
        };
        ImageName::from_options(&options).map_err(|error| wrong(&error))?
    } else {
        ImageName::parse(name).map_err(|error| wrong(&error))?
    };
    if found.format.is_some() && format.is_some() {
        return Err(wrong(&format_args!("it contains the format; {letter} gives it again")));
    }
    let implied = captive::is_captive(&found.path).then_some(Format::Raw);
    found.format = found.format.or(format).or(implied);
    Ok(found)
}

/// An image that is to be made, which has a path.
fn new(name: &mut PathBuf) -> Outcome<()> {
    if name.as_os_str().as_encoded_bytes().starts_with(b"json:") {
        return Err(Failure::usage(format_args!(
            "{}: a new image needs a path; a file of that name is written ./json:..",
            name.display()
        )));
    }
    let found = parse(name, None, false, "-O")?;
    if found.node != NodeOptions::default() {
        let shown = name.display();
        return Err(Failure::usage(format_args!(
            "{shown}: a new image needs a path; with ./ before it it is one"
        )));
    }
    *name = found.path;
    Ok(())
}
