//! The bits of a persistent bitmap, and the clusters that it takes, as its table says.
//!
//! Called when an image is opened for writing, and for a bitmap that is needed later. What a table takes is
//! bounded before it is read: see [`limits::MAX_BITMAP_BYTES`], [`limits::MAX_BITMAP_TABLES_BYTES`] and
//! [`limits::MAX_LOADED_BITMAP_BYTES`].

use std::ops::Range;

use blockmirror_bitmap::DirtyBitmap;
use byteorder::{BigEndian, ByteOrder};

use crate::context::ImageContext;
use crate::error::{Error, Result};
use crate::format::bitmaps::{BitmapEntry, Bitmaps, TableEntry};
use crate::format::header::Header;
use crate::limits;
use crate::offset::{HostCluster, HostOffset};
use crate::overlap::{MetadataKind, MetadataMap};

/// Claims what the bitmaps of an image take: their directory, tables and bits.
///
/// # Errors
/// Damage in a table, or other metadata in one of the clusters.
pub(crate) fn claim_bitmaps(ctx: &ImageContext, header: &Header, metadata: &mut MetadataMap) -> Result<()> {
    let Some(extension) = header.bitmaps.filter(|_| header.bitmaps_valid()) else { return Ok(()) };
    let directory = HostOffset(extension.directory_offset);
    metadata.claim(ctx, MetadataKind::BitmapDirectory, directory, extension.directory_size)?;
    let mut bytes = 0;
    for entry in Bitmaps::new(&*ctx.storage, &extension)? {
        let entry = entry?;
        bytes += u64::from(entry.table_entries) * 8;
        limit("the bitmap tables together", bytes, limits::MAX_BITMAP_TABLES_BYTES)?;
        let table = read_table(ctx, &entry)?;
        let len = u64::from(entry.table_entries) * 8;
        metadata.claim(ctx, MetadataKind::BitmapDirectory, HostOffset(entry.table_offset), len)?;
        for entry in table {
            if let TableEntry::Stored(at) = entry {
                metadata.claim(ctx, MetadataKind::BitmapDirectory, at, ctx.cluster().bytes())?;
            }
        }
    }
    Ok(())
}

/// The clusters that the table of `entry` and its bits take.
pub(crate) fn clusters_of(ctx: &ImageContext, entry: &BitmapEntry) -> Result<Vec<Range<HostCluster>>> {
    if entry.table_offset == 0 {
        return Ok(Vec::new());
    }
    let cluster = ctx.cluster();
    let table = cluster.touched(HostOffset(entry.table_offset), u64::from(entry.table_entries) * 8);
    let mut clusters = vec![table];
    for entry in read_table(ctx, entry)? {
        let TableEntry::Stored(at) = entry else { continue };
        let at = cluster.index(at);
        match clusters.last_mut() {
            Some(last) if last.end == at => last.end = at.plus(1),
            _ => clusters.push(at..at.plus(1)),
        }
    }
    Ok(clusters)
}

/// Loads the bits of `entry`; `loaded` counts the bytes of all that were loaded together.
pub(crate) fn load_bits(ctx: &ImageContext, entry: &BitmapEntry, loaded: &mut u64) -> Result<DirtyBitmap> {
    let cluster = ctx.cluster().bytes();
    let mut bits = DirtyBitmap::new(ctx.size(), entry.granularity)
        .map_err(|error| damaged(entry, entry.table_offset, error.to_string()))?;
    let needed = bits.stored_len().div_ceil(cluster);
    if needed > entry.table_entries.into() {
        let problem = format!("a table of {} entries, {needed} are needed", entry.table_entries);
        return Err(damaged(entry, entry.table_offset, problem));
    }
    // At most a cluster, 2 MiB.
    let mut buf = vec![0; cluster as usize];
    for (at, table_entry) in (0..bits.stored_len()).step_by(cluster as usize).zip(read_table(ctx, entry)?) {
        match table_entry {
            TableEntry::Clear | TableEntry::Invalid => {}
            TableEntry::Set => {
                let byte = bits.granularity() * 8;
                bits.set(at * byte..(at + cluster).saturating_mul(byte));
            }
            TableEntry::Stored(host) => {
                *loaded += cluster;
                limit("the bits of the bitmaps together", *loaded, limits::MAX_LOADED_BITMAP_BYTES)?;
                ctx.storage.read_at(&mut buf, host.0)?;
                bits.load(at, &buf);
            }
        }
    }
    Ok(bits)
}

/// The table of `entry`; each cluster that it names begins inside the file, on a cluster border.
fn read_table(ctx: &ImageContext, entry: &BitmapEntry) -> Result<Vec<TableEntry>> {
    let (at, entries) = (HostOffset(entry.table_offset), u64::from(entry.table_entries));
    let cluster = ctx.cluster();
    limit("a bitmap", entries.saturating_mul(cluster.bytes()), limits::MAX_BITMAP_BYTES)?;
    let file_len = ctx.storage.len()?;
    if at.0 == 0 || cluster.within(at) != 0 {
        return Err(damaged(entry, at.0, "the table is not on a cluster border".into()));
    }
    if entries == 0 || at.0.checked_add(entries * 8).is_none_or(|end| end > file_len) {
        let problem = format!("a table of {entries} entries reaches past the end of the file at {file_len}");
        return Err(damaged(entry, at.0, problem));
    }
    // At most 8 MiB: 512 MiB of bitmap in clusters of 512 bytes.
    let mut raw = vec![0; (entries * 8) as usize];
    ctx.storage.read_at(&mut raw, at.0)?;
    let words = raw.chunks_exact(8).map(BigEndian::read_u64);
    let parse = |(index, word)| match TableEntry::parse(word, cluster) {
        TableEntry::Invalid => {
            Err(damaged(entry, at.0, format!("entry {index} of its table, {word:#x}, makes no sense")))
        }
        TableEntry::Stored(host) if host.0 >= file_len => {
            let problem = format!("entry {index} of its table points past the end of the file at {file_len}");
            Err(damaged(entry, at.0, problem))
        }
        sound => Ok(sound),
    };
    (0_u64..).zip(words).map(parse).collect()
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<()> {
    if value > limit {
        return Err(Error::LimitExceeded { what, value, limit });
    }
    Ok(())
}

fn damaged(entry: &BitmapEntry, offset: u64, problem: String) -> Error {
    Error::BitmapTable { bitmap: entry.name.to_string(), offset, problem }
}
