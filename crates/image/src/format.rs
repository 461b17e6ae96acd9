//! The formats, and finding out which one a file is in.
//!
//! Called by the open functions when no format was given. What is recognised but not read is refused by name:
//! taking a VMDK for a raw disk would hand its header to a guest as if it were a boot sector.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// An image format that can be opened and created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// All formats, in the order in which help texts list them.
    pub const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// The name on the command line, in JSON and in image headers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl Format {
    /// The format of a backing file that a header calls `name`. QEMU's drivers for files are the bytes of the
    /// file.
    ///
    /// # Errors
    /// If there is no such format.
    pub fn in_header(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "file" | "host_device" => Ok(Self::Raw),
            name => name.parse(),
        }
    }
}

/// The format of a backing file, under the name that a header has for it.
///
/// ```
/// use blockmirror_image::{BackingFormat, Format};
///
/// let format: BackingFormat = "host_device".parse()?;
/// assert_eq!((format.as_str(), format.format()), ("host_device", Format::Raw));
/// # Ok::<(), blockmirror_image::UnknownFormat>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFormat {
    name: String,
    format: Format,
}

impl BackingFormat {
    /// The name in a header.
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }
}

impl From<Format> for BackingFormat {
    fn from(format: Format) -> Self {
        Self { name: format.as_str().to_owned(), format }
    }
}

impl FromStr for BackingFormat {
    type Err = UnknownFormat;

    /// Reads a name as [`Format::in_header`] does.
    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Ok(Self { name: name.to_owned(), format: Format::in_header(name)? })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A format name that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown format \"{0}\": raw and qcow2 are supported")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .into_iter()
            .find(|format| format.as_str() == name)
            .ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// What the first bytes of a file say that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Detected {
    /// A format that is supported. [`Format::Raw`] means that no magic was recognised.
    Known(Format),
    /// A format that is recognised and not supported.
    Foreign(&'static str),
}

/// How many bytes [`detect`] wants to see; fewer are fine if the file ends before.
pub const PROBE_LEN: usize = 512;

/// Tells the format from the first [`PROBE_LEN`] bytes of a file.
pub fn detect(head: &[u8]) -> Detected {
    match blockmirror_raw::foreign_format(head) {
        None => Detected::Known(Format::Raw),
        // Version 1 is another format under the same magic. A version that does not exist yet is for the
        // qcow2 reader to refuse.
        Some("qcow2") if head.get(4..8) == Some(&[0, 0, 0, 1]) => Detected::Foreign("qcow"),
        Some("qcow2") => Detected::Known(Format::Qcow2),
        Some(name) => Detected::Foreign(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert_eq!(
            "vmdk".parse::<Format>().unwrap_err().to_string(),
            "unknown format \"vmdk\": raw and qcow2 are supported"
        );
    }

    #[test]
    fn magics_are_told_apart() {
        assert_eq!(detect(b"QFI\xfb\0\0\0\x02"), Detected::Known(Format::Qcow2));
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03rest"), Detected::Known(Format::Qcow2));
        assert_eq!(detect(b"QFI\xfb\0\0\0\x01"), Detected::Foreign("qcow"));
        assert_eq!(detect(b"QFI\xfb"), Detected::Known(Format::Qcow2));
        assert_eq!(detect(b"KDMV\x01"), Detected::Foreign("vmdk"));
        assert_eq!(detect(b"LUKS\xba\xbe\0\x02"), Detected::Foreign("luks"));
        assert_eq!(detect(b"LUKS"), Detected::Known(Format::Raw));
        let mut vdi = [0u8; 512];
        vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(detect(&vdi), Detected::Foreign("vdi"));
        assert_eq!(detect(&[0u8; 512]), Detected::Known(Format::Raw));
        assert_eq!(detect(&[]), Detected::Known(Format::Raw));
    }
}
