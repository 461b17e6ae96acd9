//! Signals, as flags to look at.
//!
//! The first signal that ends a program asks for an orderly end: the job is cancelled and its partial target
//! removed. Parents send several in a row (`timeout` to the process and to its group, systemd SIGTERM and
//! SIGHUP, the kernel and the shell when a terminal closes): those count as one. A further signal, a second
//! or more after the first, removes the partial target and ends the process at once. A signal that the
//! process was started with as ignored (`nohup`, a background job of a script) stays ignored.

use std::fs;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use blockmirror_block::sync::Mutex;
use blockmirror_ops::Resumable;
use signal_hook::SigId;
use signal_hook::consts::{SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGXFSZ};
use signal_hook::low_level::pipe;
use signal_hook::{flag, low_level};

use crate::failure::{Exit, Failure, Outcome};

/// The signals that ask for an end; of those that come together the first in this list gives the exit code.
/// SIGQUIT is not among them: it is how a process that hangs is made to dump core.
const ENDING: [i32; 6] = [SIGTERM, SIGINT, SIGUSR2, SIGALRM, SIGXCPU, SIGHUP];

/// Signals within this time come together.
const TOGETHER: Duration = Duration::from_millis(10);

/// From the first signal until another one ends the process at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// Watches for signals as long as it lives.
pub(crate) struct Interrupt {
    request: Arc<Request>,
    progress_wanted: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

/// What the thread that waits for signals shares with the command.
struct Request {
    /// The first signal that asked for an end; 0 before.
    signal: AtomicI32,
    /// Files to be removed when the process ends at once.
    ///
    /// Guards the list. Leaf lock: no I/O under it.
    partial: Mutex<Vec<PathBuf>>,
    /// Whether the next run can go on with what this one has copied; set if temporary files stay.
    resumable: OnceLock<Resumable>,
}

impl Interrupt {
    /// Starts watching.
    pub(crate) fn watch() -> Outcome<Self> {
        let mut watching = Self {
            request: Arc::new(Request {
                signal: AtomicI32::new(0),
                partial: Mutex::new(Vec::new()),
                resumable: OnceLock::new(),
            }),
            progress_wanted: Arc::new(AtomicBool::new(false)),
            handlers: Vec::new(),
        };
        watching.register().map_err(|e| Failure::failed(format_args!("watch signals: {e}")))?;
        Ok(watching)
    }

    fn register(&mut self) -> io::Result<()> {
        let (wake, handlers_end) = UnixStream::pair()?;
        let mut arrived = Vec::new();
        let ignored = Ignored::read();
        for signal in ENDING.into_iter().filter(|signal| !ignored.has(*signal)) {
            // In this order: the thread that reads the byte finds the flag set.
            let flag = Arc::new(AtomicBool::new(false));
            self.handlers.push(flag::register(signal, Arc::clone(&flag))?);
            self.handlers.push(pipe::register(signal, handlers_end.try_clone()?)?);
            arrived.push((signal, flag));
        }
        if !ignored.has(SIGUSR1) {
            self.handlers.push(flag::register(SIGUSR1, Arc::clone(&self.progress_wanted))?);
        }
        let request = Arc::clone(&self.request);
        // It ends when the handlers, and their end of the socket, are gone.
        thread::Builder::new().name("signals".into()).spawn(move || request.attend(wake, &arrived))?;
        Ok(())
    }

    /// Has `files` removed before a signal ends the process at once. A file that has another name by then
    /// stays.
    pub(crate) fn remove_at_end(&self, files: impl IntoIterator<Item = PathBuf>) {
        self.request.partial.lock().extend(files);
    }

    /// Has `files` stay, which were to be removed at the end.
    pub(crate) fn keep(&self, files: &[PathBuf]) {
        self.request.partial.lock().retain(|file| !files.contains(file));
    }

    /// A signal that ends the process at once leaves the temporary files of a copy that keeps a checkpoint.
    /// The exit code says whether the next run can go on with them.
    pub(crate) fn keeps(&self, resumable: Resumable) {
        // A command makes one copy.
        let _ = self.request.resumable.set(resumable);
    }

    /// Whether a signal asked for an end.
    pub(crate) fn requested(&self) -> bool {
        self.request.signal.load(Ordering::SeqCst) != 0
    }

    /// The exit code of a command that such a signal has ended.
    pub(crate) fn exit(&self) -> Exit {
        match self.request.signal.load(Ordering::SeqCst) {
            0 => Exit::Signal(SIGINT),
            signal => Exit::Signal(signal),
        }
    }

    /// Whether SIGUSR1 asked for a line of progress since the last call.
    pub(crate) fn progress_wanted(&self) -> bool {
        self.progress_wanted.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            low_level::unregister(handler);
        }
    }
}

impl Request {
    /// Waits for signals; `wake` gets a byte for each, after its flag in `arrived` is set.
    fn attend(&self, mut wake: UnixStream, arrived: &[(i32, Arc<AtomicBool>)]) {
        if wake.read_exact(&mut [0]).is_err() {
            return;
        }
        thread::sleep(TOGETHER);
        let first = arrived.iter().find(|(_, flag)| flag.load(Ordering::SeqCst));
        let first = first.map_or(SIGTERM, |(signal, _)| *signal);
        self.signal.store(first, Ordering::SeqCst);
        thread::sleep(PATIENCE);
        if drain(&mut wake).is_ok() && wake.read_exact(&mut [0]).is_ok() {
            self.remove_partial();
            low_level::exit(self.exit_at_once(first).code().into());
        }
    }

    fn exit_at_once(&self, signal: i32) -> Exit {
        match self.resumable.get().is_some_and(Resumable::get) {
            true => Exit::Resumable,
            false => Exit::Signal(signal),
        }
    }

    fn remove_partial(&self) {
        let files = std::mem::take(&mut *self.partial.lock());
        let (done, ended) = mpsc::channel();
        // A file system that hangs keeps this thread, not the process.
        let started = thread::Builder::new().spawn(move || {
            for file in files {
                let _ = fs::remove_file(file);
            }
            let _ = done.send(());
        });
        if started.is_ok() {
            let _ = ended.recv_timeout(PATIENCE);
        }
    }
}

/// Reads what has come by now. Fails if nothing more can come.
fn drain(wake: &mut UnixStream) -> io::Result<()> {
    wake.set_nonblocking(true)?;
    loop {
        match wake.read(&mut [0; 64]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return wake.set_nonblocking(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The signals that ask for an end and are not ignored.
pub(crate) fn ending() -> impl Iterator<Item = i32> {
    let ignored = Ignored::read();
    ENDING.into_iter().filter(move |signal| !ignored.has(*signal))
}

/// Keeps signals that are no reason to end from ending the process: SIGUSR1 asks for a line of progress,
/// which some commands print, and SIGXFSZ accompanies a write beyond the limit for file sizes, which fails by
/// itself.
pub(crate) fn survive() -> std::io::Result<()> {
    let (set, ignored) = (Arc::new(AtomicBool::new(false)), Ignored::read());
    for signal in [SIGUSR1, SIGXFSZ].into_iter().filter(|signal| !ignored.has(*signal)) {
        flag::register(signal, Arc::clone(&set))?;
    }
    Ok(())
}

/// The signals that the process ignores, which here means that it was started so: a bit for each, from the
/// lowest on.
#[derive(Clone, Copy)]
struct Ignored(u64);

impl Ignored {
    /// As the kernel says. Without `/proc` there is no telling.
    fn read() -> Self {
        Self::named(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    /// Those that a `/proc/PID/status` shows.
    fn named(status: &str) -> Self {
        let set = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        Self(set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0))
    }

    fn has(self, signal: i32) -> bool {
        (1..=64).contains(&signal) && self.0 >> (signal - 1) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy that differs was said to be kept, and a further signal removed it.
    #[test]
    fn a_file_that_is_to_be_kept_is_not_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, ranges) = (dir.path().join("kept"), dir.path().join("ranges"));
        fs::write(&kept, b"").unwrap();
        fs::write(&ranges, b"").unwrap();
        let interrupt = Interrupt::watch().unwrap();
        interrupt.remove_at_end([kept.clone(), ranges.clone()]);
        interrupt.keep(std::slice::from_ref(&kept));
        interrupt.request.remove_partial();
        assert!(kept.exists() && !ranges.exists());
    }

    #[test]
    fn the_set_of_ignored_signals_is_read() {
        let status = "Name:\tsh\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        let names = |signal| Ignored::named(status).has(signal);
        assert!(names(SIGHUP) && names(signal_hook::consts::SIGPIPE));
        assert!(!names(SIGINT) && !names(0));
        assert!(!Ignored::named("").has(SIGHUP) && !Ignored::named("SigIgn:\tx\n").has(SIGHUP));
    }
}
