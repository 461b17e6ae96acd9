//! Whether version 2 can say what the internal snapshots of an image hold. Nothing is changed here.
//!
//! What must hold: each L2 table is read once, whatever the snapshots say, so that the work is bounded by the
//! length of the file and the L1 tables, of at most 32 MiB each.

use blockmirror_block::{ByteRange, Storage};
use byteorder::{BigEndian, ByteOrder};

use crate::cluster_set::ClusterSet;
use crate::error::{Error, Result};
use crate::format::entry::L1Entry;
use crate::format::header::{Compression, Header};
use crate::format::snapshot::{Snapshot, Snapshots};
use crate::limits::MAX_L1_BYTES;
use crate::offset::HostCluster;

/// Bytes of an L1 table that are read at once.
const READ: u64 = 1 << 20;

/// The flag of an entry of an L2 table.
const COMPRESSED: u64 = 1 << 62;

/// Refuses snapshots that version 2 cannot have, of a disk of `size` bytes. The image opens for writing, so
/// their L1 tables lie in the file.
pub(super) fn check_downgrade(storage: &dyn Storage, header: &Header, size: u64) -> Result<()> {
    let mut seen = ClusterSet::default();
    for snapshot in Snapshots::new(storage, header)? {
        let snapshot = snapshot?;
        let what = if snapshot.disk_size.is_some_and(|old| old != size) {
            "of another size than the disk"
        } else if u32::try_from(snapshot.vm_state_size).is_err() {
            "with a VM state of 4 GiB or more"
        } else {
            if header.compression != Compression::Deflate {
                check_tables(storage, header, &snapshot, &mut seen)?;
            }
            continue;
        };
        return Err(refused(&snapshot, what));
    }
    Ok(())
}

fn refused(snapshot: &Snapshot, what: &str) -> Error {
    let problem = format!("0.10 cannot have the internal snapshot \"{}\", {what}", snapshot.name);
    Error::Option { option: "compat", problem }
}

/// Refuses compressed clusters in the L2 tables of `snapshot` that are not in `seen`.
fn check_tables(
    storage: &dyn Storage,
    header: &Header,
    snapshot: &Snapshot,
    seen: &mut ClusterSet,
) -> Result<()> {
    let cluster_size = header.cluster_size();
    let len = u64::from(snapshot.l1_entries) * 8;
    if len > MAX_L1_BYTES {
        let what = "the L1 table of a snapshot, in bytes,";
        return Err(Error::LimitExceeded { what, value: len, limit: MAX_L1_BYTES });
    }
    let (mut l1, mut table) = (Vec::new(), vec![0; cluster_size as usize]);
    for piece in ByteRange::at(snapshot.l1_offset, len).pieces(READ) {
        // At most READ.
        l1.resize(piece.len() as usize, 0);
        storage.read_at(&mut l1, piece.start())?;
        for word in l1.chunks_exact(8) {
            let Some(at) = L1Entry(BigEndian::read_u64(word)).table() else { continue };
            if !seen.insert(HostCluster(at.0 / cluster_size)) {
                continue;
            }
            // At most 2 MiB.
            storage.read_at(&mut table, at.0)?;
            if table.chunks_exact(8).any(|entry| BigEndian::read_u64(entry) & COMPRESSED != 0) {
                return Err(refused(snapshot, "which has zstd clusters"));
            }
        }
    }
    Ok(())
}
