//! An export of an NBD server as the server describes it in another context than that of what it holds.
//! Called by the command `map`; every other opening refuses a name that asks for it.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Error as BlockError, ErrorKind};
use blockmirror_nbd::NbdUri;

use crate::error::{Error, Result};
use crate::open::OpenOptions;

impl OpenOptions {
    /// The export `path` as its server describes it in the context that the image's name asks for in place of
    /// what it holds (`x-dirty-bitmap`); `None` if it does not. Its extents have the context's flags, as
    /// [`blockmirror_nbd::ClientOptions::context`] says.
    ///
    /// # Errors
    /// The server cannot be reached, or does not have the context.
    pub fn open_context(&self, path: impl AsRef<Path>) -> Result<Option<Arc<dyn BlockDevice>>> {
        let path = path.as_ref();
        let Some(context) = &self.given_node().context else { return Ok(None) };
        let uri = NbdUri::try_from(path).map_err(|cause| Error::Uri { path: path.to_owned(), cause })?;
        let client = self.access(false, false).nbd.client(uri).context(context).open()?;
        if !client.has_block_status() {
            let error = BlockError::new(ErrorKind::NotFound, "open").in_file(path.display().to_string());
            return Err(error.because(format!("the server has no context {context}")).into());
        }
        Ok(Some(Arc::new(client)))
    }

    /// Reading and copying need to know what the export holds.
    pub(crate) fn refuse_context(&self, path: &Path) -> Result<()> {
        if self.given_node().context.is_none() {
            return Ok(());
        }
        let error = BlockError::new(ErrorKind::InvalidInput, "open").in_file(path.display().to_string());
        Err(error.because("x-dirty-bitmap shows a context, for map alone").into())
    }
}
