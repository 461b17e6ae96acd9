//! The header and the refcount table of an image that is to be checked, however damaged.

use blockmirror_block::Storage;
use byteorder::{BigEndian, ByteOrder};

use super::counts::Counts;
use super::disk::DiskCounts;
use super::{CheckObserver, CheckReport, Checker, Finding, Reporting};
use crate::error::{Error, Result};
use crate::format::entry::EntryFormat;
use crate::format::header::Header;
use crate::format::refcount::RefcountWidth;
use crate::offset::ClusterSize;

/// Clusters of a file that is checked: as many as QEMU takes.
const MAX_FILE_CLUSTERS: u64 = i32::MAX as u64;

/// Where the header has the refcount table: its offset and its clusters.
const REFCOUNT_TABLE_OFFSET: usize = 48;
const REFCOUNT_TABLE_CLUSTERS: usize = 56;

impl<'a> Checker<'a> {
    /// Reads the header and the refcount table.
    pub(crate) fn open(
        storage: &'a dyn Storage,
        observer: &'a mut dyn CheckObserver,
        reporting: Reporting,
    ) -> Result<Self> {
        let (header, damage) = read_header(storage)?;
        let out_of_range = |field, value| Error::HeaderField { field, value, allowed: "out of range".into() };
        let cluster = ClusterSize::from_bits(header.cluster_bits)
            .ok_or_else(|| out_of_range("cluster_bits", header.cluster_bits.into()))?;
        let width = RefcountWidth::from_order(header.refcount_order)
            .ok_or_else(|| out_of_range("refcount_order", header.refcount_order.into()))?;
        let file_len = storage.len()?;
        let clusters = cluster.count(file_len);
        if clusters > MAX_FILE_CLUSTERS {
            let what = "the number of clusters of the file";
            return Err(Error::LimitExceeded { what, value: clusters, limit: MAX_FILE_CLUSTERS });
        }
        let table = read_refcount_table(storage, &header, file_len)?;
        let format = EntryFormat {
            cluster,
            extended: header.extended_l2,
            // A check counts what an entry maps, also where its flags are those of another version.
            has_zero: true,
            external_data: header.data_file.is_some(),
        };
        let mut checker = Self {
            storage,
            observer,
            reporting,
            format,
            file_len,
            counts: Counts::new(clusters, width.max()),
            disk: DiskCounts::new(table, width, cluster.bytes()),
            tables: Vec::new(),
            table_clusters: Vec::new(),
            report: CheckReport::default(),
            fixing: None,
            bad_entries: 0,
            refcounts_damaged: false,
            used_as_free: false,
            bitmaps_damaged: false,
            tables_missing: false,
            lacks_data: false,
            copied_in_doubt: false,
            done: 0,
            total: 0,
            header,
        };
        checker.report.total_clusters = cluster.count(checker.header.virtual_size);
        if let Some(damage) = damage {
            checker.refcounts_damaged = true;
            checker.find(&Finding::Header(damage), 1);
        }
        Ok(checker)
    }
}

/// Reads the header. Where only the place of the refcount table is damaged, the header is taken to have none,
/// and what is wrong is returned with it.
fn read_header(storage: &dyn Storage) -> Result<(Header, Option<String>)> {
    let error = match Header::read(storage) {
        Ok(header) => return Ok((header, None)),
        Err(error) => error,
    };
    let in_table = match &error {
        Error::HeaderField { field, .. } => field.starts_with("refcount_table"),
        Error::LimitExceeded { what, .. } => what.starts_with("the refcount table"),
        _ => false,
    };
    if !in_table {
        return Err(error);
    }
    // The cluster size was read before the table's place. At most 2 MiB, and never more than the file has.
    let mut bytes = vec![0; usize::try_from(storage.len()?).unwrap_or(usize::MAX).min(2 << 20)];
    storage.read_at(&mut bytes, 0)?;
    let cluster_bits = bytes.get(20..24).map_or(0, BigEndian::read_u32);
    let place = bytes.get_mut(REFCOUNT_TABLE_OFFSET..REFCOUNT_TABLE_CLUSTERS + 4);
    let (Some(place), Some(cluster)) = (place, ClusterSize::from_bits(cluster_bits)) else {
        return Err(error);
    };
    BigEndian::write_u64(place, cluster.bytes());
    BigEndian::write_u32(&mut place[REFCOUNT_TABLE_CLUSTERS - REFCOUNT_TABLE_OFFSET..], 1);
    let mut header = Header::parse(&bytes)?;
    (header.refcount_table_offset, header.refcount_table_clusters) = (0, 0);
    Ok((header, Some(error.to_string())))
}

/// Reads what the file has of the refcount table; the rest is zeros.
fn read_refcount_table(storage: &dyn Storage, header: &Header, file_len: u64) -> Result<Vec<u64>> {
    let declared = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    let there = file_len.saturating_sub(header.refcount_table_offset).next_multiple_of(8);
    // At most 8 MiB, by the cap on the header.
    let mut raw = vec![0; declared.min(there) as usize];
    storage.read_at(&mut raw, header.refcount_table_offset)?;
    let mut table = vec![0; raw.len() / 8];
    BigEndian::read_u64_into(&raw, &mut table);
    Ok(table)
}
