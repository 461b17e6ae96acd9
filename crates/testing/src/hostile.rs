//! Images that are made to cost the reader time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::Outcome;

/// The length of the disk of [`one_l2_table`].
pub const ENDLESS: u64 = 512 << 40;

/// Makes `path` a qcow2 image of 8.3 MiB that says that it is [`ENDLESS`]: its 2^20 L1 entries all lead to
/// one L2 table, of zero clusters, so that no run of them can be left out at one look. To find out what lies
/// where takes minutes.
///
/// # Errors
/// The file cannot be written.
pub fn one_l2_table(path: &Path) -> Outcome {
    const CLUSTER_BITS: u32 = 16;
    const CLUSTER: u64 = 1 << CLUSTER_BITS;
    const COPIED: u64 = 1 << 63;
    const ZERO: u64 = 1;
    // Where things lie, in clusters.
    const REFCOUNT_TABLE: u64 = 1;
    const REFCOUNT_BLOCK: u64 = 2;
    const L1: u64 = 3;
    let per_table = CLUSTER / 8;
    let entries = u32::try_from(ENDLESS / (per_table * CLUSTER))?;
    let table = L1 + u64::from(entries).div_ceil(per_table);

    let mut header = Vec::new();
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3u32.to_be_bytes());
    // No backing file.
    header.extend_from_slice(&[0; 12]);
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&ENDLESS.to_be_bytes());
    // No encryption.
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries.to_be_bytes());
    header.extend_from_slice(&(L1 * CLUSTER).to_be_bytes());
    header.extend_from_slice(&(REFCOUNT_TABLE * CLUSTER).to_be_bytes());
    header.extend_from_slice(&1u32.to_be_bytes());
    // No snapshots, no features.
    header.extend_from_slice(&[0; 12 + 24]);
    // Refcounts of 16 bits; the length of the header.
    header.extend_from_slice(&4u32.to_be_bytes());
    header.extend_from_slice(&104u32.to_be_bytes());

    let file = File::create(path)?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(REFCOUNT_BLOCK * CLUSTER).to_be_bytes(), REFCOUNT_TABLE * CLUSTER)?;
    let counts = 1u16.to_be_bytes().repeat(usize::try_from(table + 1)?);
    file.write_all_at(&counts, REFCOUNT_BLOCK * CLUSTER)?;
    let entry = ((table * CLUSTER) | COPIED).to_be_bytes();
    file.write_all_at(&entry.repeat(usize::try_from(entries)?), L1 * CLUSTER)?;
    file.write_all_at(&ZERO.to_be_bytes().repeat(usize::try_from(per_table)?), table * CLUSTER)?;
    Ok(())
}
