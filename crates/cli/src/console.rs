//! Where a command prints: results to one stream, everything else to the other.
//!
//! What must hold: nothing is printed into a file that the command writes. A standard stream may lead there
//! (`convert disk /dev/stdout > copy`, `convert disk copy > copy`).

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::os::fd::OwnedFd;

use blockmirror_image::FileId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::HELP_WIDTH;
use crate::failure::{Failure, Outcome, object, remark};
use crate::log;
use crate::notify::Notifier;
use crate::progress::{Lines, Phase, Reading};
use crate::voice::{Own, Voice};

/// The two streams, whether they are interactive, and whose words are written to them.
pub(crate) struct Console<'a> {
    /// The words.
    pub(crate) voice: &'static dyn Voice,
    /// Results.
    pub(crate) out: Stream<'a>,
    /// Errors, notes and progress.
    pub(crate) err: Stream<'a>,
    /// Whether `err` is a terminal.
    pub(crate) is_terminal: bool,
    /// Whether `out` is one.
    pub(crate) out_is_terminal: bool,
    /// Whether a question on `err` can be answered on the standard input.
    pub(crate) can_ask: bool,
    /// Whether what is written to `err` for people is an object a line (`--output=json`).
    pub(crate) as_json: bool,
    /// Whether the process is there for the command alone, which may confine it.
    pub(crate) owns_process: bool,
    /// Whether the program that this process runs is this one, with these very words.
    pub(crate) is_program: bool,
    /// The captive servers that run: each is readable when it has ended.
    pub(crate) servers: Vec<OwnedFd>,
    /// With `--progress=json` all that is written to `err`.
    lines: Option<Lines>,
    /// What is printed in place of names that mean nothing outside of this process.
    pub(crate) shown_names: Vec<(String, String)>,
    /// The service manager that follows this process, if one does.
    pub(crate) manager: Option<Notifier>,
}

/// One of the two streams.
pub(crate) struct Stream<'a> {
    to: &'a mut dyn Write,
    /// The file that it leads to, if it is one of the process's own streams.
    file: Option<FileId>,
    /// Whether that file is written by the command: then nothing is printed.
    silent: bool,
}

impl<'a> Stream<'a> {
    fn new(to: &'a mut dyn Write, file: Option<FileId>) -> Self {
        Self { to, file, silent: false }
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.silent { Ok(buf.len()) } else { self.to.write(buf) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl<'a> Console<'a> {
    /// Streams that are not interactive.
    pub(crate) fn new(out: &'a mut dyn Write, err: &'a mut dyn Write) -> Self {
        let (out, err) = (Stream::new(out, None), Stream::new(err, None));
        Self {
            voice: &Own,
            out,
            err,
            is_terminal: false,
            out_is_terminal: false,
            can_ask: false,
            as_json: false,
            owns_process: false,
            is_program: false,
            servers: Vec::new(),
            lines: None,
            shown_names: Vec::new(),
            manager: None,
        }
    }

    /// The standard streams of the process.
    pub(crate) fn standard(out: &'a mut io::Stdout, err: &'a mut io::Stderr) -> Self {
        let is_terminal = err.is_terminal();
        let out_is_terminal = out.is_terminal();
        let (out_file, err_file) = (FileId::of_open(&*out), FileId::of_open(&*err));
        let (out, err) = (Stream::new(out, out_file), Stream::new(err, err_file));
        let can_ask = is_terminal && io::stdin().is_terminal();
        Self {
            voice: &Own,
            out,
            err,
            is_terminal,
            out_is_terminal,
            can_ask,
            as_json: false,
            owns_process: true,
            is_program: false,
            servers: Vec::new(),
            lines: None,
            shown_names: Vec::new(),
            manager: Notifier::of_process(),
        }
    }

    /// From here on nothing is printed into `files`: the command is about to write them.
    pub(crate) fn keep_out_of(&mut self, files: impl IntoIterator<Item = FileId>) {
        for file in files {
            for stream in [&mut self.out, &mut self.err] {
                stream.silent |= stream.file == Some(file);
            }
        }
        if self.err.silent {
            log::silence();
        }
    }

    /// Writes a result.
    pub(crate) fn print(&mut self, text: &str) -> Outcome<()> {
        if self.out.silent {
            return Err(Failure::failed("write: standard output: it is the file that the command writes"));
        }
        let text = with_names(&self.shown_names, text, self.as_json);
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).map_err(|e| Failure::output(&e))
    }

    /// Writes what a command has done. What is done does not depend on whether the text can be written: a
    /// failure is at most noted.
    pub(crate) fn report(&mut self, text: &str) {
        if self.out.silent || text.is_empty() {
            return;
        }
        if let Err(Failure { message: Some(message), .. }) = self.print(text) {
            self.note(message);
        }
    }

    /// From here on `err` has the objects of `--progress=json`, and nothing else: no question is asked.
    pub(crate) fn write_lines(&mut self) {
        self.lines = Some(Lines::new());
        self.can_ask = false;
    }

    /// Whether `err` has nothing but those.
    pub(crate) fn has_lines(&self) -> bool {
        self.lines.is_some()
    }

    /// Whether a captive server has ended.
    pub(crate) fn has_lost_a_server(&self) -> bool {
        let mut all: Vec<_> = self.servers.iter().map(|server| PollFd::new(server, PollFlags::IN)).collect();
        // At a failure the next look decides.
        poll(&mut all, Some(&Timespec::default())).is_ok_and(|ended| ended > 0)
    }

    /// Takes where `phase` stands, for the service manager and for `--progress=json`.
    pub(crate) fn progress(&mut self, phase: Phase, reading: &Reading, wanted: bool) {
        if let Some(manager) = &mut self.manager {
            manager.status(&reading.status(phase));
        }
        if let Some(line) = self.lines.as_mut().and_then(|lines| lines.progress(phase, reading, wanted)) {
            self.say(&line);
        }
    }

    /// The command line, whose help is the same wherever it goes but to a terminal.
    pub(crate) fn definition(&self) -> clap::Command {
        let definition = self.voice.definition();
        if self.is_terminal { definition } else { definition.term_width(HELP_WIDTH) }
    }

    /// Tells what does not stop the command, in a voice that has notes.
    pub(crate) fn note(&mut self, what: impl Display) {
        if !self.voice.has_notes() {
            return;
        }
        match self.for_programs() {
            true => self.remark("note", &what.to_string()),
            false => self.complain(format_args!("note: {what}")),
        }
    }

    /// Writes `text` to `err` as it is, in one piece. A failure is ignored: no command depends on what it
    /// says there, and no other place is left to report it.
    pub(crate) fn say(&mut self, text: &str) {
        let text = with_names(&self.shown_names, text, self.for_programs());
        let _ = self.err.write_all(text.as_bytes()).and_then(|()| self.err.flush());
    }

    /// Writes how the command has ended, where it failed or programs wait for it.
    pub(crate) fn end(&mut self, outcome: Outcome) -> u8 {
        let exit = outcome.as_ref().map_or_else(|failure| failure.exit, |exit| *exit);
        let code = self.voice.code(exit);
        if let (Some(manager), Err(Failure { message: Some(message), .. })) = (&mut self.manager, &outcome) {
            manager.last_status(message);
        }
        match (&self.lines, outcome) {
            (Some(lines), outcome) => {
                let line = lines.end(&outcome, code);
                self.say(&line);
            }
            (None, Err(failure)) => self.fail(failure),
            (None, Ok(_)) => {}
        }
        code
    }

    fn fail(&mut self, failure: Failure) {
        if self.as_json {
            if let Some(object) = object(&failure) {
                self.say(&format!("{object}\n"));
            }
        } else if let Some(message) = self.voice.failure(failure) {
            self.complain(message);
        }
    }

    /// Whether each line on `err` is an object.
    fn for_programs(&self) -> bool {
        self.as_json || self.has_lines()
    }

    /// Writes what does not end the command as one line for programs.
    fn remark(&mut self, class: &str, text: &str) {
        let line = match &self.lines {
            Some(_) => Lines::message(class, text),
            None => format!("{}\n", remark(class, text)),
        };
        self.say(&line);
    }

    /// Writes one line for people, or what it says for programs.
    pub(crate) fn complain(&mut self, what: impl Display) {
        if self.for_programs() {
            return self.remark("warning", &what.to_string());
        }
        let (program, text) = (self.voice.program(), self.voice.shown(&what.to_string()));
        self.say(&format!("{program}: {text}\n"));
    }
}

/// `text` with the second of each pair of `names` in place of the first; in JSON if `as_json`.
pub(crate) fn with_names<'a>(names: &[(String, String)], text: &'a str, as_json: bool) -> Cow<'a, str> {
    let mut text = Cow::Borrowed(text);
    for (name, shown) in names {
        if text.contains(name) {
            let quoted = serde_json::Value::from(shown.as_str()).to_string();
            let shown = if as_json { quoted.trim_matches('"') } else { shown };
            text = Cow::Owned(text.replace(name, shown));
        }
    }
    text
}
