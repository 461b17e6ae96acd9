//! The feature bits of a version 3 header, and the names that images carry for them.
//!
//! Incompatible bits must all be understood, or the image must not be opened. Compatible bits may be ignored.
//! Autoclear bits must be cleared by a writer that does not understand them. The header parser calls this.

use std::fmt;

/// Which of the three fields a bit lies in. The numbers are those of the feature-name table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[repr(u8)]
pub enum FeatureKind {
    /// A reader that does not know the bit must not open the image.
    Incompatible = 0,
    /// May be ignored.
    Compatible = 1,
    /// A writer that does not know the bit clears it at its first write.
    Autoclear = 2,
}

/// Refcounts may be wrong: the image was not closed cleanly.
pub const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
/// Metadata may be wrong: do not write.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Guest data lies in another file, at the guest's own offsets.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// The compression type is not deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// L2 entries have 16 bytes and clusters 32 subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// Every incompatible bit that is understood.
pub const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;

/// Refcounts may be written late, with the dirty bit set meanwhile.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

/// The bitmaps extension is consistent with the data.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// The external data file is a valid raw image by itself.
pub const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;

/// Bytes of a row of the feature-name table: kind, bit, name.
pub(crate) const NAME_ROW: usize = 48;
const NAME_BYTES: usize = NAME_ROW - 2;

/// A row of the feature-name table.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct FeatureName {
    /// The number of the field as the table gives it; see [`FeatureKind`].
    pub kind: u8,
    /// The bit, 0 to 63.
    pub bit: u8,
    /// The name, with anything that is not UTF-8 replaced.
    pub name: String,
}

impl fmt::Debug for FeatureName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {:?}", self.kind, self.bit, self.name)
    }
}

impl FeatureName {
    /// The rows of a feature-name table; what the last one lacks is zeros.
    pub(crate) fn parse_table(bytes: &[u8]) -> Vec<Self> {
        bytes
            .chunks(NAME_ROW)
            .filter_map(|row| {
                let ([kind, bit], name) = row.split_first_chunk()?;
                let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
                let name = String::from_utf8_lossy(&name[..end]).into_owned();
                Some(Self { kind: *kind, bit: *bit, name })
            })
            .collect()
    }

    /// The table that new images carry: every bit of which this version knows the name.
    pub(crate) fn encode_known() -> Vec<u8> {
        let mut table = Vec::with_capacity(KNOWN.len() * NAME_ROW);
        for (kind, bit, name) in KNOWN {
            table.extend([*kind as u8, *bit]);
            table.extend(name.bytes());
            table.resize(table.len() + NAME_BYTES - name.len(), 0);
        }
        table
    }
}

/// Names as other tools print them.
const KNOWN: &[(FeatureKind, u8, &str)] = &[
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// Names for the set bits of a field: the image's own, else the number.
pub(crate) fn names_of(kind: FeatureKind, bits: u64, table: &[FeatureName]) -> Vec<String> {
    (0u8..64)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| {
            table
                .iter()
                .find(|row| row.kind == kind as u8 && row.bit == bit && !row.name.is_empty())
                .map_or_else(|| format!("bit {bit}"), |row| format!("{:?} (bit {bit})", row.name))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_known_names_reads_back() {
        let table = FeatureName::parse_table(&FeatureName::encode_known());
        assert_eq!(table.len(), KNOWN.len());
        assert!(table.iter().zip(KNOWN).all(|(row, (kind, bit, name))| {
            (row.kind, row.bit, row.name.as_str()) == (*kind as u8, *bit, *name)
        }));
    }

    #[test]
    fn unknown_bits_are_named_by_the_image_or_numbered() {
        let mut row = [0u8; NAME_ROW];
        row[1] = 7;
        row[2..6].copy_from_slice(b"moon");
        let table = FeatureName::parse_table(&row);
        assert_eq!(
            names_of(FeatureKind::Incompatible, 1 << 7 | 1 << 63, &table),
            ["\"moon\" (bit 7)", "bit 63"]
        );
        assert_eq!(names_of(FeatureKind::Autoclear, 1 << 7, &table), ["bit 7"]);
        // The last row need not be whole.
        assert_eq!(FeatureName::parse_table(&row[..6]), table);
        assert_eq!(FeatureName::parse_table(&row[..1]), []);
    }
}
