//! `cargo xtask docs`: writes the part of `docs/qmp.md` that comes from the daemon's schema.
//!
//! A test compares the file with the schema and with a running daemon.

use std::fs;
use std::process::ExitCode;

use blockmirror_daemon::Daemon;
use blockmirror_testing::Outcome;
use blockmirror_tests::workspace_root;

use crate::Task;

/// What lies above is written by hand.
const BORDER: &str = "<!-- From here on written by `cargo xtask docs`. -->\n";

/// Write the reference of QMP commands, events and types in docs/qmp.md
#[derive(clap::Args)]
pub(crate) struct Docs {}

impl Task for Docs {
    fn run(self) -> Outcome<ExitCode> {
        let path = workspace_root().join("docs/qmp.md");
        let text = fs::read_to_string(&path)?;
        let (head, _) = text.split_once(BORDER).ok_or("docs/qmp.md: the line that divides it is missing")?;
        fs::write(&path, format!("{head}{BORDER}\n{}", Daemon::reference()))?;
        println!("{}", path.display());
        Ok(ExitCode::SUCCESS)
    }
}
