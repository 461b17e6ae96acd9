//! What an allocation, or a change of an entry, needs first and cannot get under the metadata lock. Returned
//! by planning; `Qcow2::provide` does it.

use super::NewBlocks;
use crate::offset::GuestCluster;

/// What must be done, without the metadata lock, before clusters can be handed out (`Qcow2::provide`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Missing {
    /// The refcount table does not reach this refcount block.
    RefcountTable(u64),
    /// The pass over all L2 tables has not come to its end, and nothing but unverified clusters is left.
    Verification,
    /// A look through all L2 tables for what the file lacks, before it may become longer.
    RestOfTables,
    /// The search goes on, after others have had the metadata lock.
    Search,
    /// These refcount blocks.
    RefcountBlocks(NewBlocks),
    /// An L2 table for this guest cluster that may be changed in place.
    L2Table(GuestCluster),
}
