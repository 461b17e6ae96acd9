//! Steps of a format on its storage, announced before they are taken ([`Storage::announce`]).
//!
//! Fault injection waits for them; no other storage listens. Called by qcow2, and read by rules of blkdebug.
//!
//! [`Storage::announce`]: crate::Storage::announce

/// A step that a format is about to take, by the name that it has in QEMU's `blkdebug`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StorageEvent {
    /// Guest data is read.
    ReadAio,
    /// Guest data is written.
    WriteAio,
    /// Entries of the L1 table are written.
    L1Update,
    /// A part of an L2 table is read.
    L2Load,
    /// Entries of L2 tables are written.
    L2Update,
    /// A part of a refcount block is read.
    RefblockLoad,
    /// Refcounts are written.
    RefblockUpdatePart,
    /// Entries of the refcount table are written.
    ReftableUpdate,
    /// Clusters are freed: their refcounts are lowered.
    ClusterFree,
}

impl StorageEvent {
    const ALL: [Self; 9] = [
        Self::ReadAio,
        Self::WriteAio,
        Self::L1Update,
        Self::L2Load,
        Self::L2Update,
        Self::RefblockLoad,
        Self::RefblockUpdatePart,
        Self::ReftableUpdate,
        Self::ClusterFree,
    ];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ReadAio => "read_aio",
            Self::WriteAio => "write_aio",
            Self::L1Update => "l1_update",
            Self::L2Load => "l2_load",
            Self::L2Update => "l2_update",
            Self::RefblockLoad => "refblock_load",
            Self::RefblockUpdatePart => "refblock_update_part",
            Self::ReftableUpdate => "reftable_update",
            Self::ClusterFree => "cluster_free",
        }
    }

    /// The event of that name.
    ///
    /// ```
    /// use blockmirror_block::StorageEvent;
    ///
    /// assert_eq!(StorageEvent::from_name("l2_load"), Some(StorageEvent::L2Load));
    /// assert_eq!(StorageEvent::from_name("l3_load"), None);
    /// ```
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.as_str() == name)
    }
}
