//! Command lines of `qemu-img`, run under that name beside QEMU's program in twin folders.
//!
//! `qemu_name/lines.txt` has the lines and their sources. Of each the exit code, every file afterwards, the
//! fields of JSON and the words on the standard output must be the same. [`EXCEPTIONS`] has the lines for
//! which they are not, and why; one that has come to pass must leave it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod repairs;
mod steps;
mod twins;
mod words;

use blockmirror_testing::report;

use crate::common::have_qemu;
use twins::{Twins, World, Wrong};

/// Lines that do something else, with the reason.
const EXCEPTIONS: &[(&str, &str)] = &[(
    "compare -s -f qcow2 -F raw base.qcow2 base.raw",
    "QEMU names the start of the run that it looked at, ours the first byte that differs",
)];

/// Lines whose words are not QEMU's: help texts, and figures of time.
const OWN_WORDS: &[&str] = &["create -f qcow2 -o help", "bench -c 16 -d 4 -f qcow2 base.qcow2"];

/// The lines, each with its source.
fn lines() -> Vec<(&'static str, &'static str)> {
    let mut source = "";
    let mut all = Vec::new();
    for line in include_str!("qemu_name/lines.txt").lines() {
        match line.strip_prefix("## ") {
            Some(named) => source = named,
            None if line.is_empty() || line.starts_with('#') => {}
            None => all.push((line, source)),
        }
    }
    all
}

#[test]
fn each_line_has_a_source_and_there_are_enough() {
    let lines = lines();
    assert!(lines.iter().all(|(_, source)| !source.is_empty()));
    let mut different: Vec<_> = lines.iter().map(|(line, _)| line).collect();
    different.sort();
    different.dedup();
    assert!(different.len() >= 100, "{}", different.len());
    for (line, _) in EXCEPTIONS {
        assert!(different.contains(&line), "no such line: {line}");
    }
}

#[test]
fn lines_do_under_the_name_what_qemu_img_does() {
    if !have_qemu("lines_do_under_the_name_what_qemu_img_does") {
        return;
    }
    let world = World::new();
    let (mut passed, mut missing, mut wrong) = (0, 0, Vec::new());
    let lines = lines();
    for (line, source) in &lines {
        let twins = Twins::new(&world);
        let same = twins.run(line, !OWN_WORDS.contains(line));
        let exception = EXCEPTIONS.iter().find(|(excepted, _)| excepted == line);
        match (same, exception) {
            (Ok(()), None) => passed += 1,
            (Err(_), Some(_)) => {}
            // A command or an option that there is not yet.
            (Err(Wrong::Missing), None) => missing += 1,
            (Ok(()), Some(_)) => wrong.push(format!("{line}: it passes and is listed as an exception")),
            (Err(Wrong::Differs(why)), None) => wrong.push(format!("{line} ({source}):\n    {why}")),
        }
    }
    report(format_args!("{passed} of {} lines do what qemu-img does, {missing} lack a command", lines.len()));
    assert!(passed >= 100, "{passed}");
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong.join("\n"));
}
