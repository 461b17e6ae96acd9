//! An export that is being served: its clients, its threads, and what was learned about its device.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockmirror_block::ByteRange;
use blockmirror_block::sync::{Condvar, Mutex};

use crate::proto::{Command, MAX_STRING};

use super::ServerError;
use super::connection::Connection;
use super::export::Export;
use super::memory::Memory;
use super::options::Observer;
use super::pace::Pace;
use super::pool::Pool;
use super::slots::Slot;
use super::terms::{Context, Terms};
use super::transport::Transport;

impl Clients {
    fn count(&self) -> usize {
        self.by_id.len() + self.arriving
    }
}

/// A client that is about to enter transmission: from then on it counts.
pub(crate) struct Arrival(Option<Arc<Served>>);

impl Drop for Arrival {
    fn drop(&mut self) {
        if let Some(served) = self.0.take() {
            served.one_less(|clients| clients.arriving -= 1);
        }
    }
}

/// How long running requests may take to end before clients are cut off, and again before the device's
/// blocked calls are ended.
const PATIENCE: Duration = Duration::from_secs(2);

/// An export with everything that serves it.
pub(crate) struct Served {
    pub(crate) export: Export,
    pub(crate) memory: Arc<Memory>,
    pub(crate) pool: Pool,
    pub(crate) known_data: Mutex<ByteRange>,
    observer: Option<Arc<dyn Observer>>,
    /// Held from a change of the clients until the observer has been notified, so that notifications are in
    /// order.
    telling: Mutex<()>,
    paces: [Pace; 5],
    clients: Mutex<Clients>,
    gone: Condvar,
    next_id: AtomicU64,
    /// Requests that were taken in although they have to wait for another request or job.
    waiting: AtomicUsize,
}

/// A request that waits for another request or job, from when it is taken in until it has been done.
pub(crate) struct Waiting(Arc<Served>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Clients {
    by_id: HashMap<u64, Arc<Connection>>,
    /// Those whose answer to `GO` is being sent.
    arriving: usize,
    /// The export is being removed: no client connects any more.
    closed: bool,
}

impl Served {
    pub(crate) fn new(
        export: Export,
        memory: Arc<Memory>,
        workers: usize,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, ServerError> {
        let contexts = export.contexts.iter().map(|c| ("meta context", c.name()));
        for (what, text) in
            contexts.chain([("export name", &*export.name), ("description", &*export.description)])
        {
            if text.len() > MAX_STRING {
                return Err(ServerError::NameTooLong { what, len: text.len() });
            }
        }
        if export.writable && !export.device.geometry().writable {
            let device = export.device.name().to_owned();
            return Err(ServerError::ReadOnlyDevice { name: export.name, device });
        }
        let pool =
            Pool::new(workers).map_err(|cause| ServerError::System { what: "prepare an export", cause })?;
        Ok(Arc::new(Self {
            export,
            memory,
            pool,
            known_data: Mutex::default(),
            observer,
            telling: Mutex::default(),
            paces: [Pace::default(), Pace::of_writes(), Pace::default(), Pace::default(), Pace::default()],
            waiting: AtomicUsize::new(0),
            clients: Mutex::default(),
            gone: Condvar::new(),
            next_id: AtomicU64::new(1),
        }))
    }

    /// Counts a request that has to wait.
    pub(crate) fn one_waits(self: &Arc<Self>) -> Waiting {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(Arc::clone(self))
    }

    /// Whether so many wait that the threads that are left are needed for everything else.
    pub(crate) fn many_wait(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= self.pool.most() / 2
    }

    /// What is known about how quick requests like this one are.
    pub(crate) fn pace(&self, command: Command) -> &Pace {
        let [read, write, flush, change, other] = &self.paces;
        match command {
            Command::Read => read,
            Command::Write => write,
            Command::Flush => flush,
            Command::Trim | Command::WriteZeroes => change,
            _ => other,
        }
    }

    /// Every meta context there is, with the name that clients know it by. Its place is its id.
    pub(crate) fn contexts(&self) -> Vec<(&str, Context)> {
        let mut all = vec![(crate::proto::BASE_ALLOCATION, Context::Allocation)];
        if self.export.allocation_depth {
            all.push(("qemu:allocation-depth", Context::Depth));
        }
        all.extend(self.export.contexts.iter().map(|c| (c.name(), Context::Custom(Arc::clone(c)))));
        all
    }

    /// A place for a client, who counts from now on; `None` if the export is closed.
    pub(crate) fn expect(self: &Arc<Self>) -> Option<Arrival> {
        let _telling = self.telling.lock();
        let count = {
            let mut clients = self.clients.lock();
            if clients.closed {
                return None;
            }
            clients.arriving += 1;
            clients.count()
        };
        if let Some(observer) = &self.observer {
            observer.connected(&self.export.name, count);
        }
        Some(Arrival(Some(Arc::clone(self))))
    }

    /// Begins to serve a client whose handshake is done. If the export was closed meanwhile, the client is
    /// dropped.
    pub(crate) fn serve(
        self: &Arc<Self>,
        mut arrival: Arrival,
        transport: Transport,
        terms: Terms,
        slot: Slot,
    ) {
        // 0 is the event that wakes workers; the counter does not come round to it.
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Connection::new(id, transport, terms, Arc::clone(self), slot);
        {
            let mut clients = self.clients.lock();
            if clients.closed {
                return;
            }
            clients.by_id.insert(id, Arc::clone(&connection));
            // It has arrived, in the same instant.
            clients.arriving -= 1;
            arrival.0 = None;
        }
        if self.pool.register(self, Arc::clone(&connection)).is_err() {
            self.forget(&connection);
        }
    }

    /// The client's last request has ended and its last reply is sent.
    pub(crate) fn close(&self, connection: &Connection) {
        self.pool.unregister(connection);
        connection.transport.close();
        self.forget(connection);
    }

    fn forget(&self, connection: &Connection) {
        connection.leave();
        let mut gone = None;
        self.one_less(|clients| gone = clients.by_id.remove(&connection.id));
        // Not under the lock: it may be the last to hold the connection.
        drop(gone);
    }

    /// Takes a client off and tells of it.
    fn one_less(&self, take_off: impl FnOnce(&mut Clients)) {
        let telling = self.telling.lock();
        let count = {
            let mut clients = self.clients.lock();
            take_off(&mut clients);
            clients.count()
        };
        if let Some(observer) = &self.observer {
            observer.disconnected(&self.export.name, count);
        }
        drop(telling);
        self.gone.notify_all();
    }

    pub(crate) fn connection(&self, id: u64) -> Option<Arc<Connection>> {
        self.clients.lock().by_id.get(&id).cloned()
    }

    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        self.clients.lock().by_id.values().cloned().collect()
    }

    pub(crate) fn client_count(&self) -> usize {
        self.clients.lock().count()
    }

    /// Closes the export to new clients, if there are none now.
    pub(crate) fn close_if_unused(&self) -> Result<(), ServerError> {
        let mut clients = self.clients.lock();
        match clients.count() {
            0 => {
                clients.closed = true;
                Ok(())
            }
            n => Err(ServerError::ExportInUse { name: self.export.name.clone(), clients: n }),
        }
    }

    /// Closes the export to new clients, and reads no further request of those that are there.
    pub(crate) fn finish(&self) {
        self.clients.lock().closed = true;
        for connection in self.connections() {
            connection.finish();
        }
    }

    /// Cuts all clients off at once.
    pub(crate) fn cut_off(&self) {
        self.clients.lock().closed = true;
        for connection in self.connections() {
            connection.cut_off();
        }
    }

    /// Waits for the last clients of all `exports` to be gone, whose end has been asked for: for running
    /// requests and their replies first, unless clients have been cut off already; then without sending
    /// replies; then after telling devices to ended. The limits are the same for one as for many.
    pub(crate) fn wait_gone(exports: &[Arc<Self>], already_cut_off: bool) -> Result<(), ServerError> {
        let mut left: Vec<_> = exports.iter().collect();
        let mut wait = |then: fn(&Self)| {
            let deadline = Instant::now() + PATIENCE;
            left.retain(|served| !served.wait(deadline));
            left.iter().for_each(|served| then(served));
            left.first().map(|served| Arc::clone(served))
        };
        if !already_cut_off {
            wait(Self::cut_off);
        }
        wait(|served| served.export.device.cancel_in_flight());
        let Some(served) = wait(|_| {}) else { return Ok(()) };
        let requests = served.connections().iter().map(|c| c.running()).sum();
        Err(ServerError::RequestsHang { name: served.export.name.clone(), requests })
    }

    fn wait(&self, deadline: Instant) -> bool {
        let mut clients = self.clients.lock();
        while clients.count() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (clients, _) = self.gone.wait_timeout(clients, left);
        }
        drop(clients);
        // And the observer has been notified.
        drop(self.telling.lock());
        true
    }
}
