//! Captive servers: an image named `[ PROGRAM ARGUMENT... ]` is the export of an NBD server that runs for
//! this command alone, and is connected to by systemd's socket activation.
//!
//! [`Captives::take`] puts the URI of a socket in place of each bracketed command before the command line is
//! parsed; [`Captives::check`] refuses one that stands where no image is named; [`Captives::start`] starts
//! the servers; [`Captives::finish`] ends them, and says what became of them. Called by [`crate::run`].
//!
//! What must hold: the command comes from the command line and from nowhere else, and its words reach the
//! program as they are, without a shell. No server outlives a command that ends, and one whose command is
//! killed gets SIGTERM. A server's socket never has a name in a file system while it runs.

mod exec;
mod images;
mod server;
mod socket;
mod via;
mod words;

use std::ffi::OsString;
use std::fmt::{self, Display};
use std::path::Path;

use crate::args::Command;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::quote::{in_brackets, shell_word};

use self::server::{Ended, Server};
use self::socket::Socket;

pub(crate) use exec::{HIDDEN, run as exec};
pub(crate) use via::{note_content, note_guesses};

/// The servers of one command line.
#[derive(Default)]
pub(crate) struct Captives(Vec<Captive>);

/// One of them.
struct Captive {
    /// The program and its arguments.
    command: Vec<OsString>,
    socket: Socket,
    /// Whether the command names it as an image, and whether it writes to that.
    is_named: bool,
    is_written: bool,
    server: Option<Server>,
}

impl Captives {
    /// Takes the bracketed commands out of a command line, `words`; the URIs of their sockets stand there
    /// instead.
    pub(crate) fn take(words: &[OsString]) -> Outcome<(Vec<OsString>, Self)> {
        let mut captives = Self::default();
        let mut left = Vec::with_capacity(words.len());
        for word in words::parse(words).map_err(Failure::usage)? {
            left.push(match word {
                words::Word::Plain(word) => word,
                words::Word::Server { mut before, command } => {
                    before.push(captives.add(command)?);
                    before
                }
            });
        }
        Ok((left, captives))
    }

    /// Adds the server that `command` runs; its URI.
    fn add(&mut self, command: Vec<OsString>) -> Outcome<OsString> {
        let socket = Socket::new()
            .map_err(|error| Failure::failed(format_args!("{}: listen: {error}", in_brackets(&command))))?;
        let uri = socket.uri();
        self.0.push(Captive { command, socket, is_named: false, is_written: false, server: None });
        Ok(uri.into())
    }

    /// Has qemu-nbd serve the images that `command` reads, where it asks for that.
    pub(crate) fn via(&mut self, console: &mut Console<'_>, command: &mut Command) -> Outcome<()> {
        via::settle(console, command, &mut |words| self.add(words))
    }

    /// What to print in place of the URI of each socket, which leads nowhere outside of this process.
    pub(crate) fn names(&self) -> Vec<(String, String)> {
        let mut names: Vec<_> =
            self.0.iter().map(|captive| (captive.socket.uri(), in_brackets(&captive.command))).collect();
        // One may begin with another.
        names.sort_by_key(|(uri, _)| std::cmp::Reverse(uri.len()));
        names
    }

    /// Fails if a server stands where `command` names no image, or could not be known again.
    pub(crate) fn check(&mut self, command: &mut Command) -> Outcome<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        for (path, is_written) in images::named(command) {
            let captive = self.0.iter_mut().find(|captive| path == Path::new(&captive.socket.uri()));
            if let Some(captive) = captive {
                captive.is_written |= is_written;
                captive.is_named = true;
            }
        }
        if let Some(captive) = self.0.iter().find(|captive| !captive.is_named) {
            return Err(Failure::usage(format_args!("{captive}: no image is named there")));
        }
        let copy = match command {
            Command::Mirror(args) => &mut args.copy,
            Command::Convert(args) => &mut args.copy,
            _ => return Ok(()),
        };
        // What the address of an export is to others, its command would be to a later run; it could name
        // anything.
        let asked = &mut copy.checkpoint;
        asked.only_if_named = true;
        let resumes = asked.restart || asked.resume.is_some() || asked.checkpoint_interval.is_some();
        match resumes || asked.checkpoint.is_some() {
            true => Err(Failure::usage(
                "--checkpoint: a later run could not know a captive server again; serve the image by itself",
            )),
            false => Ok(()),
        }
    }

    /// Starts the servers, by way of the program that this process runs: `console` says whether that is this
    /// one.
    pub(crate) fn start(&mut self, console: &mut Console<'_>) -> Outcome<()> {
        for captive in &mut self.0 {
            let failed =
                |why: &dyn Display| Failure::failed(format_args!("{}: {why}", in_brackets(&captive.command)));
            if !console.is_program {
                return Err(failed(&"only the program itself starts a captive server"));
            }
            let Some(listener) = captive.socket.hand_over() else { continue };
            let server = Server::start(&captive.command, listener).map_err(|error| failed(&error))?;
            console.servers.push(server.process().map_err(|error| failed(&error))?);
            captive.server = Some(server);
        }
        Ok(())
    }

    /// Ends the servers of a command that has come to `outcome`. One that ended by itself with an error is
    /// named in the failure; one that was written to and did not end well is a failure itself.
    pub(crate) fn finish(self, console: &mut Console<'_>, mut outcome: Outcome) -> Outcome {
        for Captive { command, is_written, server, .. } in self.0 {
            let Some(server) = server else { continue };
            let ended = server.stop(is_written, outcome.is_err());
            outcome = settle(console, &command, is_written, &ended, outcome);
        }
        outcome
    }
}

/// What `outcome` becomes when the server that `command` ran has `ended`.
fn settle(
    console: &mut Console<'_>,
    command: &[OsString],
    is_written: bool,
    ended: &Ended,
    outcome: Outcome,
) -> Outcome {
    let program = command.first().map(|word| shell_word(&word.to_string_lossy())).unwrap_or_default();
    if matches!(&outcome, Err(failure) if is_asked_for(failure.exit)) {
        return outcome;
    }
    if !ended.is_well() {
        let said = format!("the captive server {program} {ended}");
        match outcome {
            Err(failure) => {
                let message = match &failure.message {
                    Some(message) => format!("{message}; {said}"),
                    None => said,
                };
                return Err(Failure { message: Some(message), ..failure });
            }
            Ok(_) if is_written => {
                return Err(Failure::failed(format_args!("{said}; what was written to it may be lost")));
            }
            Ok(exit) => {
                console.note(said);
                return Ok(exit);
            }
        }
    }
    let has_failed = outcome.is_err();
    let of_a_disk = matches!(&outcome, Err(failure) if failure.detail.is_some());
    // Of a command that ended well, a server may say that a connection has ended.
    let wanted = |line: &&String| has_failed || line.to_ascii_lowercase().contains("warning");
    for line in ended.words().iter().filter(wanted) {
        match line.starts_with(&format!("{program}:")) {
            true => console.note(line),
            false => console.note(format_args!("{program}: {line}")),
        }
    }
    if of_a_disk && ended.is_by_itself() {
        console.note(format_args!("the captive server {program} had ended before the command did"));
    }
    outcome
}

/// Whether a command that ends so has met no failure of a server: a signal came, or its words make no sense.
fn is_asked_for(exit: Exit) -> bool {
    matches!(exit, Exit::Signal(_) | Exit::Resumable | Exit::Usage)
}

impl Display for Captive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&in_brackets(&self.command))
    }
}

/// Whether `path` is the URI of a captive server. What such a server exports is a disk, unless a format is
/// given.
pub(crate) fn is_captive(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(socket::URI.as_bytes())
}
