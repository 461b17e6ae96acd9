//! What happens on a node, under QEMU's names.
//!
//! The requests make some of them, and qcow2 announces some of its steps ([`StorageEvent`]), as QEMU's format
//! drivers do. The others are known by name, so that rules written for QEMU are accepted, but they never
//! happen here.

use blockmirror_block::StorageEvent;

/// An event that a rule can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// Once, when the rules are put in force.
    None,
    /// Before a read; of guest data, where the format above announces it.
    ReadAio,
    /// Before a write, likewise.
    WriteAio,
    /// Before a write, after [`WriteAio`](Self::WriteAio).
    Pwritev,
    /// Before zeroing.
    PwritevZero,
    /// After a write or zeroing, whether or not it failed.
    PwritevDone,
    /// Before a flush.
    FlushToOs,
    /// Before a flush, after [`FlushToOs`](Self::FlushToOs).
    FlushToDisk,
    /// Before what was read from below is written to the device.
    CorWrite,
    /// Before a step of the format above.
    Format(StorageEvent),
    /// One of QEMU's own that never happens here.
    Elsewhere,
}

/// QEMU's events that never happen here.
const ELSEWHERE: [&str; 31] = [
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_backing_aio",
    "read_compressed",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "refblock_update",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_alloc_space",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
];

impl Event {
    /// The event of that name; `None` if QEMU has no such event either.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "read_aio" => Self::ReadAio,
            "write_aio" => Self::WriteAio,
            "pwritev" => Self::Pwritev,
            "pwritev_zero" => Self::PwritevZero,
            "pwritev_done" => Self::PwritevDone,
            "flush_to_os" => Self::FlushToOs,
            "flush_to_disk" => Self::FlushToDisk,
            "cor_write" => Self::CorWrite,
            "empty_image_prepare" => Self::Elsewhere,
            other if ELSEWHERE.contains(&other) => Self::Elsewhere,
            other => Self::Format(StorageEvent::from_name(other)?),
        })
    }

    /// Whether it ever happens here.
    pub fn happens(self) -> bool {
        self != Self::Elsewhere
    }
}

/// Kinds of request that a rule can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IoType {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Zeroing.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Queries of extents.
    BlockStatus,
}

impl IoType {
    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "read" => Self::Read,
            "write" => Self::Write,
            "write-zeroes" => Self::WriteZeroes,
            "discard" => Self::Discard,
            "flush" => Self::Flush,
            "block-status" => Self::BlockStatus,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_names_are_known_and_others_are_not() {
        assert_eq!(Event::from_name("read_aio"), Some(Event::ReadAio));
        assert_eq!(Event::from_name("l2_update"), Some(Event::Format(StorageEvent::L2Update)));
        assert_eq!(Event::from_name("cluster_alloc"), Some(Event::Elsewhere));
        assert_eq!(Event::from_name("READ_AIO"), None);
        assert!(Event::CorWrite.happens() && !Event::Elsewhere.happens());
        assert_eq!(IoType::from_name("write-zeroes"), Some(IoType::WriteZeroes));
        assert_eq!(IoType::from_name("writes"), None);
    }
}
