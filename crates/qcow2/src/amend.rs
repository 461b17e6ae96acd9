//! Changing the options of an existing image: version, lazy refcounts, refcount width, data file, size.
//!
//! Called by `image`, for the command. The image is opened anew for each part, in this order, as each builds
//! on what the one before has made durable:
//!
//! ```text
//!   checks that change nothing (`plan`)
//!     -->  version 2 becomes 3 (`version`)  -->  data file, lazy refcounts (the header)
//!     -->  refcount width (`width`)  -->  size (a resize)  -->  version 3 becomes 2 (`version`)
//! ```
//!
//! What must hold: after each write the header is the old one or the new one, and what it says is true. So an
//! amendment that was cut short leaves a sound image that has the first of the new options, and can be
//! repeated.

mod options;
mod plan;
mod snapshot_zeros;
mod snapshots;
mod version;
mod width;

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Error as BlockError, ErrorKind, Storage, Visit};

pub use self::options::AmendOptions;
use self::plan::Plan;
use crate::error::Result;
use crate::format::feature;
use crate::format::header::{FileName, Header};
use crate::format::relist::{FeatureNames, NewList, change_list};
use crate::image::{OpenOptions, Qcow2};

/// Where a version 3 header has its compatible features, and its autoclear features.
const HEADER_COMPATIBLE: u64 = 80;
const HEADER_AUTOCLEAR: u64 = 88;

/// Changes the options of the image in `storage`, which nothing else has open. `open` has its backing device
/// and its data file.
///
/// `progress` is called with how much of how much metadata has been worked through. If it breaks, or the
/// caller is cancelled, what was done before stays.
///
/// ```
/// use std::ops::ControlFlow;
/// use std::sync::Arc;
/// use blockmirror_block::testing::MemoryStorage;
/// use blockmirror_qcow2::{AmendOptions, CreateOptions, Header, OpenOptions, amend};
///
/// let storage = Arc::new(MemoryStorage::new());
/// CreateOptions::new(1 << 20).create(&*storage, None)?;
/// let mut options = AmendOptions::default();
/// options.refcount_bits = Some(1);
/// amend(storage.clone(), &OpenOptions::new(), &options, &mut |_, _| ControlFlow::Continue(()))?;
/// assert_eq!(Header::read(&*storage)?.refcount_bits(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Option`](crate::Error::Option) for what cannot be changed, before anything is; as
/// [`OpenOptions::open`] for writing; what reading and writing fails with. The change can be repeated then.
pub fn amend(
    storage: Arc<dyn Storage>,
    open: &OpenOptions,
    options: &AmendOptions,
    progress: &mut dyn FnMut(u64, u64) -> Visit,
) -> Result<()> {
    let open = || open.clone().writable(true).open(Arc::clone(&storage));
    let mut meter = Meter { done: 0, total: 0, progress };
    // Opening repairs a dirty image, and refuses what must not be written.
    let plan = Plan::new(&open()?, options, &mut meter)?;
    if plan.upgrades() {
        open()?.upgrade()?;
    }
    open()?.amend_header(&plan)?;
    if let Some(order) = plan.refcount_order {
        let metadata = open()?.into_metadata()?;
        width::change(&*storage, order, &metadata, &mut meter)?;
    }
    if let Some(size) = plan.size {
        let image = open()?;
        image.resize(size, true)?;
        image.store_bitmaps()?;
    }
    if plan.downgrades() {
        open()?.downgrade(&mut meter)?;
    }
    Ok(())
}

/// How far an amendment is.
struct Meter<'a> {
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64) -> Visit,
}

impl Meter<'_> {
    /// `bytes` more are to be worked through.
    fn expect(&mut self, bytes: u64) {
        self.total += bytes;
    }

    /// `bytes` of them have been.
    fn step(&mut self, storage: &dyn Storage, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.total = self.total.max(self.done);
        if (self.progress)(self.done, self.total).is_continue() {
            return Ok(());
        }
        Err(BlockError::new(ErrorKind::Cancelled, "amend").in_file(storage.name()).into())
    }
}

impl Qcow2 {
    /// Changes what fits into one sector of the header.
    fn amend_header(&self, plan: &Plan) -> Result<()> {
        let _no_write_back = self.write_back.lock();
        let header = self.header();
        if let Some(name) = &plan.data_file {
            let cluster = self.first_cluster()?;
            let length = header.header_length as usize;
            let fixed = cluster[..length].to_vec();
            let names = FeatureNames::Kept;
            let new = NewList { fixed, data_file: Some(name), feature_names: names, option: "data_file" };
            let steps = change_list(&cluster, length, &new)?;
            let is_named = |header: &Header| {
                header.data_file.as_ref().and_then(|data| data.name.as_ref()).map(FileName::as_bytes)
                    == Some(name)
            };
            self.write_steps("amend", cluster, &steps, is_named)?;
        }
        if let Some(lazy) = plan.lazy_refcounts {
            let others = header.compatible & !feature::COMPATIBLE_LAZY_REFCOUNTS;
            let word = others | if lazy { feature::COMPATIBLE_LAZY_REFCOUNTS } else { 0 };
            self.write_header_word(HEADER_COMPATIBLE, word)?;
        }
        if plan.data_file_not_raw {
            let word = header.autoclear & !feature::AUTOCLEAR_RAW_DATA_FILE;
            self.write_header_word(HEADER_AUTOCLEAR, word)?;
        }
        Ok(())
    }
}
