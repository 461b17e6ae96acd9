//! What an inspection can find: the kinds, under the names that the command and its JSON have for them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Something that speaks against opening an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InspectFinding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// The particulars, on one line but for what names in the image hold.
    pub message: String,
}

/// The kinds of findings. Each refuses an image unless the caller allows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// The header names a backing file: opening the image opens that file of the host.
    BackingFile,
    /// The header asks for an external data file: opening the image opens that file of the host.
    DataFile,
    /// The image needs features that are not known, so what it holds is not known.
    UnknownFeatures,
    /// The file ends before what its metadata says.
    Truncated,
    /// The image was not closed cleanly: opening it for writing begins with a repair.
    Dirty,
    /// The image is marked corrupt.
    Corrupt,
    /// The data is encrypted.
    Encrypted,
    /// Two programs can take the file, or what it holds, for different formats.
    FormatConfusion,
    /// The format is recognised and cannot be read.
    UnsupportedFormat,
    /// Metadata makes no sense.
    Malformed,
    /// A size is over a limit.
    LimitExceeded,
}

impl FindingKind {
    /// All kinds, in the order in which help texts list them.
    pub const ALL: [Self; 11] = [
        Self::BackingFile,
        Self::DataFile,
        Self::UnknownFeatures,
        Self::Truncated,
        Self::Dirty,
        Self::Corrupt,
        Self::Encrypted,
        Self::FormatConfusion,
        Self::UnsupportedFormat,
        Self::Malformed,
        Self::LimitExceeded,
    ];

    /// Its name on the command line and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BackingFile => "backing_file",
            Self::DataFile => "data_file",
            Self::UnknownFeatures => "unknown_features",
            Self::Truncated => "truncated",
            Self::Dirty => "dirty",
            Self::Corrupt => "corrupt",
            Self::Encrypted => "encrypted",
            Self::FormatConfusion => "format_confusion",
            Self::UnsupportedFormat => "unsupported_format",
            Self::Malformed => "malformed",
            Self::LimitExceeded => "limit_exceeded",
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that no kind of finding has.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("\"{0}\" is no finding; there are {all}", all = FindingKind::ALL.map(FindingKind::as_str).join(", "))]
pub struct UnknownFinding(pub String);

impl FromStr for FindingKind {
    type Err = UnknownFinding;

    fn from_str(name: &str) -> Result<Self, UnknownFinding> {
        let kind = Self::ALL.into_iter().find(|kind| kind.as_str() == name);
        kind.ok_or_else(|| UnknownFinding(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn names_round_trip() {
        for kind in FindingKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let unknown = "backing".parse::<FindingKind>().unwrap_err().to_string();
        assert!(
            unknown.starts_with("\"backing\" is no finding; there are backing_file, data_file"),
            "{unknown}"
        );
    }
}
