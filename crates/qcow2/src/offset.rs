//! The two address spaces, guest and host: byte offsets and clusters of each are types of their own, and the
//! cluster size relates them.
//!
//! Used by every module of the crate. Mixing up the two spaces, or offsets and cluster numbers, is the
//! classic image-format bug; here it does not compile. Ranges of bytes that go to a device or a storage are
//! `ByteRange`s, which belong to no space: they are made at the border.

use std::fmt;
use std::ops::Range;

use blockmirror_block::ByteRange;

macro_rules! address_space {
    (
        $(#[$offset_doc:meta])* $offset:ident, $(#[$cluster_doc:meta])* $cluster:ident, $name:literal
    ) => {
        $(#[$offset_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $offset(pub u64);

        $(#[$cluster_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $cluster(pub u64);

        impl $offset {
            /// The offset `bytes` further on. Offsets are below 2^63, and so are lengths: it cannot wrap.
            #[must_use]
            pub const fn plus(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl $cluster {
            /// The cluster `clusters` further on.
            #[must_use]
            pub const fn plus(self, clusters: u64) -> Self {
                Self(self.0 + clusters)
            }
        }

        impl fmt::Debug for $offset {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($name, " {:#x}"), self.0)
            }
        }

        impl fmt::Debug for $cluster {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($name, " cluster {}"), self.0)
            }
        }

        impl Offset for $offset {
            type Cluster = $cluster;

            fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            fn bytes(self) -> u64 {
                self.0
            }
        }

        impl Cluster for $cluster {
            type Offset = $offset;

            fn new(index: u64) -> Self {
                Self(index)
            }

            fn index(self) -> u64 {
                self.0
            }
        }
    };
}

address_space! {
    /// A byte offset on the virtual disk.
    GuestOffset,
    /// A cluster of the virtual disk.
    GuestCluster,
    "guest"
}

address_space! {
    /// A byte offset in the image file (or in the external data file).
    HostOffset,
    /// A cluster of the image file (or of the external data file).
    HostCluster,
    "host"
}

/// A byte offset in one of the two address spaces.
pub trait Offset: Copy {
    /// The clusters of the same space.
    type Cluster: Cluster<Offset = Self>;

    /// The offset of byte `bytes`.
    fn new(bytes: u64) -> Self;

    /// Its number.
    fn bytes(self) -> u64;
}

/// A cluster in one of the two address spaces.
pub trait Cluster: Copy + Ord {
    /// The byte offsets of the same space.
    type Offset: Offset<Cluster = Self>;

    /// Cluster number `index`.
    fn new(index: u64) -> Self;

    /// Its number.
    fn index(self) -> u64;
}

/// Consecutive clusters, which std's ranges do not iterate over.
pub(crate) trait ClusterRange<C> {
    /// Each of them, in order.
    fn each(&self) -> impl DoubleEndedIterator<Item = C> + use<Self, C>;

    /// How many there are.
    fn len(&self) -> u64;
}

impl<C: Cluster> ClusterRange<C> for Range<C> {
    fn each(&self) -> impl DoubleEndedIterator<Item = C> + use<C> {
        (self.start.index()..self.end.index()).map(C::new)
    }

    fn len(&self) -> u64 {
        self.end.index().saturating_sub(self.start.index())
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

    /// The cluster that holds the byte at `offset`.
    pub fn index<O: Offset>(self, offset: O) -> O::Cluster {
        O::Cluster::new(offset.bytes() >> self.bits)
    }

    /// How far inside its cluster the byte at `offset` lies.
    pub fn within<O: Offset>(self, offset: O) -> u64 {
        offset.bytes() & (self.bytes() - 1)
    }

    /// First byte of `cluster`.
    pub fn start<C: Cluster>(self, cluster: C) -> C::Offset {
        C::Offset::new(cluster.index() << self.bits)
    }

    /// Clusters needed for `bytes`.
    pub const fn count(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// The clusters that `len` bytes from `offset` on touch.
    pub fn touched<O: Offset>(self, offset: O, len: u64) -> Range<O::Cluster> {
        self.index(offset)..O::Cluster::new(self.count(offset.bytes() + len))
    }

    /// The bytes of `clusters`.
    pub fn byte_range<C: Cluster>(self, clusters: Range<C>) -> ByteRange {
        ByteRange::new(self.start(clusters.start).bytes(), self.start(clusters.end).bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_and_clusters_of_one_space() {
        let size = ClusterSize::from_bits(16).unwrap();
        assert_eq!(size.index(GuestOffset(0x2_0005)), GuestCluster(2));
        assert_eq!(size.within(HostOffset(0x2_0005)), 5);
        assert_eq!(size.start(HostCluster(3)), HostOffset(0x3_0000));
        assert_eq!(size.touched(HostOffset(0xffff), 2), HostCluster(0)..HostCluster(2));
        assert_eq!(size.touched(HostOffset(0x1_0000), 0).len(), 0);
        assert_eq!(size.byte_range(GuestCluster(1)..GuestCluster(3)), ByteRange::new(0x1_0000, 0x3_0000));
        let three = GuestCluster(5)..GuestCluster(8);
        assert_eq!((three.len(), three.each().next_back()), (3, Some(GuestCluster(7))));
        assert_eq!(format!("{:?} {:?}", HostOffset(16), GuestCluster(4)), "host 0x10 guest cluster 4");
    }
}
