//! docs/daemon.md and the part on the daemon of README.md: their commands print what stands below them. Those
//! of a page are run one after the other, in one folder.
//!
//! A command that is talked to (`socat`, `qmp-shell`) gets what stands behind `> ` or `(QEMU) `, each once
//! what it printed so far has come. With `TRANSCRIPT_RECORD=1` the page is written anew with what was
//! printed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_testing::qemu::{have, python};
use blockmirror_testing::workspace_root;

/// Nothing here takes longer, on a machine that works at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// While recording: what has not been printed by then will not be.
const QUIET: Duration = Duration::from_secs(1);

const PROMPTS: [&str; 2] = ["> ", "(QEMU) "];

/// A command of the page: what is typed after `$ `, what is printed and typed then.
#[derive(Debug, Default)]
struct Step {
    command: String,
    lines: Vec<String>,
}

impl Step {
    fn prompt(&self) -> Option<&'static str> {
        PROMPTS.into_iter().find(|prompt| self.lines.iter().any(|line| line.starts_with(prompt)))
    }
}

/// The page in pieces: prose, and the steps of console blocks.
enum Piece {
    Prose(String),
    Steps(Vec<Step>),
}

fn parse(page: &str) -> Vec<Piece> {
    let mut pieces = vec![Piece::Prose(String::new())];
    for line in page.lines() {
        let open = matches!(pieces.last(), Some(Piece::Steps(_)));
        match pieces.last_mut() {
            Some(Piece::Steps(steps)) if line != "```" => {
                let continued =
                    steps.last().is_some_and(|step| step.lines.is_empty() && unfinished(&step.command));
                match (line.strip_prefix("$ "), steps.last_mut()) {
                    (Some(command), _) => steps.push(Step { command: command.into(), lines: Vec::new() }),
                    (None, Some(step)) if continued => step.command += &format!("\n{line}"),
                    (None, Some(step)) => step.lines.push(line.into()),
                    (None, None) => panic!("a block starts with a command: {line}"),
                }
            }
            Some(Piece::Prose(text)) => {
                *text += &format!("{line}\n");
                if line == "```console" {
                    pieces.push(Piece::Steps(Vec::new()));
                }
            }
            _ => {}
        }
        if open && line == "```" {
            pieces.push(Piece::Prose("```\n".into()));
        }
    }
    pieces
}

/// Whether the shell would ask for another line.
fn unfinished(command: &str) -> bool {
    command.ends_with('\\') || command.matches('\'').count() % 2 == 1
}

/// What differs from run to run is a number behind one of these.
fn steady(line: &str) -> String {
    let mut line = line.to_owned();
    for key in ["\"seconds\": ", "\"microseconds\": "] {
        if let Some(at) = line.find(key).map(|at| at + key.len()) {
            let digits = line[at..].chars().take_while(char::is_ascii_digit).count();
            line.replace_range(at..at + digits, "..");
        }
    }
    line
}

/// Runs the commands of the page in a folder, with `blockmirror` in the path.
struct Shell {
    dir: PathBuf,
    path: String,
    record: bool,
}

impl Shell {
    fn command(&self, text: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("exec 2>&1; {text}")).current_dir(&self.dir);
        command.env("PATH", &self.path).env("PYTHONUNBUFFERED", "1").env("HOME", &self.dir);
        command
    }

    fn run(&self, step: &Step) -> Vec<String> {
        match step.prompt() {
            None => {
                let output = self.command(&step.command).stdin(Stdio::null()).output().unwrap();
                let text = String::from_utf8(output.stdout).unwrap();
                let lines: Vec<_> = text.lines().map(str::to_owned).collect();
                if !self.record {
                    assert_eq!(lines, step.lines, "{}", step.command);
                }
                lines
            }
            Some(prompt) => self.talk(step, prompt),
        }
    }

    fn talk(&self, step: &Step, prompt: &str) -> Vec<String> {
        let mut child =
            self.command(&step.command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (line_read, lines) = channel();
        let stdout = child.stdout.take().unwrap();
        let prompt_printed = prompt.to_owned();
        let reading = thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                // What is typed is not echoed to a pipe, so that the prompt is at the start of what is
                // printed then.
                let line = line.unwrap();
                let line = line.trim_end_matches('\r').trim_start_matches(&prompt_printed).to_owned();
                if line_read.send(line).is_err() {
                    break;
                }
            }
        });
        let mut stdin = child.stdin.take().unwrap();
        let mut printed = Vec::new();
        // What is typed, with what is printed before the next.
        for (typed, wanted) in exchanges(step, prompt) {
            if let Some(typed) = typed {
                writeln!(stdin, "{typed}").unwrap();
                printed.push(format!("{prompt}{typed}"));
            }
            if self.record {
                printed.extend(quiet(&lines));
                continue;
            }
            let mut real: Vec<_> = wanted.iter().map(|line| next(&lines, line)).collect();
            // What the shell from PyPI shows has no events: it is asked until things are as they are going to
            // be.
            let since = Instant::now();
            while typed == Some("query-jobs") && real != wanted && since.elapsed() < PATIENCE {
                writeln!(stdin, "query-jobs").unwrap();
                real = vec![next(&lines, wanted[0])];
            }
            // An answer may come before or after events of what it has set going.
            for is_event in [true, false] {
                let of_kind =
                    |line: &String| (line.contains("\"event\": ") == is_event).then(|| steady(line));
                let wanted: Vec<_> = wanted.iter().map(|line| (*line).to_owned()).collect();
                let (real, wanted): (Vec<_>, Vec<_>) =
                    (real.iter().filter_map(of_kind).collect(), wanted.iter().filter_map(of_kind).collect());
                assert_eq!(real, wanted, "{}", step.command);
            }
        }
        drop(stdin);
        child.wait().unwrap();
        reading.join().unwrap();
        let rest: Vec<_> = lines.try_iter().filter(|line| !line.is_empty()).collect();
        assert_eq!(rest, [""; 0], "{}: there is more", step.command);
        printed
    }
}

/// What is typed after `prompt`, each with the lines that are printed then; first those that nothing was
/// typed for.
fn exchanges<'a>(step: &'a Step, prompt: &str) -> Vec<(Option<&'a str>, Vec<&'a str>)> {
    let mut exchanges = vec![(None, Vec::new())];
    for line in &step.lines {
        match line.strip_prefix(prompt) {
            Some(typed) => exchanges.push((Some(typed), Vec::new())),
            None => exchanges.last_mut().unwrap().1.push(line.as_str()),
        }
    }
    exchanges
}

fn next(lines: &Receiver<String>, wanted: &str) -> String {
    lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("not printed: {wanted}"))
}

fn quiet(lines: &Receiver<String>) -> Vec<String> {
    std::iter::from_fn(|| lines.recv_timeout(QUIET).ok()).collect()
}

/// Ends the daemon of a page that failed in the middle.
struct Pidfile(PathBuf);

impl Drop for Pidfile {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(&self.0) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

/// Waits until the daemon that was killed is gone: it removes its file.
fn gone(pidfile: &Path) {
    let since = Instant::now();
    while pidfile.exists() {
        assert!(since.elapsed() < PATIENCE, "the daemon did not end");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_daemon_by_hand() {
    run("the_daemon_by_hand", "docs/daemon.md", 0);
}

#[test]
fn the_daemon_in_short() {
    // The first block is about images alone and has a test of its own.
    run("the_daemon_in_short", "README.md", 1);
}

/// Runs the blocks of `page` but for the first few.
fn run(name: &str, page: &str, skip: usize) {
    if !have(name, &["qemu-img", "qemu-io", "socat"]) {
        return;
    }
    let Some(python) = python(name) else { return };
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let bin = Path::new(env!("CARGO_BIN_EXE_blockmirror")).parent().unwrap();
    let old = std::env::var("PATH").unwrap();
    let python_bin = python.parent().unwrap().display();
    let shell = Shell {
        dir: dir.path().into(),
        path: format!("{}:{python_bin}:{old}", bin.display()),
        record: std::env::var_os("TRANSCRIPT_RECORD").is_some(),
    };
    let pidfile = Pidfile(dir.path().join("daemon.pid"));
    let file = workspace_root().join(page);
    let mut text = String::new();
    let (mut blocks, mut steps_run) = (0, 0);
    for piece in parse(&fs::read_to_string(&file).unwrap()) {
        let steps = match piece {
            Piece::Prose(prose) => {
                text += &prose;
                continue;
            }
            Piece::Steps(steps) => steps,
        };
        blocks += 1;
        for step in steps {
            let printed = if blocks > skip { shell.run(&step) } else { step.lines };
            text += &format!("$ {}\n", step.command);
            for line in printed {
                text += &format!("{}\n", line.trim_end());
            }
            if step.command.starts_with("kill ") {
                gone(&pidfile.0);
            }
            steps_run += usize::from(blocks > skip);
        }
    }
    assert!(steps_run >= 9, "{steps_run}");
    if shell.record {
        fs::write(&file, text).unwrap();
    }
}
