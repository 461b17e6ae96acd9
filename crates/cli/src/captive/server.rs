//! The process of a captive server: started with its socket, watched, and ended.
//!
//! It has a process group of its own, so that a key on the terminal does not end it before the command has
//! ended in order, and so that what it has started ends with it. What must hold: a `Server` that is dropped
//! has no process left in that group.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead, BufReader, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::sync::Mutex;
use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use signal_hook::consts::SIGTERM;
use tracing::info;

use super::HIDDEN;

/// The first descriptor of systemd's socket activation.
const FIRST: i32 = 3;
/// From the request to end until it is killed: of one that was written to, which may have much to write, and
/// of one that was read.
const PATIENCE_WRITTEN: Duration = Duration::from_secs(10);
const PATIENCE_READ: Duration = Duration::from_secs(2);
/// From the end of its sockets to the end of the process.
const DYING: Duration = Duration::from_secs(5);
/// From its end until what it has printed is known; another process may have its pipe.
const REST: Duration = Duration::from_secs(1);
/// How much of that is kept.
const LINES: usize = 8;
const LINE: u64 = 512;

pub(super) struct Server {
    child: Child,
    /// Readable when the process has ended.
    process: OwnedFd,
    group: Pid,
    last_words: LastWords,
    is_reaped: bool,
}

impl Server {
    /// Starts `command` with the socket `listener`, by way of this same program (`exec`).
    pub(super) fn start(command: &[OsString], listener: UnixListener) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let mut starting = Command::new("/proc/self/exe");
        starting.arg(HIDDEN).arg(std::process::id().to_string()).args(command);
        starting.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
        let socket = FdMapping { parent_fd: listener.into(), child_fd: FIRST };
        starting.fd_mappings(vec![socket]).map_err(io::Error::other)?;
        let last_words = LastWords::of(reader)?;
        let mut child = starting.spawn()?;
        // Our ends of the socket and of the pipe: they would keep both open when the server has gone.
        drop(starting);
        let group = Pid::from_child(&child);
        match pidfd_open(group, PidfdFlags::empty()) {
            Ok(process) => Ok(Self { child, process, group, last_words, is_reaped: false }),
            Err(error) => {
                let _ = kill_process_group(group, Signal::KILL);
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    /// A descriptor that is readable when the process has ended.
    pub(super) fn process(&self) -> io::Result<OwnedFd> {
        self.process.try_clone()
    }

    /// Ends it, unless it has ended; `is_written` if the command wrote to it. After a failure, `has_failed`,
    /// one that is about to end is waited for: its end may be the cause.
    pub(super) fn stop(mut self, is_written: bool, has_failed: bool) -> Ended {
        let is_dying = has_failed && self.has_no_socket();
        let by_itself = self.ends_within(if is_dying { DYING } else { Duration::ZERO });
        let patience = if is_written { PATIENCE_WRITTEN } else { PATIENCE_READ };
        let deadline = Instant::now() + patience;
        let left = || deadline.saturating_duration_since(Instant::now());
        // What it has started it may need to end in order; so that is asked after it.
        let has_ended = by_itself || {
            let _ = kill_process(self.group, Signal::TERM);
            self.ends_within(left())
        };
        let all_ended = has_ended && {
            let _ = kill_process_group(self.group, Signal::TERM);
            self.last_words.are_over_within(left())
        };
        let killed_after = (!all_ended).then_some(patience);
        let status = self.reap();
        let words = self.last_words.all();
        Ended { status, is_written, by_itself, killed_after, words }
    }

    /// Whether the process has no socket any more: the kernel closes what it has open a moment before it has
    /// ended.
    fn has_no_socket(&self) -> bool {
        let socket = format!("/proc/{}/fd/{FIRST}", self.child.id());
        std::fs::symlink_metadata(socket).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return ready > 0,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Kills what is left of its group, whose number is its own as long as it is not reaped.
    fn reap(&mut self) -> io::Result<ExitStatus> {
        let _ = kill_process_group(self.group, Signal::KILL);
        self.is_reaped = true;
        self.child.wait()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.is_reaped {
            let _ = self.reap();
        }
    }
}

/// How a server has ended, in words that follow its name.
#[derive(Debug)]
pub(super) struct Ended {
    status: io::Result<ExitStatus>,
    is_written: bool,
    by_itself: bool,
    /// How long it was waited for before it was killed.
    killed_after: Option<Duration>,
    words: Vec<String>,
}

impl Ended {
    /// Whether it has ended as a server does that is no longer needed. A signal says nothing about what it
    /// had still to write.
    pub(super) fn is_well(&self) -> bool {
        let Ok(status) = &self.status else { return false };
        let by_signal = status.signal() == Some(SIGTERM) || status.code() == Some(128 + SIGTERM);
        self.killed_after.is_none()
            && (status.success() || (by_signal && !self.by_itself && !self.is_written))
    }

    /// Whether it had ended before it was asked to.
    pub(super) fn is_by_itself(&self) -> bool {
        self.by_itself
    }

    /// The last lines that it printed.
    pub(super) fn words(&self) -> &[String] {
        &self.words
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.killed_after, &self.status) {
            (Some(limit), _) => write!(
                f,
                "did not end within {limit:?} of SIGTERM, with all that it started, and was killed"
            )?,
            (None, Err(error)) => write!(f, "cannot be waited for: {error}")?,
            (None, Ok(status)) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "exited with status {code}")?,
                (None, Some(signal)) => write!(f, "was ended by signal {signal}")?,
                (None, None) => write!(f, "ended: {status}")?,
            },
        }
        self.words.last().map_or(Ok(()), |line| write!(f, ": {line}"))
    }
}

/// What a server prints: each line is logged, and the last ones are kept.
struct LastWords {
    /// Guards the lines. Leaf lock: no I/O under it.
    lines: Arc<Mutex<VecDeque<String>>>,
    at_end: mpsc::Receiver<()>,
}

impl LastWords {
    fn of(pipe: PipeReader) -> io::Result<Self> {
        let (ended, at_end) = mpsc::channel();
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&lines);
        thread::Builder::new().name("captive".into()).spawn(move || {
            let mut pipe = BufReader::new(pipe);
            while let Some(line) = next_line(&mut pipe) {
                info!("captive server: {line}");
                let mut kept = kept.lock();
                kept.push_back(line);
                if kept.len() > LINES {
                    kept.pop_front();
                }
            }
            // The other end may have given up.
            let _ = ended.send(());
        })?;
        Ok(Self { lines, at_end })
    }

    /// Whether no process has the other end of the pipe any more, at the latest after `limit`.
    fn are_over_within(&self, limit: Duration) -> bool {
        // The thread that reads sends nothing else than its end.
        !matches!(self.at_end.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Timeout))
    }

    /// All that are kept, when the server has ended.
    fn all(&self) -> Vec<String> {
        self.are_over_within(REST);
        self.lines.lock().drain(..).collect()
    }
}

/// The next line that is not empty, or a part of one that is long.
fn next_line(pipe: &mut BufReader<PipeReader>) -> Option<String> {
    loop {
        let mut line = Vec::new();
        let read = pipe.by_ref().take(LINE).read_until(b'\n', &mut line);
        if line.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(line.trim_ascii_end()).into_owned();
        if !text.is_empty() {
            return Some(text);
        }
        read.ok()?;
    }
}
