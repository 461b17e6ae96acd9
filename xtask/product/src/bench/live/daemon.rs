//! A storage daemon under the live benchmark: any program that takes `qemu-storage-daemon`'s arguments and
//! speaks its QMP. The guest comes over NBD.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use serde_json::{Value, json};

use super::guest::Writer;
use super::nbd::Connection;
use super::{ALL_MODES, Ask, Mode, State, Subject};

const EXPORT: &str = "disk";
const QEMU_MODES: [Mode; 2] = [Mode::Background, Mode::WriteBlocking];
/// Longest wait for the daemon to carry out a command.
const PATIENCE: Duration = Duration::from_secs(20);

/// A program that is such a daemon.
pub(in crate::bench) struct Program {
    pub(in crate::bench) name: String,
    /// The program and what comes before `qemu-storage-daemon`'s arguments.
    pub(in crate::bench) words: Vec<OsString>,
    pub(in crate::bench) modes: &'static [Mode],
}

impl Program {
    /// QEMU's own.
    pub(in crate::bench) fn qemu() -> Self {
        Self::new(vec!["qemu-storage-daemon".into()], "qemu-storage-daemon".into(), &QEMU_MODES)
    }

    /// `blockmirror daemon`, which this very program holds.
    pub(in crate::bench) fn ours() -> Outcome<Self> {
        let words = vec![std::env::current_exe()?.into(), "daemon".into()];
        Ok(Self::new(words, "daemon".into(), &ALL_MODES))
    }

    /// Another build of ours, or of this program.
    pub(in crate::bench) fn ours_at(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self::new(vec![path.into(), "daemon".into()], name, &ALL_MODES)
    }

    /// Any other.
    pub(in crate::bench) fn other(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self::new(vec![path.into()], name, &QEMU_MODES)
    }

    fn new(words: Vec<OsString>, name: String, modes: &'static [Mode]) -> Self {
        Self { name, words, modes }
    }
}

pub(in crate::bench) struct Daemon {
    modes: &'static [Mode],
    child: Child,
    qmp: Qmp,
    socket: PathBuf,
    target: PathBuf,
    log: PathBuf,
    len: u64,
    qemu: Qemu,
}

impl Daemon {
    pub(in crate::bench) fn start(
        program: &Program,
        qemu: Qemu,
        source: &Path,
        len: u64,
        dir: &Path,
    ) -> Outcome<Self> {
        let (socket, monitor) = (dir.join("nbd.sock"), dir.join("qmp.sock"));
        for old in [&socket, &monitor] {
            let _ = std::fs::remove_file(old);
        }
        let (first, rest) = program.words.split_first().ok_or("no program")?;
        let child = Command::new(first)
            .args(rest)
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=source-file,filename={}", source.display()))
            .args(["--blockdev", "driver=qcow2,node-name=source,file=source-file"])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .args(["--export", &format!("type=nbd,id=export,node-name=source,name={EXPORT},writable=on")])
            .arg("--chardev")
            .arg(format!("socket,id=monitor,path={},server=on,wait=off", monitor.display()))
            .args(["--monitor", "chardev=monitor"])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| format!("{}: {e}", program.name))?;
        let qmp = Qmp::connect(&monitor)?;
        let (target, log) = (dir.join("target.qcow2"), dir.join("mirror.log"));
        Ok(Self { modes: program.modes, child, qmp, socket, target, log, len, qemu })
    }

    /// Where the disk is to be found.
    pub(in crate::bench) fn uri(&self) -> String {
        format!("nbd+unix:///{EXPORT}?socket={}", self.socket.display())
    }

    fn job(&mut self) -> Outcome<Option<Value>> {
        let jobs = self.qmp.execute("query-jobs", json!({}))?;
        Ok(jobs.as_array().and_then(|jobs| jobs.first()).cloned())
    }
}

impl Subject for Daemon {
    fn writer(&self) -> Outcome<Box<dyn Writer>> {
        Ok(Box::new(Connection::open(&self.socket, EXPORT)?))
    }

    fn modes(&self) -> &'static [Mode] {
        self.modes
    }

    fn start(&mut self, ask: Ask) -> Outcome {
        let name = self.target.display().to_string();
        self.qemu.img(["create", "-q", "-f", "qcow2", &name, &self.len.to_string()])?;
        let node =
            json!({"driver": "qcow2", "node-name": "target", "file": {"driver": "file", "filename": name}});
        self.qmp.execute("blockdev-add", node)?;
        let mode = match ask.mode {
            Mode::Background => "background",
            Mode::WriteBlocking => "write-blocking",
            Mode::Auto => "auto",
        };
        let mut job = json!({
            "job-id": "job", "device": "source", "target": "target", "sync": "full",
            "granularity": ask.granularity, "copy-mode": mode, "speed": ask.speed,
        });
        if ask.log {
            job["x-log"] = self.log.display().to_string().into();
        }
        self.qmp.execute("blockdev-mirror", job).map(drop)
    }

    fn state(&mut self) -> Outcome<State> {
        let job = self.job()?.ok_or("the job is gone")?;
        let figure = |name: &str| job[name].as_u64().unwrap_or(0);
        Ok(State {
            ready: job["status"] == "ready",
            offset: figure("current-progress"),
            len: figure("total-progress"),
        })
    }

    fn stop(&mut self) -> Outcome {
        self.qmp.execute("block-job-cancel", json!({"device": "job", "force": true}))?;
        let until = Instant::now() + PATIENCE;
        while self.job()?.is_some() {
            if Instant::now() > until {
                return Err("the job does not go".into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        self.qmp.execute("blockdev-del", json!({"node-name": "target"}))?;
        // A log that has ended is refused.
        let _ = std::fs::remove_file(&self.log);
        Ok(std::fs::remove_file(&self.target)?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have gone by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A monitor. Events are dropped.
struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Qmp {
    fn connect(socket: &Path) -> Outcome<Self> {
        let until = Instant::now() + PATIENCE;
        let output = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    // A program that hangs must not hang the benchmark.
                    stream.set_read_timeout(Some(PATIENCE))?;
                    break stream;
                }
                Err(error) if Instant::now() > until => {
                    return Err(format!("{}: {error}", socket.display()).into());
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut qmp = Self { input: BufReader::new(output.try_clone()?), output };
        qmp.input.read_line(&mut String::new())?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.output.write_all(text.as_bytes())?;
        loop {
            let mut line = String::new();
            if self.input.read_line(&mut line)? == 0 {
                return Err(format!("{command}: the daemon has hung up").into());
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("{command}: {error}").into());
            }
        }
    }
}
