//! The header: the fixed fields at the start of the file, and what its extensions say.
//!
//! [`Header::parse`] is a pure function over the bytes of the first cluster, called by [`Header::read`] for
//! every open and by `info`. Whatever it accepts holds: version 2 or 3, every incompatible feature known, no
//! encryption, every size within its cap in [`crate::limits`], every table on a cluster border below 2^56,
//! and an L1 table that covers the virtual size. Nothing here allocates more than the first cluster.

use std::fmt;

use blockmirror_block::Storage;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extension::{self, BitmapsExtension, Extensions, UnknownExtension};
use super::feature::{self, FeatureKind, FeatureName};
use super::field::{check_table, field};
use crate::error::{Error, Result, WriteRefusal};
use crate::limits;
use crate::offset::ClusterSize;

/// The fields that both versions have: 72 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: U32,
    pub(crate) version: U32,
    pub(crate) backing_file_offset: U64,
    pub(crate) backing_file_size: U32,
    pub(crate) cluster_bits: U32,
    pub(crate) size: U64,
    pub(crate) crypt_method: U32,
    pub(crate) l1_size: U32,
    pub(crate) l1_table_offset: U64,
    pub(crate) refcount_table_offset: U64,
    pub(crate) refcount_table_clusters: U32,
    pub(crate) nb_snapshots: U32,
    pub(crate) snapshots_offset: U64,
}

/// What version 3 adds: up to byte 104.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeaderV3 {
    pub(crate) incompatible_features: U64,
    pub(crate) compatible_features: U64,
    pub(crate) autoclear_features: U64,
    pub(crate) refcount_order: U32,
    pub(crate) header_length: U32,
}

/// Bytes of a version 2 header.
pub(crate) const V2_LENGTH: usize = size_of::<RawHeader>();
/// Bytes of the shortest version 3 header.
pub(crate) const V3_LENGTH: usize = V2_LENGTH + size_of::<RawHeaderV3>();
/// Bytes of a version 3 header with every field that is known: the compression type and its padding follow.
pub(crate) const FULL_LENGTH: usize = V3_LENGTH + 8;

/// Bytes that are read first, in which nearly every header ends.
const FIRST_READ: usize = 4096;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Compression {
    /// Raw deflate (called `zlib` by other tools).
    #[default]
    Deflate,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// The name that `-o compression_type` and `info` use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// The name of another file, as an image carries it: bytes, usually a path. Never opened by this crate.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct FileName(Vec<u8>);

impl FileName {
    fn parse(bytes: &[u8], field: &'static str) -> Result<Self> {
        match bytes.iter().position(|b| *b == 0) {
            Some(at) => Err(Error::Extension {
                name: field,
                problem: format!("a NUL byte at {at} of {}", bytes.len()),
            }),
            None => Ok(Self(bytes.to_vec())),
        }
    }

    /// The bytes as they are.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a path of the host.
    pub fn as_path(&self) -> &std::path::Path {
        use std::os::unix::ffi::OsStrExt;
        std::path::Path::new(std::ffi::OsStr::from_bytes(&self.0))
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for FileName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The backing file that a header names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct BackingRef {
    /// Its name.
    pub name: FileName,
    /// Its format; to be probed if absent.
    pub format: Option<String>,
}

/// The external data file that a header asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DataFileRef {
    /// Its name; if absent, the caller that opens the image must know the file.
    pub name: Option<FileName>,
    /// Whether the data file is a valid raw image by itself.
    pub raw: bool,
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// Length of the disk in bytes, a multiple of 512. What the header says is rounded down, as QEMU reads
    /// it.
    pub virtual_size: u64,
    /// Where the L1 table starts in the file.
    pub l1_offset: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the refcount table starts in the file.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table, at least 1.
    pub refcount_table_clusters: u32,
    /// Width of a refcount as a power of two of bits, 0 to 6.
    pub refcount_order: u32,
    /// Incompatible feature bits, all known; 0 in version 2.
    pub incompatible: u64,
    /// Compatible feature bits; 0 in version 2.
    pub compatible: u64,
    /// Autoclear feature bits; 0 in version 2.
    pub autoclear: u64,
    /// Whether L2 entries have 16 bytes and clusters 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<BackingRef>,
    /// The external data file, if guest data lies in one.
    pub data_file: Option<DataFileRef>,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table starts in the file; 0 without snapshots.
    pub snapshots_offset: u64,
    /// The directory of persistent bitmaps, if there is one.
    pub bitmaps: Option<BitmapsExtension>,
    /// Names of feature bits, from the image.
    pub feature_names: Vec<FeatureName>,
    /// Bytes of the fixed fields, 72 in version 2.
    pub header_length: u32,
    /// Fixed fields that are not known, to be kept when the header is rewritten.
    pub unknown_fields: Vec<u8>,
    /// Extensions that are not known, to be kept when the header is rewritten.
    pub unknown_extensions: Vec<UnknownExtension>,
}

impl Header {
    /// Reads and checks the header of the image in `storage`. Reads nothing past the first cluster, or past
    /// the first 4 KiB where a cluster is smaller.
    ///
    /// # Errors
    /// [`Error::Storage`] if that cannot be read, else why the image is refused.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let len = usize::try_from(storage.len()?).unwrap_or(usize::MAX);
        let mut first = vec![0; len.min(FIRST_READ)];
        storage.read_at(&mut first, 0)?;
        let raw = raw_header(&first)?;
        let cluster_size = 1 << check_cluster_bits(raw.cluster_bits.get())?;
        // At most 2 MiB, and never more than the file has.
        let rest = len.min(cluster_size).saturating_sub(first.len());
        if rest > 0 {
            if is_all_in(&raw, &first)
                && let Ok(header) = Self::parse(&first)
            {
                return Ok(header);
            }
            let read = first.len();
            first.resize(read + rest, 0);
            storage.read_at(&mut first[read..], read as u64)?;
        }
        Self::parse(&first)
    }

    /// Parses the first cluster of an image, or what the file has of it. More bytes do no harm.
    ///
    /// # Errors
    /// Why the image is refused. Never panics.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let raw = raw_header(bytes)?;
        let version = raw.version.get();
        let cluster_bits = check_cluster_bits(raw.cluster_bits.get())?;
        let cluster_size = 1u64 << cluster_bits;
        let bytes = &bytes[..bytes.len().min(1 << cluster_bits)];

        let v3 = if version == 3 { Some(parse_v3(bytes, cluster_size)?) } else { None };
        let header_length = v3.map_or(V2_LENGTH, |v3| v3.header_length.get() as usize);
        let incompatible = v3.map_or(0, |v3| v3.incompatible_features.get());
        let autoclear = v3.map_or(0, |v3| v3.autoclear_features.get());
        let refcount_order = v3.map_or(4, |v3| v3.refcount_order.get());

        let backing_offset = raw.backing_file_offset.get();
        let room_end = extension_end(backing_offset, header_length, cluster_size)?;
        let room = bytes.get(header_length..bytes.len().min(room_end)).unwrap_or_default();
        let missing = room_end.saturating_sub(header_length + room.len());

        check_features(incompatible, room)?;
        check_encryption(raw.crypt_method.get())?;
        if refcount_order > limits::MAX_REFCOUNT_ORDER {
            return Err(field("refcount_order", refcount_order, "at most 6 (64 bits) is allowed"));
        }
        let extended_l2 = incompatible & feature::INCOMPATIBLE_EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < limits::MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(field("cluster_bits", cluster_bits, "extended L2 entries need 14 to 21"));
        }
        let compression = if version == 3 {
            parse_compression(bytes, header_length, incompatible)?
        } else {
            Compression::Deflate
        };

        check_tables(&raw, cluster_bits, extended_l2)?;

        let extensions = Extensions::parse(room, missing, cluster_size)?;
        if extensions.encryption {
            return Err(Error::Encrypted { method: "encryption header without a method".into() });
        }
        let backing = parse_backing(&raw, bytes, cluster_size)?
            .map(|name| BackingRef { name, format: extensions.backing_format });
        let data_file = parse_data_file(incompatible, autoclear, extensions.data_file)?;

        Ok(Self {
            version,
            cluster_bits,
            virtual_size: raw.size.get() / 512 * 512,
            l1_offset: raw.l1_table_offset.get(),
            l1_entries: raw.l1_size.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            refcount_order,
            incompatible,
            compatible: v3.map_or(0, |v3| v3.compatible_features.get()),
            autoclear,
            extended_l2,
            compression,
            backing,
            data_file,
            snapshot_count: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            bitmaps: extensions.bitmaps,
            feature_names: extensions.feature_names,
            header_length: u32::try_from(header_length).unwrap_or(u32::MAX),
            unknown_fields: bytes.get(FULL_LENGTH..header_length).unwrap_or_default().to_vec(),
            unknown_extensions: extensions.unknown,
        })
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of one L2 table.
    pub fn l2_entries(&self) -> u64 {
        l2_entries(self.cluster_bits, self.extended_l2)
    }

    /// Bits of a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Whether the image was not closed cleanly and its refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & feature::INCOMPATIBLE_DIRTY != 0
    }

    /// Whether the image is marked corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & feature::INCOMPATIBLE_CORRUPT != 0
    }

    /// Whether refcounts may be written late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & feature::COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// Whether the persistent bitmaps agree with the data. If not, they are not to be used.
    pub fn bitmaps_valid(&self) -> bool {
        self.bitmaps.is_some() && self.autoclear & feature::AUTOCLEAR_BITMAPS != 0
    }

    /// The autoclear bits that may stand once this crate writes to the image: those whose feature it keeps up
    /// to date, and no unknown one.
    pub fn autoclear_when_written(&self) -> u64 {
        let raw = if self.data_file.is_some() { feature::AUTOCLEAR_RAW_DATA_FILE } else { 0 };
        let bitmaps = if self.bitmaps.is_some() { feature::AUTOCLEAR_BITMAPS } else { 0 };
        self.autoclear & (raw | bitmaps)
    }

    /// Whether this crate may write to the image. One that is marked dirty is repaired first.
    ///
    /// # Errors
    /// [`Error::NotWritable`] with the reason. Reading is allowed all the same.
    pub fn check_writable(&self) -> Result<()> {
        let refusal = if self.is_corrupt() {
            WriteRefusal::Corrupt
        } else {
            return Ok(());
        };
        Err(refusal.into())
    }
}

/// Entries of an L2 table, which is one cluster.
pub(crate) fn l2_entries(cluster_bits: u32, extended_l2: bool) -> u64 {
    1 << (cluster_bits - if extended_l2 { 4 } else { 3 })
}

/// L1 entries that a disk of `size` bytes needs.
pub(crate) fn l1_entries_for(size: u64, cluster_bits: u32, extended_l2: bool) -> u64 {
    size.div_ceil(l2_entries(cluster_bits, extended_l2) << cluster_bits)
}

fn raw_header(bytes: &[u8]) -> Result<RawHeader> {
    if bytes.len() < 4 || bytes[..4] != limits::MAGIC.to_be_bytes() {
        return Err(Error::NotQcow2 { found: bytes[..bytes.len().min(4)].to_vec() });
    }
    let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
        return Err(field("file length", bytes.len() as u64, "a header has at least 72 bytes"));
    };
    match raw.version.get() {
        2 | 3 => Ok(raw),
        limits::VERSION_UNFINISHED => Err(Error::Unfinished),
        version => Err(Error::Version { version }),
    }
}

/// Whether `bytes`, the first of an image with the header `raw`, have all of its header: its fields, its
/// extensions with their end, and the names.
fn is_all_in(raw: &RawHeader, bytes: &[u8]) -> bool {
    let v3 = (raw.version.get() == 3).then(|| bytes.get(V2_LENGTH..).map(RawHeaderV3::read_from_prefix));
    let header_length = match v3 {
        None => V2_LENGTH,
        Some(Some(Ok((v3, _)))) => v3.header_length.get() as usize,
        Some(_) => return false,
    };
    let backing = raw.backing_file_offset.get();
    let names_end = backing.saturating_add(raw.backing_file_size.get().into());
    let room_end = if backing == 0 { usize::MAX } else { usize::try_from(backing).unwrap_or(usize::MAX) };
    let room = bytes.get(header_length..room_end.min(bytes.len()));
    names_end <= bytes.len() as u64
        && room.is_some_and(|room| room_end <= bytes.len() || extension::has_end(room))
}

fn check_cluster_bits(bits: u32) -> Result<u32> {
    match ClusterSize::from_bits(bits) {
        Some(_) => Ok(bits),
        None => Err(field("cluster_bits", bits, "9 to 21 (512 bytes to 2 MiB) is allowed")),
    }
}

fn parse_v3(bytes: &[u8], cluster_size: u64) -> Result<RawHeaderV3> {
    let Some(Ok((v3, _))) = bytes.get(V2_LENGTH..).map(RawHeaderV3::read_from_prefix) else {
        return Err(field("file length", bytes.len() as u64, "a version 3 header has at least 104 bytes"));
    };
    let length = v3.header_length.get();
    if (length as usize) < V3_LENGTH || u64::from(length) > cluster_size || !length.is_multiple_of(8) {
        return Err(Error::HeaderField {
            field: "header_length",
            value: length.into(),
            allowed: format!("a multiple of 8 from 104 to the cluster size, {cluster_size}, is allowed"),
        });
    }
    Ok(v3)
}

fn parse_compression(bytes: &[u8], header_length: usize, incompatible: u64) -> Result<Compression> {
    let value = if header_length > V3_LENGTH { bytes.get(V3_LENGTH).copied().unwrap_or(0) } else { 0 };
    let flagged = incompatible & feature::INCOMPATIBLE_COMPRESSION != 0;
    match (value, flagged) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => {
            Err(field("compression_type", value, "the incompatible feature bit 3 asks for another type"))
        }
        (1, false) => {
            Err(field("compression_type", value, "the incompatible feature bit 3 must be set for it"))
        }
        _ => Err(field("compression_type", value, "0 (deflate) and 1 (zstd) are supported")),
    }
}

/// Refuses incompatible features that are not known, by the names in the image's own table.
fn check_features(incompatible: u64, extensions: &[u8]) -> Result<()> {
    let unknown = incompatible & !feature::INCOMPATIBLE_KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let table = extension::feature_names(extensions);
    let names = feature::names_of(FeatureKind::Incompatible, unknown, &table);
    Err(Error::UnknownFeatures { bits: unknown, names })
}

/// The external data file, if the features say that there is one; `name` is that of the extension.
fn parse_data_file(incompatible: u64, autoclear: u64, name: Option<Vec<u8>>) -> Result<Option<DataFileRef>> {
    let raw = autoclear & feature::AUTOCLEAR_RAW_DATA_FILE != 0;
    if incompatible & feature::INCOMPATIBLE_DATA_FILE == 0 {
        if raw {
            let problem = "a raw data file needs the external data file feature";
            return Err(field("autoclear_features", autoclear, problem));
        }
        return Ok(None);
    }
    let name = name.filter(|name| !name.is_empty());
    Ok(Some(DataFileRef {
        name: name.map(|name| FileName::parse(&name, "data file name")).transpose()?,
        raw,
    }))
}

fn check_encryption(method: u32) -> Result<()> {
    let method = match method {
        0 => return Ok(()),
        1 => "AES".to_owned(),
        2 => "LUKS".to_owned(),
        other => format!("unknown method {other}"),
    };
    Err(Error::Encrypted { method })
}

/// Where the room for extensions ends.
fn extension_end(backing_offset: u64, header_length: usize, cluster_size: u64) -> Result<usize> {
    let end = if backing_offset == 0 { cluster_size } else { backing_offset };
    if end < header_length as u64 || end > cluster_size {
        return Err(Error::HeaderField {
            field: "backing_file_offset",
            value: backing_offset,
            allowed: format!(
                "it lies between the header, {header_length}, and the cluster's end, {cluster_size}"
            ),
        });
    }
    Ok(usize::try_from(end).unwrap_or(usize::MAX))
}

fn parse_backing(raw: &RawHeader, bytes: &[u8], cluster_size: u64) -> Result<Option<FileName>> {
    let (offset, len) = (raw.backing_file_offset.get(), raw.backing_file_size.get());
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > limits::MAX_BACKING_NAME || u64::from(len) > cluster_size.saturating_sub(offset) {
        return Err(Error::HeaderField {
            field: "backing_file_size",
            value: len.into(),
            allowed: format!(
                "at most {} bytes inside the first cluster are allowed",
                limits::MAX_BACKING_NAME
            ),
        });
    }
    let name = usize::try_from(offset).ok().and_then(|start| bytes.get(start..start + len as usize));
    let Some(name) = name else {
        return Err(field("backing_file_size", len, "the file ends inside the name"));
    };
    FileName::parse(name, "backing file name").map(Some)
}

fn check_tables(raw: &RawHeader, cluster_bits: u32, extended_l2: bool) -> Result<()> {
    let cluster_size = 1u64 << cluster_bits;
    let limit = |what, value, limit| {
        if value > limit { Err(Error::LimitExceeded { what, value, limit }) } else { Ok(()) }
    };

    let clusters = u64::from(raw.refcount_table_clusters.get());
    if clusters == 0 {
        return Err(field("refcount_table_clusters", clusters, "at least 1 is needed"));
    }
    let bytes = clusters << cluster_bits;
    limit("the refcount table, in bytes,", bytes, limits::MAX_REFCOUNT_TABLE_BYTES)?;
    check_table("refcount_table_offset", raw.refcount_table_offset.get(), bytes, cluster_size)?;

    let entries = u64::from(raw.l1_size.get());
    limit("the L1 table, in bytes,", entries * 8, limits::MAX_L1_BYTES)?;
    check_table("l1_table_offset", raw.l1_table_offset.get(), entries * 8, cluster_size)?;

    let size = raw.size.get();
    let needed = l1_entries_for(size, cluster_bits, extended_l2);
    limit("the L1 table for this virtual size, in bytes,", needed.saturating_mul(8), limits::MAX_L1_BYTES)?;
    if entries < needed {
        return Err(Error::HeaderField {
            field: "l1_size",
            value: entries,
            allowed: format!("the virtual size {size} needs at least {needed} entries"),
        });
    }

    let snapshots = raw.nb_snapshots.get();
    limit("the number of snapshots", snapshots.into(), limits::MAX_SNAPSHOTS.into())?;
    // Each entry has 40 bytes at least; where the table ends shows only when it is read. The offset counts
    // even without snapshots.
    let least = u64::from(snapshots) * limits::MIN_SNAPSHOT_ENTRY;
    check_table("snapshots_offset", raw.snapshots_offset.get(), least, cluster_size)
}
