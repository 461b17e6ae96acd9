//! What the listeners, handshakes and connections of one server share: exports, limits, buffers, and whether
//! the server is stopping.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::sync::Mutex;

use super::ServerError;
use super::acceptor_state::Acceptor;
use super::connection_limit::ConnectionLimit;
use super::export::{Export, RemoveMode};
use super::export_runtime::ExportRuntime;
use super::handshake_set::HandshakeSet;
use super::memory::Memory;
use super::options::ServerOptions;

/// What listeners, handshakes and connections have in common.
pub(crate) struct ServerState {
    pub(crate) options: ServerOptions,
    pub(crate) connection_limit: Arc<ConnectionLimit>,
    /// *Guards* the exports by name, and that none is added after the server has been stopped. *Order*:
    /// before the clients of an export. *Not under it*: I/O, waiting for clients.
    exports: Mutex<BTreeMap<String, Arc<ExportRuntime>>>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) handshakes: Arc<HandshakeSet>,
    acceptor: Acceptor,
    stopping: AtomicBool,
}

impl std::fmt::Debug for ServerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerState").field("options", &self.options).finish_non_exhaustive()
    }
}

impl ServerState {
    pub(crate) fn new(options: ServerOptions) -> Result<Arc<Self>, ServerError> {
        let acceptor =
            Acceptor::new().map_err(|cause| ServerError::System { what: "prepare a server", cause })?;
        let waker = acceptor.waker();
        Ok(Arc::new(Self {
            connection_limit: ConnectionLimit::new(options.max_connections, Box::new(move || waker.wake())),
            exports: Mutex::default(),
            memory: Memory::new(options.memory, options.max_connections),
            handshakes: Arc::default(),
            acceptor,
            stopping: AtomicBool::new(false),
            options,
        }))
    }

    /// Adds an export, unless the server has been stopped or has one of that name.
    pub(crate) fn add(&self, export: Export) -> Result<(), ServerError> {
        let name = export.name.clone();
        let options = &self.options;
        let memory = Arc::clone(&self.memory);
        let runtime = ExportRuntime::new(export, memory, options.workers, options.observer.clone())?;
        let mut exports = self.exports.lock();
        self.check_running()?;
        if exports.contains_key(&name) {
            return Err(ServerError::ExportExists { name });
        }
        exports.insert(name, runtime);
        Ok(())
    }

    /// Takes an export off the list, with [`RemoveMode::Safe`] only if it has no clients.
    pub(crate) fn remove(
        &self,
        name: &str,
        mode: RemoveMode,
    ) -> Result<Option<Arc<ExportRuntime>>, ServerError> {
        let mut exports = self.exports.lock();
        let export = exports.get(name).ok_or_else(|| ServerError::NoSuchExport { name: name.to_owned() })?;
        if mode == RemoveMode::Safe {
            export.close_if_unused()?;
        }
        Ok(exports.remove(name))
    }

    /// Fails if the server has been stopped.
    pub(crate) fn check_running(&self) -> Result<(), ServerError> {
        if self.is_stopping() { Err(ServerError::Stopped) } else { Ok(()) }
    }

    pub(crate) fn acceptor(&self) -> &Acceptor {
        &self.acceptor
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn requires_tls(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.options.tls.is_required();
        #[cfg(not(feature = "tls"))]
        return false;
    }

    pub(crate) fn find(&self, name: &str) -> Option<Arc<ExportRuntime>> {
        self.exports.lock().get(name).cloned()
    }

    pub(crate) fn exports(&self) -> Vec<Arc<ExportRuntime>> {
        self.exports.lock().values().cloned().collect()
    }

    /// Closes the server to new clients and returns what was served.
    pub(crate) fn close(&self) -> Vec<Arc<ExportRuntime>> {
        let exports = {
            let mut exports = self.exports.lock();
            self.stopping.store(true, Ordering::SeqCst);
            std::mem::take(&mut *exports)
        };
        self.acceptor.close();
        self.handshakes.close();
        self.connection_limit.close();
        exports.into_values().collect()
    }

    /// Connections at present, those in the handshake included. One that ends its handshake meanwhile counts
    /// twice rather than not at all: without connections the acceptor checks none.
    pub(crate) fn connections(&self) -> usize {
        let handshakes = self.handshakes.count();
        handshakes + self.connection_limit.taken()
    }
}
