//! Newtypes that keep guest and host offsets apart, and the cluster size that relates them to indexes.
//!
//! Used by every module of the crate. Mixing up the two address spaces is the classic image-format bug; here
//! it does not compile.

use std::fmt;

/// A byte offset on the virtual disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte offset in the image file (or in the external data file).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl HostOffset {
    /// The offset `bytes` further on. Host offsets are below 2^56 and lengths below 2^63, so this cannot
    /// wrap.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::Debug for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest {:#x}", self.0)
    }
}

impl fmt::Debug for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {:#x}", self.0)
    }
}

/// The cluster size of an image: a power of two, 512 B to 2 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClusterSize {
    bits: u32,
}

impl ClusterSize {
    /// Smallest `cluster_bits` of the format.
    pub const MIN_BITS: u32 = 9;
    /// Largest `cluster_bits` that is accepted, QEMU's limit.
    pub const MAX_BITS: u32 = 21;

    /// From `cluster_bits`; `None` outside 9..=21.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits < Self::MIN_BITS || bits > Self::MAX_BITS { None } else { Some(Self { bits }) }
    }

    /// log2 of the size.
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// Index of the cluster that holds byte `offset`.
    pub const fn index(self, offset: u64) -> u64 {
        offset >> self.bits
    }

    /// Offset of byte `offset` inside its cluster.
    pub const fn within(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }

    /// Start of the cluster that holds byte `offset`.
    pub const fn floor(self, offset: u64) -> u64 {
        offset & !(self.bytes() - 1)
    }

    /// First byte of cluster `index`.
    pub const fn start(self, index: u64) -> u64 {
        index << self.bits
    }

    /// Clusters needed for `bytes`.
    pub const fn count(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}
