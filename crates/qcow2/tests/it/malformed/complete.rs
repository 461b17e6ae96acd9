//! Holds the table of malformed images against the sources and LIMITS.md: each type of error, each cap and
//! each refusal has a row, or a reason here why no image can be one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::workspace_root;

use super::answers::Answers;
use super::table;

/// Types of errors that no image causes.
const OF_CALLERS: [(&str, &str); 8] = [
    ("Option", "an option of a new image"),
    ("Storage", "the storage fails, or refuses: rows have its cause"),
    ("SnapshotLeaks", "the storage fails once a snapshot is deleted"),
    ("NotFound", "a name that the caller gives"),
    ("Exists", "a name that the caller gives"),
    ("NameLength", "a name that the caller gives"),
    ("Granularity", "an option that the caller gives"),
    ("OtherLength", "bits that the caller gives"),
];

/// Constants that bound a request, or how a long look is cut into pieces, and not what an image may say.
const OF_REQUESTS: [&str; 4] = ["MAX_WRITE", "MAX_AHEAD", "MAX_PIECES", "MAX_CLUSTERS"];

/// Refusals of LIMITS.md that are answers to failures of the storage: `fault` has them.
const OF_FAILURES: [&str; 1] = ["a flush, or a write of the header, that fails, for want of space too"];

fn source(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name)).unwrap()
}

/// The variants of an enum, as the source has them.
fn variants(text: &str, name: &str) -> Vec<String> {
    let start = text.find(&format!("pub enum {name} {{")).unwrap_or_else(|| panic!("no enum {name}"));
    let body = text[start..].split("\n}").next().unwrap_or_default();
    let is_variant = |line: &&str| line.starts_with("    ") && line.as_bytes()[4].is_ascii_uppercase();
    let word = |line: &str| line.trim().split(|c: char| !c.is_alphanumeric()).next().unwrap_or("").to_owned();
    body.lines().filter(|line| line.len() > 4).filter(is_variant).map(word).collect()
}

#[test]
fn each_type_of_error_and_finding_has_a_row() {
    let mut seen = BTreeSet::new();
    for row in table() {
        let answers = Answers::of(&row);
        seen.extend(answers.all().into_iter().flat_map(|answer| answer.types().to_vec()));
        seen.extend(answers.found.into_iter().map(|(kind, ..)| kind));
    }
    let (error, damage) = (source("error.rs"), source("damage.rs"));
    let (entry, report) = (source("format/entry.rs"), source("check/report.rs"));
    let all = [
        variants(&error, "Error"),
        variants(&error, "WriteRefusal"),
        variants(&error, "BitmapProblem"),
        variants(&damage, "Damage"),
        variants(&entry, "EntryError"),
        variants(&report, "Finding"),
    ];
    assert!(all.iter().all(|names| names.len() > 1), "{all:?}");
    let is_excused = |name: &String| OF_CALLERS.iter().any(|(excused, _)| excused == name);
    let missing: Vec<_> = all.iter().flatten().filter(|n| !seen.contains(*n) && !is_excused(n)).collect();
    assert!(missing.is_empty(), "without a row: {missing:?}");
}

/// The files below a folder.
fn files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, out) } else { out.push(path) }
    }
}

#[test]
fn each_named_cap_has_a_row() {
    let mut caps = Vec::new();
    let mut sources = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut sources);
    for path in sources {
        let is_limits = path.ends_with("limits.rs");
        for line in fs::read_to_string(&path).unwrap().lines() {
            let Some((_, rest)) = line.trim_start().split_once("const ") else { continue };
            let Some((name, _)) = rest.split_once(": ") else { continue };
            if name.starts_with("MAX_") || is_limits {
                caps.push(name.to_owned());
            }
        }
    }
    assert!(caps.len() > 15, "{caps:?}");
    let of_rows: BTreeSet<_> = table().filter_map(|row| row.cap).collect();
    let has_row = |cap: &String| of_rows.contains(&**cap) || OF_REQUESTS.contains(&&**cap);
    let missing: Vec<_> = caps.iter().filter(|cap| !has_row(cap) && *cap != "MAX_BITS").collect();
    assert!(missing.is_empty(), "without a row: {missing:?}");
    let unknown: Vec<_> = of_rows.iter().filter(|cap| !caps.iter().any(|known| known == *cap)).collect();
    assert!(unknown.is_empty(), "no such constant: {unknown:?}");
}

#[test]
fn each_refusal_of_the_limits_has_a_row() {
    let text = fs::read_to_string(workspace_root().join("LIMITS.md")).unwrap();
    let section = text.split("\n## ").find(|section| section.starts_with("qcow2\n")).unwrap();
    let rows: Vec<_> = section.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    let feature = |line: &str| line.trim_start_matches("| ").split(" | ").next().unwrap().to_owned();
    let of_rows: BTreeSet<_> = table().filter_map(|row| row.limit).collect();
    let refused: Vec<_> = rows.iter().filter(|line| line.to_lowercase().contains("refused")).collect();
    assert!(refused.len() > 10, "{refused:?}");
    let has_row = |name: &String| of_rows.contains(&**name) || OF_FAILURES.contains(&&**name);
    let missing: Vec<_> = refused.iter().map(|line| feature(line)).filter(|name| !has_row(name)).collect();
    assert!(missing.is_empty(), "without a row: {missing:?}");
    let known: BTreeSet<_> = rows.iter().map(|line| feature(line)).collect();
    let unknown: Vec<_> = of_rows.iter().filter(|name| !known.contains(**name)).collect();
    assert!(unknown.is_empty(), "LIMITS.md has no row: {unknown:?}");
}
