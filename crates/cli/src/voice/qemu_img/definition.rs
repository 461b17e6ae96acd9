//! The command line under the name `qemu-img`: our own definition with QEMU's names, and with the values of
//! arguments that go without saying there.
//!
//! A table of names, a table of defaults, and what follows from other arguments ([`settle`]). What the
//! command `qemu-img` does not have it does not have here.

use blockmirror_image::Format;
use clap::builder::ArgPredicate;
use clap::{Arg, ArgAction, CommandFactory};

use crate::args::{Cli, Command};
use crate::failure::{Failure, Outcome};
use crate::lock_policy;

/// Long names that QEMU has for our arguments, where they differ: command, argument, name.
const NAMES: &[(&str, &str, &str)] = &[
    ("check", "source_cache", "cache"),
    ("compare", "first_format", "a-format"),
    ("compare", "second_format", "b-format"),
    ("compare", "source_cache", "cache"),
    ("convert", "image_opts", "source-image-opts"),
    ("convert", "speed", "rate"),
    ("convert", "copy_range", "copy-range-offloading"),
    ("create", "no_look", "backing-unsafe"),
    ("rebase", "header_only", "backing-unsafe"),
];

/// Commands that QEMU's program does not have.
const OURS: [&str; 8] = ["mirror", "plan", "inspect", "hash", "serve", "daemon", "ctl", "help"];

/// The definition.
pub(super) fn command() -> clap::Command {
    Cli::command()
        .name("qemu-img")
        .bin_name("qemu-img")
        .arg(ignored("trace").short('T'))
        .mut_subcommands(subcommand)
}

/// An option that changes nothing: a trace, or an object, to which nothing here refers.
fn ignored(name: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::Append).hide(true)
}

fn subcommand(command: clap::Command) -> clap::Command {
    let name = command.get_name().to_owned();
    if OURS.contains(&&*name) {
        return command;
    }
    let has = |command: &clap::Command, id: &str| command.get_arguments().any(|arg| arg.get_id() == id);
    // The last of several values counts, and a name may be cut short.
    let mut command = command.args_override_self(true).infer_long_args(true).arg(ignored("object"));
    for (_, id, long) in NAMES.iter().filter(|(command, ..)| *command == name) {
        command = command.mut_arg(id, |arg| arg.alias(*long));
    }
    if has(&command, "backing_chain") {
        command = command.mut_arg("backing_chain", |arg| arg.short('b'));
    }
    if has(&command, "bar") && has(&command, "progress") {
        command = command.mut_arg("progress", |arg| arg.long("progress-style"));
        command = command.mut_arg("bar", |arg| arg.long("progress"));
    }
    // What fails ends the copy.
    if has(&command, "on_target_error") {
        command = command.mut_arg("on_target_error", |arg| arg.default_value("report"));
    }
    // Zeros that were written become holes, as `-S` says there by default: they are not looked for in what is
    // shared.
    if has(&command, "reflink") {
        command = command.mut_arg("reflink", |arg| arg.default_value("never"));
    }
    // Plain paths in images are followed wherever they lead, unless the environment says where they may, or
    // the images are from strangers.
    if has(&command, "allow_backing") && !lock_policy::is_narrowed() {
        let limited = has(&command, "limits");
        command = command.mut_arg("allow_backing", |arg| match limited {
            true => arg.default_value_if("limits", ArgPredicate::IsPresent, None).default_value("/"),
            false => arg.default_value("/"),
        });
    }
    command
}

/// What follows from other arguments, or has no name on the command line.
pub(super) fn settle(command: &mut Command) -> Outcome<()> {
    match command {
        Command::Convert(args) => {
            let copy = &mut args.copy;
            copy.existing.or_in_place = true;
            copy.checkpoint.only_if_named = true;
            copy.no_space_check = true;
            copy.existing.allocated_as_qemu = true;
            copy.existing.blank_data_file = true;
            if copy.no_create {
                copy.target_format.get_or_insert(Format::Raw);
            }
        }
        Command::Create(args) => {
            args.existing.or_in_place = true;
            args.existing.allocated_as_qemu = true;
            args.existing.blank_data_file = true;
        }
        Command::Amend(args) => args.shrink = true,
        Command::Dd(args) => args.existing.or_in_place = true,
        Command::Info(args) => args.locks = true,
        Command::Map(args) => args.holes_if_preallocated = true,
        Command::Rebase(args) => {
            args.unchecked = true;
            args.allocate_zeros = true;
        }
        Command::Mirror(_) => return Err(unknown("mirror")),
        Command::Plan(_) => return Err(unknown("plan")),
        Command::Inspect(_) => return Err(unknown("inspect")),
        Command::Hash(_) => return Err(unknown("hash")),
        Command::Serve(_) => return Err(unknown("serve")),
        Command::Daemon(_) => return Err(unknown("daemon")),
        Command::Ctl(_) => return Err(unknown("ctl")),
        Command::Help(_) => return Err(unknown("help")),
        _ => {}
    }
    Ok(())
}

/// The commands that there are, with our help.
pub(super) fn commands() -> Vec<(String, String)> {
    let definition = Cli::command();
    let known = definition.get_subcommands().filter(|command| !OURS.contains(&command.get_name()));
    let about = |command: &clap::Command| command.get_about().map(ToString::to_string).unwrap_or_default();
    known.map(|command| (command.get_name().to_owned(), about(command))).collect()
}

/// A command that does not exist.
pub(super) fn unknown(name: &str) -> Failure {
    Failure::usage(format_args!("Command not found: {name}\nTry 'qemu-img --help' for more info"))
}
