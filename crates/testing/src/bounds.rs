//! What a check and a repair of a qcow2 image may cost, as functions of the length of its file: the bounds
//! that `blockmirror_qcow2::check` and `repair` state, for the tests of that crate and for the fuzzer.

/// Requests to a storage, and the bytes that they read and write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Calls that read, write or change the storage.
    pub requests: u64,
    /// Bytes that were read and written.
    pub bytes: u64,
}

/// Checks that a repair makes, at most, each of which may write back what it reads.
const CHECKS_OF_REPAIR: u64 = 20;

/// Most that a check of a file of `len` bytes with clusters of `cluster` bytes costs, if `entries` snapshots
/// and bitmaps lie in the file.
pub fn check_bound(len: u64, cluster: u64, entries: u64) -> Work {
    let clusters = len.div_ceil(cluster);
    Work { requests: 16 + 8 * clusters + 4 * entries, bytes: (64 << 10) + 14 * len }
}

/// Most that a repair costs. `len` is the length of the file when the repair is over.
pub fn repair_bound(len: u64, cluster: u64, entries: u64) -> Work {
    let check = check_bound(len, cluster, entries);
    Work { requests: CHECKS_OF_REPAIR * check.requests, bytes: CHECKS_OF_REPAIR * check.bytes }
}

/// The longest file that a repair of one of `len` bytes leaves: tables that guest data lies in are copied.
pub fn repaired_len_bound(len: u64) -> u64 {
    len + 2 * len + len / 4 + (1 << 20)
}
