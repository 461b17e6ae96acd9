//! Captive servers, by the program: what they serve, how they are named, and that none is left.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod ends;
mod http;
mod kinds;
mod words;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use blockmirror_testing::process::with_default_signals;
use blockmirror_testing::qemu::have;

use crate::common::{Place, Ran};
use crate::process::wait_until;

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");

/// Has the server that follows write its process number to the file `pid` before it begins.
const WITH_PID: [&str; 4] = ["sh", "-c", "echo $$ >pid.new; mv pid.new pid; exec \"$@\"", "sh"];

/// A folder with a folder for temporary files in it, if `tools` can be run.
fn place(test: &str, tools: &[&str]) -> Option<Place> {
    have(test, tools).then(|| {
        let place = Place::new();
        fs::create_dir(place.path("tmp")).unwrap();
        place
    })
}

/// `blockmirror` with `words`, in the folder of `place`.
fn command<W: AsRef<OsStr>>(place: &Place, words: impl IntoIterator<Item = W>) -> Command {
    let mut command = with_default_signals(OURS);
    command.args(words).current_dir(place.path(".")).env("TMPDIR", place.path("tmp")).stdin(Stdio::null());
    command
}

/// Runs `blockmirror` with `words`; no temporary file and no server that has written its number is left.
fn run<W: AsRef<OsStr>>(place: &Place, words: impl IntoIterator<Item = W>) -> Ran {
    let ran = ran(&mut command(place, words));
    nothing_is_left(place);
    ran
}

fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code, out: text(output.stdout), err: text(output.stderr) }
}

/// Runs `blockmirror`, which must end well.
fn ok<W: AsRef<OsStr>>(place: &Place, words: impl IntoIterator<Item = W>) -> Ran {
    let ran = run(place, words);
    assert_eq!(ran.code, 0, "{ran:?}");
    ran
}

/// The words of `line`.
fn split(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// `server` in brackets, which writes its number to the file `pid`.
fn with_pid(server: &str) -> Vec<&str> {
    let words = ["["].into_iter().chain(WITH_PID);
    words.chain(server.split(' ')).chain(["]"]).collect()
}

/// The number of the server, as soon as it is known.
fn pid(place: &Place) -> String {
    wait_until("the server does not start", || place.path("pid").exists());
    fs::read_to_string(place.path("pid")).unwrap().trim().to_owned()
}

/// Whether the process `pid` runs; one that nothing has waited for yet does not.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !matches!(rest.trim_start().bytes().next(), None | Some(b'Z')))
}

fn nothing_is_left(place: &Place) {
    let left: Vec<_> = fs::read_dir(place.path("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    if let Ok(pid) = fs::read_to_string(place.path("pid")) {
        assert!(!runs(pid.trim()), "the server {pid} still runs");
        fs::remove_file(place.path("pid")).unwrap();
    }
}

/// Bytes that differ from sector to sector, with holes between them.
fn content(len: usize) -> Vec<u8> {
    let sector = |index: usize| match index % 192 {
        0..64 => vec![0; 512],
        _ => (0..512).map(|at| (index * 7 + at) as u8).collect(),
    };
    (0..len / 512).flat_map(sector).collect()
}
