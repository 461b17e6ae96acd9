//! Listening sockets: made by [`Monitors::listen_unix`] or inherited, served by one thread each.
//!
//! A socket is created with mode 0600, and a peer that is neither root nor the user of this process is hung
//! up on before it is greeted: on a socket whose mode was changed, or that was inherited.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::connection::Connection;
use super::hub::Monitors;
use crate::peer::Peer;
use crate::sync::{Condvar, Mutex};

/// Clients at once; the next waits in the kernel.
const MAX_SESSIONS: usize = 64;
/// Clients that wait in the kernel.
const BACKLOG: i32 = 16;
/// How long to wait before looking again whether one more can be served.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A socket that clients connect to. [`Monitors::stop`] ends listening, and so does dropping it, which also
/// removes the socket's file; sessions go on.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<Shared>,
    monitors: Monitors,
    id: u64,
    thread: Option<JoinHandle<()>>,
    file: Option<SocketFile>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    accepted: u64,
    ended: bool,
}

impl Monitors {
    /// Listens on a new unix socket at `path`. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// A server listens there; what is there is not a socket; the path is longer than 107 bytes; any other
    /// failure to create the socket.
    pub fn listen_unix(&self, path: impl AsRef<Path>) -> io::Result<Listener> {
        let path = path.as_ref();
        let socket = bind(path).map_err(|error| {
            io::Error::new(error.kind(), format!("Failed to bind socket to {}: {error}", path.display()))
        })?;
        let file = SocketFile::of(path).ok();
        let mut listener = self.listen(socket)?;
        listener.file = file;
        Ok(listener)
    }

    /// Serves the clients of a unix socket that is listening already.
    ///
    /// # Errors
    /// No more descriptors or threads.
    pub fn listen(&self, socket: OwnedFd) -> io::Result<Listener> {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        let (woken, wake) = io::pipe()?;
        let shared = Arc::new(Shared::default());
        let thread = thread::Builder::new().name("qmp listen".into()).spawn({
            let (shared, monitors) = (Arc::clone(&shared), self.clone());
            move || {
                accept_all(&socket, &woken, &monitors, &shared);
                shared.state.lock().ended = true;
                shared.changed.notify_all();
            }
        })?;
        let id = self.add_listener(wake);
        Ok(Listener { shared, monitors: self.clone(), id, thread: Some(thread), file: None })
    }
}

impl Listener {
    /// Waits for the first client, or until listening has ended.
    pub fn wait_first(&self) {
        let state = self.shared.state.lock();
        drop(self.shared.changed.wait_while(state, |state| state.accepted == 0 && !state.ended));
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.monitors.end_listener(self.id);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say, and a panic in it was reported.
            drop(thread.join());
        }
        if let Some(file) = &self.file {
            file.remove();
        }
    }
}

/// The file of a socket, as it was when the socket was made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        // The process may be in another directory by the end.
        Ok(Self { path: std::path::absolute(path)?, identity: identity(path)? })
    }

    /// Removes it, unless it was replaced.
    fn remove(&self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            drop(std::fs::remove_file(&self.path));
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::FileTypeExt;
    let address = SocketAddrUnix::new(path)?;
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(io::ErrorKind::AddrInUse.into()),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        },
        Err(_) => {}
    }
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Linux gives the file the mode of the unbound socket: there is no moment at which others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Accepts until `woken` is hung up on.
fn accept_all(socket: &UnixListener, woken: &io::PipeReader, monitors: &Monitors, shared: &Shared) {
    let mut pause = false;
    loop {
        let mut fds =
            [PollFd::from_borrowed_fd(woken.as_fd(), PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        // Too many clients, or no descriptor left for one more: look again in a while.
        let paused = pause || monitors.sessions() >= MAX_SESSIONS;
        let polled = match paused {
            true => poll(&mut fds[..1], Some(&PAUSE)),
            false => poll(&mut fds, None),
        };
        match polled {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        pause = false;
        if fds[1].revents().is_empty() {
            continue;
        }
        match socket.accept() {
            Ok((client, _)) => {
                if admit(client, monitors).is_ok() {
                    shared.state.lock().accepted += 1;
                    shared.changed.notify_all();
                }
            }
            Err(error) => pause = error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}

fn admit(client: UnixStream, monitors: &Monitors) -> io::Result<()> {
    if !Peer::of(&client)?.is_trusted() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    client.set_nonblocking(false)?;
    monitors.serve(Connection::unix(client)?).map(drop)
}
