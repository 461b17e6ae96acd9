//! What is served: a device under a name, with what clients may know and do.

use std::fmt;
use std::sync::{Arc, Once};

use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, Result, Visit};

/// A device under a name. Made by the owner of a server, given to [`Server::add`](super::Server::add).
#[derive(Clone)]
pub struct Export {
    pub(crate) name: String,
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) description: String,
    pub(crate) writable: bool,
    pub(crate) allocation_depth: bool,
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
    on_cut_short: Option<OnCutShort>,
    cut_short: Arc<Once>,
}

/// Called with the first read that met a file which was cut short.
type OnCutShort = Arc<dyn Fn(&Error) + Send + Sync>;

/// A request that meets a file which was cut short is divided down to this.
const SECTOR: u64 = 512;

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
            on_cut_short: None,
            cut_short: Arc::new(Once::new()),
        }
    }

    /// What to do, once, when a client reads data of a file that was cut short ([`ErrorKind::CutShort`]): the client reads zeros
    /// there, so this is the only sign of it.
    #[must_use]
    pub fn on_cut_short(mut self, report: impl Fn(&Error) + Send + Sync + 'static) -> Self {
        self.on_cut_short = Some(Arc::new(report));
        self
    }

    /// Reads from the device; what a file that was cut short lacks is zeros.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let result = self.device.read_at(buf, offset);
        let Err(error) = &result else { return result };
        if error.kind() != ErrorKind::CutShort {
            return result;
        }
        self.cut_short.call_once(|| {
            if let Some(report) = &self.on_cut_short {
                report(error);
            }
        });
        // A file lacks whole sectors, so a border of sectors near the middle is where the request is divided.
        let middle = offset + buf.len() as u64 / 2;
        let below = middle / SECTOR * SECTOR;
        let border = if below > offset { below } else { (offset + 1).next_multiple_of(SECTOR) };
        match usize::try_from(border - offset) {
            Ok(at) if at < buf.len() => {
                let (front, back) = buf.split_at_mut(at);
                self.read_at(front, offset)?;
                self.read_at(back, border)
            }
            // It lies in one sector.
            _ => {
                buf.fill(0);
                Ok(())
            }
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
