//! The NBD server and what it serves. At most one server, as scripts expect.
//!
//! What must hold: an export serves the *tap* of its node, so that a job sees every write, and a pivot moves
//! the export.

mod address;

use std::collections::BTreeMap;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_nbd::server::{Export, Listener, RemoveMode, Server, ServerError, ServerOptions};
use blockmirror_qmp::QmpError;
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::context::Context;
use crate::errors::qmp_error;
use crate::events::BLOCK_EXPORT_DELETED;
use crate::graph::{ALL_PERMS, AttachmentId, Parent, Perms, WRITE};
use crate::ids::is_well_formed;
use crate::object::Iothread;
use crate::schema::{BitmapRef, NbdServerArgs, SocketAddress};
use crate::{Deferred, NOTICE, Reply};

pub(crate) use address::listener;

/// Notes that export `id` has met a file that was cut short, where its client reads zeros.
fn cut_short(id: &str) -> impl Fn(&blockmirror_block::Error) + Send + Sync + 'static {
    let id = id.to_owned();
    move |error| warn!(target: NOTICE, "export '{id}': {error}; its clients read zeros there")
}

/// The server and its exports.
#[derive(Debug)]
pub(crate) struct Exports {
    context: Arc<Context>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    server: Option<Arc<Server>>,
    exports: BTreeMap<String, Entry>,
}

/// An export by its id.
#[derive(Debug)]
struct Entry {
    /// Its name on the wire.
    name: String,
    attachment: AttachmentId,
    shutting_down: bool,
    /// Held as long as the export is there.
    _iothread: Option<Arc<Iothread>>,
}

/// What is to be exported.
pub(crate) struct NewExport<'a> {
    pub(crate) id: &'a str,
    pub(crate) node: &'a str,
    pub(crate) name: Option<&'a str>,
    pub(crate) description: Option<&'a str>,
    pub(crate) writable: bool,
    pub(crate) allocation_depth: bool,
    pub(crate) bitmaps: &'a [BitmapRef],
    pub(crate) iothread: Option<&'a str>,
}

impl Exports {
    /// No server, no exports; they serve nodes of `context`.
    pub(crate) fn new(context: Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context, state: Mutex::default() })
    }

    fn server(&self) -> Option<Arc<Server>> {
        self.state.lock().server.clone()
    }

    /// The exports in the words of `query-block-exports`.
    pub(crate) fn list(&self) -> Value {
        let state = self.state.lock();
        let graph = self.context.graph.lock();
        let mut exports: Vec<_> = state.exports.iter().collect();
        exports.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.attachment));
        let list: Vec<_> = exports
            .into_iter()
            .map(|(id, entry)| {
                let node = graph.attachment(entry.attachment).map_or("", |u| u.node.as_str());
                json!({"node-name": node, "shutting-down": entry.shutting_down, "type": "nbd", "id": id})
            })
            .collect();
        Value::Array(list)
    }

    /// `nbd-server-start`.
    pub(crate) fn start_nbd_server(&self, args: NbdServerArgs) -> Reply<()> {
        self.start_nbd_server_at(args, listener)
    }

    /// `nbd-server-start`, with a way from an address to a socket that listens there.
    pub(crate) fn start_nbd_server_at(
        &self,
        args: NbdServerArgs,
        listener: impl FnOnce(&SocketAddress) -> Reply<Listener>,
    ) -> Reply<()> {
        if self.server().is_some() {
            return Err(QmpError::generic("NBD server already running"));
        }
        if args.tls_authz.is_some() {
            return Err(QmpError::generic("'tls-authz' is not supported"));
        }
        let mut options = ServerOptions::default();
        if let Some(most) = args.max_connections {
            options.max_connections = most as usize;
        }
        if let Some(seconds) = args.handshake_max_seconds {
            options.handshake_limit = std::time::Duration::from_secs(seconds.into());
        }
        if let Some(id) = args.tls_creds {
            let creds = self.context.objects.tls_creds(&id, true)?;
            let config = blockmirror_nbd::server::x509_credentials(&creds.dir, creds.verify_peer)
                .map_err(qmp_error)?;
            options.tls = blockmirror_nbd::server::TlsPolicy::Require(config);
        }
        let address = args.addr.0.address()?;
        let listener = listener(&address)?;
        let server = Server::new(options).map_err(qmp_error)?;
        server.listen(listener).map_err(qmp_error)?;
        self.state.lock().server = Some(server);
        info!(?address, "NBD server listens");
        Ok(())
    }

    /// Ends the server with its exports, whatever the clients do, if there is one.
    pub(crate) fn end_all(&self) {
        // What hangs is cut off: the process ends.
        if self.server().is_some()
            && let Err(error) = self.stop_nbd_server()
        {
            warn!(error = error.desc, "the NBD server does not stop");
        }
    }

    /// `nbd-server-stop`: the exports go with the server.
    pub(crate) fn stop_nbd_server(&self) -> Reply<()> {
        let Some(server) = self.state.lock().server.take() else {
            return Err(QmpError::generic("NBD server not running"));
        };
        let stopped = server.stop().map_err(qmp_error);
        let entries = std::mem::take(&mut self.state.lock().exports);
        self.forget_exports(&entries);
        stopped
    }

    fn forget_exports(&self, entries: &BTreeMap<String, Entry>) {
        let attachments: Vec<_> = entries.values().map(|entry| entry.attachment).collect();
        self.context.detach_all(&attachments);
        for id in entries.keys() {
            info!(id, "export removed");
            self.context.events.emit(&BLOCK_EXPORT_DELETED, json!({"id": id}));
        }
    }

    /// Adds an export to the server.
    pub(crate) fn add_export(&self, new: &NewExport<'_>) -> Reply<()> {
        let Some(server) = self.server() else {
            return Err(QmpError::generic("NBD server not running"));
        };
        if !is_well_formed(new.id) {
            return Err(QmpError::generic("Invalid block export id"));
        }
        if self.state.lock().exports.contains_key(new.id) {
            return Err(QmpError::generic(format!("Block export id '{}' is already in use", new.id)));
        }
        let name = new.name.unwrap_or(new.node);
        if self.state.lock().exports.values().any(|entry| entry.name == name) {
            return Err(QmpError::generic(format!("NBD server already has export named '{name}'")));
        }
        let iothread = match new.iothread {
            None => None,
            Some(id) => {
                let thread = self.context.objects.iothread(id);
                Some(thread.ok_or_else(|| QmpError::generic(format!("iothread \"{id}\" not found")))?)
            }
        };
        let (tap, attachment) = {
            let mut graph = self.context.graph.lock();
            let node = graph.get(new.node).ok_or_else(|| {
                QmpError::generic(format!("Cannot find device='' nor node-name='{}'", new.node))
            })?;
            if new.writable && node.read_only {
                return Err(QmpError::generic("Cannot export read-only node as writable"));
            }
            let tap = Arc::clone(&node.tap);
            let perm = if new.writable { WRITE } else { Perms::READ };
            (tap, graph.attach(new.node, Parent::Export(new.id.to_owned()), perm, ALL_PERMS)?)
        };
        let mut export = Export::new(name, Arc::clone(&tap) as _)
            .writable(new.writable)
            .allocation_depth(new.allocation_depth)
            .on_cut_short(cut_short(new.id));
        if let Some(text) = new.description {
            export = export.description(text);
        }
        let contexts = new.bitmaps.iter().map(|bitmap| {
            let tap = match &bitmap.node {
                Some(other) => {
                    let graph = self.context.graph.lock();
                    let other = graph.find(other)?;
                    if other.name != new.node {
                        // Its bitmaps would go with that one's users.
                        graph.check_keeps_tap(&other.name)?;
                    }
                    Arc::clone(&other.tap)
                }
                None => Arc::clone(&tap),
            };
            self.context.exported_bitmaps.add(&tap, &bitmap.name, new.writable)
        });
        let added = contexts.collect::<Reply<Vec<_>>>().and_then(|contexts| {
            let export = contexts.into_iter().fold(export, Export::context);
            server.add(export).map_err(qmp_error)
        });
        if let Err(error) = added {
            self.context.detach_all(&[attachment]);
            return Err(error);
        }
        let entry = Entry { name: name.to_owned(), attachment, shutting_down: false, _iothread: iothread };
        self.state.lock().exports.insert(new.id.to_owned(), entry);
        info!(id = new.id, name, node = new.node, writable = new.writable, "export added");
        Ok(())
    }

    /// Begins to remove the export `id`, while it has clients only if `hard`: no client connects any more.
    /// What is returned waits for its requests and forgets it; other commands may run meanwhile.
    pub(crate) fn remove_export(self: &Arc<Self>, id: &str, hard: bool) -> Reply<Deferred> {
        let server = self.server();
        let (name, attachment) = {
            let mut state = self.state.lock();
            let entry = state.exports.get_mut(id);
            let entry = entry.ok_or_else(|| QmpError::generic(format!("Export '{id}' is not found")))?;
            if entry.shutting_down {
                return Err(QmpError::generic(format!("Export '{id}' is already shutting down")));
            }
            entry.shutting_down = hard;
            (entry.name.clone(), entry.attachment)
        };
        if let (Some(server), false) = (&server, hard) {
            server.remove(&name, RemoveMode::Safe).map_err(|error| match error {
                ServerError::ExportInUse { .. } => QmpError::generic(format!("export '{id}' still in use")),
                other => qmp_error(other),
            })?;
        }
        let (exports, id) = (Arc::clone(self), id.to_owned());
        Ok(Box::new(move || {
            // A device that hangs does not keep the export from being forgotten.
            let removed = match server {
                Some(server) if hard => server.remove(&name, RemoveMode::Hard).map_err(qmp_error),
                _ => Ok(()),
            };
            let entry = {
                let entries = &mut exports.state.lock().exports;
                // It went with the server if that was stopped meanwhile, and another one may have its id.
                let is_there = entries.get(&id).is_some_and(|entry| entry.attachment == attachment);
                if is_there { entries.remove_entry(&id) } else { None }
            };
            exports.forget_exports(&entry.into_iter().collect());
            removed.map(|()| Value::Null)
        }))
    }
}
