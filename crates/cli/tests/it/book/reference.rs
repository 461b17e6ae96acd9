//! The reference of the command line is what the definition makes it.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

#[path = "../../../examples/cli_reference/page.rs"]
mod page;

use std::fs;

/// What lies above is written by hand.
const BORDER: &str = "<!-- From here on written by `cargo xtask docs`. -->\n\n";

#[test]
fn the_reference_is_what_the_definition_makes_it() {
    let text = fs::read_to_string(super::folder().join("reference.md")).unwrap();
    let (_, generated) = text.split_once(BORDER).unwrap();
    let made = page::reference(blockmirror_cli::definition());
    assert!(generated == made, "docs/book/src/reference.md is out of date: run `cargo xtask docs`");
    assert!(made.contains("### ctl mirror\n") && made.contains("| `-O`, `--target-format FMT` |"));
}
