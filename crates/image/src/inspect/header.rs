//! The fields of a qcow2 header that an inspection judges, each read by itself.
//!
//! The parser that opens images stops at the first thing it refuses. Here a header may be wrong in one place
//! and is still asked for the others: an unknown feature does not hide the name of a backing file. Nothing
//! is believed that is not in the bytes that were read.

use blockmirror_qcow2::format::feature::{
    INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY, INCOMPATIBLE_KNOWN,
};
use blockmirror_qcow2::limits::VERSION_UNFINISHED;

const CRYPT_METHOD: usize = 32;
const INCOMPATIBLE: usize = 72;
const HEADER_LENGTH: usize = 100;
const V2_LENGTH: u64 = 72;

// Extensions, by the format's specification.
const END: u64 = 0;
const BACKING_FORMAT: u64 = 0xe279_2aca;
const ENCRYPTION: u64 = 0x0537_be77;
const DATA_FILE: u64 = 0x4441_5441;
/// In place of an extension that is masked. It has no meaning, and is passed over.
const NO_EXTENSION: [u8; 4] = *b"\0inv";

/// Bytes of a name that are shown.
const NAME_SHOWN: usize = 1023;

/// What a header says, whether or not the whole of it makes sense.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) version: u64,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// The name of the backing file, if there is a place for one.
    pub(super) backing: Option<String>,
    /// The format of the backing file, by the extension.
    pub(super) backing_format: Option<String>,
    /// The name of the data file, by the extension.
    pub(super) data_file: Option<String>,
    /// 0 in version 2.
    pub(super) incompatible: u64,
    pub(super) crypt_method: u64,
    /// Where the extension is that describes encryption.
    encryption_at: Option<usize>,
}

impl Fields {
    /// Reads the fields of a header that begins `bytes`, which are all of the first cluster or as much of it
    /// as the file has.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let version = number(bytes, 4, 4);
        // Version 1 has the same fields as far as the size; in place of the rest it has others.
        let later = |at, len| if version == 1 { 0 } else { number(bytes, at, len) };
        let (at, len) = (number(bytes, 8, 8), number(bytes, 16, 4));
        let mut out = Self {
            version,
            size: number(bytes, 24, 8),
            backing: (at != 0).then(|| name_at(bytes, at, len)),
            incompatible: if version >= 3 { later(INCOMPATIBLE, 8) } else { 0 },
            crypt_method: later(CRYPT_METHOD, 4),
            ..Self::default()
        };
        if version > 1 {
            out.extensions(bytes, at);
        }
        out
    }

    fn extensions(&mut self, bytes: &[u8], backing_at: u64) {
        let start = if self.version == 2 { V2_LENGTH } else { number(bytes, HEADER_LENGTH, 4) };
        let len = bytes.len() as u64;
        let end = if backing_at == 0 { len } else { backing_at.min(len) };
        // Each turn takes 8 bytes or more of the first cluster, which has 2 MiB at most.
        let mut at = start;
        while at.saturating_add(8) <= end {
            let here = at as usize;
            let (magic, size) = (number(bytes, here, 4), number(bytes, here + 4, 4));
            // At most 2^33, and `at` is below 2^22.
            let next = at + 8 + size.next_multiple_of(8);
            let text = || text(bytes.get(here + 8..).unwrap_or_default(), size);
            match magic {
                END => break,
                BACKING_FORMAT => self.backing_format = Some(text()),
                DATA_FILE => self.data_file = Some(text()),
                ENCRYPTION => self.encryption_at = Some(here),
                _ => {}
            }
            at = next;
        }
    }

    /// Whether it is a version that can be read, or the mark of an unfinished image, which is read as one.
    pub(super) fn has_known_version(&self) -> bool {
        matches!(self.version, 2 | 3) || self.is_unfinished()
    }

    pub(super) fn is_unfinished(&self) -> bool {
        self.version == u64::from(VERSION_UNFINISHED)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    pub(super) fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    pub(super) fn needs_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    pub(super) fn unknown_features(&self) -> u64 {
        self.incompatible & !INCOMPATIBLE_KNOWN
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.crypt_method != 0 || self.encryption_at.is_some()
    }

    /// `bytes` without what is refused as a whole, and has been found: encryption and unknown features. The
    /// rest of the header can be judged then.
    pub(super) fn masked(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        let mut put = |at: usize, value: &[u8]| {
            if let Some(place) = out.get_mut(at..at + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(CRYPT_METHOD, &[0; 4]);
        if self.unknown_features() != 0 {
            put(INCOMPATIBLE, &(self.incompatible & INCOMPATIBLE_KNOWN).to_be_bytes());
        }
        if let Some(at) = self.encryption_at {
            put(at, &NO_EXTENSION);
        }
        out
    }
}

/// The number of `len` bytes at `at`; 0 if it is not all there.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = at.checked_add(len).and_then(|end| bytes.get(at..end)).unwrap_or_default();
    field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn name_at(bytes: &[u8], at: u64, len: u64) -> String {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    text(rest, len)
}

/// The first `len` bytes of `bytes` as a text, or what is there of them.
fn text(bytes: &[u8], len: u64) -> String {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(NAME_SHOWN).min(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[103] = 104;
        for (at, value) in fields {
            bytes[*at..*at + value.len()].copy_from_slice(value);
        }
        bytes
    }

    #[test]
    fn what_is_refused_hides_nothing_else() {
        let bytes = header(&[
            (14, &[2, 0]),
            (19, &[6]),
            (0x200, b"/a/b/c"),
            (35, &[2]),
            (72, &[0x80, 0, 0, 0, 0, 0, 0, 7]),
            (104, b"\x05\x37\xbe\x77\0\0\0\x10"),
            (128, b"DATA\0\0\0\x03sec"),
            (144, b"\xe2\x79\x2a\xca\0\0\0\x03raw"),
        ]);
        let fields = Fields::read(&bytes);
        assert_eq!(fields.backing.as_deref(), Some("/a/b/c"));
        assert_eq!(fields.data_file.as_deref(), Some("sec"));
        assert_eq!(fields.backing_format.as_deref(), Some("raw"));
        assert!(fields.is_dirty() && fields.is_corrupt() && fields.needs_data_file());
        assert!(fields.is_encrypted());
        assert_eq!(fields.unknown_features(), 1 << 63);
        let masked = Fields::read(&fields.masked(&bytes));
        assert!(!masked.is_encrypted() && masked.unknown_features() == 0);
        assert_eq!((masked.data_file, masked.incompatible), (fields.data_file, 7));
    }

    #[test]
    fn any_bytes_have_fields() {
        let mut bytes = vec![0xff; 4096];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        for version in [0, 1, 2, 3, 4, 0xff] {
            bytes[4..8].copy_from_slice(&[0, 0, 0, version]);
            for len in [0, 4, 8, 20, 32, 72, 73, 100, 104, 4096] {
                let fields = Fields::read(&bytes[..len]);
                assert_eq!(fields.masked(&bytes[..len]).len(), len);
            }
        }
        // Extensions that begin at each byte, and reach past the end.
        for start in 0..=255 {
            let fields = Fields::read(&header(&[(100, &[0, 0, 0, start]), (200, &[0xee; 3000])]));
            assert_eq!(fields.data_file, None);
        }
    }

    #[test]
    fn version_2_has_no_features() {
        let fields = Fields::read(&header(&[(7, &[2]), (72, &[0xff; 8])]));
        assert_eq!((fields.incompatible, fields.has_known_version()), (0, true));
        assert!(!Fields::read(&header(&[(7, &[4])])).has_known_version());
    }
}
