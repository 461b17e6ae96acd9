//! The tables of internal snapshots, as they are on disk: what they take, and what one of them shows. Called
//! when an image is opened, and by `snapshots`.
//!
//! What must hold: each byte of an L1 table is read once, so that the work is bounded by the length of the
//! file. L1 tables that overlap are refused, and so is an entry that names a table outside the file.

use blockmirror_block::{ByteRange, Storage};
use byteorder::{BigEndian, ByteOrder};

use crate::cluster_set::ClusterSet;
use crate::context::ImageContext;
use crate::error::{Error, Result, WriteRefusal};
use crate::format::entry::L1Entry;
use crate::format::header::{Header, l1_entries_for};
use crate::format::snapshot::{Snapshot, Snapshots};
use crate::limits::{MAX_HOST_OFFSET, MAX_L1_BYTES};
use crate::offset::HostOffset;
use crate::overlap::{MetadataKind, MetadataMap};
use crate::snapshot_ref::SnapshotRef;

/// Bytes of an L1 table that are read at once.
const READ: u64 = 1 << 20;

/// Adds the snapshot table and the tables of all snapshots to `metadata`, which has everything else but the
/// refcount structures.
pub(crate) fn claim(ctx: &ImageContext, header: &Header, metadata: &mut MetadataMap) -> Result<()> {
    let mut snapshots = Snapshots::new(&*ctx.storage, header)?;
    for snapshot in snapshots.by_ref() {
        let l1 = l1_range(ctx, &snapshot?)?;
        metadata.claim(ctx, MetadataKind::InactiveL1, HostOffset(l1.start()), l1.len())?;
    }
    let start = header.snapshots_offset;
    metadata.claim(ctx, MetadataKind::SnapshotTable, HostOffset(start), snapshots.end() - start)?;
    let inactive = inactive_tables(ctx, header)?;
    // What has two references would be freed with the first that is dropped.
    if header.refcount_order == 0 && !inactive.is_empty() {
        return Err(WriteRefusal::SnapshotsUncounted.into());
    }
    metadata.set_inactive_l2(inactive);
    Ok(())
}

/// The L2 tables that snapshots have. No two of their L1 tables overlap.
pub(crate) fn inactive_tables(ctx: &ImageContext, header: &Header) -> Result<ClusterSet> {
    let cluster = ctx.cluster();
    let end = ctx.storage.len()?;
    let mut set = ClusterSet::default();
    let mut buf = Vec::new();
    for snapshot in Snapshots::new(&*ctx.storage, header)? {
        for piece in l1_range(ctx, &snapshot?)?.pieces(READ) {
            // At most READ.
            buf.resize(piece.len() as usize, 0);
            ctx.storage.read_at(&mut buf, piece.start())?;
            for (word, index) in buf.chunks_exact(8).zip(0..) {
                let Some(table) = L1Entry(BigEndian::read_u64(word)).table() else { continue };
                ctx.check_table("read L1 table of a snapshot", table, index)?;
                if table.0 >= end {
                    let why =
                        format!("it names an L2 table at {}, past the end of the file at {end}", table.0);
                    return Err(ctx.corrupt("read L1 table of a snapshot", piece.start(), why).into());
                }
                set.insert(cluster.index(table));
            }
        }
    }
    Ok(set)
}

/// Where the L1 table of `snapshot` lies, all of it in the file.
fn l1_range(ctx: &ImageContext, snapshot: &Snapshot) -> Result<ByteRange> {
    let (at, len) = (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
    check_l1(ctx.cluster().bytes(), &*ctx.storage, snapshot)?;
    Ok(ByteRange::at(at, len))
}

fn check_l1(cluster_size: u64, storage: &dyn Storage, snapshot: &Snapshot) -> Result<()> {
    let (at, len) = (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
    let error = |field, value, allowed: String| Err(Error::HeaderField { field, value, allowed });
    if len > MAX_L1_BYTES {
        let what = "the L1 table of a snapshot, in bytes,";
        return Err(Error::LimitExceeded { what, value: len, limit: MAX_L1_BYTES });
    }
    if !at.is_multiple_of(cluster_size) || at >= MAX_HOST_OFFSET {
        return error("l1_table_offset of a snapshot", at, "a cluster below 2^56 is allowed".into());
    }
    let end = storage.len()?;
    if len > 0 && at + len > end {
        let allowed = format!("its {len} bytes reach past the end of the file at {end}");
        return error("l1_table_offset of a snapshot", at, allowed);
    }
    Ok(())
}

/// The L1 table of `snapshot`, as it is on disk.
pub(crate) fn read_l1(ctx: &ImageContext, snapshot: &Snapshot) -> Result<Vec<L1Entry>> {
    let range = l1_range(ctx, snapshot)?;
    let mut table = Vec::with_capacity(snapshot.l1_entries as usize);
    let mut buf = Vec::new();
    for piece in range.pieces(READ) {
        // At most READ.
        buf.resize(piece.len() as usize, 0);
        ctx.storage.read_at(&mut buf, piece.start())?;
        table.extend(buf.chunks_exact(8).map(|word| L1Entry(BigEndian::read_u64(word))));
    }
    Ok(table)
}

/// How long the disk was that `snapshot` shows, in an image with `header`.
///
/// # Errors
/// No image has such a length.
pub(crate) fn disk_size(header: &Header, snapshot: &Snapshot) -> Result<u64> {
    let size = snapshot.disk_size.unwrap_or(header.virtual_size);
    let entries = l1_entries_for(size, header.cluster_bits, header.extended_l2);
    if i64::try_from(size).is_ok() && size.is_multiple_of(512) && entries * 8 <= MAX_L1_BYTES {
        return Ok(size);
    }
    let allowed = "a multiple of 512 that an L1 table of 32 MiB covers is allowed".into();
    Err(Error::HeaderField { field: "disk size of a snapshot", value: size, allowed })
}

/// `header` with the L1 table and the length of the snapshot that `wanted` means.
pub(crate) fn as_snapshot(header: &Header, storage: &dyn Storage, wanted: &SnapshotRef) -> Result<Header> {
    let mut found: Option<(u8, Snapshot)> = None;
    for snapshot in Snapshots::new(storage, header)? {
        let snapshot = snapshot?;
        if let Some(rank) = wanted.rank(&snapshot.id, &snapshot.name)
            && found.as_ref().is_none_or(|(best, _)| rank < *best)
        {
            found = Some((rank, snapshot));
        }
    }
    let Some((_, snapshot)) = found else { return Err(Error::NoSnapshot { wanted: wanted.clone() }) };
    check_l1(header.cluster_size(), storage, &snapshot)?;
    let mut header = header.clone();
    header.virtual_size = disk_size(&header, &snapshot)?;
    (header.l1_offset, header.l1_entries) = (snapshot.l1_offset, snapshot.l1_entries);
    Ok(header)
}
