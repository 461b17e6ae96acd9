//! Manual pages and completions, from the definition of the command line.

use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// A page, or a script, and its name.
pub(super) struct Page {
    pub(super) name: String,
    pub(super) text: Vec<u8>,
}

/// One manual page for the command, and one for each of its commands.
pub(super) fn manual() -> Outcome<Vec<Page>> {
    let mut whole = blockmirror_cli::definition();
    // Gives each command the name of its page: `blockmirror-ctl-watch`.
    whole.build();
    let mut pages = Vec::new();
    add(&whole, &mut pages)?;
    Ok(pages)
}

fn add(command: &Command, pages: &mut Vec<Page>) -> Outcome {
    let mut text = Vec::new();
    let page = Man::new(command.clone()).section("1").source("blockmirror").manual("User Commands");
    page.render(&mut text)?;
    pages.push(Page { name: page.get_filename(), text });
    let shown = |inner: &&Command| !inner.is_hide_set() && inner.get_name() != "help";
    command.get_subcommands().filter(shown).try_for_each(|inner| add(inner, pages))
}

/// The completion of one shell.
pub(super) fn completion(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut blockmirror_cli::definition(), "blockmirror", &mut text);
    text
}

/// Writes all of them below `out`.
pub(super) fn write(out: &Path) -> Outcome<PathBuf> {
    let man = out.join("man");
    fs::create_dir_all(&man)?;
    for page in manual()? {
        fs::write(man.join(page.name), page.text)?;
    }
    let scripts = out.join("completions");
    fs::create_dir_all(&scripts)?;
    let names =
        [(Shell::Bash, "blockmirror.bash"), (Shell::Zsh, "_blockmirror"), (Shell::Fish, "blockmirror.fish")];
    for (shell, name) in names {
        fs::write(scripts.join(name), completion(shell))?;
    }
    Ok(man)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn every_command_has_a_page_that_names_it_as_it_is_typed() {
        let pages = manual().unwrap();
        for (name, typed) in [
            ("blockmirror.1", "blockmirror"),
            ("blockmirror-convert.1", "blockmirror convert"),
            ("blockmirror-ctl-watch.1", "blockmirror ctl"),
        ] {
            let page = pages.iter().find(|page| page.name == name).unwrap();
            let text = String::from_utf8(page.text.clone()).unwrap().replace("\\-", "-");
            let synopsis = text.split(".SH SYNOPSIS").nth(1).unwrap().replace("\\fB", "").replace("\\fR", "");
            assert!(synopsis.trim_start().starts_with(typed), "{synopsis}");
        }
        let hidden = |name: &str| name.contains("-help") || name.contains("completions");
        assert!(pages.iter().all(|page| !hidden(&page.name)));
    }

    #[test]
    fn completions_know_options() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(completion(shell)).unwrap();
            assert!(script.contains("granularity"), "{shell}");
        }
    }
}
