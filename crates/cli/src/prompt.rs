//! Asking at the terminal whether a stopped copy is to go on.

use std::io::{Write as _, stdin};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::console::Console;
use crate::interrupt::Interrupt;

/// Asks whether to go on after `reason`; no answer, an end of input and a signal mean no.
pub(crate) fn ask_to_resume(console: &mut Console<'_>, reason: &str, interrupt: &Interrupt) -> bool {
    console.complain(format_args!("paused: {reason}"));
    ask(console, "Try again?", &[("yes", ())], interrupt).is_some()
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
    let (answer, answered) = mpsc::channel();
    loop {
        let question = console.voice.shown(question);
        let _ = write!(console.err, "{question} [{letters}n] ").and_then(|()| console.err.flush());
        let answer = answer.clone();
        // A read cannot be given up when a signal comes, a thread can be left behind.
        thread::spawn(move || {
            let mut line = String::new();
            let read = stdin().read_line(&mut line);
            // There is no listener any more once the copy was cancelled.
            let _ = answer.send(read.is_ok_and(|n| n > 0).then(|| line.trim().to_lowercase()));
        });
        let line = loop {
            match answered.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => break line,
                Err(RecvTimeoutError::Timeout) if !interrupt.requested() => {}
                Err(_) => break None,
            }
        };
        let line = line?;
        if matches!(&*line, "n" | "no") {
            return None;
        }
        if let Some((_, answer)) = answers.iter().find(|(word, _)| line == *word || line == word[..1]) {
            return Some(*answer);
        }
    }
}
