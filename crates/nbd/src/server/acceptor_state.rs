//! What a server keeps of its acceptor: the listeners, the thread and the means to wake it. Knows nothing of
//! the server; what the thread does is in `acceptor`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use blockmirror_block::sync::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::IntoBytes;

use super::listener::Listener;

/// Wakes the acceptor's thread out of `poll`: an eventfd.
#[derive(Clone)]
pub(crate) struct Waker(pub(super) Arc<OwnedFd>);

impl Waker {
    pub(crate) fn wake(&self) {
        // A full counter has woken it already.
        let _ = rustix::io::write(&*self.0, 1u64.as_bytes());
    }

    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }
}

/// The listeners and the thread.
pub(crate) struct Acceptor {
    pub(super) waker: Waker,
    pub(super) state: Mutex<AcceptorState>,
}

#[derive(Default)]
pub(super) struct AcceptorState {
    pub(super) listeners: Vec<Arc<Listener>>,
    pub(super) thread: Option<JoinHandle<()>>,
    pub(super) closed: bool,
}

impl Acceptor {
    pub(crate) fn new() -> io::Result<Self> {
        let waker = Waker(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?));
        Ok(Self { waker, state: Mutex::default() })
    }

    pub(crate) fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Closes all listeners and has the thread end.
    pub(crate) fn close(&self) {
        let listeners = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.listeners)
        };
        self.waker.wake();
        drop(listeners);
    }

    /// Waits for the end of the thread, after [`close`](Self::close).
    pub(crate) fn join(&self) {
        let thread = self.state.lock().thread.take();
        if let Some(thread) = thread {
            // It has no way to panic; if it did, it has ended as well.
            let _ = thread.join();
        }
    }
}
