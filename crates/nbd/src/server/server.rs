//! The server as its owner sees it: exports come and go, listeners and clients are added, and at the end
//! everything stops.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use blockmirror_block::sync::Mutex;

use super::ServerError;
use super::doorman::Doorman;
use super::export::{Export, ExportInfo, RemoveMode};
use super::handshake;
use super::handshakes::Handshakes;
use super::listener::Listener;
use super::memory::Memory;
use super::options::ServerOptions;
use super::served::Served;
use super::slots::Slots;
use super::socket::Socket;
use super::transport::Transport;

/// An NBD server: exports under their names, listeners, and clients. See the [module](super).
///
/// Dropping it cuts all clients off without waiting for them; [`stop`](Self::stop) is the orderly end.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What listeners, handshakes and connections have in common.
pub(crate) struct Shared {
    pub(crate) options: ServerOptions,
    pub(crate) slots: Arc<Slots>,
    exports: Mutex<BTreeMap<String, Arc<Served>>>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) handshakes: Arc<Handshakes>,
    doorman: Doorman,
    stopping: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Server {
    /// A server without exports and listeners.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(options: ServerOptions) -> Result<Arc<Self>, ServerError> {
        let doorman =
            Doorman::new().map_err(|cause| ServerError::System { what: "prepare a server", cause })?;
        let bell = doorman.bell();
        let shared = Arc::new(Shared {
            slots: Slots::new(options.max_connections, Box::new(move || bell.ring())),
            exports: Mutex::default(),
            memory: Memory::new(options.memory, options.max_connections),
            handshakes: Arc::default(),
            doorman,
            stopping: AtomicBool::new(false),
            options,
        });
        Ok(Arc::new(Self { shared }))
    }

    /// Serves `export` from now on.
    ///
    /// # Errors
    /// The name is taken or too long, the export is to be writable and its device is not, or the server has
    /// been stopped.
    pub fn add(&self, export: Export) -> Result<(), ServerError> {
        let name = export.name.clone();
        let options = &self.shared.options;
        let memory = Arc::clone(&self.shared.memory);
        let served = Served::new(export, memory, options.workers, options.observer.clone())?;
        let mut exports = self.shared.exports.lock();
        if self.shared.is_stopping() {
            return Err(ServerError::Stopped);
        }
        if exports.contains_key(&name) {
            return Err(ServerError::ExportExists { name });
        }
        exports.insert(name, served);
        Ok(())
    }

    /// Stops serving `name`. With [`RemoveMode::Hard`] its clients are cut off and their running requests
    /// waited for, some seconds at most.
    ///
    /// # Errors
    /// There is no such export; it has clients and the mode is [`RemoveMode::Safe`]; or its device does not
    /// answer running requests: then it is removed all the same.
    pub fn remove(&self, name: &str, mode: RemoveMode) -> Result<(), ServerError> {
        let served = {
            let mut exports = self.shared.exports.lock();
            let served =
                exports.get(name).ok_or_else(|| ServerError::NoSuchExport { name: name.to_owned() })?;
            if mode == RemoveMode::Safe {
                served.close_if_unused()?;
            }
            exports.remove(name)
        };
        match served {
            Some(served) if mode == RemoveMode::Hard => {
                served.cut_off();
                Served::wait_gone(&[served], true)
            }
            _ => Ok(()),
        }
    }

    /// What is served, by name.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.shared
            .all()
            .iter()
            .map(|served| ExportInfo {
                name: served.export.name.clone(),
                description: served.export.description.clone(),
                writable: served.export.writable,
                clients: served.client_count(),
            })
            .collect()
    }

    /// Connections at present, those in the handshake included.
    pub fn connections(&self) -> usize {
        self.shared.connections()
    }

    /// Bytes that requests and unsent replies hold at present.
    pub fn memory_in_use(&self) -> u64 {
        self.shared.memory.used()
    }

    /// Lets clients in that come to `listener`, until the server stops.
    ///
    /// # Errors
    /// The server has been stopped, or no thread can be started.
    pub fn listen(&self, listener: Listener) -> Result<(), ServerError> {
        if self.shared.is_stopping() {
            return Err(ServerError::Stopped);
        }
        self.shared.doorman.add(&self.shared, listener)
    }

    /// Serves a client that is connected already.
    ///
    /// # Errors
    /// The server has been stopped, or no thread can be started.
    pub fn serve(&self, stream: impl Into<OwnedFd>) -> Result<(), ServerError> {
        if self.shared.is_stopping() {
            return Err(ServerError::Stopped);
        }
        self.shared.doorman.start(&self.shared)?;
        self.shared.serve(stream.into())
    }

    /// Stops: no client connects any more, running requests are answered, clients are disconnected, listeners
    /// are closed. Takes seconds at most, with clients that do not read and devices that do not answer, too.
    /// All exports are gone afterwards.
    ///
    /// # Errors
    /// A device did not answer requests even when its blocked calls were ended.
    pub fn stop(&self) -> Result<(), ServerError> {
        let exports = self.shared.close();
        for served in &exports {
            served.finish();
        }
        let result = Served::wait_gone(&exports, false);
        self.shared.doorman.join();
        self.shared.handshakes.wait();
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for served in self.shared.close() {
            served.cut_off();
        }
    }
}

impl Shared {
    pub(crate) fn doorman(&self) -> &Doorman {
        &self.doorman
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

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Served>> {
        self.exports.lock().get(name).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Served>> {
        self.exports.lock().values().cloned().collect()
    }

    /// Closes the server to new clients and returns what was served.
    fn close(&self) -> Vec<Arc<Served>> {
        let exports = {
            let mut exports = self.exports.lock();
            self.stopping.store(true, Ordering::SeqCst);
            std::mem::take(&mut *exports)
        };
        self.doorman.close();
        self.handshakes.close();
        self.slots.close();
        exports.into_values().collect()
    }

    /// Connections at present, those in the handshake included.
    pub(crate) fn connections(&self) -> usize {
        self.slots.taken() + self.handshakes.count()
    }

    /// Takes a connected client through the handshake, on a thread of its own.
    pub(crate) fn serve(self: &Arc<Self>, fd: OwnedFd) -> Result<(), ServerError> {
        let socket = Arc::new(Socket::new(fd));
        let handshaking = self.handshakes.begin(&socket).ok_or(ServerError::Stopped)?;
        let shared = Arc::clone(self);
        thread::Builder::new()
            .name("nbd-handshake".into())
            .spawn(move || {
                let deadline = Instant::now() + shared.options.handshake_limit;
                // A client that fails sees the end of its connection.
                let _ = handshake::run(&shared, Transport::plain(socket), &handshaking, deadline);
            })
            .map_err(|cause| ServerError::System { what: "start a thread", cause })?;
        Ok(())
    }
}
