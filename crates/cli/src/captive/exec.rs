//! The step between our process and a captive server: this same program, which says what a server of
//! systemd's socket activation is to know, and then becomes that server.
//!
//! Called by [`crate::run_here`] before anything else. It is a step of its own because `LISTEN_PID` is the
//! number of the server's process, which only that process knows before it is the server, and so is the
//! signal that it gets when its parent ends.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// The first word of such a command line. The number of the parent and the server's command follow.
pub(crate) const HIDDEN: &str = "--captive-exec";

/// The exit codes of shells, for a program that is not found and one that cannot be run.
const NOT_FOUND: u8 = 127;
const NOT_RUN: u8 = 126;

/// Becomes the server that `words` describe. Returns if they are another command line, or if that fails.
pub(crate) fn run(words: &[OsString]) -> Option<ExitCode> {
    if words.get(1)? != HIDDEN {
        return None;
    }
    let error = become_server(words);
    // The parent repeats it.
    eprintln!("it cannot be run: {error}");
    Some(ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUN }))
}

fn become_server(words: &[OsString]) -> io::Error {
    let (Some(parent), Some(program)) = (words.get(2), words.get(3)) else {
        return io::ErrorKind::InvalidInput.into();
    };
    // SIGTERM lets it close what it writes. It stays across the exec.
    if let Err(error) = set_parent_process_death_signal(Some(Signal::TERM)) {
        return error.into();
    }
    // A parent that ended before has sent no signal.
    let is_alive = getppid().is_some_and(|pid| *parent == *Pid::as_raw(Some(pid)).to_string());
    if !is_alive {
        return io::Error::other("the command has ended");
    }
    Command::new(program)
        .args(&words[4..])
        .env("LISTEN_PID", std::process::id().to_string())
        .env("LISTEN_FDS", "1")
        // libnbd's name for a socket without one.
        .env("LISTEN_FDNAMES", "unknown")
        // The service manager follows our process.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("LISTEN_PIDFDID")
        .exec()
}
