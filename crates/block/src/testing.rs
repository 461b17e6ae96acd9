//! Doubles for tests: memory in place of files and disks, a log of what was durable when, faults on demand.
//!
//! | double | what it is for |
//! |---|---|
//! | [`MemoryStorage`] | what a format lives in, without a file |
//! | [`MemoryDisk`] | a disk of any geometry, with an allocation map, a backing disk and a log |
//! | [`RecordingStorage`] | every image that a crash could leave ([`CrashPoint`]) |
//! | [`FaultStorage`], [`FaultDisk`] | the n-th operation fails ([`Fault`]), or is held until released ([`Gate`]) |
//! | [`CorruptingDisk`] | one byte is stored wrongly, without an error |
//! | [`Rng`] | random numbers of a seed, for all random tests |
//! | [`locks_taken`] | the mutexes that a call takes |
//!
//! They keep the contracts of [`Storage`] and [`BlockDevice`](crate::BlockDevice) to the
//! letter, so that a test that passes on them says something. Contents are sparse: a disk of 8 TiB with a few
//! runs in it is small.

mod allocation;
mod corrupting_disk;
mod crash;
mod fault;
mod fault_disk;
mod fault_storage;
mod gate;
mod log;
mod memory_disk;
mod memory_storage;
#[cfg(shuttle)]
mod model;
mod recording;
mod rng;
mod sparse;
#[cfg(test)]
mod tests;

pub use corrupting_disk::CorruptingDisk;
pub use crash::{CrashPoint, CrashPoints, Torn};
pub use fault::{Done, Fault, Faults, OpKind};
pub use fault_disk::FaultDisk;
pub use fault_storage::FaultStorage;
pub use gate::Gate;
pub use log::Logged;
pub use memory_disk::{DiskOp, MemoryDisk};
pub use memory_storage::MemoryStorage;
#[cfg(shuttle)]
pub use model::explore;
pub use recording::RecordingStorage;
pub use rng::Rng;

use crate::{Error, ErrorKind, HostRun, Result, Storage};

/// The block of clones between storages in memory.
const CLONE_BLOCK: u64 = 4096;

/// A clone of storages in memory, which share nothing: the bytes are written.
fn clone_as_write(to: &dyn Storage, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
    if [offset, run.offset, len].iter().any(|at| !at.is_multiple_of(CLONE_BLOCK)) {
        return Err(Error::new(ErrorKind::Unsupported, "clone").at(offset).because("not whole blocks"));
    }
    if run.storage.len()? < run.offset.saturating_add(len) {
        return Err(Error::new(ErrorKind::Unsupported, "clone").at(offset).because("past the end"));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| Error::new(ErrorKind::LimitExceeded, "clone"))?];
    run.storage.read_at(&mut bytes, run.offset)?;
    to.write_at(&bytes, offset)?;
    Ok(1)
}

/// How often the calling thread has taken a [`Mutex`](crate::sync::Mutex), a condition variable's wait aside;
/// `None` in builds without debug assertions and under the model checker, which do not count.
pub fn locks_taken() -> Option<u64> {
    #[cfg(not(shuttle))]
    let taken = crate::sync::locks_taken();
    #[cfg(shuttle)]
    let taken = None;
    taken
}
