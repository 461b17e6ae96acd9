//! The reference of the command line in Markdown, from its definition. A test compares the book with it.

use std::fmt::Write as _;

use clap::{Arg, Command};

/// Exit codes and what all commands share; then each command with its options.
pub(crate) fn reference(mut whole: Command) -> String {
    // Gives each command its name as it is typed.
    whole.build();
    let mut page = String::new();
    let after = whole.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (codes, rest) = after.split_once("\n\n").unwrap_or((&after, ""));
    let codes = codes.trim_start_matches("Exit codes:\n");
    add(&mut page, format_args!("## Exit codes\n\n```text\n{codes}\n```\n"));
    add(&mut page, format_args!("## What all commands share\n\n```text\n{rest}\n```\n"));
    options(&mut page, whole.get_arguments().collect());
    add(&mut page, format_args!("## Commands\n"));
    list(&mut page, &whole);
    shown(&whole).for_each(|command| one(&mut page, command));
    page
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help")
}

/// What a command's subcommands do, one line each.
fn list(page: &mut String, command: &Command) {
    add(page, format_args!("| | |\n|---|---|"));
    for inner in shown(command) {
        let about = inner.get_about().map(ToString::to_string).unwrap_or_default();
        let name = typed(inner);
        add(page, format_args!("| [`{name}`](#{}) | {} |", name.replace(' ', "-"), cell(&about)));
    }
    page.push('\n');
}

/// The command without the name of the program.
fn typed(command: &Command) -> &str {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    name.strip_prefix("blockmirror ").unwrap_or(name)
}

fn one(page: &mut String, command: &Command) {
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string);
    let about = about.unwrap_or_default();
    add(page, format_args!("### {}\n\n{}.\n", typed(command), about.trim_end_matches('.')));
    let usage = command.clone().render_usage().to_string();
    add(page, format_args!("```text\n{}\n```\n", usage.trim_start_matches("Usage: ").trim_end()));
    options(page, command.get_arguments().filter(|arg| !arg.is_global_set()).collect());
    if let Some(examples) = command.get_after_help().map(ToString::to_string) {
        let lines = examples.lines().skip_while(|line| *line == "Examples:");
        let lines: Vec<_> = lines.map(|line| line.strip_prefix("  ").unwrap_or(line)).collect();
        add(page, format_args!("```sh\n{}\n```\n", lines.join("\n").trim_end()));
    }
    if shown(command).next().is_some() {
        list(page, command);
        shown(command).for_each(|inner| one(page, inner));
    }
}

/// A table for each heading of the help, in its order.
fn options(page: &mut String, args: Vec<&Arg>) {
    let shown = |arg: &&Arg| !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str());
    let args: Vec<_> = args.into_iter().filter(shown).collect();
    let mut headings: Vec<_> = Vec::new();
    for arg in &args {
        if !headings.contains(&arg.get_help_heading()) {
            headings.push(arg.get_help_heading());
        }
    }
    for heading in headings {
        add(page, format_args!("| {} | |\n|---|---|", heading.unwrap_or("Options")));
        for arg in args.iter().filter(|arg| arg.get_help_heading() == heading) {
            add(page, format_args!("| {} | {} |", name(arg), explained(arg)));
        }
        page.push('\n');
    }
}

/// `-O`, `--target-format FMT`.
fn name(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let value = if arg.get_action().takes_values() { names.join(" ") } else { String::new() };
    if arg.is_positional() {
        return format!("`{}`", cell(&value));
    }
    let letter = arg.get_short().map(|letter| format!("-{letter}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let mut names: Vec<_> = letter.into_iter().chain(long).collect();
    if let Some(last) = names.last_mut().filter(|_| !value.is_empty()) {
        *last = format!("{last} {value}");
    }
    names.iter().map(|name| format!("`{}`", cell(name))).collect::<Vec<_>>().join(", ")
}

/// What an option does, its values, and its default.
fn explained(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut text = cell(&help);
    if !arg.get_action().takes_values() {
        return text;
    }
    let values = arg.get_possible_values();
    let values: Vec<_> = values.iter().filter(|value| !value.is_hide_set()).collect();
    let are_explained = values.iter().any(|value| value.get_help().is_some());
    for (number, value) in values.iter().enumerate() {
        let before = match (are_explained, number) {
            (true, _) => "<br>",
            (false, 0) => "<br>values: ",
            (false, _) => ", ",
        };
        let help = value.get_help().map(|help| format!(": {}", cell(&help.to_string()))).unwrap_or_default();
        // Writing to a string cannot fail.
        let _ = write!(text, "{before}`{}`{help}", value.get_name());
    }
    let is_said = arg.is_hide_default_value_set() || help.contains("[default: ");
    if let [default] = arg.get_default_values()
        && !is_said
    {
        let _ = write!(text, "<br>default: `{}`", default.to_string_lossy());
    }
    text
}

/// In one line of a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn add(page: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "{line}");
}
