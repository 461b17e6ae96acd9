//! Where clients come in: Unix and TCP sockets, made here or inherited.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
};

use super::ServerError;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that listens. Given to [`Server::listen`](super::Server::listen), which closes it when the server
/// stops.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    /// A socket file that was made here, with its device and inode number: it is removed at the end if it is
    /// still that one.
    file: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    /// Listens at `path`. A socket that is not served any more is replaced; the file goes when the server
    /// stops.
    ///
    /// # Errors
    /// Another server answers there, something that is no socket is there, or the system refuses.
    pub fn unix(path: impl AsRef<Path>) -> Result<Self, ServerError> {
        Self::bind_unix(path.as_ref(), |path| Ok(UnixListener::bind(path)?.into()))
    }

    /// The same; the file has the permissions `mode`, less those that the umask takes away, from the moment
    /// at which it is there. Who may write to it may connect.
    ///
    /// ```
    /// use std::os::unix::fs::PermissionsExt;
    /// use blockmirror_nbd::server::Listener;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("nbd.sock");
    /// let listener = Listener::unix_with_mode(&path, 0o600)?;
    /// assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
    /// assert_eq!(listener.unix_path(), Some(path));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for [`unix`](Self::unix).
    pub fn unix_with_mode(path: impl AsRef<Path>, mode: u32) -> Result<Self, ServerError> {
        Self::bind_unix(path.as_ref(), |path| {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // The file gets the mode of the socket.
            fchmod(&socket, Mode::from_raw_mode(mode))?;
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        })
    }

    fn bind_unix(path: &Path, bind: impl FnOnce(&Path) -> io::Result<OwnedFd>) -> Result<Self, ServerError> {
        let failed = |cause| ServerError::Listen { address: path.display().to_string(), cause };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ServerError::NotASocket { path: path.to_owned() });
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(failed(e)),
                _ => return Err(ServerError::SocketInUse { path: path.to_owned() }),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        let listener = bind(path).map_err(failed)?;
        let made = std::fs::symlink_metadata(path).map_err(failed)?;
        let mut this = Self::from_fd(listener)?;
        // The process may be in another directory by the end.
        let absolute = std::path::absolute(path).map_err(failed)?;
        this.file = Some((absolute, made.dev(), made.ino()));
        Ok(this)
    }

    /// Listens at `host` (a name or an address) and `port`; port 0 is any that is free.
    ///
    /// # Errors
    /// The name stands for nothing, or the system refuses.
    pub fn tcp(host: &str, port: u16) -> Result<Self, ServerError> {
        let listener = TcpListener::bind((host, port))
            .map_err(|cause| ServerError::Listen { address: format!("{host}:{port}"), cause })?;
        Self::from_fd(listener.into())
    }

    /// Takes a socket over that listens already.
    ///
    /// # Errors
    /// It does not listen, is no stream socket, or no socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, ServerError> {
        match sockopt::socket_acceptconn(&fd) {
            Ok(true) => {}
            Ok(false) => {
                return Err(ServerError::Activation { reason: "the socket does not listen".into() });
            }
            Err(e) => {
                return Err(ServerError::System { what: "use a listening socket", cause: e.into() });
            }
        }
        if sockopt::socket_type(&fd) != Ok(SocketType::STREAM) {
            return Err(ServerError::Activation { reason: "the socket is no stream socket".into() });
        }
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|e| ServerError::System { what: "use a listening socket", cause: e.into() })?;
        Ok(Self { fd, file: None })
    }

    /// The address, if it is a TCP socket; with the port that the system chose.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        rustix::net::getsockname(&self.fd).ok().and_then(|address| SocketAddr::try_from(address).ok())
    }

    /// The path, if it is a Unix socket that has one.
    pub fn unix_path(&self) -> Option<PathBuf> {
        let address = rustix::net::getsockname(&self.fd).ok()?;
        let path = SocketAddrUnix::try_from(address).ok()?.path()?.into_owned();
        Some(OsString::from_vec(path.into_bytes()).into())
    }

    /// Accepts a connection; [`io::ErrorKind::WouldBlock`] if none waits.
    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, dev, ino)) = &self.file
            && std::fs::symlink_metadata(path).is_ok_and(|m| m.dev() == *dev && m.ino() == *ino)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}
