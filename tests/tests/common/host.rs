//! A daemon in a process of its own, perhaps in a network namespace of its own, and a monitor of it.
//!
//! The process is the test program itself: the ignored test [`daemon_process`] runs the daemon that its
//! environment names.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_nbd::{Client, ClientOptions, NbdUri};
use serde_json::{Value, json};

/// Nothing here takes longer, on a machine that works at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Holds the arguments of the daemon, as JSON.
const OPTIONS: &str = "BLOCKMIRROR_TEST_DAEMON";

/// Runs the daemon that the environment names until it ends.
#[test]
#[ignore = "the process of a daemon that the tests start"]
fn daemon_process() {
    let Ok(given) = std::env::var(OPTIONS) else { return };
    let words: Vec<String> = serde_json::from_str(&given).unwrap();
    let all = ["blockmirror".to_owned(), "daemon".to_owned()].into_iter().chain(words);
    let code = blockmirror_cli::run_here(all);
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

/// A daemon that runs. Killed when dropped.
pub(crate) struct Host {
    name: String,
    dir: PathBuf,
    namespace: Option<String>,
    words: Vec<String>,
    child: Child,
    lines: BufReader<UnixStream>,
    /// Events that were not waited for yet.
    pub(crate) events: Vec<Value>,
}

impl Host {
    /// Starts `blockmirror daemon` with `words` and a monitor. Its sockets and its output lie in `dir` and
    /// are called after `name`.
    pub(crate) fn start(dir: &Path, name: &str, namespace: Option<&str>, words: &[String]) -> Self {
        let words = words.to_vec();
        let namespace = namespace.map(str::to_owned);
        let (child, lines) = spawn(dir, name, namespace.as_deref(), &words);
        let (name, dir) = (name.to_owned(), dir.to_owned());
        let mut host = Self { name, dir, namespace, words, child, lines, events: Vec::new() };
        host.greet();
        host
    }

    fn greet(&mut self) {
        self.line();
        self.must("qmp_capabilities", json!({}));
    }

    /// Ends it as a power cut would: no connection is closed by the protocol.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again as it was started, after it was killed.
    pub(crate) fn restart(&mut self) {
        (self.child, self.lines) = spawn(&self.dir, &self.name, self.namespace.as_deref(), &self.words);
        self.events.clear();
        self.greet();
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        let log = || fs::read_to_string(self.dir.join(format!("{}.log", self.name))).unwrap_or_default();
        assert!(read.is_ok_and(|n| n != 0), "{}: no answer in time: {}", self.name, log());
        serde_json::from_str(&line).unwrap()
    }

    /// Gives a command and returns its answer, whatever that is.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        self.lines.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push(line);
        }
    }

    /// Gives a command that must succeed.
    pub(crate) fn must(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        answer.get("return").cloned().unwrap_or_else(|| panic!("{}: {command}: {answer}", self.name))
    }

    /// Waits for an event; those before it are dropped.
    pub(crate) fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let next = if self.events.is_empty() { self.line() } else { self.events.remove(0) };
            if next["event"] == event {
                return next["data"].clone();
            }
            let failed = next["event"] == "BLOCK_JOB_COMPLETED" && next["data"].get("error").is_some();
            assert!(!failed, "{}: waiting for {event}: {next}", self.name);
        }
    }

    /// Whether such an event has come that was not waited for.
    pub(crate) fn has_heard(&mut self, event: &str) -> bool {
        self.must("query-version", json!({}));
        self.events.iter().any(|e| e["event"] == event)
    }

    /// What `query-block-jobs` says of the only job.
    pub(crate) fn job(&mut self) -> Value {
        let jobs = self.must("query-block-jobs", json!({}));
        assert_eq!(jobs.as_array().map(Vec::len), Some(1), "{jobs}");
        jobs[0].clone()
    }

    /// Waits until the only job is as `reached` wants it.
    pub(crate) fn wait_until(&mut self, mut reached: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let job = self.job();
            if reached(&job) {
                return job;
            }
            assert!(Instant::now() < deadline, "{}: {job}", self.name);
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A disk that it exports on the socket `NAME.nbd`.
    pub(crate) fn open(&self, export: &str) -> Client {
        let uri = NbdUri::unix(self.nbd_socket(), export);
        ClientOptions::new(uri).writable(true).open().unwrap()
    }

    /// Where it serves NBD if it was started with [`nbd_server`].
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        nbd_socket(&self.dir, &self.name)
    }

    /// Ends it as asked, and returns how long that took.
    pub(crate) fn quit(mut self) -> Duration {
        let start = Instant::now();
        self.must("quit", json!({}));
        self.ended(start)
    }

    /// Ends it by SIGTERM, and returns how long that took.
    pub(crate) fn terminate(mut self) -> Duration {
        let start = Instant::now();
        let sent = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().unwrap();
        assert!(sent.success());
        self.ended(start)
    }

    fn ended(&mut self, start: Instant) -> Duration {
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{}: {status}", self.name);
                return start.elapsed();
            }
            assert!(start.elapsed() < PATIENCE, "{} does not end", self.name);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nbd_socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.nbd"))
}

/// The option with which the daemon `name` serves NBD on a socket in `dir`.
pub(crate) fn nbd_server(dir: &Path, name: &str) -> [String; 2] {
    let path = nbd_socket(dir, name);
    ["--nbd-server".into(), format!("addr.type=unix,addr.path={}", path.display())]
}

/// The option with which a daemon has `image` as the node `node`.
pub(crate) fn image(node: &str, format: &str, image: &Path) -> [String; 2] {
    let file = image.display();
    let text =
        format!("driver={format},node-name={node},discard=unmap,file.driver=file,file.filename={file}");
    ["--blockdev".into(), text]
}

/// The option with which a daemon exports the node `node` as `name`, to be written.
pub(crate) fn export(node: &str, name: &str) -> [String; 2] {
    ["--export".into(), format!("nbd,id={name},node-name={node},name={name},writable=on")]
}

fn spawn(
    dir: &Path,
    name: &str,
    namespace: Option<&str>,
    words: &[String],
) -> (Child, BufReader<UnixStream>) {
    let socket = dir.join(format!("{name}.qmp"));
    let mut all = words.to_vec();
    all.extend([
        "--chardev".into(),
        format!("socket,id=qmp,path={},server=on,wait=off", socket.display()),
        "--monitor".into(),
        "chardev=qmp".into(),
    ]);
    for stale in [&socket, &nbd_socket(dir, name)] {
        let _ = fs::remove_file(stale);
    }
    let program = std::env::current_exe().unwrap();
    let mut command = match namespace {
        Some(namespace) => {
            let mut ip = Command::new("ip");
            ip.args(["netns", "exec", namespace]).arg(program);
            ip
        }
        None => Command::new(program),
    };
    let log = File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).unwrap();
    let mut child = command
        .args(["--exact", "common::host::daemon_process", "--ignored", "--nocapture"])
        .env(OPTIONS, json!(all).to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        if let Ok(stream) = UnixStream::connect(&socket) {
            break stream;
        }
        if let Some(status) = child.try_wait().unwrap() {
            let log = fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
            panic!("{name} {words:?} ended: {status}: {log}");
        }
        assert!(Instant::now() < deadline, "{name} does not listen");
        thread::sleep(Duration::from_millis(5));
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (child, BufReader::new(stream))
}
