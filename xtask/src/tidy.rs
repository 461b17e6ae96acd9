//! `cargo xtask tidy`: the house rules that no compiler checks. Also run as a test.
//!
//! The rules read the tree and what ARCHITECTURE.md says of it: the map there and the manifests must tell the
//! same story, so neither can drift.

mod links;
mod map;
mod packages;
mod sources;
mod structure;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use blockmirror_testing::Outcome;
use blockmirror_testing::workspace_root;

use crate::Task;

/// What is allowed although a rule says otherwise: groups of findings below a `#` comment with the reason.
const ALLOWED: &str = "xtask/tidy-allowed.txt";

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
    structure::check(root, &mut found)?;
    found.sort();
    allow(&fs::read_to_string(root.join(ALLOWED))?, &mut found);
    Ok(found)
}

/// Takes what the list of exceptions allows out of `found`, and adds the exceptions that are not needed: the
/// list only shrinks.
fn allow(list: &str, found: &mut Vec<String>) {
    let mut reason = false;
    for line in list.lines() {
        if line.trim().is_empty() {
            reason = false;
        } else if line.starts_with('#') {
            reason = true;
        } else if !reason {
            found.push(format!("{ALLOWED}: no reason above `{line}`"));
        } else if let Some(at) = found.iter().position(|finding| finding == line) {
            found.remove(at);
        } else {
            found.push(format!("{ALLOWED}: not found any more: {line}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_needs_a_reason_and_a_finding() {
        let mut found = vec!["a: b".to_owned(), "c: d".to_owned()];
        allow("# Why.\na: b\ne: f\n\nc: d\n", &mut found);
        let list = "xtask/tidy-allowed.txt";
        assert_eq!(
            found,
            [
                "c: d".to_owned(),
                format!("{list}: not found any more: e: f"),
                format!("{list}: no reason above `c: d`")
            ]
        );
    }

    #[test]
    fn the_tree_is_tidy() {
        let found = findings(&workspace_root()).unwrap();
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
