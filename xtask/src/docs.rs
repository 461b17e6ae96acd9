//! `cargo xtask docs`: writes the part of `docs/qmp.md` that comes from the daemon's schema, and the READMEs
//! of the packages.
//!
//! Builds the daemon's library and nothing above it. A test compares the file with the schema and with a
//! running daemon.

use std::fs;
use std::process::ExitCode;

use blockmirror_testing::{Outcome, workspace_root};
use cargo_metadata::MetadataCommand;

use crate::{Task, cargo, readme};

/// What lies above is written by hand.
const BORDER: &str = "<!-- From here on written by `cargo xtask docs`. -->\n";

/// Write the reference of QMP commands, events and types in docs/qmp.md, and the packages' READMEs
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
        write_readmes()?;
        Ok(ExitCode::SUCCESS)
    }
}

fn write_readmes() -> Outcome {
    let packages = MetadataCommand::new().current_dir(workspace_root()).no_deps().exec()?.packages;
    for package in packages.iter().filter(|package| package.publish.is_none()) {
        let folder = package.manifest_path.with_file_name("");
        let source = fs::read_to_string(folder.join("src/lib.rs"))?;
        fs::write(folder.join("README.md"), readme::of_front_page(&package.name, &source))?;
        println!("{}", folder.join("README.md"));
    }
    Ok(())
}
