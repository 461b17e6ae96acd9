//! The log of a live mirror on any storage.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::ops::Range;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{Error as DiskError, ErrorKind, Result, Storage};
use blockmirror_checkpoint::{ActivityLog, Error, Identity};
use blockmirror_mirror::{LogStart, RegionLog};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct LogOnStorage {
    log: Mutex<ActivityLog>,
    resumed: bool,
}

impl LogOnStorage {
    /// A new one, of a disk of `len` bytes in regions of `region` bytes.
    pub(crate) fn create(storage: Arc<dyn Storage>, len: u64, region: u64) -> Arc<Self> {
        let log = ActivityLog::create(storage, len, region, Identity::new()).unwrap();
        Arc::new(Self { log: Mutex::new(log), resumed: false })
    }

    /// One that another job has had.
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Arc<Self> {
        let log = ActivityLog::open(storage).unwrap();
        Arc::new(Self { log: Mutex::new(log), resumed: true })
    }
}

fn failed(error: Error) -> DiskError {
    match error {
        Error::Storage(error) => error,
        error => DiskError::new(ErrorKind::Io, "write log").because(error.to_string()),
    }
}

impl RegionLog for LogOnStorage {
    fn name(&self) -> &str {
        "log"
    }

    fn region_size(&self) -> u64 {
        self.log.lock().region_size()
    }

    fn attach(&self) -> Result<LogStart> {
        let log = self.log.lock();
        Ok(match self.resumed {
            true => LogStart::resumed(log.marked().collect()),
            false => LogStart::new_log(log.disk_len()),
        })
    }

    fn update(&self, mark: &[Range<u64>], clear: &[Range<u64>]) -> Result<()> {
        self.log.lock().update(mark, clear).map_err(failed)
    }

    fn end(&self) -> Result<()> {
        self.log.lock().end().map_err(failed)
    }

    fn invalidate(&self) -> Result<()> {
        self.log.lock().invalidate().map_err(failed)
    }
}
