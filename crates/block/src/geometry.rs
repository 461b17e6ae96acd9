//! Facts about a device: its units, what zeros and discards cost, what lies below.

/// Facts about a device that decide how it is used best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
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
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
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
    #[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
    Remote {
        /// Whether the server zeroes a range without being sent the zeros.
        can_zero: bool,
    },
}

/// What [`BlockDevice::write_zeroes`](crate::BlockDevice::write_zeroes) costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum ZeroCost {
    /// As much as writing zero bytes.
    Data,
    /// Metadata only: quick, whatever the length.
    Metadata,
}

/// What [`BlockDevice::discard`](crate::BlockDevice::discard) does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum DiscardEffect {
    /// Nothing.
    Ignored,
    /// Gives space back; the range then reads as zeros where whole units were covered.
    Frees,
}
