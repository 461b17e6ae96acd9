//! Lays a new image out and writes it: header, refcount table, refcount blocks, L1 table, and with
//! preallocation L2 tables and data clusters, each kind contiguous, in this order. Called by
//! `CreateOptions::create` only.
//!
//! Everything is computed before anything is written, and the header is written last.

use blockmirror_block::{ByteRange, Storage, ZeroFlags};
use zerocopy::IntoBytes;

use super::{Checked, stream};
use crate::create_options::{Preallocation, Version};
use crate::error::{Error, Result};
use crate::format::feature;
use crate::format::header::{Compression, FULL_LENGTH, RawHeader, RawHeaderV3, l2_entries};
use crate::limits;
use crate::offset::{ClusterRange, HostCluster};

/// "Refcount is exactly one" in L1 and L2 entries.
const COPIED: u64 = 1 << 63;

/// Where each kind of thing begins.
struct Layout {
    refcount_table: HostCluster,
    refcount_table_clusters: u64,
    refcount_blocks: HostCluster,
    l1: HostCluster,
    l2: HostCluster,
    l2_tables: u64,
    data: HostCluster,
    /// Guest clusters that are mapped.
    mapped: u64,
    /// One past the last cluster.
    end: HostCluster,
}

impl Layout {
    /// The layout of an image that can be made.
    fn new(checked: &Checked<'_>) -> Result<Self> {
        let layout = Self::place(checked);
        let cluster = checked.cluster;
        let bytes = layout.refcount_table_clusters * cluster.bytes();
        if bytes > limits::MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::LimitExceeded {
                what: "the refcount table for this preallocation, in bytes,",
                value: bytes,
                limit: limits::MAX_REFCOUNT_TABLE_BYTES,
            });
        }
        let end = layout.end.0;
        if end > limits::MAX_HOST_OFFSET >> cluster.bits() {
            return Err(Error::LimitExceeded {
                what: "the end of the preallocated image",
                value: end.saturating_mul(cluster.bytes()),
                limit: limits::MAX_HOST_OFFSET,
            });
        }
        Ok(layout)
    }

    fn place(checked: &Checked<'_>) -> Self {
        let cluster = checked.cluster;
        let preallocated = checked.preallocation != Preallocation::Off;
        let mapped = if preallocated { cluster.count(checked.size) } else { 0 };
        let l2_tables = if preallocated { checked.l1_entries } else { 0 };
        let l1_clusters = cluster.count(checked.l1_entries * 8);
        let data_clusters = if checked.options.data_file.is_some() { 0 } else { mapped };
        // A disk has at most 2^63 bytes and metadata is a small part of it: none of this can wrap.
        let others = 1 + l1_clusters + l2_tables + data_clusters;

        let per_block = cluster.bytes() * 8 / u64::from(checked.options.refcount_bits);
        let (mut blocks, mut table) = (1, 1);
        loop {
            let needed_blocks = (others + blocks + table).div_ceil(per_block);
            let needed_table = cluster.count(needed_blocks * 8);
            if (needed_blocks, needed_table) == (blocks, table) {
                break;
            }
            // Both only grow, each round by a factor of at most 1/per_block: this ends.
            (blocks, table) = (needed_blocks.max(blocks), needed_table.max(table));
        }
        let refcount_blocks = 1 + table;
        let l1 = refcount_blocks + blocks;
        let l2 = l1 + l1_clusters;
        let data = l2 + l2_tables;
        let end = data + data_clusters;
        Self {
            refcount_table: HostCluster(1),
            refcount_table_clusters: table,
            refcount_blocks: HostCluster(refcount_blocks),
            l1: HostCluster(l1),
            l2: HostCluster(l2),
            l2_tables,
            data: HostCluster(data),
            mapped,
            end: HostCluster(end),
        }
    }
}

/// Where the image ends. See [`crate::CreateOptions::storage_len`].
pub(super) fn len(checked: &Checked<'_>) -> Result<u64> {
    Ok(checked.cluster.start(Layout::new(checked)?.end).0)
}

/// How long the image becomes, and how much of that is guest data, if all of it is mapped.
pub(crate) fn fully_allocated(checked: &Checked<'_>) -> (u64, u64) {
    let layout = Layout::place(checked);
    let bytes = |clusters: u64| clusters.saturating_mul(checked.cluster.bytes());
    (bytes(layout.end.0), bytes(layout.mapped))
}

/// Writes the image. See [`crate::CreateOptions::create`].
pub(super) fn write(checked: &Checked<'_>, storage: &dyn Storage, data: Option<&dyn Storage>) -> Result<()> {
    let layout = Layout::new(checked)?;
    let cluster = checked.cluster;
    let at = |place: HostCluster| cluster.start(place).0;

    empty(storage, at(layout.end))?;
    let held = data.map_or(Ok(0), |data| prepare_data(checked, data))?;
    // Guest data first: it is what takes the time, and what runs out of space.
    let (area, range) = match data {
        Some(data) => (data, ByteRange::new(held, checked.size)),
        None => (storage, ByteRange::new(at(layout.data), at(layout.end))),
    };
    match checked.preallocation {
        Preallocation::Off => {}
        _ if range.is_empty() && held == 0 => {}
        // A data file has its length already.
        Preallocation::Metadata if data.is_some() || area.info().fixed_len => {}
        Preallocation::Metadata => area.set_len(range.end())?,
        Preallocation::Falloc if data.is_some() => area.allocate(ByteRange::new(0, checked.size))?,
        Preallocation::Falloc => area.allocate(range)?,
        Preallocation::Full => stream::zeros(area, range.start(), range.len())?,
    }

    if checked.options.whole_metadata {
        stream::zeros(storage, 0, at(layout.l1))?;
    }
    write_l2(checked, &layout, storage)?;
    let l2 = |index| [if index < layout.l2_tables { at(layout.l2.plus(index)) | COPIED } else { 0 }];
    stream::entries(storage, at(layout.l1), checked.l1_entries, l2)?;

    let order = checked.options.refcount_bits.trailing_zeros();
    stream::refcounts_of_one(storage, at(layout.refcount_blocks), layout.end.0, order)?;
    let blocks = (layout.refcount_blocks..layout.l1).len();
    stream::entries(storage, at(layout.refcount_table), blocks, |index| {
        [at(layout.refcount_blocks.plus(index))]
    })?;

    storage.write_at(&header(checked, &layout), 0)?;
    Ok(())
}

/// Makes the data file as long as the disk, and empty unless what it holds is to stay. Returns how much of it
/// stays; no more than the disk has.
fn prepare_data(checked: &Checked<'_>, data: &dyn Storage) -> Result<u64> {
    let keep = checked.options.keep_data;
    let len = if keep { data.len()? } else { 0 };
    if !keep {
        empty(data, checked.size)?;
    }
    // As a raw image of its own a longer file may be more than this disk.
    let longer_stays = keep && checked.options.data_file_raw;
    if !data.info().fixed_len && (len < checked.size || !longer_stays) {
        data.set_len(checked.size)?;
    }
    Ok(len.min(checked.size))
}

/// Makes `storage` read as zeros up to `len`. What is newly grown reads so by itself; a block device shows
/// what was there before.
fn empty(storage: &dyn Storage, len: u64) -> Result<()> {
    let info = storage.info();
    if !info.fixed_len {
        storage.set_len(0)?;
    }
    if (info.fixed_len || !info.zero_init) && len > 0 {
        storage.write_zeroes(ByteRange::new(0, len), ZeroFlags::MAY_UNMAP)?;
    }
    Ok(())
}

/// The tables are whole clusters one after the other, so together they are one array of entries.
fn write_l2(checked: &Checked<'_>, layout: &Layout, storage: &dyn Storage) -> Result<()> {
    let cluster = checked.cluster;
    let extended = checked.options.extended_l2;
    let count = layout.l2_tables * l2_entries(cluster.bits(), extended);
    // In an external data file every guest offset is its own host offset.
    let first = if checked.options.data_file.is_some() { HostCluster(0) } else { layout.data };
    let word = |index| {
        if index < layout.mapped { cluster.start(first.plus(index)).0 | COPIED } else { 0 }
    };
    let offset = cluster.start(layout.l2).0;
    if extended {
        // A raw data file is the disk. Else the place is reserved, and a backing file shows through.
        let allocated = if checked.options.data_file_raw { u64::from(u32::MAX) } else { 0 };
        stream::entries(storage, offset, count, |index| match word(index) {
            0 => [0, 0],
            word => [word, allocated],
        })
    } else {
        stream::entries(storage, offset, count, |index| [word(index)])
    }
}

/// The used part of the first cluster.
fn header(checked: &Checked<'_>, layout: &Layout) -> Vec<u8> {
    let options = checked.options;
    let cluster = checked.cluster;
    let raw = RawHeader {
        magic: limits::MAGIC.into(),
        version: if options.version == Version::V3 { 3 } else { 2 }.into(),
        backing_file_offset: checked.backing_offset.into(),
        // Checked against the caps: these fit.
        backing_file_size: (options.backing_file.as_ref().map_or(0, Vec::len) as u32).into(),
        cluster_bits: cluster.bits().into(),
        size: checked.size.into(),
        crypt_method: 0.into(),
        l1_size: (checked.l1_entries as u32).into(),
        l1_table_offset: cluster.start(layout.l1).0.into(),
        refcount_table_offset: cluster.start(layout.refcount_table).0.into(),
        refcount_table_clusters: (layout.refcount_table_clusters as u32).into(),
        nb_snapshots: 0.into(),
        snapshots_offset: 0.into(),
    };
    let mut out = raw.as_bytes().to_vec();
    if options.version == Version::V3 {
        let bit = |set, bit| if set { bit } else { 0 };
        let zstd = options.compression != Compression::Deflate;
        let v3 = RawHeaderV3 {
            incompatible_features: (bit(options.data_file.is_some(), feature::INCOMPATIBLE_DATA_FILE)
                | bit(zstd, feature::INCOMPATIBLE_COMPRESSION)
                | bit(options.extended_l2, feature::INCOMPATIBLE_EXTENDED_L2))
            .into(),
            compatible_features: bit(options.lazy_refcounts, feature::COMPATIBLE_LAZY_REFCOUNTS).into(),
            autoclear_features: bit(options.data_file_raw, feature::AUTOCLEAR_RAW_DATA_FILE).into(),
            refcount_order: options.refcount_bits.trailing_zeros().into(),
            header_length: (FULL_LENGTH as u32).into(),
        };
        out.extend(v3.as_bytes());
        out.extend([u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    out.extend(&checked.extensions);
    out
}
