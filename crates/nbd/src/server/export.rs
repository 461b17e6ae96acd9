//! What is served: a device under a name, with what clients may know and do.

use std::fmt;
use std::sync::{Arc, Once};

use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Result, Visit, WriteFlags, ZeroFlags, read_lost_as_zeros,
};

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

/// Called with the first request that met a file which was cut short.
type OnCutShort = Arc<dyn Fn(&Error) + Send + Sync>;

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

    /// What to do, once, when a client reads data of a file that was cut short ([`ErrorKind::CutShort`]), or
    /// writes beside such data into one cluster: the client reads zeros there, so this is the only sign of
    /// it.
    #[must_use]
    pub fn on_cut_short(mut self, report: impl Fn(&Error) + Send + Sync + 'static) -> Self {
        self.on_cut_short = Some(Arc::new(report));
        self
    }

    /// Reads from the device; what a file that was cut short lacks is zeros.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let read = |buf: &mut [u8], offset| self.device.read_at(buf, offset);
        if let Some(error) = read_lost_as_zeros(&read, buf, offset)? {
            self.report_cut_short(&error);
        }
        Ok(())
    }

    /// Writes to the device; what a file that was cut short lacks around the bytes becomes zeros.
    pub(crate) fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.until_lost_is_zeros(|lost| {
            let flags = if lost { flags | WriteFlags::LOST_AS_ZEROS } else { flags };
            self.device.write_at(buf, offset, flags)
        })
    }

    /// Zeroes a range of the device, with the same around it.
    pub(crate) fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.until_lost_is_zeros(|lost| {
            let flags = if lost { flags | ZeroFlags::LOST_AS_ZEROS } else { flags };
            self.device.write_zeroes(range, flags)
        })
    }

    /// Asks for zeros only where a first try has met the loss, so that it is reported.
    fn until_lost_is_zeros(&self, write: impl Fn(bool) -> Result<()>) -> Result<()> {
        match write(false) {
            Err(error) if error.kind() == ErrorKind::CutShort => {
                self.report_cut_short(&error);
                write(true)
            }
            other => other,
        }
    }

    fn report_cut_short(&self, error: &Error) {
        self.cut_short.call_once(|| {
            if let Some(report) = &self.on_cut_short {
                report(error);
            }
        });
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

/// Something that is known about every byte of an export and can be asked for by block status: a dirty
/// bitmap.
pub trait MetaContext: Send + Sync {
    /// What clients call it: `namespace:leaf`, such as `qemu:dirty-bitmap:backup`.
    fn name(&self) -> &str;

    /// Visits runs of `range` with their flags, in order and without gaps, until `visit` stops it.
    ///
    /// Flags mean what the namespace says; in dirty bitmaps, 1 is dirty and 0 is clean. Neighbouring runs may
    /// have the same flags.
    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()>;
}

/// What [`Server::remove`](super::Server::remove) does with clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RemoveMode {
    /// Fails while there are any.
    Safe,
    /// Cuts them off. Requests that run are waited for.
    Hard,
}

/// An export as [`Server::exports`](super::Server::exports) lists it.
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
