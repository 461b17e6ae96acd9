//! What a check finds: figures, and findings one by one. No printing; the words here are those of an error.

use std::fmt;

use thiserror::Error;

/// The figures of a check. Those of `qemu-img check --output=json` by the same names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// What is wrong and may lose data.
    pub corruptions: u64,
    /// Clusters whose refcount is too high: space is wasted, no data is at risk.
    pub leaks: u64,
    /// Clusters whose refcount cannot be read.
    pub check_errors: u64,
    /// Corruptions that a repair has mended.
    pub corruptions_fixed: u64,
    /// Leaks that a repair has mended.
    pub leaks_fixed: u64,
    /// End of the last cluster that is in use.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk that have a place in the file.
    pub allocated_clusters: u64,
    /// Those that do not lie behind the one before.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It may lose data.
    Corruption,
    /// It wastes space.
    Leak,
    /// It could not be checked.
    CheckError,
}

/// What a repair writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mending {
    /// All refcounts are written anew, to free space. The clusters that had the old ones are named when the
    /// header names the new ones.
    NewRefcounts,
    /// The refcount of a cluster becomes the number of its references.
    Refcount {
        /// The cluster.
        cluster: u64,
        /// What its refcount was.
        refcount: u64,
        /// What it becomes.
        references: u64,
    },
}

/// A structure of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names say it")]
pub enum Structure {
    Header,
    L1Table,
    L2Table,
    Data,
    CompressedData,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::L1Table => "L1 table",
            Self::L2Table => "L2 table",
            Self::Data => "data cluster",
            Self::CompressedData => "compressed data",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap data",
        })
    }
}

/// Something that is wrong. Offsets are bytes of the image file; `at` is where the entry lies that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the text of each says what its fields are")]
pub enum Finding {
    /// A refcount is too low.
    #[error("cluster {cluster}: refcount {refcount}, references {references}")]
    RefcountTooLow { cluster: u64, refcount: u64, references: u64 },
    /// A refcount is too high.
    #[error("cluster {cluster}: leaked: refcount {refcount}, references {references}")]
    Leak { cluster: u64, refcount: u64, references: u64 },
    /// A refcount cannot be read.
    #[error("clusters {first} to {last}: their refcounts cannot be read: {why}")]
    RefcountUnreadable { first: u64, last: u64, why: &'static str },
    /// More references than a refcount of the image can say.
    #[error("cluster {cluster}: more references than its refcount can say")]
    RefcountOverflow { cluster: u64 },
    /// Something lies past the end of the file.
    #[error("{structure} at {offset}, {len} bytes: past the end of the file")]
    PastEnd { structure: Structure, offset: u64, len: u64 },
    /// A table cannot be read.
    #[error("{structure} at {offset}: {why}")]
    Unreadable { structure: Structure, offset: u64, why: String },
    /// An entry has bits that must be zero.
    #[error("entry at {at} of an {table}: {entry:#x} has reserved bits")]
    ReservedBits { table: Structure, at: u64, entry: u64 },
    /// An entry points at an offset that is no multiple of the cluster size.
    #[error("entry at {at}: {structure} at {offset} is not aligned to clusters")]
    Misaligned { structure: Structure, at: u64, offset: u64 },
    /// An entry makes no sense.
    #[error("entry at {at}: {why}")]
    BadEntry { at: u64, why: &'static str },
    /// The COPIED flag of an entry, the `index`th of its table, does not agree with a refcount.
    #[error("entry at {at}: COPIED is {}, but the refcount of the {structure} at {offset} is {refcount}", if *.copied { "set" } else { "clear" })]
    CopiedWrong { structure: Structure, at: u64, index: u64, offset: u64, copied: bool, refcount: u64 },
    /// Several entries of the active L1 table point at one L2 table, whose refcount says so: QEMU takes that
    /// for sound, but a change of the table is one of each part of the disk that it maps.
    #[error("L2 table at {offset}: {entries} entries of the L1 table point at it")]
    SharedL2Table { offset: u64, entries: u64 },
    /// Several tables lie in a cluster, whose refcount says so.
    #[error("cluster {cluster}: {tables} tables lie in it")]
    TablesOverlap { cluster: u64, tables: u64 },
    /// A refcount block has other references than that of the refcount table.
    #[error("refcount block {index} at {offset}: references {references}")]
    SharedRefcountBlock { index: u64, offset: u64, references: u64 },
    /// A field of the header cannot be right.
    #[error("{0}")]
    Header(String),
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::Leak { .. } => Severity::Leak,
            Self::RefcountUnreadable { .. } => Severity::CheckError,
            _ => Severity::Corruption,
        }
    }
}
