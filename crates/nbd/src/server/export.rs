//! What is served: a device under a name, with what clients may know and do.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ByteRange, Result, Visit};

/// A device under a name. Made by the owner of a server, given to [`Server::add`](super::Server::add).
#[derive(Clone)]
pub struct Export {
    pub(crate) name: String,
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) description: String,
    pub(crate) writable: bool,
    pub(crate) allocation_depth: bool,
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
}

impl Export {
    /// `device` as `name`, read-only. The name may be empty: that is the export of clients that name none.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Self {
        Self {
            name: name.into(),
            device,
            description: String::new(),
            writable: false,
            allocation_depth: false,
            contexts: Vec::new(),
        }
    }

    /// Words for people, shown by clients that list exports.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }

    /// Whether clients may write.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable;
        self
    }

    /// Whether the meta context `qemu:allocation-depth` is offered.
    #[must_use]
    pub fn allocation_depth(mut self, offered: bool) -> Self {
        self.allocation_depth = offered;
        self
    }

    /// Offers one more meta context.
    #[must_use]
    pub fn context(mut self, context: Arc<dyn MetaContext>) -> Self {
        self.contexts.push(context);
        self
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("device", &self.device)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

/// Something that is known about every byte of an export and can be asked for by block status: a dirty bitmap.
pub trait MetaContext: Send + Sync {
    /// What clients call it: `namespace:leaf`, such as `qemu:dirty-bitmap:backup`.
    fn name(&self) -> &str;

    /// Visits runs of `range` with their flags, in order and without gaps, until told to stop.
    ///
    /// Flags mean what the namespace says; in dirty bitmaps, 1 is dirty and 0 is clean. Neighbouring runs may have the
    /// same flags.
    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()>;
}

/// What [`Server::remove`](super::Server::remove) does with clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveMode {
    /// Fails while there are any.
    Safe,
    /// Cuts them off. Requests that run are waited for.
    Hard,
}

/// An export as [`Server::exports`](super::Server::exports) tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Its name.
    pub name: String,
    /// Its words for people.
    pub description: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Connections in the transmission phase.
    pub clients: usize,
}
