//! What the command line of `qemu-storage-daemon` sets up: `--object`, `--blockdev`, `--chardev`,
//! `--nbd-server`, `--export`, `--monitor`, each in its own syntax.
//!
//! The command line interface collects the texts; [`Startup::apply`] carries them out, in the order just
//! given and, of one kind, in the order of the command line. Sockets that were inherited are taken and
//! checked before: nothing that is opened later can be taken for one.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockmirror_block::sync::Mutex;
use blockmirror_nbd::server::Listener;
use blockmirror_qmp::schema::Object;
use blockmirror_qmp::{Connection, QmpError, keyval};

use crate::Reply;
use crate::arguments::{Arguments, arguments, choice, object_of};
use crate::command::export::{EXPORT_OPTIONS, ExportArgs};
use crate::daemon::Daemon;
use crate::driver::BLOCKDEV_OPTIONS;
use crate::errors::{StartupError, qmp_error};
use crate::export::listener;
use crate::inherited::{self, SocketState};
use crate::schema::{NbdServerArgs, OBJECT_OPTIONS, SocketAddress, SocketAddressLegacy, SocketArg};

/// How long nodes and exports may keep monitors waiting.
const OPEN_LIMIT: Duration = Duration::from_secs(3);

/// What a daemon starts with: the values of its options, as typed.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Startup {
    /// `--object`: `TYPE,id=..`.
    pub objects: Vec<String>,
    /// `--blockdev`: options of `blockdev-add`.
    pub blockdevs: Vec<String>,
    /// `--chardev`: `socket,id=..,path=..|fd=..` or `stdio,id=..`.
    pub chardevs: Vec<String>,
    /// `--nbd-server`.
    pub nbd_server: Option<String>,
    /// `--export`: options of `block-export-add`.
    pub exports: Vec<String>,
    /// `--monitor`: `chardev=..`.
    pub monitors: Vec<String>,
}

choice! {
    enum Backend("ChardevBackendKind", "What kind.") {
        Socket = "socket", "a Unix socket";
        Stdio = "stdio", "standard input and output";
    }
}

arguments! {
    struct ChardevArgs("ChardevOptions", "Where a monitor's client is.") {
        backend: Backend = "backend", "what kind";
        id: String = "id", "its name";
        path: Option<String> = "path", "path of the socket";
        fd: Option<String> = "fd", "number or name of an inherited socket, connected or listening";
        server: Option<bool> = "server", "whether to listen" [default "off"];
        wait: Option<bool> = "wait", "whether to wait for the first client before going on" [default "on"];
        _reconnect: Option<u32> = "reconnect", "without effect";
        _signal: Option<bool> = "signal", "without effect";
    }
}

choice! {
    enum MonitorMode("MonitorMode", "What is spoken.") {
        Control = "control", "QMP";
    }
}

arguments! {
    struct MonitorArgs("MonitorOptions", "A monitor.") {
        chardev: String = "chardev", "where its client is";
        _id: Option<String> = "id", "its name; without effect";
        _mode: Option<MonitorMode> = "mode", "what is spoken" [default "control"];
        _pretty: Option<bool> = "pretty", "without effect" [default "off"];
    }
}

arguments! {
    struct NbdServerOptions("NbdServerOptions", "The NBD server.") {
        addr: SocketArg = "addr", "where it listens";
        handshake_max_seconds: Option<u32> = "handshake-max-seconds", "how long a client may take to \
         negotiate"
            [default "10"];
        tls_creds: Option<String> = "tls-creds", "id of TLS credentials";
        tls_authz: Option<String> = "tls-authz", "refused";
        max_connections: Option<u32> = "max-connections", "connections at the same time; 0 is no limit"
            [default "100"];
    }
}

impl From<NbdServerOptions> for NbdServerArgs {
    fn from(options: NbdServerOptions) -> Self {
        Self {
            addr: SocketAddressLegacy(options.addr),
            handshake_max_seconds: options.handshake_max_seconds,
            tls_creds: options.tls_creds,
            tls_authz: options.tls_authz,
            max_connections: options.max_connections,
        }
    }
}

/// Reads an option of the command line.
fn parse<T: Arguments>(text: &str, object: &'static Object, implied: Option<&str>) -> Reply<T> {
    T::parse(keyval::options(text, object, implied)?.map())
}

impl Startup {
    /// Sets `daemon` up. Nodes and exports that take long to open, because a file or server hangs, do not
    /// keep monitors back: they come when they come, and should one fail then, the daemon ends with
    /// [`Daemon::late_failure`].
    ///
    /// # Errors
    /// The first option that could not be carried out. What came before it stays.
    pub fn apply(&self, daemon: &Arc<Daemon>) -> Result<(), StartupError> {
        let mut chardevs = BTreeMap::new();
        each("--chardev", &self.chardevs, |text| {
            let chardev = Chardev::parse(text)?;
            match chardevs.insert(chardev.args.id.clone(), chardev) {
                None => Ok(()),
                Some(old) => Err(QmpError::generic(format!("Duplicate ID '{}' for chardev", old.args.id))),
            }
        })?;
        let mut nbd_socket = None;
        each("--nbd-server", self.nbd_server.as_slice(), |text| {
            let options: NbdServerOptions = parse(text, object_of::<NbdServerOptions>(), None)?;
            if let SocketAddress::Fd(name) = options.addr.address()? {
                nbd_socket = Some(inherit(&name, SocketState::Listening)?);
            }
            Ok(())
        })?;
        each("--object", &self.objects, |text| {
            daemon.services.context.objects.add(parse(text, &OBJECT_OPTIONS, Some("qom-type"))?)
        })?;
        self.open_all(daemon, nbd_socket)?;
        each("--monitor", &self.monitors, |text| {
            let MonitorArgs { chardev: name, .. } = parse(text, object_of::<MonitorArgs>(), Some("chardev"))?;
            let chardev = chardevs
                .remove(&name)
                .ok_or_else(|| QmpError::generic(format!("chardev \"{name}\" not found")))?;
            monitor(daemon, chardev)
        })
    }

    /// Opens nodes and exports on a thread of their own, and waits for it for a while. The NBD server listens
    /// at `nbd_socket` if it was inherited.
    fn open_all(&self, daemon: &Arc<Daemon>, nbd_socket: Option<OwnedFd>) -> Result<(), StartupError> {
        let (options, opener) = (self.clone(), Arc::clone(daemon));
        let (done, is_done) = mpsc::sync_channel::<Result<(), StartupError>>(0);
        let nbd_socket = Arc::new(Mutex::new(nbd_socket));
        let socket = Arc::clone(&nbd_socket);
        let work = move || {
            let result = options.open_nodes_and_exports(&opener, &socket);
            // The waiter is gone where it took long.
            if let Err(mpsc::SendError(Err(error))) = done.send(result) {
                opener.fail_late(error);
            }
        };
        if thread::Builder::new().name("open".into()).spawn(work).is_err() {
            return self.open_nodes_and_exports(daemon, &nbd_socket);
        }
        is_done.recv_timeout(OPEN_LIMIT).unwrap_or(Ok(()))
    }

    fn open_nodes_and_exports(
        &self,
        daemon: &Arc<Daemon>,
        nbd_socket: &Mutex<Option<OwnedFd>>,
    ) -> Result<(), StartupError> {
        each("--blockdev", &self.blockdevs, |text| {
            daemon.services.context.add_node(keyval::options(text, &BLOCKDEV_OPTIONS, Some("driver"))?.map())
        })?;
        each("--nbd-server", self.nbd_server.as_slice(), |text| {
            let options: NbdServerOptions = parse(text, object_of::<NbdServerOptions>(), None)?;
            daemon.services.exports.start_nbd_server_at(options.into(), |address| {
                match nbd_socket.lock().take() {
                    Some(socket) => Listener::from_fd(socket).map_err(qmp_error),
                    None => listener(address),
                }
            })
        })?;
        each("--export", &self.exports, |text| {
            let args = keyval::options(text, &EXPORT_OPTIONS, Some("type"))?;
            let _nodes = daemon.services.context.lock_nodes(args.map(), true);
            daemon.services.add_export_by(&ExportArgs::parse(args.map())?)
        })
    }
}

fn each(
    option: &'static str,
    texts: &[String],
    mut apply: impl FnMut(&str) -> Reply<()>,
) -> Result<(), StartupError> {
    texts.iter().try_for_each(|text| {
        apply(text).map_err(|error| StartupError { option, text: text.clone(), reason: error.desc })
    })
}

/// Where a monitor's client is, with the socket if that was inherited.
struct Chardev {
    args: ChardevArgs,
    socket: Option<OwnedFd>,
}

impl Chardev {
    fn parse(text: &str) -> Reply<Self> {
        let args = keyval::flat(text, object_of::<ChardevArgs>(), Some("backend"))?;
        let args = ChardevArgs::parse(args.map())?;
        let wanted = if args.server == Some(true) { SocketState::Listening } else { SocketState::Connected };
        let socket = args.fd.as_ref().map(|name| inherit(name, wanted)).transpose()?;
        Ok(Self { args, socket })
    }
}

fn inherit(name: &str, wanted: SocketState) -> Reply<OwnedFd> {
    inherited::take(name, wanted).map_err(|e| QmpError::generic(e.to_string()))
}

fn monitor(daemon: &Arc<Daemon>, chardev: Chardev) -> Reply<()> {
    let Chardev { args: chardev, socket } = chardev;
    let monitors = daemon.monitors();
    if chardev.backend == Backend::Stdio {
        monitors.serve(Connection::stdio().map_err(qmp_error)?).map_err(qmp_error)?;
        return Ok(());
    }
    let is_server = chardev.server.unwrap_or(false);
    let wait = chardev.wait.unwrap_or(true);
    let listener = match (chardev.path.as_deref(), socket) {
        (Some(path), None) if is_server => monitors.listen_unix(PathBuf::from(path)).map_err(qmp_error)?,
        (Some(path), None) => {
            let socket = std::os::unix::net::UnixStream::connect(path)
                .map_err(|e| QmpError::generic(format!("Failed to connect to '{path}': {e}")))?;
            monitors.serve(Connection::unix(socket).map_err(qmp_error)?).map_err(qmp_error)?;
            return Ok(());
        }
        (None, Some(socket)) => {
            if !is_server {
                monitors.serve(Connection::fd(socket).map_err(qmp_error)?).map_err(qmp_error)?;
                return Ok(());
            }
            monitors.listen(socket).map_err(qmp_error)?
        }
        _ => return Err(QmpError::generic("a socket is given by its path or its fd")),
    };
    if is_server && wait {
        listener.wait_first();
    }
    daemon.keep_listener(listener);
    Ok(())
}
