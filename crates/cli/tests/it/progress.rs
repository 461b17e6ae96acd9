//! `--progress=json`: each line of the standard error is an object of the schema, whatever the command does,
//! and the last one says how it ended.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "members are read, not used")]

use std::fs;
use std::process::Stdio;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::common::Place;
use crate::output::Failed;
use crate::process::shell;

/// A line of the standard error under `--progress=json`, and of the standard output of `ctl watch --json`.
/// Figures are in bytes, or in what a job counts in; what is not known is left out. Members may be added.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub(crate) enum Line {
    /// Where a phase, or a job, stands: at most once a second, but for the first and last of a phase and
    /// another state.
    Progress {
        /// 1; another number when a member gets another name or meaning.
        version: u32,
        /// `ctl watch`: the id of the job.
        job: Option<String>,
        /// `copy`, `verify`, `commit`, `rebase`, `compare`, `check`, `amend`, `hash`; of a job its type.
        phase: String,
        /// QEMU's name of the state of a job: `running`, `paused`, `ready`, ...
        state: String,
        /// What has been dealt with; grows, unless the same phase begins again with the next image.
        done: u64,
        /// What there is to deal with; changes when a guest writes, or part of the disk need not be copied.
        total: u64,
        /// What is left to be copied or zeroed, estimated where the disk has not been looked at.
        left: u64,
        /// Bytes copied or zeroed per second, over the last seconds.
        rate: Option<u64>,
        /// Seconds until nothing is left.
        eta: Option<u64>,
        copied: Option<u64>,
        zeroed: Option<u64>,
        skipped: Option<u64>,
        shared: Option<u64>,
        /// What was given up.
        failed: Option<u64>,
        /// `ctl watch`: bytes per second that a guest makes dirty.
        dirty_rate: Option<u64>,
        /// `ctl watch`: `equal`, `yes` or `no`.
        converging: Option<String>,
        /// `ctl watch`: whether the guest's writes go to both disks.
        writes_through: Option<bool>,
        /// `ctl watch`: `ok`, `nospace` or `failed`.
        io_status: Option<String>,
        /// Seconds since the command started.
        elapsed: f64,
    },
    /// What does not end the command.
    Message {
        version: u32,
        /// `note` or `warning`.
        class: String,
        message: String,
    },
    /// The last line, of each job with `ctl watch`. It is missing if the process was killed, or a second
    /// signal has ended it at once.
    End {
        version: u32,
        job: Option<String>,
        /// The last phase.
        phase: Option<String>,
        /// `completed`, `failed`, `interrupted`; with `ctl watch` also `cancelled` and `unknown`.
        state: String,
        /// Of the command.
        exit_code: Option<u8>,
        done: Option<u64>,
        total: Option<u64>,
        left: Option<u64>,
        copied: Option<u64>,
        zeroed: Option<u64>,
        skipped: Option<u64>,
        shared: Option<u64>,
        failed: Option<u64>,
        elapsed: f64,
        error: Option<Failed>,
    },
}

/// All lines of `text`.
pub(crate) fn lines(text: &str) -> Vec<Line> {
    let parse =
        |line: &str| -> Line { serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")) };
    let lines: Vec<_> = text.lines().map(parse).collect();
    for line in &lines {
        let (Line::Progress { version, .. } | Line::Message { version, .. } | Line::End { version, .. }) =
            line;
        assert_eq!(*version, 1);
    }
    lines
}

/// What the lines of a command say in all.
struct Summary<'a> {
    /// Each once.
    phases: Vec<&'a str>,
    /// At the end, as what follows.
    state: &'a str,
    exit_code: Option<u8>,
    done: Option<u64>,
    total: Option<u64>,
    /// The class of the error.
    class: Option<&'a str>,
}

fn summary(lines: &[Line]) -> Summary<'_> {
    let mut phases: Vec<_> = lines
        .iter()
        .filter_map(|line| match line {
            Line::Progress { phase, .. } => Some(phase.as_str()),
            _ => None,
        })
        .collect();
    phases.dedup();
    let ends = lines.iter().filter(|line| matches!(line, Line::End { .. })).count();
    assert_eq!(ends, 1, "{lines:?}");
    match lines.last().unwrap() {
        Line::End { state, exit_code, done, total, error, .. } => {
            let class = error.as_ref().map(|error| error.class.as_str());
            Summary { phases, state, exit_code: *exit_code, done: *done, total: *total, class }
        }
        line => panic!("{line:?}"),
    }
}

/// Of each command that shows progress.
#[test]
fn each_line_is_an_object_and_the_last_is_the_end() {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    fs::write(place.path("other"), vec![8; 1 << 20]).unwrap();
    fs::write(place.path("rules"), "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n").unwrap();
    place.ours_ok("create -q -f qcow2 -b raw -F raw @top");
    place.ours_ok("create -q -f qcow2 -b other -F raw @based");
    let all = Some(1 << 20);
    for (line, phases, exit, total) in [
        ("convert -f raw -O qcow2 @raw @copy", "copy", 0, all),
        ("mirror -f raw --verify=full @raw @mirrored", "copy verify", 0, all),
        ("mirror --output=json -f raw @raw @mirrored", "copy", 0, all),
        ("convert --salvage -f raw blkdebug:@rules:@raw @lossy", "copy", 3, all),
        ("compare -f raw @raw @mirrored", "compare", 0, all),
        ("compare -f raw @raw @other", "compare", 1, None),
        ("hash -f raw @raw @other", "hash", 0, all),
        ("amend -o lazy_refcounts=on @copy", "amend", 0, None),
        ("commit @top", "commit", 0, None),
        ("rebase -b @raw -F raw @based", "rebase", 0, None),
        ("dd -f raw bs=1M count=1 if=@raw of=@dd", "copy", 0, all),
        ("check @copy", "check", 0, None),
    ] {
        let (command, rest) = line.split_once(' ').unwrap();
        let ran = place.ours(&format!("{command} --progress=json {rest}"));
        let lines = lines(&ran.err);
        let Summary { phases: found, state, exit_code: code, done, total: len, class } = summary(&lines);
        assert_eq!((state, code, class), ("completed", Some(exit), None), "{line}: {ran:?}");
        assert_eq!(ran.code, i32::from(exit), "{line}");
        // A pass over a few tables may have nothing to show before it is over.
        assert!(found.join(" ") == phases || total.is_none() && found.is_empty(), "{line}: {ran:?}");
        if exit == 0 && total.is_some() {
            assert_eq!((done, len), (total, total), "{line}: {ran:?}");
        }
        let warned =
            lines.iter().any(|line| matches!(line, Line::Message { class, .. } if class == "warning"));
        assert_eq!(warned, exit == 3, "{line}: {ran:?}");
    }
}

#[test]
fn a_failure_is_in_the_last_object() {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    fs::write(place.path("rules"), "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n").unwrap();
    for (line, exit, class) in [
        ("convert --progress json @missing @t", 1, "not-found"),
        ("convert --progress=json --output=json @missing @t", 1, "not-found"),
        ("convert --progress=json --nonsense", 2, "usage"),
        ("convert --progress=json -f raw blkdebug:@rules:@raw @t", 1, "io"),
        ("mirror --progress=json --on-source-error=stop -f raw @raw @t", 2, "usage"),
        ("compare --progress=json -f raw @raw @missing", 2, "not-found"),
    ] {
        let ran = place.ours(line);
        let lines = lines(&ran.err);
        let Summary { state, exit_code, class: found, .. } = summary(&lines);
        assert_eq!((state, exit_code, found), ("failed", Some(exit), Some(class)), "{line}: {ran:?}");
        assert_eq!(ran.code, i32::from(exit), "{line}");
    }
    // Of a name alone, and under the name of another program, they are text.
    assert!(place.ours("convert -- --progress=json @t").err.starts_with("blockmirror: "));
    assert!(place.ours("qemu-img convert --progress=json @missing @t").err.starts_with("qemu-img: "));
}

/// A log would be no object.
#[test]
fn the_log_is_left_out() {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    let mut command = shell(&place, "export RUST_LOG=trace", "convert -q --progress=json -f raw raw t");
    let output = command.output().unwrap();
    let lines = lines(&String::from_utf8(output.stderr).unwrap());
    assert!(matches!(&lines[0], Line::Message { message, .. } if message.starts_with("RUST_LOG is ignored")));
    assert_eq!(summary(&lines).state, "completed");
}

/// The reader of progress goes away: the copy goes on.
#[test]
fn a_closed_stream_does_not_end_the_copy() {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    for command in ["convert", "mirror"] {
        let line = format!("{command} --progress=json -f raw raw {command}");
        let writer = writer.try_clone().unwrap();
        let status = shell(&place, ":", &line).stdout(Stdio::null()).stderr(writer).status().unwrap();
        assert_eq!(status.code(), Some(0), "{command}");
        assert_eq!(fs::read(place.path(command)).unwrap(), vec![7; 1 << 20], "{command}");
    }
}
