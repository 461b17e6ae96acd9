//! Rules on files: heads, width of comments, words, leftovers, reasons of lint exceptions, trailing
//! blanks, links.

use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;

use super::links;

/// The width of a comment; rustfmt keeps that of code.
const MOST_COLUMNS: usize = 110;
/// Words that stand in for a subject that has a name. Each is spelled in two parts, so that this file does
/// not find itself.
const VAGUE: [&str; 10] = [
    concat!("any", "body"),
    concat!("every", "body"),
    concat!("some", "body"),
    concat!("no", "body"),
    concat!("who", "ever"),
    concat!("to", "ld"),
    concat!("let ", "in"),
    concat!("lets ", "in"),
    concat!("let ", "go"),
    concat!("lets ", "go"),
];
/// Folders that hold no sources of ours.
const SKIPPED: [&str; 3] = ["target", ".git", "testdata"];
/// Endings of the text files that are looked at.
const TEXTS: [&str; 6] = ["rs", "toml", "md", "yml", "sh", "run"];

/// Adds what is wrong with the files below `root` to `found`.
pub(super) fn check(root: &Path, found: &mut Vec<String>) -> Outcome {
    let mut files = Vec::new();
    collect(root, &mut files)?;
    let is_page = |path: &&PathBuf| path.extension().is_some_and(|ext| ext == "md");
    links::check(root, &files.iter().filter(is_page).cloned().collect::<Vec<_>>(), found)?;
    for path in files {
        let place = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        let Ok(text) = fs::read_to_string(&path) else {
            found.push(format!("{place}: not UTF-8"));
            continue;
        };
        blanks(&place, &text, found);
        words(&place, &text, found);
        if place.ends_with(".rs") {
            source(&place, &text, found);
        }
    }
    Ok(())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Outcome {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            if !SKIPPED.contains(&name.as_str()) {
                collect(&entry.path(), files)?;
            }
        } else if TEXTS.iter().any(|t| name == *t || name.ends_with(&format!(".{t}"))) {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn blanks(place: &str, text: &str, found: &mut Vec<String>) {
    for (number, line) in text.lines().enumerate() {
        if line.ends_with([' ', '\t']) {
            found.push(format!("{place}:{}: trailing blanks", number + 1));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        found.push(format!("{place}: no newline at the end"));
    }
}

/// Prose names its subject.
fn words(place: &str, text: &str, found: &mut Vec<String>) {
    for (number, line) in text.lines().enumerate() {
        let line = line.to_lowercase();
        for word in VAGUE {
            let is_word = |(at, _): (usize, &str)| {
                let letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
                !letter(line[..at].chars().next_back()) && !letter(line[at + word.len()..].chars().next())
            };
            if line.match_indices(word).any(is_word) {
                found.push(format!("{place}:{}: `{word}`: name the subject", number + 1));
            }
        }
    }
}

/// Comments, but for tables and examples, end at one column.
fn width(place: &str, text: &str, found: &mut Vec<String>) {
    let mut is_example = false;
    for (number, line) in text.lines().enumerate() {
        let Some(comment) = line.trim_start().strip_prefix("//") else {
            is_example = false;
            continue;
        };
        let comment = comment.trim_start_matches(['/', '!']).trim_start();
        is_example ^= comment.starts_with("```");
        if !is_example && !comment.starts_with('|') && line.chars().count() > MOST_COLUMNS {
            found.push(format!("{place}:{}: a comment wider than {MOST_COLUMNS} columns", number + 1));
        }
    }
}

fn source(place: &str, text: &str, found: &mut Vec<String>) {
    if !text.starts_with("//!") {
        found.push(format!("{place}: does not open with `//!`"));
    }
    // Spelled in two parts, so that this file does not find itself.
    let leftovers =
        [concat!("todo", "!("), concat!("unimpl", "emented!("), concat!("FIX", "ME"), concat!("TO", "DO")];
    for (number, line) in text.lines().enumerate() {
        for leftover in leftovers {
            if line.contains(leftover) {
                found.push(format!("{place}:{}: `{leftover}`", number + 1));
            }
        }
    }
    width(place, text, found);
    exceptions(place, text, found);
}

/// Attributes that allow what a lint forbids must say why.
fn exceptions(place: &str, text: &str, found: &mut Vec<String>) {
    for opening in ["#[allow(", "#[expect(", "#![allow(", "#![expect("] {
        for (at, _) in text.match_indices(opening) {
            let line_start = text[..at].rfind('\n').map_or(0, |n| n + 1);
            if !text[line_start..at].trim().is_empty() {
                continue;
            }
            let end = text[at..].find(")]").map_or(text.len(), |n| at + n);
            if !text[at..end].contains("reason = ") {
                let number = text[..at].matches('\n').count() + 1;
                found.push(format!("{place}:{number}: a lint exception without a reason"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        blanks("f.rs", text, &mut found);
        words("f.rs", text, &mut found);
        source("f.rs", text, &mut found);
        found
    }

    #[test]
    fn each_rule_finds_its_breach() {
        assert!(on("//! Head.\nfn f() {}\n").is_empty());
        assert_eq!(on("fn f() {}\n"), ["f.rs: does not open with `//!`"]);
        assert_eq!(on("//! Head.\nlet a; \n"), ["f.rs:2: trailing blanks"]);
        assert_eq!(on("//! Head."), ["f.rs: no newline at the end"]);
        let wide = format!("//! Head.\n// {}\n", "x".repeat(108));
        assert_eq!(on(&wide), ["f.rs:2: a comment wider than 110 columns"]);
        assert!(on(&format!("//! Head.\n/// | {} |\n", "x".repeat(108))).is_empty());
        assert!(on(&format!("//! Head.\n/// ```\n/// {}\n/// ```\n", "x".repeat(108))).is_empty());
        let vague = concat!("//! Head.\n// No", "body writes.\n");
        assert_eq!(on(vague), [concat!("f.rs:2: `no", "body`: name the subject")]);
        assert!(on(concat!("//! Head.\n// The user no", "bodyguard.\n")).is_empty());
        let bare = "//! Head.\n#[allow(dead_code)]\nfn f() {}\n";
        assert_eq!(on(bare), ["f.rs:2: a lint exception without a reason"]);
        assert!(on("//! Head.\n#[allow(\n    dead_code,\n    reason = \"x\"\n)]\nfn f() {}\n").is_empty());
    }
}
