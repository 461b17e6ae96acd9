//! Outbox: events that were not taken, and what a waiting worker waits for.
//!
//! Any owner's change may push an event; handles take them in order. The scheduler records here why the last
//! worker that asked got nothing, so that a guest write wakes a worker only if it can have made work. Memory
//! is bounded whether or not events are taken.

use std::collections::VecDeque;
use std::time::Duration;

use super::Next;
use crate::progress::Event;

/// Events kept while none is taken; the oldest errors are dropped first.
pub(super) const MAX_EVENTS: usize = 1024;

/// What gives a worker work that has asked for it in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum WaitReason {
    /// Any change may.
    #[default]
    Change,
    /// Time, or the end of an operation: nothing that the guest does.
    Time,
    /// A range that becomes dirty: everything is done.
    Dirt,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    events: VecDeque<Event>,
    waits_for: WaitReason,
}

impl Outbox {
    pub(super) fn push(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            let error = self.events.iter().position(|event| matches!(event, Event::Error { .. }));
            self.events.remove(error.unwrap_or(0));
        }
        self.events.push_back(event);
    }

    /// The events since the last call.
    pub(super) fn take_all(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// The oldest event that was not taken.
    pub(super) fn take(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// A worker asks for work.
    pub(super) fn worker_asks(&mut self) {
        self.waits_for = WaitReason::Change;
    }

    /// It waits until this time or the end of an operation.
    pub(super) fn wait_for_time(&mut self, until: Option<Duration>) -> Next {
        self.waits_for = WaitReason::Time;
        Next::Wait(until)
    }

    /// It waits until something becomes dirty, or this time.
    pub(super) fn wait_for_dirt(&mut self, until: Option<Duration>) -> Next {
        self.waits_for = WaitReason::Dirt;
        Next::Wait(until)
    }

    /// Whether a waiting worker need not be woken after a guest write; `is_clean`: nothing is dirty.
    pub(super) fn guest_makes_no_work(&self, is_clean: bool) -> bool {
        match self.waits_for {
            WaitReason::Change => false,
            WaitReason::Time => true,
            WaitReason::Dirt => is_clean,
        }
    }
}
