//! The block device: what a virtual disk can do, and what its callers may rely on.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::{
    ByteRange, CloneUnits, Error, ErrorKind, Extent, Geometry, HostRun, Result, Storage, Visit, WriteFlags,
    ZeroFlags,
};

/// A virtual disk.
///
/// # Contract
///
/// - **Length** is fixed while there are writers; any byte offset and length is a legal request (devices
///   do read-modify-write where their format or medium needs alignment).
/// - **Bounds**: the device checks them. A request past the end fails with [`ErrorKind::OutOfBounds`] and
///   touches nothing. An empty request inside the disk succeeds. No offset or length panics.
/// - **Concurrency**: every method may be called from any thread at any time. Calls that do not overlap do
///   not disturb each other. Of overlapping writes, each byte ends as one of them wrote it; an overlapping
///   read sees of each byte what it was or what one of them wrote, never anything else, but old and new mixed
///   in any way: Linux's page cache keeps not even a sector of 512 bytes together. Who needs more keeps
///   readers and writers apart.
/// - **Failure**: a failed write leaves each byte of its range old or new. Bytes outside its range are never
///   changed.
/// - **Durability**: [`flush`](Self::flush) returns after everything that was *completed before it was
///   called* is on stable storage. [`WriteFlags::FUA`] makes one write durable before it returns. Nothing
///   else promises durability.
/// - **Zeros**: after [`write_zeroes`](Self::write_zeroes) the range reads as zeros, whatever lay below.
///   [`discard`](Self::discard) is a hint: each byte of the range then reads as before or as zero, never as
///   something a backing file holds.
pub trait BlockDevice: Any + Send + Sync + fmt::Debug {
    /// Length of the disk in bytes.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A name for messages, usually the path of the image.
    fn name(&self) -> &str;

    /// Cluster size, alignments and costs. They do not change while the device is open; for one that
    /// forwards, they change when it forwards to another device (a tap that pivots), so who keeps it for long
    /// asks again.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()>;

    /// Makes `range` read as zeros.
    ///
    /// With [`ZeroFlags::NO_FALLBACK`] it fails with [`ErrorKind::Unsupported`], having written nothing,
    /// where the device could only do it by writing zero bytes. A device that learns it in the middle of a
    /// long range (a server refuses the second of several requests) does the rest as if without the flag.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()>;

    /// Says that the contents of `range` are not needed any more.
    fn discard(&self, range: ByteRange) -> Result<()>;

    /// Makes all completed writes durable.
    fn flush(&self) -> Result<()>;

    /// Visits what `range` holds, in order, as maximal runs clipped to `range`.
    ///
    /// Many extents come out of one call; asking again for each run would be quadratic in long chains. The
    /// visitor is never called while a lock is held, so it may use the device. The answer may be outdated by
    /// writes that run at the same time, but only by those.
    ///
    /// **Budget**: the work between two calls of the visitor is bounded, whatever the image says. A device
    /// that has looked at some ten thousand entries inside one run (or waited for one answer of a server)
    /// hands out what it has, marked [`partial`](Extent::partial); the next extent may continue it. So the
    /// visitor is where a caller looks whether to stop: it breaks, and asks again from the end of the last
    /// extent it took. [`QueryBudget`](crate::QueryBudget) does that for callers that must not keep others
    /// waiting. Who needs maximal runs merges them.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()>;

    /// The units in which the device can share blocks with `file`, the whole of a host file
    /// ([`HostRun::in_file`]), by [`clone_range`](Self::clone_range). `None` if it cannot.
    ///
    /// The answer may take as long as a flush: what `file` holds is made durable first.
    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        let _ = file;
        None
    }

    /// Fills `len` bytes at `offset` with the bytes of `run`, by sharing the blocks that they lie in (a
    /// reflink). Offsets and length are multiples of the [units](Self::clone_units). Returns the number of
    /// system calls that it took.
    ///
    /// # Errors
    /// Each byte of the range is old or new then: read and write instead. [`ErrorKind::Unsupported`] where
    /// blocks cannot be shared.
    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let _ = (offset, run, len);
        Err(Error::new(ErrorKind::Unsupported, "clone"))
    }

    /// Gives `range`, which reads as zeros, its place in what the device lies in, without writing the zeros
    /// where that is not needed: a format maps its clusters to bytes that read as zeros. Durable after a
    /// flush.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device has no place of its own to give.
    fn preallocate(&self, range: ByteRange) -> Result<()> {
        let _ = range;
        Err(Error::new(ErrorKind::Unsupported, "preallocate").in_file(self.name()))
    }

    /// Makes the disk `len` bytes long. The caller excludes writes meanwhile, and reads past the shorter of
    /// the two lengths. New bytes read as zeros, whatever a layer below holds there. After a crash the disk
    /// has the old length or the new one; once this returns, durably the new one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if `len` is no multiple of what the disk counts in, or would cut bytes off
    /// and `may_shrink` is not set; [`ErrorKind::Unsupported`] where the length is fixed. The length is the
    /// old one then. After any other error [`len`](Self::len) says which of the two it is; where it is the
    /// new one, the same call once more finishes what is left.
    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        let _ = (len, may_shrink);
        Err(Error::new(ErrorKind::Unsupported, "resize").in_file(self.name()))
    }

    /// Brings what the layers 1 to `max_depth` below show in `range` up into the device itself, in whole
    /// units of its own (clusters, subclusters) around the range. Reads return the same as before, and a
    /// write that runs at the same time is never undone. What lies deeper, or nowhere in the chain, stays
    /// there; but where a layer in reach is too short for a deeper one to be asked, the device says itself
    /// that it reads as zeros, so that the layers in reach can be taken out of the chain afterwards.
    /// ([`u32::MAX`] reaches all of it.) Returns the bytes that were brought up.
    ///
    /// A device without layers below has nothing to do. A filter passes the call on.
    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        let _ = (range, max_depth);
        Ok(0)
    }

    /// The device whose bytes this one shows and changes: a filter or a tap names what it stands on. Who must
    /// know whether two devices are one disk compares what they lead to. `None`, the default, is a disk of
    /// its own.
    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        None
    }

    /// Whether a write to `range`, or a discard, would have to wait now until another has finished there, a
    /// job that copies the range for example. A hint, outdated the next moment, for callers that do many
    /// requests on one thread: that one is better left to another thread.
    fn write_would_wait(&self, range: ByteRange) -> bool {
        let _ = range;
        false
    }

    /// Ends *all* calls that are blocked on something that may never answer (a dead network peer), of all
    /// callers; they fail with [`ErrorKind::Cancelled`]. Devices that always answer do nothing.
    ///
    /// What is in flight may be lost with it: a network device drops its connections, and writes that no
    /// flush has covered count as lost. So only the sole user of a device calls this, or who gives up all of
    /// its users: the job that fills a target, the process that ends. One user of several cancels its own
    /// calls ([`CancelSource`](crate::cancel::CancelSource)).
    ///
    /// The call reaches what belongs to the device (the file of a format, the child of a filter), and not its
    /// backing device, on which others may stand.
    fn cancel_in_flight(&self) {}
}
