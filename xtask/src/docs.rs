//! `cargo xtask docs`: writes the part of `docs/qmp.md` that comes from the daemon's schema.
//!
//! Builds the daemon's library and nothing above it. A test compares the file with the schema and with a
//! running daemon.

use std::fs;
use std::process::ExitCode;

use blockmirror_testing::{Outcome, workspace_root};

use crate::{Task, cargo};

/// What lies above is written by hand.
const BORDER: &str = "<!-- From here on written by `cargo xtask docs`. -->\n";

/// Write the reference of QMP commands, events and types in docs/qmp.md
#[derive(clap::Args)]
pub(crate) struct Docs {}

impl Task for Docs {
    fn run(self) -> Outcome<ExitCode> {
        let example = ["--package", "blockmirror-daemon", "--example", "qmp_reference"];
        let printed = cargo().args(["run", "--quiet", "--locked"]).args(example).output()?;
        if !printed.status.success() {
            return Err(String::from_utf8_lossy(&printed.stderr).into());
        }
        let path = workspace_root().join("docs/qmp.md");
        let text = fs::read_to_string(&path)?;
        let (head, _) = text.split_once(BORDER).ok_or("docs/qmp.md: the line that divides it is missing")?;
        fs::write(&path, format!("{head}{BORDER}\n{}", String::from_utf8(printed.stdout)?))?;
        println!("{}", path.display());
        Ok(ExitCode::SUCCESS)
    }
}
