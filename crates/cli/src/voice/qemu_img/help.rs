//! `--help`, `--version` and `-o help` under the name `qemu-img`. Programs look for the version, the list of
//! formats, and option names at the starts of lines.

use std::fmt::Write;

use blockmirror_image::{Format, OptionHelp};

use super::definition;
use crate::args::HELP_WIDTH;

/// The version of QEMU whose command line and output this is.
const VERSION: &str = "10.0.0";

/// `--version`.
pub(super) fn version() -> String {
    format!("qemu-img version {VERSION} (blockmirror {})\n", env!("CARGO_PKG_VERSION"))
}

/// The help of `command`, or of the program.
pub(super) fn text(command: Option<&str>) -> String {
    let known = command.filter(|name| definition::commands().iter().any(|(known, _)| known == name));
    let Some(name) = known else { return overview() };
    let mut definition = definition::command().term_width(HELP_WIDTH);
    definition.build();
    let found = definition.find_subcommand_mut(name).map(|command| command.render_long_help().to_string());
    found.unwrap_or_else(overview)
}

fn overview() -> String {
    let mut out = version();
    out.push_str("usage: qemu-img [-h | -V | -T TRACE] COMMAND [options]\n\nCommands:\n\n");
    for (name, about) in definition::commands() {
        let _ = writeln!(out, "  {name:<9} {about}");
    }
    let mut formats = Format::ALL.map(Format::as_str);
    formats.sort_unstable();
    let _ = writeln!(out, "\nSupported image formats: {}", formats.join(" "));
    out
}

/// `-o help` of a new image.
pub(super) fn options(format: Format, options: &[OptionHelp]) -> String {
    let mut out = match format {
        Format::Raw => "Supported options:\n".to_owned(),
        format => format!("Supported {format} options:\n"),
    };
    let mut options: Vec<_> = options.iter().collect();
    options.sort_by_key(|option| option.key);
    for option in options {
        let key = format!("{}=<{}>", option.key, option.values);
        let _ = writeln!(out, "  {key:<22} - {}", option.help);
    }
    out
}
