//! The device below a tap, and the end of its use after a pivot.
//!
//! Each call of the tap, and each ticket, has a reference to the [`Below`] that it began with. A pivot stores
//! another one: from then on no reference to the old one is made, and the last that is dropped ends its use.
//! That costs a read nothing: it has the reference anyway, so that the device outlives the call.
//!
//! Must hold: a `Below` that a pivot has replaced is not dropped under the lock of the tap's state: what is
//! called then takes the lock of the job.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{self as block, BlockDevice, ByteRange, Error as DiskError};

/// Where the tap forwards to.
#[derive(Debug)]
pub(super) struct Below {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) len: u64,
    last_use: Arc<LastUse>,
}

/// The moment from which no call and no ticket of the tap uses a device below any more.
#[derive(Debug, Default)]
pub(crate) struct LastUse(Mutex<Use>);

/// *Guards* what is called then. *Order*: leaf. *Not under it*: the call.
#[derive(Default)]
enum Use {
    #[default]
    Used,
    /// This is called when it ends.
    Awaited(Box<dyn FnOnce() + Send>),
    Ended,
}

impl fmt::Debug for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Used => "Used",
            Self::Awaited(_) => "Awaited",
            Self::Ended => "Ended",
        })
    }
}

impl LastUse {
    /// Has `call` called when the use ends, by the thread that ends it; false if it has ended: then it is not
    /// called.
    pub(crate) fn then(&self, call: impl FnOnce() + Send + 'static) -> bool {
        let mut state = self.0.lock();
        if matches!(*state, Use::Ended) {
            return false;
        }
        *state = Use::Awaited(Box::new(call));
        true
    }
}

impl Below {
    pub(super) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { len: device.len(), device, last_use: Arc::default() }
    }

    pub(super) fn last_use(&self) -> Arc<LastUse> {
        Arc::clone(&self.last_use)
    }

    pub(super) fn check_bounds(&self, operation: &'static str, range: ByteRange) -> block::Result<()> {
        if range.end() <= self.len {
            return Ok(());
        }
        let error = DiskError::out_of_bounds(operation, range.start(), range.len(), self.len);
        Err(error.in_file(self.device.name()))
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let before = std::mem::replace(&mut *self.last_use.0.lock(), Use::Ended);
        if let Use::Awaited(call) = before {
            call();
        }
    }
}
