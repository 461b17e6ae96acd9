//! `blockmirror help`: the help of a command, and texts on topics that concern several.
//!
//! Called by [`crate::run`]. The help of a command is what `--help` prints.

use std::fmt::Write as _;

use clap::error::ErrorKind;

use crate::args::{HelpArgs, TOPICS, topic, topic_names};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::suggest::did_you_mean;

/// Prints the help of a command or a topic, or the list of both.
///
/// # Errors
/// If there is none of that name.
pub(crate) fn run(console: &mut Console<'_>, args: &HelpArgs) -> Outcome {
    let text = match args.subject.as_slice() {
        [] => overview(&console.voice.definition()),
        [name] if topic(name).is_some() => {
            topic(name).map(|topic| topic.text.to_owned() + "\n").unwrap_or_default()
        }
        subject => of_command(console, subject)?,
    };
    console.print(&text)?;
    Ok(Exit::Done)
}

/// All commands and topics, a line each.
fn overview(definition: &clap::Command) -> String {
    let mut out = String::from("Commands (`blockmirror help COMMAND`):\n");
    let mut line = |name: &str, about: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {name:<12} {about}");
    };
    for command in definition.get_subcommands() {
        line(command.get_name(), &command.get_about().map(ToString::to_string).unwrap_or_default());
    }
    out.push_str("\nTopics (`blockmirror help TOPIC`):\n");
    for topic in TOPICS {
        let _ = writeln!(out, "  {:<12} {}", topic.name, topic.about);
    }
    out
}

/// What `--help` prints for the command `subject`.
fn of_command(console: &Console<'_>, subject: &[String]) -> Outcome<String> {
    let mut command = console.voice.definition();
    let mut path = Vec::new();
    for word in subject {
        let inner = command.find_subcommand(word).cloned();
        command = inner.ok_or_else(|| unknown(&command, &path, word))?;
        path.push(word.as_str());
    }
    let words = [console.voice.program()].into_iter().chain(path).chain(["--help"]);
    match console.definition().try_get_matches_from(words) {
        Err(error) if error.kind() == ErrorKind::DisplayHelp => Ok(error.render().to_string()),
        Err(error) => Err(Failure::usage(error)),
        Ok(_) => Err(Failure::usage(format_args!("{}: no help", subject.join(" ")))),
    }
}

/// There is no `word` in `command`, which `path` leads to.
fn unknown(command: &clap::Command, path: &[&str], word: &str) -> Failure {
    let mut known: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
    if path.is_empty() {
        known.extend(topic_names());
    }
    let meant = did_you_mean(word, known);
    let place = path.join(" ");
    let place = if place.is_empty() { place } else { format!("{place} ") };
    Failure::usage(format_args!(
        "help: no command or topic \"{place}{word}\"{meant} (`blockmirror help` lists them)"
    ))
}
