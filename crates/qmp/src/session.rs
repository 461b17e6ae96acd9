//! A client as the handlers of its commands see it: who it is, what it has negotiated, and what they put off
//! until it has its answer. The threads that serve it are the server's and not known here.

use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, ThreadId};

use crate::peer::Peer;
use crate::sync::Mutex;

/// Negotiation, as it goes.
const NEW: u8 = 0;
const PLAIN: u8 = 1;
const OOB: u8 = 2;

/// A client, as handlers see it.
#[derive(Debug)]
pub struct Session {
    id: u64,
    peer: Option<Peer>,
    mode: AtomicU8,
    /// What handlers have put off until their command is answered, by the thread that runs them.
    after: Mutex<Vec<(ThreadId, Deferred)>>,
}

struct Deferred(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Deferred {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Deferred")
    }
}

impl Session {
    /// A client that has not negotiated yet.
    pub(crate) fn new(id: u64, peer: Option<Peer>) -> Self {
        Self { id, peer, mode: AtomicU8::new(NEW), after: Mutex::default() }
    }

    /// A number that no other session of these monitors has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Who is at the other end, if the connection can tell.
    pub fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// Called by a handler: does `work` once the command that runs on this thread has been answered, for what
    /// the client is to hear of only then.
    pub fn after_answer(&self, work: impl FnOnce() + Send + 'static) {
        self.after.lock().push((thread::current().id(), Deferred(Box::new(work))));
    }

    /// Does what the command that ran on this thread has put off.
    pub(crate) fn do_deferred(&self) {
        let me = thread::current().id();
        let mine: Vec<_> = self.after.lock().extract_if(.., |(thread, _)| *thread == me).collect();
        for (_, Deferred(work)) in mine {
            work();
        }
    }

    pub(crate) fn negotiated(&self) -> bool {
        self.mode.load(Ordering::Acquire) != NEW
    }

    pub(crate) fn negotiate(&self, oob: bool) {
        self.mode.store(if oob { OOB } else { PLAIN }, Ordering::Release);
    }

    /// Whether commands may be run out of band.
    pub(crate) fn oob(&self) -> bool {
        self.mode.load(Ordering::Acquire) == OOB
    }
}
