//! The block device: what a virtual disk can do, and what its callers may rely on.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::extent::{Extent, HostRun, Visit};
use crate::{ByteRange, Error, ErrorKind, Result};

/// A virtual disk.
///
/// # Contract
///
/// - **Length** is fixed while anybody writes; any byte offset and length is a legal request (devices
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
    /// where the device could only do it by writing zero bytes.
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

    /// Fills `len` bytes at `offset` from a host file without passing them through the caller, if the device
    /// and the kernel can.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] having written nothing where they cannot: read and write instead.
    fn copy_from(&self, offset: u64, run: &HostRun, len: u64) -> Result<()> {
        let _ = (offset, run, len);
        Err(Error::new(ErrorKind::Unsupported, "copy in the kernel"))
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
    /// old one then.
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

    /// Ends calls that are blocked on something that may never answer (a dead network peer); they fail
    /// with [`ErrorKind::Cancelled`]. Devices that always answer do nothing.
    fn cancel_in_flight(&self) {}
}

/// Facts about a device that decide how it is used best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Geometry {
    /// Allocation unit of the format in bytes, a power of two; `None` if the device has no such unit (raw).
    pub cluster_size: Option<u64>,
    /// Unit in which the format can hold less than a cluster (a qcow2 subcluster), if it can.
    pub subcluster_size: Option<u64>,
    /// Requests aligned to this (a power of two) need no read-modify-write below the format.
    pub request_alignment: u32,
    /// What making a range zero costs.
    pub zero_cost: ZeroCost,
    /// What a discard does.
    pub discard: DiscardEffect,
    /// Whether writes are accepted at all.
    pub writable: bool,
    /// Whether it may go and come back while it is in use, without what was not flushed: another process
    /// serves it. Who would have to write all that again flushes now and then.
    pub forgetful: bool,
    /// Whether a flush makes anything durable. Not so on a server that has no command for it: a flush there
    /// succeeds, and says nothing.
    pub can_flush: bool,
    /// What shows where the device itself holds nothing. It changes when a layer is put below the device.
    pub backing: Backing,
}

impl Geometry {
    /// The geometry of a plain, writable disk: no clusters, byte-aligned, zeros as dear as data.
    pub const fn plain() -> Self {
        Self {
            cluster_size: None,
            subcluster_size: None,
            request_alignment: 1,
            zero_cost: ZeroCost::Data,
            discard: DiscardEffect::Ignored,
            writable: true,
            forgetful: false,
            can_flush: true,
            backing: Backing::None,
        }
    }
}

/// What shows where a device itself holds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// Zeros, for good: the device has no layers.
    None,
    /// Zeros, until a layer is put below the device: an image that names no backing file.
    Possible,
    /// What the layers below hold. All that they name are attached.
    Attached,
    /// Unknown: the image, or a layer below it, names a backing file that is not attached. Zeros until it is.
    Hidden,
    /// Unknown: a server has the layers, and says only how the device reads now.
    Remote {
        /// Whether the server zeroes a range without being sent the zeros.
        can_zero: bool,
    },
}

/// What [`BlockDevice::write_zeroes`] costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZeroCost {
    /// As much as writing zero bytes.
    Data,
    /// Metadata only: quick, whatever the length.
    Metadata,
}

/// What [`BlockDevice::discard`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscardEffect {
    /// Nothing.
    Ignored,
    /// Gives space back; the range then reads as zeros where whole units were covered.
    Frees,
}

macro_rules! flags {
    ($(#[$m:meta])* $name:ident { $($(#[$fm:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$m])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(u8);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$fm])* pub const $flag: Self = Self(1 << $bit);)*

            /// Whether every flag of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Both sets of flags.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The same flags without those of `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut set = f.debug_set();
                $(if self.contains(Self::$flag) { set.entry(&stringify!($flag)); })*
                set.finish()
            }
        }
    };
}

flags! {
    /// How a write is to be done.
    WriteFlags {
        /// Durable before the call returns.
        FUA = 0;
        /// A guest's write: where it is part of a unit of the format, and the rest of that unit lies in a
        /// file that was cut short, the rest becomes zeros, as the guest reads it. Without the flag such a
        /// write fails with
        /// [`ErrorKind::CutShort`]: a job must not turn a loss into zeros.
        LOST_AS_ZEROS = 1;
    }
}

flags! {
    /// How zeros are to be written.
    ZeroFlags {
        /// Space may be given back.
        MAY_UNMAP = 0;
        /// Fail rather than write zero bytes.
        NO_FALLBACK = 1;
        /// Durable before the call returns.
        FUA = 2;
        /// By statement of the device itself, also where it reads as zeros already because it holds nothing:
        /// what is attached below it later must not show. Devices without layers need nothing for it.
        EXPLICIT = 3;
        /// As [`WriteFlags::LOST_AS_ZEROS`].
        LOST_AS_ZEROS = 4;
    }
}

/// What the two kinds of writing have in common.
const IN_COMMON: [(WriteFlags, ZeroFlags); 2] =
    [(WriteFlags::FUA, ZeroFlags::FUA), (WriteFlags::LOST_AS_ZEROS, ZeroFlags::LOST_AS_ZEROS)];

/// For zero bytes that are written in place of zeroing.
impl From<ZeroFlags> for WriteFlags {
    fn from(flags: ZeroFlags) -> Self {
        let set = IN_COMMON.into_iter().filter(|(_, zero)| flags.contains(*zero));
        set.fold(Self::NONE, |all, (write, _)| all | write)
    }
}

/// For zeroing in place of a write of zero bytes.
impl From<WriteFlags> for ZeroFlags {
    fn from(flags: WriteFlags) -> Self {
        let set = IN_COMMON.into_iter().filter(|(write, _)| flags.contains(*write));
        set.fold(Self::NONE, |all, (_, zero)| all | zero)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_combine_and_print_by_name() {
        let f = ZeroFlags::MAY_UNMAP | ZeroFlags::FUA;
        assert!(f.contains(ZeroFlags::FUA) && !f.contains(ZeroFlags::NO_FALLBACK));
        assert_eq!(format!("{f:?}"), r#"{"MAY_UNMAP", "FUA"}"#);
        assert_eq!(f.without(ZeroFlags::FUA), ZeroFlags::MAY_UNMAP);
        assert_eq!(WriteFlags::from(f), WriteFlags::FUA);
        let both = WriteFlags::FUA | WriteFlags::LOST_AS_ZEROS;
        assert_eq!(WriteFlags::from(ZeroFlags::from(both) | ZeroFlags::EXPLICIT), both);
    }
}
