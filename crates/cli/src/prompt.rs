//! Asking at the terminal whether a stopped copy is to go on.

use std::io::{Write as _, stdin};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::console::Console;
use crate::interrupt::Interrupt;

/// Asks whether to go on after `reason`; no answer, an end of input and a signal mean no.
pub(crate) fn ask_to_resume(console: &mut Console<'_>, reason: &str, interrupt: &Interrupt) -> bool {
    let (answer, answered) = mpsc::channel();
    loop {
        console.complain(format_args!("paused: {reason}"));
        let _ = write!(console.err, "Try again? [y/n] ").and_then(|()| console.err.flush());
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
        match line.as_deref() {
            Some("y" | "yes") => return true,
            Some("n" | "no") | None => return false,
            Some(_) => {}
        }
    }
}
