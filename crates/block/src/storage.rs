//! Storage: the run of bytes that an image format lives in, usually a host file.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::{Backing, ByteRange, Error, ErrorKind, Result, StorageEvent, Visit, ZeroFlags};

/// A growable, positional, thread-safe run of bytes.
///
/// # Contract
///
/// - **Reads** may reach past the end: bytes there read as zeros. (An image file may end anywhere inside its
///   last cluster.)
/// - **Writes** past the end grow the storage, zero-filling any gap, unless [`StorageInfo::fixed_len`] is
///   set; then they fail with [`ErrorKind::NoSpace`].
/// - Requests need no alignment; implementations on direct I/O bounce.
/// - Concurrency and failure are as for [`BlockDevice`](crate::BlockDevice): no lock is needed around calls,
///   and bytes outside a request never change.
/// - **flush** returns after everything that completed before the call is durable, length included. After one
///   flush has failed every later flush fails as well with [`ErrorKind::Poisoned`]: the kernel reports a lost
///   write once only, so no later success could be believed. (A storage that knows itself which writes were
///   lost may offer to fail just the flushes that should have covered them, for a disk with no format above
///   it.)
pub trait Storage: Send + Sync + fmt::Debug {
    /// A name for messages, usually the path.
    fn name(&self) -> &str;

    /// Present length in bytes.
    fn len(&self) -> Result<u64>;

    /// Whether it holds no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Facts that do not change while it is open.
    fn info(&self) -> StorageInfo;

    /// Fills `buf` from `offset`; zeros past the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes `range` read as zeros, growing the storage if it reaches past the end. Flags as for
    /// [`BlockDevice::write_zeroes`](crate::BlockDevice::write_zeroes).
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()>;

    /// Gives the space of `range` back where that is possible; the range then reads as zeros or as before.
    fn discard(&self, range: ByteRange) -> Result<()>;

    /// Reserves space for `range` (`fallocate`), growing the storage if needed; contents do not change.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the host cannot.
    fn allocate(&self, range: ByteRange) -> Result<()>;

    /// Sets the length. Growing adds zeros.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Makes all completed writes durable.
    fn flush(&self) -> Result<()>;

    /// Visits the holes and data of `range`, clipped to the present length. In order, without gaps. A storage
    /// that cannot tell says that all is data. Neighbours differ, unless the storage has used up a budget of
    /// work in between, as [`BlockDevice::extents`](crate::BlockDevice::extents) does.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()>;

    /// The block in which this file can share blocks with `file`, a power of two; `None` if it cannot, as the
    /// file system does not do that, or has only one of the two. What `file` holds is made durable first, as
    /// clones of bytes that are lost later would be lost with them.
    fn clone_block(&self, file: &dyn Storage) -> Option<u64> {
        let _ = file;
        None
    }

    /// Fills `len` bytes at `offset` with the bytes of `run` by sharing the blocks that they lie in, growing
    /// the storage if needed. All three are multiples of [`clone_block`](Self::clone_block). Returns the
    /// number of system calls.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where that cannot be done. Each byte of the range is old or new then.
    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let _ = (offset, run, len);
        Err(Error::new(ErrorKind::Unsupported, "clone"))
    }

    /// The storage that this one is a part of, and the offset there of its first byte. Who must know where
    /// bytes lie in a file follows it ([`HostRun::in_file`]).
    fn part_of(&self) -> Option<(&Arc<dyn Storage>, u64)> {
        None
    }

    /// The open file below, for calls that the kernel does between two files.
    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Ends calls that are blocked on something that may never answer, as
    /// [`BlockDevice::cancel_in_flight`](crate::BlockDevice::cancel_in_flight) does. Files always answer.
    fn cancel_in_flight(&self) {}

    /// The format above is about to take a step. Only fault injection listens.
    fn announce(&self, event: StorageEvent) {
        let _ = event;
    }

    /// Bytes that the storage occupies on its host, as `st_blocks` tells; `None` if unknown.
    fn allocated_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

/// A run of a storage that is a hole or is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// The bytes it covers.
    pub range: ByteRange,
    /// Whether they are a hole, reading as zeros.
    pub hole: bool,
}

/// Facts about a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StorageInfo {
    /// The length cannot change (a block device, a network export).
    pub fixed_len: bool,
    /// Requests aligned to this need no read-modify-write below; a power of two.
    pub request_alignment: u32,
    /// Whether writes are accepted.
    pub writable: bool,
    /// Whether zeroing is a metadata operation (hole punching and the like work).
    pub cheap_zero: bool,
    /// Whether a discard gives space back.
    pub discards: bool,
    /// Whether bytes that were never written read as zeros after the storage grew over them. False on block
    /// devices, whose old contents show.
    pub zero_init: bool,
    /// What [`Geometry::forgetful`](crate::Geometry::forgetful) says of a disk.
    pub forgetful: bool,
    /// What [`Geometry::can_flush`](crate::Geometry::can_flush) says of a disk.
    pub can_flush: bool,
    /// What [`Geometry::backing`](crate::Geometry::backing) says of a disk.
    pub backing: Backing,
}

impl StorageInfo {
    /// A growable, writable, byte-aligned storage with no shortcuts.
    pub const fn plain() -> Self {
        Self {
            fixed_len: false,
            request_alignment: 1,
            writable: true,
            cheap_zero: false,
            discards: false,
            zero_init: true,
            forgetful: false,
            can_flush: true,
            backing: Backing::None,
        }
    }
}

/// A place in a host file where guest bytes lie as they are.
#[derive(Clone)]
pub struct HostRun {
    /// The file.
    pub storage: Arc<dyn Storage>,
    /// The offset in it.
    pub offset: u64,
}

/// Written as the name of the file and the offset in it.
#[cfg(feature = "serde")]
impl serde::Serialize for HostRun {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut run = serializer.serialize_struct("HostRun", 2)?;
        run.serialize_field("file", self.storage.name())?;
        run.serialize_field("offset", &self.offset)?;
        run.end()
    }
}

impl HostRun {
    /// The same place in the file itself, where the storage is only a part of it.
    #[must_use]
    pub fn in_file(mut self) -> Self {
        while let Some((whole, start)) =
            self.storage.part_of().map(|(whole, start)| (Arc::clone(whole), start))
        {
            self = Self { storage: whole, offset: self.offset.saturating_add(start) };
        }
        self
    }
}

impl fmt::Debug for HostRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:#x}", self.storage.name(), self.offset)
    }
}
