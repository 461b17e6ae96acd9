//! Header extensions: typed records between the header's fixed fields and the backing file's name.
//!
//! Each is a 4-byte magic, a 4-byte length and the data, padded to 8 bytes; a zero magic or the end of the
//! room ends the list. The header parser calls this. What is not known is kept as it is, to be written back.

use byteorder::{BigEndian, ByteOrder};

use super::feature::FeatureName;
use super::field::check_table;
use crate::error::{Error, Result};
use crate::limits::{MAX_BACKING_FORMAT, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};

pub(crate) const END: u32 = 0;
pub(crate) const BACKING_FORMAT: u32 = 0xE279_2ACA;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_F857;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
pub(crate) const ENCRYPTION: u32 = 0x0537_BE77;
pub(crate) const DATA_FILE: u32 = 0x4441_5441;

/// An extension that is not understood, kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct UnknownExtension {
    /// Its magic number.
    pub magic: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// Where the directory of persistent bitmaps lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Where it starts in the file; on a cluster border.
    pub directory_offset: u64,
}

/// Everything the extensions of one header say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    pub(crate) backing_format: Option<String>,
    pub(crate) feature_names: Vec<FeatureName>,
    pub(crate) bitmaps: Option<BitmapsExtension>,
    pub(crate) encryption: bool,
    pub(crate) data_file: Option<Vec<u8>>,
    pub(crate) unknown: Vec<UnknownExtension>,
}

/// One extension as it lies in the header.
struct Record<'a> {
    magic: u32,
    data: &'a [u8],
}

/// Cuts the room for extensions into records. Bytes that the file does not have read as zeros, and so end it.
struct Records<'a> {
    rest: &'a [u8],
    /// Bytes of room after `rest` that lie past the end of the file.
    missing: usize,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (head, data) = self.rest.split_at_checked(8)?;
        let magic = BigEndian::read_u32(head);
        let len = usize::try_from(BigEndian::read_u32(&head[4..])).unwrap_or(usize::MAX);
        if len > data.len() + self.missing {
            self.rest = &[];
            return Some(Err(Error::Extension {
                name: name_of(magic),
                problem: format!("{len} bytes, but only {} remain in the first cluster", data.len()),
            }));
        }
        if magic == END {
            return None;
        }
        if len > data.len() {
            self.rest = &[];
            return Some(Err(Error::Extension {
                name: name_of(magic),
                problem: format!("{len} bytes, but the file ends after {}", data.len()),
            }));
        }
        let padded = len.next_multiple_of(8).min(data.len());
        self.rest = &data[padded..];
        Some(Ok(Record { magic, data: &data[..len] }))
    }
}

/// The name of an extension in messages.
fn name_of(magic: u32) -> &'static str {
    match magic {
        BACKING_FORMAT => "backing format",
        END => "end",
        FEATURE_NAMES => "feature names",
        BITMAPS => "bitmaps",
        ENCRYPTION => "encryption header",
        DATA_FILE => "data file name",
        _ => "of unknown type",
    }
}

/// Finds the feature names alone, whatever else is damaged: they are needed to say which unknown feature an
/// image has, and such a feature may have changed the rest.
pub(crate) fn feature_names(room: &[u8]) -> Vec<FeatureName> {
    Records { rest: room, missing: 0 }
        .map_while(Result::ok)
        .find(|record| record.magic == FEATURE_NAMES)
        .map(|record| FeatureName::parse_table(record.data))
        .unwrap_or_default()
}

/// Whether the list ends in `room`, by the record for that.
pub(crate) fn has_end(room: &[u8]) -> bool {
    let mut records = Records { rest: room, missing: 0 };
    while records.next().is_some_and(|record| record.is_ok()) {}
    records.rest.len() >= 8
}

/// The extensions in `room` as they are, without the end.
pub(crate) fn records(room: &[u8]) -> Result<Vec<(u32, &[u8])>> {
    Records { rest: room, missing: 0 }.map(|record| record.map(|r| (r.magic, r.data))).collect()
}

impl Extensions {
    /// Parses the room between the fixed header and the backing name or the end of the first cluster.
    /// `missing` bytes of that room lie past the end of the file.
    pub(crate) fn parse(room: &[u8], missing: usize, cluster_size: u64) -> Result<Self> {
        let mut out = Self::default();
        for record in (Records { rest: room, missing }) {
            let Record { magic, data } = record?;
            match magic {
                BACKING_FORMAT => out.backing_format = backing_format(data)?,
                FEATURE_NAMES => out.feature_names = FeatureName::parse_table(data),
                BITMAPS => out.bitmaps = Some(BitmapsExtension::parse(data, cluster_size)?),
                ENCRYPTION => out.encryption = true,
                DATA_FILE => out.data_file = Some(data.to_vec()),
                _ => out.unknown.push(UnknownExtension { magic, data: data.to_vec() }),
            }
        }
        Ok(out)
    }
}

fn backing_format(data: &[u8]) -> Result<Option<String>> {
    let error = |problem| Error::Extension { name: "backing format", problem };
    if data.len() > MAX_BACKING_FORMAT {
        return Err(error(format!("{} bytes, at most {MAX_BACKING_FORMAT} are allowed", data.len())));
    }
    let text = std::str::from_utf8(data)
        .ok()
        .filter(|t| t.bytes().all(|b| b.is_ascii_graphic()))
        .ok_or_else(|| error(format!("{:?} is not the name of a format", data.escape_ascii().to_string())))?;
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

impl BitmapsExtension {
    fn parse(data: &[u8], cluster_size: u64) -> Result<Self> {
        let error = |problem| Error::Extension { name: "bitmaps", problem };
        if data.len() != 24 {
            return Err(error(format!("{} bytes instead of 24", data.len())));
        }
        let out = Self {
            count: BigEndian::read_u32(data),
            directory_size: BigEndian::read_u64(&data[8..]),
            directory_offset: BigEndian::read_u64(&data[16..]),
        };
        let reserved = BigEndian::read_u32(&data[4..]);
        if reserved != 0 {
            return Err(error(format!("the reserved field is {reserved}, not 0")));
        }
        if out.count == 0 {
            return Err(error("it declares no bitmap".into()));
        }
        if out.count > MAX_BITMAPS {
            return Err(Error::LimitExceeded {
                what: "the number of bitmaps",
                value: out.count.into(),
                limit: MAX_BITMAPS.into(),
            });
        }
        if out.directory_size > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(Error::LimitExceeded {
                what: "the bitmap directory",
                value: out.directory_size,
                limit: MAX_BITMAP_DIRECTORY_BYTES,
            });
        }
        check_table("bitmap directory offset", out.directory_offset, out.directory_size, cluster_size)?;
        Ok(out)
    }

    /// The data of the extension.
    pub(super) fn encode(&self) -> [u8; 24] {
        let mut data = [0; 24];
        BigEndian::write_u32(&mut data, self.count);
        BigEndian::write_u64(&mut data[8..], self.directory_size);
        BigEndian::write_u64(&mut data[16..], self.directory_offset);
        data
    }
}

/// Appends one extension, padded to 8 bytes.
pub(crate) fn append(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    let mut head = [0; 8];
    BigEndian::write_u32(&mut head, magic);
    // Lengths here are those of our own tables and of names that were checked against a cluster.
    BigEndian::write_u32(&mut head[4..], u32::try_from(data.len()).unwrap_or(u32::MAX));
    out.extend(head);
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(records: &[(u32, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (magic, data) in records {
            append(&mut out, *magic, data);
        }
        out
    }

    #[test]
    fn records_are_told_apart_and_unknown_ones_kept() {
        let bytes = room(&[(BACKING_FORMAT, b"qcow2"), (0x1234, b"xyz"), (DATA_FILE, b"d.raw"), (END, b"")]);
        let ext = Extensions::parse(&bytes, 0, 65536).unwrap();
        assert_eq!(ext.backing_format.as_deref(), Some("qcow2"));
        assert_eq!(ext.data_file.as_deref(), Some(&b"d.raw"[..]));
        assert_eq!(ext.unknown, [UnknownExtension { magic: 0x1234, data: b"xyz".to_vec() }]);
    }

    #[test]
    fn a_record_longer_than_the_room_is_refused() {
        let mut bytes = room(&[(0x1234, b"12345678")]);
        bytes[7] = 9;
        let e = Extensions::parse(&bytes, 0, 65536).unwrap_err();
        assert!(e.to_string().contains("9 bytes, but only 8 remain"), "{e}");
    }

    #[test]
    fn the_end_of_the_list_is_found() {
        let bytes = room(&[(BACKING_FORMAT, b"qcow2"), (END, b"")]);
        assert!(has_end(&bytes) && has_end(&bytes[bytes.len() - 8..]));
        assert!(!has_end(&bytes[..bytes.len() - 1]) && !has_end(&bytes[..8]) && !has_end(&[]));
        // It ends outside of what there is.
        assert!(!has_end(&room(&[(0x1234, &[0; 64])])[..40]));
    }

    #[test]
    fn the_last_record_may_lack_its_padding() {
        let mut bytes = room(&[(0x1234, b"abc")]);
        bytes.truncate(11);
        assert_eq!(Extensions::parse(&bytes, 0, 65536).unwrap().unknown.len(), 1);
    }

    #[test]
    fn names_are_found_before_damage() {
        let mut bytes = room(&[(FEATURE_NAMES, &FeatureName::encode_known()), (7, b"")]);
        let end = bytes.len();
        bytes[end - 1] = 200;
        assert!(!feature_names(&bytes).is_empty());
        assert!(Extensions::parse(&bytes, 0, 65536).is_err());
    }

    #[test]
    fn bitmaps_are_bounded() {
        let ext = |count: u32, size: u64, offset: u64| {
            let mut data = [0; 24];
            BigEndian::write_u32(&mut data, count);
            BigEndian::write_u64(&mut data[8..], size);
            BigEndian::write_u64(&mut data[16..], offset);
            Extensions::parse(&room(&[(BITMAPS, &data)]), 0, 65536).map(|e| e.bitmaps)
        };
        assert!(ext(1, 64, 65536).unwrap().is_some());
        assert!(matches!(ext(0, 64, 65536), Err(Error::Extension { .. })));
        assert!(matches!(ext(65536, 64, 65536), Err(Error::LimitExceeded { .. })));
        assert!(matches!(ext(1, (64 << 20) + 1, 65536), Err(Error::LimitExceeded { .. })));
        assert!(matches!(ext(1, 64, 65537), Err(Error::HeaderField { .. })));
        assert!(matches!(ext(1, 64, 1 << 56), Err(Error::HeaderField { .. })));
    }

    #[test]
    fn the_format_of_the_backing_file_is_a_short_plain_word() {
        for bad in [&b"0123456789abcdef"[..], b"ra w", b"\xff"] {
            assert!(Extensions::parse(&room(&[(BACKING_FORMAT, bad)]), 0, 65536).is_err());
        }
    }
}
