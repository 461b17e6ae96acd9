//! `cargo xtask docs`: writes the part of `docs/qmp.md` that comes from the daemon's schema, that of the
//! book's reference which comes from the definition of the command line, and the READMEs of the packages.
//!
//! Tests compare the files with the schema, with a running daemon and with the definition.

use std::fs;
use std::process::ExitCode;

use blockmirror_testing::{Outcome, workspace_root};
use cargo_metadata::MetadataCommand;

use crate::{Task, cargo, readme};

/// What lies above is written by hand.
const BORDER: &str = "<!-- From here on written by `cargo xtask docs`. -->\n";

/// Write the references of QMP (docs/qmp.md) and of the command line (docs/book), and the packages' READMEs
#[derive(clap::Args)]
pub(crate) struct Docs {}

impl Task for Docs {
    fn run(self) -> Outcome<ExitCode> {
        write_reference("docs/qmp.md", "blockmirror-daemon", "qmp_reference")?;
        write_reference("docs/book/src/reference.md", "blockmirror-cli", "cli_reference")?;
        write_readmes()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Writes what an example of a package prints below the border in the file `place`.
fn write_reference(place: &str, package: &str, example: &str) -> Outcome {
    let what = ["--package", package, "--example", example];
    let printed = cargo().args(["run", "--quiet", "--locked"]).args(what).output()?;
    if !printed.status.success() {
        return Err(String::from_utf8_lossy(&printed.stderr).into());
    }
    let path = workspace_root().join(place);
    let text = fs::read_to_string(&path)?;
    let divided = text.split_once(BORDER);
    let (head, _) = divided.ok_or_else(|| format!("{place}: the line that divides it is missing"))?;
    fs::write(&path, format!("{head}{BORDER}\n{}", String::from_utf8(printed.stdout)?))?;
    println!("{}", path.display());
    Ok(())
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
