//! How exports of NBD servers are opened, where a path is a URI.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{BlockDevice, Error as BlockError, ErrorKind};
use blockmirror_nbd::{ClientOptions, NbdUri};

use crate::error::{Error, Result};
use crate::open::OpenOptions;

/// How a connection to an NBD server is made, and how long a lost one is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NbdOptions {
    /// Most connections to one export; `None` leaves it to the client.
    pub connections: Option<u16>,
    /// How long requests wait for a server that has gone, before they fail.
    pub reconnect_delay: Duration,
    /// How long opening waits for a server that is not there yet.
    pub open_timeout: Duration,
    /// How long a request waits for a server that does not answer, before the connection counts as lost;
    /// `None` as long as its host acknowledges.
    pub io_timeout: Option<Duration>,
}

impl NbdOptions {
    /// One attempt to open, as many connections as the client likes, and no waiting.
    pub const fn new() -> Self {
        Self {
            connections: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            io_timeout: None,
        }
    }

    pub(crate) fn apply(self, mut options: ClientOptions) -> ClientOptions {
        if let Some(connections) = self.connections {
            options = options.connections(connections);
        }
        options
            .reconnect_delay(self.reconnect_delay)
            .open_timeout(self.open_timeout)
            .io_timeout(self.io_timeout)
    }
}

impl OpenOptions {
    /// The export `path` as its server describes it in the context that the image's name asks for in place of
    /// what it holds (`x-dirty-bitmap`); `None` if it does not. Its extents have the context's flags, as
    /// [`ClientOptions::context`] says.
    ///
    /// # Errors
    /// The server cannot be reached, or does not have the context.
    pub fn open_context(&self, path: impl AsRef<Path>) -> Result<Option<Arc<dyn BlockDevice>>> {
        let path = path.as_ref();
        let Some(context) = &self.given_node().context else { return Ok(None) };
        let uri = NbdUri::try_from(path).map_err(|cause| Error::Uri { path: path.to_owned(), cause })?;
        let client = self.access(false, false).nbd.apply(ClientOptions::new(uri)).context(context).open()?;
        if !client.has_block_status() {
            let error = BlockError::new(ErrorKind::NotFound, "open").in_file(path.display().to_string());
            return Err(error.because(format!("the server has no context {context}")).into());
        }
        Ok(Some(Arc::new(client)))
    }

    /// Whoever reads or copies the export needs to know what it holds.
    pub(crate) fn refuse_context(&self, path: &Path) -> Result<()> {
        if self.given_node().context.is_none() {
            return Ok(());
        }
        let error = BlockError::new(ErrorKind::InvalidInput, "open").in_file(path.display().to_string());
        Err(error.because("x-dirty-bitmap shows a context, for map alone").into())
    }
}
