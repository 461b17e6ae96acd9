//! What waits to be written to one client. Filled by answers and events, emptied by the session's writer.
//!
//! Answers are never dropped; the next command waits while there is too much ([`Outgoing::wait_room`]).
//! Events cannot wait, for those who emit them have other work: past [`MAX_EVENTS`] or [`MAX_EVENT_BYTES`]
//! the oldest event that is not yet written goes.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::sync::{Condvar, Mutex};

/// Events that wait for a client at most.
pub(super) const MAX_EVENTS: usize = 4096;
/// Bytes of events that wait for a client at most.
pub(super) const MAX_EVENT_BYTES: usize = 1 << 20;
/// Bytes of answers beyond which no other command is begun.
const MAX_ANSWER_BYTES: usize = 256 << 10;

#[derive(Debug, Default)]
pub(super) struct Outgoing {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Line>,
    events: usize,
    event_bytes: usize,
    answer_bytes: usize,
    /// Events are for those who have negotiated.
    wants_events: bool,
    /// Nothing more will come.
    finished: bool,
    /// Nothing more can be written.
    dead: bool,
}

#[derive(Debug)]
enum Line {
    Answer(String),
    Event(Arc<str>),
}

impl Line {
    fn text(&self) -> &str {
        match self {
            Self::Answer(text) => text,
            Self::Event(text) => text,
        }
    }
}

impl Outgoing {
    /// Queues an answer. With `then_events`, events follow from here on.
    pub(super) fn answer(&self, line: String, then_events: bool) {
        let mut state = self.state.lock();
        state.wants_events |= then_events;
        if state.dead {
            return;
        }
        state.answer_bytes = state.answer_bytes.saturating_add(line.len());
        state.lines.push_back(Line::Answer(line));
        self.changed.notify_all();
    }

    /// Queues an event, at the cost of older ones if the client does not read.
    pub(super) fn event(&self, line: &Arc<str>) {
        let mut state = self.state.lock();
        if state.dead || state.finished || !state.wants_events {
            return;
        }
        state.events += 1;
        state.event_bytes = state.event_bytes.saturating_add(line.len());
        state.lines.push_back(Line::Event(Arc::clone(line)));
        while state.events > MAX_EVENTS || (state.event_bytes > MAX_EVENT_BYTES && state.events > 1) {
            let Some(oldest) = state.lines.iter().position(|line| matches!(line, Line::Event(_))) else {
                break;
            };
            if let Some(line) = state.lines.remove(oldest) {
                state.events -= 1;
                state.event_bytes = state.event_bytes.saturating_sub(line.text().len());
            }
        }
        self.changed.notify_all();
    }

    /// Waits while too many answers wait.
    pub(super) fn wait_room(&self) {
        let state = self.state.lock();
        drop(self.changed.wait_while(state, |state| state.answer_bytes > MAX_ANSWER_BYTES && !state.dead));
    }

    /// The next line to write; `None` when all is written that there will be, or nothing can be.
    pub(super) fn next(&self) -> Option<NextLine> {
        let mut state = self
            .changed
            .wait_while(self.state.lock(), |state| state.lines.is_empty() && !state.finished && !state.dead);
        if state.dead {
            return None;
        }
        let line = state.lines.pop_front()?;
        match &line {
            Line::Answer(text) => state.answer_bytes = state.answer_bytes.saturating_sub(text.len()),
            Line::Event(text) => {
                state.events -= 1;
                state.event_bytes = state.event_bytes.saturating_sub(text.len());
            }
        }
        self.changed.notify_all();
        Some(NextLine(line))
    }

    /// No more lines will come; what is there is still written.
    pub(super) fn finish(&self) {
        self.state.lock().finished = true;
        self.changed.notify_all();
    }

    /// Nothing can be written any more.
    pub(super) fn kill(&self) {
        let mut state = self.state.lock();
        state.dead = true;
        state.lines = VecDeque::new();
        self.changed.notify_all();
    }
}

/// A line taken out to be written.
pub(super) struct NextLine(Line);

impl NextLine {
    pub(super) fn text(&self) -> &str {
        self.0.text()
    }
}
