//! Asking somebody at the terminal whether a stopped copy is to go on.

use std::io::{IsTerminal, stderr, stdin};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::failure::one_line;
use crate::interrupt::Interrupt;

/// Whether somebody can be asked.
pub(crate) fn can_ask() -> bool {
    stdin().is_terminal() && stderr().is_terminal()
}

/// Asks whether to go on after `reason`; no answer, an end of input and a signal mean no.
pub(crate) fn ask_to_resume(reason: &str, interrupt: &Interrupt) -> bool {
    let (answer, answered) = mpsc::channel();
    loop {
        eprint!("blockmirror: paused: {}\nTry again? [y/n] ", one_line(reason));
        let answer = answer.clone();
        // A read cannot be given up when a signal comes, a thread can be left behind.
        thread::spawn(move || {
            let mut line = String::new();
            let read = stdin().read_line(&mut line);
            // Nobody listens any more once the copy was given up.
            let _ = answer.send(read.is_ok_and(|n| n > 0).then(|| line.trim().to_lowercase()));
        });
        let line = loop {
            match answered.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => break line,
                Err(RecvTimeoutError::Timeout) if !interrupt.requested() => {}
                Err(_) => break None,
            }
        };
        match line.as_deref() {
            Some("y" | "yes") => return true,
            Some("n" | "no") | None => return false,
            Some(_) => {}
        }
    }
}
