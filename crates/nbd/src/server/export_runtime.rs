//! An export that is being served: its connections, its worker threads, and what was measured of its device.
//!
//! Made by the server's state, held by each of its connections and workers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockmirror_block::ByteRange;
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::sync::{Condvar, Mutex};
use tracing::Span;

use crate::proto::{Command, MAX_STRING};

use super::ServerError;
use super::connection::Connection;
use super::connection_limit::ConnectionPermit;
use super::dispatch_policy::DispatchPolicy;
use super::export::{Export, ExportInfo};
use super::memory::Memory;
use super::negotiated_params::{Context, NegotiatedParams};
use super::options::Observer;
use super::transport::Transport;
use super::worker_pool::WorkerPool;

impl Clients {
    fn count(&self) -> usize {
        self.by_id.len() + self.pending
    }
}

/// A client whose answer to `GO` is being sent: it counts as a client of the export from then on.
pub(crate) struct PendingClient(Option<Arc<ExportRuntime>>);

impl Drop for PendingClient {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.remove_client(|clients| clients.pending -= 1);
        }
    }
}

/// How long running requests may take to end before the connections are aborted, and again before the calls
/// of the device are cancelled.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// An export with everything that serves it.
pub(crate) struct ExportRuntime {
    pub(crate) export: Export,
    pub(crate) memory: Arc<Memory>,
    pub(crate) pool: WorkerPool,
    /// Cancels the calls that the workers have made of the device, which others may use too.
    pub(crate) calls: CancelSource,
    pub(crate) known_data: Mutex<ByteRange>,
    observer: Option<Arc<dyn Observer>>,
    /// *Guards* the order of notifications: held from a change of the clients until the observer has
    /// returned. *Order*: before `clients`. *Not under it*: any other lock of the server.
    notifying: Mutex<()>,
    /// Of reads, writes, flushes, zeroing and trimming, and others.
    dispatch: [DispatchPolicy; 5],
    clients: Mutex<Clients>,
    client_gone: Condvar,
    next_id: AtomicU64,
    /// Requests that were admitted although they have to wait for another request or job.
    blocked: AtomicUsize,
}

/// A request that waits for another request or job, from its admission to its end.
pub(crate) struct BlockedRequest(Arc<ExportRuntime>);

impl Drop for BlockedRequest {
    fn drop(&mut self) {
        self.0.blocked.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Clients {
    by_id: HashMap<u64, Arc<Connection>>,
    /// Those whose answer to `GO` is being sent.
    pending: usize,
    /// The export is being removed: no client connects any more.
    closed: bool,
}

impl ExportRuntime {
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
        let pool = WorkerPool::new(workers)
            .map_err(|cause| ServerError::System { what: "prepare an export", cause })?;
        Ok(Arc::new(Self {
            export,
            memory,
            pool,
            calls: CancelSource::new(),
            known_data: Mutex::default(),
            observer,
            notifying: Mutex::default(),
            dispatch: [
                DispatchPolicy::default(),
                DispatchPolicy::for_writes(),
                DispatchPolicy::default(),
                DispatchPolicy::default(),
                DispatchPolicy::default(),
            ],
            blocked: AtomicUsize::new(0),
            clients: Mutex::default(),
            client_gone: Condvar::new(),
            next_id: AtomicU64::new(1),
        }))
    }

    /// Counts a request that has to wait for another.
    pub(crate) fn note_blocked(self: &Arc<Self>) -> BlockedRequest {
        self.blocked.fetch_add(1, Ordering::Relaxed);
        BlockedRequest(Arc::clone(self))
    }

    /// Whether so many requests wait that the remaining threads are needed for everything else.
    pub(crate) fn many_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed) >= self.pool.most() / 2
    }

    /// How requests of this kind are dispatched.
    pub(crate) fn dispatch_policy(&self, command: Command) -> &DispatchPolicy {
        let [read, write, flush, change, other] = &self.dispatch;
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

    /// Counts a client from now on; `None` if the export is closed.
    pub(crate) fn reserve(self: &Arc<Self>) -> Option<PendingClient> {
        let _notifying = self.notifying.lock();
        let count = {
            let mut clients = self.clients.lock();
            if clients.closed {
                return None;
            }
            clients.pending += 1;
            clients.count()
        };
        if let Some(observer) = &self.observer {
            observer.connected(&self.export.name, count);
        }
        Some(PendingClient(Some(Arc::clone(self))))
    }

    /// Begins to serve a client whose handshake is done. If the export was closed meanwhile, the client is
    /// dropped.
    pub(crate) fn serve(
        self: &Arc<Self>,
        mut pending: PendingClient,
        transport: Transport,
        params: NegotiatedParams,
        permit: ConnectionPermit,
    ) {
        // 0 is the event that wakes workers; the counter does not come round to it.
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Span::current().record("client", id);
        let connection = Connection::new(id, transport, params, Arc::clone(self), permit);
        {
            let mut clients = self.clients.lock();
            if clients.closed {
                return;
            }
            clients.by_id.insert(id, Arc::clone(&connection));
            // From pending to connected in one step.
            clients.pending -= 1;
            pending.0 = None;
        }
        if self.pool.register(self, Arc::clone(&connection)).is_err() {
            self.forget(&connection);
        }
    }

    /// The client's last request has ended and its last reply is sent.
    pub(crate) fn close(&self, connection: &Connection) {
        self.pool.unregister(connection);
        connection.transport.close();
        connection.log_end();
        self.forget(connection);
    }

    fn forget(&self, connection: &Connection) {
        connection.release();
        let mut gone = None;
        self.remove_client(|clients| gone = clients.by_id.remove(&connection.id));
        // Not under the lock: it may be the last to hold the connection.
        drop(gone);
    }

    /// Removes a client and notifies the observer.
    fn remove_client(&self, remove: impl FnOnce(&mut Clients)) {
        let notifying = self.notifying.lock();
        let count = {
            let mut clients = self.clients.lock();
            remove(&mut clients);
            clients.count()
        };
        if let Some(observer) = &self.observer {
            observer.disconnected(&self.export.name, count);
        }
        drop(notifying);
        self.client_gone.notify_all();
    }

    pub(crate) fn connection(&self, id: u64) -> Option<Arc<Connection>> {
        self.clients.lock().by_id.get(&id).cloned()
    }

    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        self.clients.lock().by_id.values().cloned().collect()
    }

    /// What the server's owner sees of it.
    pub(crate) fn info(&self) -> ExportInfo {
        ExportInfo {
            name: self.export.name.clone(),
            description: self.export.description.clone(),
            writable: self.export.writable,
            clients: self.client_count(),
        }
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

    /// Closes the export to new clients and drains its connections: no further request is read, those that
    /// run are answered.
    pub(crate) fn drain(&self) {
        self.clients.lock().closed = true;
        for connection in self.connections() {
            connection.drain();
        }
    }

    /// Closes the export to new clients and aborts its connections.
    pub(crate) fn abort(&self) {
        self.clients.lock().closed = true;
        for connection in self.connections() {
            connection.abort();
        }
    }

    /// Waits until the connections of all `exports` have closed, in up to three steps with a time limit each:
    /// after draining, unless they were aborted already; after aborting; after cancelling the calls that they
    /// have made of the devices. The limits are the same for one export as for many.
    pub(crate) fn wait_drained(exports: &[Arc<Self>], already_aborted: bool) -> Result<(), ServerError> {
        let mut left: Vec<_> = exports.iter().collect();
        let mut wait = |then: fn(&Self)| {
            let deadline = Instant::now() + DRAIN_TIMEOUT;
            left.retain(|runtime| !runtime.wait(deadline));
            left.iter().for_each(|runtime| then(runtime));
            left.first().map(|runtime| Arc::clone(runtime))
        };
        if !already_aborted {
            wait(Self::abort);
        }
        wait(|runtime| runtime.calls.cancel());
        let Some(runtime) = wait(|_| {}) else { return Ok(()) };
        let requests = runtime.connections().iter().map(|c| c.running()).sum();
        Err(ServerError::RequestsHang { name: runtime.export.name.clone(), requests })
    }

    fn wait(&self, deadline: Instant) -> bool {
        let mut clients = self.clients.lock();
        while clients.count() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (clients, _) = self.client_gone.wait_timeout(clients, left);
        }
        drop(clients);
        // And the observer has been notified.
        drop(self.notifying.lock());
        true
    }
}
