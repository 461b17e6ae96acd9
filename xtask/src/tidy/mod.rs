//! `cargo xtask tidy`: the house rules that no compiler checks. Also run as a test.
//!
//! The rules read the tree and what ARCHITECTURE.md says of it: the map there and the manifests must tell the
//! same story, so neither can drift.

mod map;
mod packages;
mod sources;

use std::path::Path;
use std::process::ExitCode;

use blockmirror_testing::Outcome;
use blockmirror_tests::workspace_root;

use crate::Task;

/// Check arrows between crates, file heads and sizes, reasons of exceptions, licences, dependencies' entries
#[derive(clap::Args)]
pub(crate) struct Tidy {}

impl Task for Tidy {
    fn run(self) -> Outcome<ExitCode> {
        let findings = findings(&workspace_root())?;
        for finding in &findings {
            eprintln!("{finding}");
        }
        if findings.is_empty() {
            println!("tidy: nothing found");
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("tidy: {} findings", findings.len());
        Ok(ExitCode::FAILURE)
    }
}

/// Every breach of a rule below `root`, one line each.
fn findings(root: &Path) -> Outcome<Vec<String>> {
    let mut found = Vec::new();
    sources::check(root, &mut found)?;
    packages::check(root, &mut found)?;
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy() {
        let found = findings(&workspace_root()).unwrap();
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
