//! `cargo xtask dist`: the packages, under `target/dist/`.
//!
//! Each is made of one tree of files ([`tree`]) around the command: its manual pages and completions come
//! from the definition of the command line itself ([`pages`]). Programs of other projects pack them; a kind
//! whose program is missing is skipped by name, and asked for with `--only` it fails.

mod deb;
mod oci;
mod pages;
mod program;
mod rpm;
mod tree;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use blockmirror_testing::{Outcome, workspace_root};
use clap::ValueEnum;

use crate::Task;

/// Build the packages: manual pages, completions, deb, rpm, a static binary and an OCI image layout
#[derive(clap::Args)]
pub(crate) struct Dist {
    /// Build this kind only; can be repeated
    #[arg(long, value_enum)]
    only: Vec<Kind>,
    /// Where they go
    #[arg(long, default_value = "target/dist")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Manual pages and completions, as files
    Pages,
    /// A Debian package, by dpkg-deb
    Deb,
    /// An RPM package, by rpmbuild
    Rpm,
    /// A binary without shared libraries, by the target x86_64-unknown-linux-musl
    Static,
    /// An OCI image layout of the static binary, by tar
    Oci,
}

impl Kind {
    /// Programs that it takes.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Pages => &[],
            Self::Deb => &["dpkg-deb", "dpkg-shlibdeps", "objcopy"],
            Self::Rpm => &["rpmbuild", "objcopy"],
            Self::Static => &["musl-gcc", "objcopy"],
            Self::Oci => &["musl-gcc", "objcopy", "tar"],
        }
    }
}

impl Task for Dist {
    fn run(self) -> Outcome<ExitCode> {
        let out = workspace_root().join(&self.out);
        fs::create_dir_all(&out)?;
        let kinds = if self.only.is_empty() { Kind::value_variants() } else { &self.only };
        for kind in kinds {
            if let Some(missing) = kind.programs().iter().find(|program| !is_there(program)) {
                if self.only.is_empty() {
                    println!("{kind:?}: SKIPPED: {missing} is not installed");
                    continue;
                }
                return Err(format!("{kind:?} takes {missing}, which is not installed").into());
            }
            let made = match kind {
                Kind::Pages => pages::write(&out)?,
                Kind::Deb => deb::build(&out)?,
                Kind::Rpm => rpm::build(&out)?,
                Kind::Static => program::build_static(&out)?,
                Kind::Oci => oci::build(&out)?,
            };
            println!("{kind:?}: {}", made.display());
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Runs `command` to its end; it must succeed.
fn run(command: &mut Command) -> Outcome {
    let status = command.status().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}
