//! The kinds of metadata, and those that writes of guest data are checked against.
//!
//! Chosen by who opens an image, asked by the map of metadata (`overlap`), and named by the error of a write
//! that was refused (`damage`).

use std::fmt;

/// A kind of metadata. The names are those of QEMU's `Qcow2OverlapCheckFlags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetadataKind {
    /// The header, with its extensions: the first cluster.
    MainHeader,
    /// The L1 table of the disk.
    ActiveL1,
    /// An L2 table of the disk.
    ActiveL2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The table of internal snapshots.
    SnapshotTable,
    /// The L1 table of a snapshot.
    InactiveL1,
    /// An L2 table of a snapshot; the disk may use it as well.
    InactiveL2,
    /// The directory of persistent bitmaps, their tables and their bits (QEMU: the directory alone).
    BitmapDirectory,
}

impl MetadataKind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::MainHeader,
        Self::ActiveL1,
        Self::ActiveL2,
        Self::RefcountTable,
        Self::RefcountBlock,
        Self::SnapshotTable,
        Self::InactiveL1,
        Self::InactiveL2,
        Self::BitmapDirectory,
    ];

    /// The name of its option, behind `overlap-check.`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MainHeader => "main-header",
            Self::ActiveL1 => "active-l1",
            Self::ActiveL2 => "active-l2",
            Self::RefcountTable => "refcount-table",
            Self::RefcountBlock => "refcount-block",
            Self::SnapshotTable => "snapshot-table",
            Self::InactiveL1 => "inactive-l1",
            Self::InactiveL2 => "inactive-l2",
            Self::BitmapDirectory => "bitmap-directory",
        }
    }

    /// The kind whose option has the name `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

/// As a message says it, with the article.
impl fmt::Display for MetadataKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MainHeader => "the header",
            Self::ActiveL1 => "the L1 table",
            Self::ActiveL2 => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::InactiveL1 => "the L1 table of a snapshot",
            Self::InactiveL2 => "an L2 table of a snapshot",
            Self::BitmapDirectory => "the bitmap directory or a bitmap",
        })
    }
}

/// The kinds of metadata that writes are checked against (QEMU's `overlap-check`).
///
/// ```
/// use blockmirror_qcow2::{MetadataKind, OverlapChecks};
///
/// let checks = OverlapChecks::from_name("constant").unwrap().with(MetadataKind::ActiveL2, true);
/// assert!(checks.contains(MetadataKind::ActiveL2) && !checks.contains(MetadataKind::RefcountBlock));
/// assert_eq!(OverlapChecks::default(), OverlapChecks::CACHED);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapChecks(u16);

impl OverlapChecks {
    /// Writes are not checked.
    pub const NONE: Self = Self(0);
    /// What takes no look at tables to know.
    pub const CONSTANT: Self = Self::of(&[
        MetadataKind::MainHeader,
        MetadataKind::ActiveL1,
        MetadataKind::RefcountTable,
        MetadataKind::SnapshotTable,
        MetadataKind::BitmapDirectory,
    ]);
    /// All but the L2 tables of snapshots. The default.
    pub const CACHED: Self = Self(Self::ALL.0 & !MetadataKind::InactiveL2.bit());
    /// Everything. The L2 tables of snapshots are looked up at opening.
    pub const ALL: Self = Self::of(&MetadataKind::ALL);

    const fn of(kinds: &[MetadataKind]) -> Self {
        let (mut bits, mut i) = (0, 0);
        while i < kinds.len() {
            bits |= kinds[i].bit();
            i += 1;
        }
        Self(bits)
    }

    /// The set with the name `name`: `none`, `constant`, `cached` or `all`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::NONE),
            "constant" => Some(Self::CONSTANT),
            "cached" => Some(Self::CACHED),
            "all" => Some(Self::ALL),
            _ => None,
        }
    }

    /// The set that the options of a node or image describe: `overlap-check`, or `overlap-check.template`,
    /// says which set to begin with, and an option for each kind whether it is in it.
    ///
    /// ```
    /// use blockmirror_qcow2::{MetadataKind, OverlapChecks};
    ///
    /// let options = [("overlap-check.template", "all"), ("overlap-check.active-l2", "off")];
    /// let checks = OverlapChecks::from_options(options).unwrap();
    /// assert_eq!(checks, OverlapChecks::ALL.with(MetadataKind::ActiveL2, false));
    /// assert_eq!(OverlapChecks::from_options([("overlap-check", "some")]), Err("overlap-check"));
    /// ```
    ///
    /// # Errors
    /// The option that does not exist, that has another value, or that contradicts another.
    pub fn from_options<'a>(options: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, &'a str> {
        let (mut template, mut kinds) = (None, Vec::new());
        for (option, value) in options {
            let name = option.strip_prefix("overlap-check").ok_or(option)?;
            match (name, name.strip_prefix('.').and_then(MetadataKind::from_name), value) {
                ("" | ".template", ..) => {
                    let set = Self::from_name(value).ok_or(option)?;
                    if template.replace(set).is_some_and(|other| other != set) {
                        return Err(option);
                    }
                }
                (_, Some(kind), "on" | "yes" | "true" | "y") => kinds.push((kind, true)),
                (_, Some(kind), "off" | "no" | "false" | "n") => kinds.push((kind, false)),
                _ => return Err(option),
            }
        }
        let set = template.unwrap_or_default();
        Ok(kinds.into_iter().fold(set, |set, (kind, checked)| set.with(kind, checked)))
    }

    /// The same set with `kind`, or without it.
    #[must_use]
    pub const fn with(self, kind: MetadataKind, checked: bool) -> Self {
        if checked { Self(self.0 | kind.bit()) } else { Self(self.0 & !kind.bit()) }
    }

    /// Whether writes are checked against `kind`.
    pub const fn contains(self, kind: MetadataKind) -> bool {
        self.0 & kind.bit() != 0
    }
}

impl Default for OverlapChecks {
    fn default() -> Self {
        Self::CACHED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_bit_and_a_name_of_its_own() {
        for (index, kind) in MetadataKind::ALL.into_iter().enumerate() {
            assert_eq!((kind as usize, MetadataKind::from_name(kind.as_str())), (index, Some(kind)));
            assert!(OverlapChecks::ALL.contains(kind) && !OverlapChecks::NONE.contains(kind));
            assert!(!OverlapChecks::ALL.with(kind, false).contains(kind));
        }
        assert!(!OverlapChecks::CACHED.contains(MetadataKind::InactiveL2));
        assert!(!OverlapChecks::CONSTANT.contains(MetadataKind::ActiveL2));
        assert_eq!(OverlapChecks::from_name("most"), None);
    }
}
