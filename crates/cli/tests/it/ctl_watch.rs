//! `blockmirror ctl SOCKET watch` as a process: Ctrl-C leaves the job alone, and on a terminal the view is
//! drawn over.

#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is the point")]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockmirror_qmp::Client;
use blockmirror_testing::process::with_default_signals;
use blockmirror_testing::qemu::have;
use serde_json::{Value, json};

use crate::progress::{Line, lines};

/// Nothing here takes longer, on a machine that works at all.
const PATIENCE: Duration = Duration::from_secs(60);
const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");

/// A daemon with a mirror that stands still, and a monitor besides the one that is watched.
struct World {
    dir: tempfile::TempDir,
    daemon: Child,
    client: Client,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str, file: &str| {
            format!("driver=raw,node-name={name},file.driver=file,file.filename={file}")
        };
        for name in ["disk", "copy"] {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            file.set_len(1 << 20).unwrap();
        }
        // Data everywhere, so that there is something to be slow about.
        std::fs::write(dir.path().join("disk"), vec![7; 1 << 20]).unwrap();
        let daemon = Command::new(OURS)
            .current_dir(dir.path())
            .arg("daemon")
            .args(["--blockdev", &disk("disk", "disk"), "--blockdev", &disk("copy", "copy")])
            .args(["--chardev", "socket,id=c,path=qmp,server=on,wait=off", "--monitor", "chardev=c"])
            .args(["--pidfile", "pid"])
            .spawn()
            .unwrap();
        let since = Instant::now();
        while !dir.path().join("pid").exists() {
            assert!(since.elapsed() < PATIENCE, "the daemon does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut client = Client::connect(dir.path().join("qmp"), PATIENCE).unwrap();
        let mirror = json!({"job-id": "m", "device": "disk", "target": "copy", "sync": "full", "speed": 1});
        client.execute("blockdev-mirror", mirror).unwrap();
        Self { dir, daemon, client }
    }

    fn watch(&self, program: &[&str]) -> Child {
        with_default_signals(program[0])
            .args(&program[1..])
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn jobs(&mut self) -> Value {
        self.client.execute("query-jobs", json!({})).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn an_interrupted_watch_leaves_the_job_alone() {
    let mut world = World::new();
    let mut watch = world.watch(&[OURS, "ctl", "qmp", "watch"]);
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(first.starts_with("m: running "), "{first}");
    Command::new("kill").args(["-INT", &watch.id().to_string()]).status().unwrap();
    let output = watch.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(130), Vec::new()));
    assert_eq!(world.jobs()[0]["status"], "running");
}

#[test]
fn for_programs_a_line_is_an_object() {
    let mut world = World::new();
    let mut watch = world.watch(&[OURS, "ctl", "qmp", "watch", "--json", "m"]);
    let mut output = BufReader::new(watch.stdout.take().unwrap());
    let mut text = String::new();
    output.read_line(&mut text).unwrap();
    world.client.execute("job-cancel", json!({"id": "m"})).unwrap();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(watch.wait().unwrap().code(), Some(1));
    let lines = lines(&text);
    let Line::Progress { job, phase, state, total, .. } = &lines[0] else { panic!("{text}") };
    let found = (job.as_deref(), phase.as_str(), state.as_str(), *total);
    assert_eq!(found, (Some("m"), "mirror", "running", 1 << 20));
    let Some(Line::End { job, state, error, .. }) = lines.last() else { panic!("{text}") };
    assert_eq!((job.as_deref(), state.as_str(), error.is_none()), (Some("m"), "cancelled", true));
    assert_eq!(lines.iter().filter(|line| matches!(line, Line::End { .. })).count(), 1);
}

#[test]
fn a_terminal_is_drawn_over() {
    if !have("a_terminal_is_drawn_over", &["script"]) {
        return;
    }
    let mut world = World::new();
    let command = format!("{OURS} ctl qmp watch");
    let mut watch = world.watch(&["script", "-qec", &command, "/dev/null"]);
    let mut shown = BufReader::new(watch.stdout.take().unwrap());
    let mut line = String::new();
    shown.read_line(&mut line).unwrap();
    assert!(line.starts_with("m: running ") && line.ends_with("\u{1b}[K\r\n"), "{line:?}");
    world.client.execute("job-cancel", json!({"id": "m"})).unwrap();
    let mut rest = String::new();
    shown.read_to_string(&mut rest).unwrap();
    // One line up, and over it: whatever was drawn in between.
    assert!(rest.ends_with("\u{1b}[1Am: aborted\u{1b}[K\r\n"), "{rest:?}");
    assert_eq!(watch.wait().unwrap().code(), Some(1));
    assert_eq!(world.jobs(), json!([]));
}

#[test]
fn a_pipe_that_is_closed_ends_the_watch() {
    let world = World::new();
    let mut watch = world.watch(&[OURS, "ctl", "qmp", "watch"]);
    let mut output = BufReader::new(watch.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    drop(output);
    // It finds out with the next line, which comes with the next state.
    let paused = Command::new(OURS).current_dir(world.dir.path()).args(["ctl", "qmp", "pause"]).status();
    assert!(paused.unwrap().success());
    let output = watch.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(141), Vec::new()));
}

#[test]
fn a_watched_job_has_a_page() {
    let mut world = World::new();
    let mut watch = world.watch(&[OURS, "ctl", "qmp", "watch", "--report", "page.html"]);
    let mut output = BufReader::new(watch.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    world.client.execute("job-cancel", json!({"id": "m"})).unwrap();
    output.read_to_string(&mut String::new()).unwrap();
    assert_eq!(watch.wait().unwrap().code(), Some(1));
    let page = std::fs::read_to_string(world.dir.path().join("page.html")).unwrap();
    assert!(page.contains("<h1 class=\"bad\">Mirror interrupted after "), "{page}");
    assert!(page.contains("job m at qmp") && page.contains("<td>running</td>"), "{page}");
}

#[test]
fn a_page_of_a_job_that_goes_on_says_so() {
    let world = World::new();
    let mut watch = world.watch(&[OURS, "ctl", "qmp", "watch", "--report", "page.html"]);
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    Command::new("kill").args(["-INT", &watch.id().to_string()]).status().unwrap();
    assert_eq!(watch.wait().unwrap().code(), Some(130));
    let page = std::fs::read_to_string(world.dir.path().join("page.html")).unwrap();
    assert!(page.contains("<h1>Mirror was still running after "), "{page}");
}
