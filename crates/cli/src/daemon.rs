//! `blockmirror daemon`: the process around the daemon. Signals, the way to the background.
//!
//! To go to the background the program starts itself anew: the child has a session of its own and says on its
//! standard output when everything is set up, and only then does the parent end.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockmirror_daemon::{Daemon, JobSummary, Startup};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::low_level::pipe;

use crate::args::DaemonArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::ending;
use crate::lock_policy;
use crate::notify::Notifier;
use crate::pid_file::PidFile;

/// What the child in the background says when it is ready.
const READY: &[u8] = b"ready\n";
/// The most files that a daemon is allowed to open, where the system allows more.
const MOST_FILES: u64 = 1 << 20;

pub(crate) fn run(console: &mut Console<'_>, args: &DaemonArgs) -> Outcome {
    if args.daemonize && !args.background {
        return go_to_background();
    }
    if args.background {
        // Fails only if the process leads a session already.
        let _ = rustix::process::setsid();
    }
    raise_file_limit();
    let pid_file = args.pidfile.as_deref().map(PidFile::check).transpose()?;
    let daemon = Daemon::with_readable(args.allowed.clone(), lock_policy::lasting_directories()?);
    quit_on_signals(&daemon).map_err(|e| Failure::failed(format!("cannot handle signals: {e}")))?;
    let mut startup = Startup::default();
    startup.objects.clone_from(&args.objects);
    startup.blockdevs.clone_from(&args.blockdevs);
    startup.chardevs.clone_from(&args.chardevs);
    startup.nbd_server.clone_from(&args.nbd_server);
    startup.exports.clone_from(&args.exports);
    startup.monitors.clone_from(&args.monitors);
    startup.apply(&daemon).map_err(|e| Failure::failed(e.to_string()))?;
    pid_file.as_ref().map_or(Ok(()), PidFile::write)?;
    if args.background {
        console.print(&String::from_utf8_lossy(READY))?;
        leave_terminal().map_err(|e| Failure::failed(format!("cannot leave the terminal: {e}")))?;
    }
    // Only a process that got this far is ready, and only the parent of one in the background ends here.
    let notifying = console.manager.take().and_then(|manager| notify(manager, &daemon, args.background).ok());
    daemon.run();
    if let Some(notifying) = notifying {
        // It ends with the daemon. That it panicked is no reason to fail.
        let _ = notifying.join();
    }
    if let Some(file) = pid_file {
        file.remove();
    }
    match daemon.late_failure() {
        Some(error) => Err(Failure::failed(error.to_string())),
        None => Ok(Exit::Done),
    }
}

/// Lets the daemon open as many files as the system allows it to: each node has one or two, and each mirror
/// two nodes, so that the usual limit of 1024 ends at some 400 of them.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = maximum.unwrap_or(MOST_FILES).min(MOST_FILES);
    if current.is_some_and(|current| current < most) {
        // With the limit that it has it can do less, which it says then.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum });
    }
}

/// How often jobs are looked at for the service manager.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Jobs that the status names.
const MOST_NAMED: usize = 4;

/// Sends the service manager that the daemon is ready, what its jobs do, and that it ends.
fn notify(
    mut manager: Notifier,
    daemon: &Arc<Daemon>,
    background: bool,
) -> std::io::Result<thread::JoinHandle<()>> {
    let daemon = Arc::clone(daemon);
    manager.ready(background);
    thread::Builder::new().name("notify".into()).spawn(move || {
        loop {
            manager.status(&status(&daemon.jobs()));
            if daemon.quits_within(STATUS_INTERVAL) {
                return manager.stopping();
            }
        }
    })
}

/// The jobs on one line.
fn status(jobs: &[JobSummary]) -> String {
    if jobs.is_empty() {
        return "no jobs".to_owned();
    }
    let named = jobs.iter().take(MOST_NAMED).map(|job| {
        let percent = if job.total == 0 { 100.0 } else { job.done as f64 * 100.0 / job.total as f64 };
        format!("{}: {} {} {}%", job.id, job.kind, job.state, percent as u64)
    });
    let named = named.collect::<Vec<_>>().join(", ");
    match jobs.len().saturating_sub(MOST_NAMED) {
        0 => named,
        more => format!("{named}, and {more} more"),
    }
}

/// The parent's part: starts the child, waits until it is ready or has failed.
fn go_to_background() -> Outcome {
    let failed = |e: std::io::Error| Failure::failed(format!("cannot go to the background: {e}"));
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .arg("--background")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = Vec::new();
    if let Some(stdout) = &mut child.stdout {
        // Until it is ready, or gone.
        stdout.take(READY.len() as u64).read_to_end(&mut said).map_err(failed)?;
    }
    if said == READY {
        return Ok(Exit::Done);
    }
    let status = child.wait().map_err(failed)?;
    match status.signal() {
        // It has said why itself.
        None => Err(Failure { exit: Exit::Failed, message: None, in_qemu: None, detail: None }),
        Some(signal) => {
            Err(Failure::failed(format!("the process in the background died of signal {signal}")))
        }
    }
}

/// Releases everything that the terminal, or the parent process, may want to close or unmount.
fn leave_terminal() -> std::io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    std::env::set_current_dir("/")
}

fn quit_on_signals(daemon: &Arc<Daemon>) -> std::io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    for signal in ending() {
        pipe::register(signal, theirs.try_clone()?)?;
    }
    let daemon = Arc::clone(daemon);
    thread::Builder::new().name("signals".into()).spawn(move || {
        // One byte a signal. The other end stays open as long as the process lives.
        let mut byte = [0];
        while ours.read_exact(&mut byte).is_ok() {
            daemon.quit();
        }
    })?;
    Ok(())
}
