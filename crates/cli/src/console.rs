//! Where a command prints: results to one stream, everything else to the other.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use crate::failure::{Failure, Outcome, one_line};

/// The two streams, and whether somebody sits in front of them.
pub(crate) struct Console<'a> {
    /// Results.
    pub(crate) out: &'a mut dyn Write,
    /// Errors, notes and progress.
    pub(crate) err: &'a mut dyn Write,
    /// Whether `err` is a terminal.
    pub(crate) is_terminal: bool,
    /// Whether `out` is one.
    pub(crate) out_is_terminal: bool,
    /// Whether a question on `err` can be answered on the standard input.
    pub(crate) can_ask: bool,
}

impl<'a> Console<'a> {
    /// Streams with nobody in front of them.
    pub(crate) fn new(out: &'a mut dyn Write, err: &'a mut dyn Write) -> Self {
        Self { out, err, is_terminal: false, out_is_terminal: false, can_ask: false }
    }

    /// The standard streams of the process.
    pub(crate) fn standard(out: &'a mut io::Stdout, err: &'a mut io::Stderr) -> Self {
        let is_terminal = err.is_terminal();
        let out_is_terminal = out.is_terminal();
        Self { out, err, is_terminal, out_is_terminal, can_ask: is_terminal && io::stdin().is_terminal() }
    }

    /// Writes a result.
    pub(crate) fn print(&mut self, text: &str) -> Outcome<()> {
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).map_err(|e| Failure::output(&e))
    }

    /// Writes what a command has done. What is done does not depend on whether anybody can read that: a failure is
    /// at most noted.
    pub(crate) fn report(&mut self, text: &str) {
        if let Err(Failure { message: Some(message), .. }) = self.print(text) {
            self.note(message);
        }
    }

    /// Tells what does not stop the command.
    pub(crate) fn note(&mut self, what: impl Display) {
        self.complain(format_args!("note: {what}"));
    }

    /// Writes one line to the people. If that fails there is nobody left to tell.
    pub(crate) fn complain(&mut self, what: impl Display) {
        let _ = writeln!(self.err, "blockmirror: {}", one_line(&what.to_string()));
        let _ = self.err.flush();
    }
}
