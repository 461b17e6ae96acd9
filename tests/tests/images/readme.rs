//! README.md: the commands of its transcript print what it says they print.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::path::Path;

use crate::common::ours;
use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::workspace_root;

/// Commands (without `$ `) with the lines printed below them.
fn transcript(text: &str) -> Vec<(String, Vec<String>)> {
    let mut steps: Vec<(String, Vec<String>)> = Vec::new();
    let block = text.split("```console\n").nth(1).expect("README.md has a console block");
    for line in block.lines().take_while(|line| *line != "```") {
        match line.strip_prefix("$ ") {
            Some(command) => steps.push((command.to_owned(), Vec::new())),
            None => steps.last_mut().expect("a command comes first").1.push(line.to_owned()),
        }
    }
    steps
}

/// Runs one command of the transcript inside `dir`; the lines it prints. Files are the words with a dot in
/// them.
fn run(dir: &Path, command: &str) -> Vec<String> {
    let words = command.strip_prefix("blockmirror ").expect("only our command can be checked");
    let place = format!("{}/", dir.display());
    let words = words.split(' ').map(|w| match w.contains('.') && !w.contains('=') {
        true => place.clone() + w,
        false => w.to_owned(),
    });
    let ran = ours(words);
    assert_eq!(ran.code, 0, "{command}: {}", ran.stderr);
    let text = (ran.stdout + &ran.stderr).replace(&place, "");
    text.lines().map(steady).collect()
}

/// Times and space on the host differ from run to run.
fn steady(line: &str) -> String {
    if let Some(at) = line.rfind(", in ").filter(|_| line.ends_with(" s")) {
        return line[..at].to_owned();
    }
    for space in ["disk size:", "file length:"] {
        if let Some(at) = line.find(space) {
            return line[..at + space.len()].to_owned();
        }
    }
    line.to_owned()
}

#[test]
fn the_transcript_is_what_the_commands_print() {
    let text = fs::read_to_string(workspace_root().join("README.md")).unwrap();
    let dir = scratch().unwrap();
    // The disk of the transcript: 1 GiB, most of it never written.
    let runs = [
        (0, 1 << 20, Fill::Noise),
        (100 << 20, 200 << 20, Fill::Noise),
        (700 << 20, 4096, Fill::Noise),
        ((1 << 30) - 4096, 4096, Fill::Noise),
    ];
    write_raw(&dir.path().join("disk.raw"), 1 << 30, &runs).unwrap();
    let steps = transcript(&text);
    assert!(steps.len() >= 4, "{} commands", steps.len());
    for (command, printed) in steps {
        let printed: Vec<_> = printed.iter().map(|line| steady(line)).collect();
        assert_eq!(run(dir.path(), &command), printed, "{command}");
    }
}
