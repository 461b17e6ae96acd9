//! Asking at the terminal whether a stopped copy is to go on.

use std::io::stdin;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::console::Console;
use crate::interrupt::Interrupt;

/// Asks whether to go on after `reason`: Enter means yes; `q`, an end of input and a signal mean no. A
/// process in the background of its terminal does not ask: the terminal would stop it.
pub(crate) fn ask_to_resume(console: &mut Console<'_>, reason: &str, interrupt: &Interrupt) -> bool {
    if !is_in_foreground() {
        return false;
    }
    console.complain(format_args!("paused: {reason}"));
    loop {
        match ask_line(console, "Enter tries again, q ends the copy:", interrupt).as_deref() {
            Some("" | "y" | "yes") => return true,
            None | Some("q" | "quit" | "n" | "no") => return false,
            Some(_) => {}
        }
    }
}

/// Asks `question`, with what the answers, words or their first letters, mean; no, no answer, an end of
/// input and a signal mean none of them.
pub(crate) fn ask<T: Copy>(
    console: &mut Console<'_>,
    question: &str,
    answers: &[(&str, T)],
    interrupt: &Interrupt,
) -> Option<T> {
    let letters: String = answers.iter().map(|(word, _)| format!("{}/", &word[..1])).collect();
    let question = format!("{question} [{letters}n]");
    loop {
        let line = ask_line(console, &question, interrupt)?;
        if matches!(&*line, "n" | "no") {
            return None;
        }
        if let Some((_, answer)) = answers.iter().find(|(word, _)| line == *word || line == word[..1]) {
            return Some(*answer);
        }
    }
}

/// Whether this process may read the terminal that is its standard input.
fn is_in_foreground() -> bool {
    rustix::termios::tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// The line that answers `question`, in small letters; `None` at an end of input, at a signal, and in the
/// background.
fn ask_line(console: &mut Console<'_>, question: &str, interrupt: &Interrupt) -> Option<String> {
    if !is_in_foreground() {
        return None;
    }
    let question = console.voice.shown(question);
    console.say(&format!("{question} "));
    let (answer, answered) = mpsc::channel();
    // A read cannot be given up when a signal comes, a thread can be left behind.
    thread::spawn(move || {
        let mut line = String::new();
        let read = stdin().read_line(&mut line);
        // There is no listener any more once the copy was cancelled.
        let _ = answer.send(read.is_ok_and(|n| n > 0).then(|| line.trim().to_lowercase()));
    });
    loop {
        match answered.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => return line,
            Err(RecvTimeoutError::Timeout) if !interrupt.requested() => {}
            Err(_) => return None,
        }
    }
}
