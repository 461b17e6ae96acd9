//! What the bytes of a file, or of a disk, look like: every image format whose magic they have, and what a
//! disk begins with.
//!
//! Probing takes the first match; an inspection wants all of them, because the program that opens the file
//! later may look for them in another order. Called for the file and for the disk in a qcow2 image.

use blockmirror_block::Result;
use blockmirror_raw::{SECTOR, foreign_formats};

/// Where a volume descriptor of ISO 9660 has its name.
const ISO_AT: usize = 16 * 2048 + 1;
/// Bytes of the beginning that are read.
const HEAD: usize = ISO_AT + 5;
/// Bytes of the header of a GPT that are read.
const GPT_FIELDS: usize = 40;

/// What was recognised.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Signatures {
    /// Image formats, by what the bytes begin with.
    pub(super) formats: Vec<&'static str>,
    /// Whether the last sector is the footer of a vpc image of fixed size.
    pub(super) has_vpc_footer: bool,
    /// What a disk may begin with.
    pub(super) contents: Vec<&'static str>,
    /// Where the disk ends that a GPT describes.
    pub(super) gpt_end: Option<u64>,
    /// Where that GPT has its header.
    gpt_at: u64,
}

impl Signatures {
    /// Looks at `len` bytes, which `read` reads: 32 KiB at the beginning and a sector at the end.
    pub(super) fn read(read: &dyn Fn(&mut [u8], u64) -> Result<()>, len: u64) -> Result<Self> {
        let mut head = vec![0; HEAD.min(usize::try_from(len).unwrap_or(HEAD))];
        read(&mut head, 0)?;
        let sector = &head[..head.len().min(SECTOR as usize)];
        let mut out = Self { formats: foreign_formats(sector).collect(), ..Self::default() };
        out.formats.dedup();
        // Version 1 is another format under the same magic.
        if sector.get(..8) == Some(b"QFI\xfb\0\0\0\x01") {
            out.formats[0] = "qcow";
        }
        if let Some(at) = len.checked_sub(SECTOR) {
            let mut footer = [0; 8];
            read(&mut footer, at)?;
            out.has_vpc_footer = &footer == b"conectix";
        }
        if let Some((at, end)) = gpt(&head) {
            (out.gpt_at, out.gpt_end) = (at, Some(end));
        }
        if out.gpt_end.is_some() {
            out.contents.push("gpt");
        } else if has_mbr(sector) {
            out.contents.push("mbr");
        }
        if head.get(ISO_AT..) == Some(b"CD001") {
            out.contents.push("iso");
        }
        Ok(out)
    }

    /// Where that ends by which `name` of the contents was recognised.
    pub(super) fn end_of(&self, name: &str) -> u64 {
        match name {
            "iso" => HEAD as u64,
            "gpt" => self.gpt_at + GPT_FIELDS as u64,
            _ => SECTOR,
        }
    }

    /// The format that probing detects.
    pub(super) fn detected(&self) -> &'static str {
        self.formats.first().copied().unwrap_or("raw")
    }
}

/// Where the GPT in `head` begins, and the end of the disk that it describes, which has its second header in
/// the last sector.
fn gpt(head: &[u8]) -> Option<(u64, u64)> {
    [512u64, 4096].into_iter().find_map(|sector| {
        let header = head.get(usize::try_from(sector).ok()?..)?;
        let second = header.get(32..GPT_FIELDS).filter(|_| header.starts_with(b"EFI PART"))?;
        let second = second.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        Some((sector, second.saturating_add(1).saturating_mul(sector)))
    })
}

/// Whether `sector` has a table of partitions. File systems end their first sector as it does, and have code
/// where its entries are.
fn has_mbr(sector: &[u8]) -> bool {
    let Some(entries) = sector.get(446..510).filter(|_| sector.get(510..512) == Some(&[0x55, 0xaa])) else {
        return false;
    };
    let entries = entries.as_chunks::<16>().0;
    entries.iter().all(|entry| matches!(entry[0], 0 | 0x80))
        && entries.iter().any(|entry| entry[4] != 0 && entry[12..] != [0; 4])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    fn of(bytes: &[u8]) -> Signatures {
        let read = |buf: &mut [u8], at: u64| {
            buf.copy_from_slice(&bytes[at as usize..][..buf.len()]);
            Ok(())
        };
        Signatures::read(&read, bytes.len() as u64).unwrap()
    }

    #[test]
    fn short_files_have_nothing() {
        for len in [0, 1, 8, 511, 512, 513, 5000] {
            assert_eq!(of(&vec![0; len]), Signatures::default(), "{len}");
        }
        assert_eq!(of(b"QFI\xfb").detected(), "qcow2");
        assert_eq!(of(b"QFI\xfb\0\0\0\x01").detected(), "qcow");
    }

    #[test]
    fn partition_tables_are_told_from_boot_sectors() {
        let mut disk = vec![0; 40_000];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(of(&disk).contents.is_empty(), "no entry");
        disk[446 + 4] = 0x83;
        disk[446 + 12] = 1;
        assert_eq!(of(&disk).contents, ["mbr"]);
        disk[446 + 16] = 0x33;
        assert!(of(&disk).contents.is_empty(), "code");
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[512 + 32] = 77;
        let seen = of(&disk);
        assert_eq!((seen.contents, seen.gpt_end), (vec!["gpt"], Some(78 * 512)));
    }

    #[test]
    fn a_gpt_of_large_sectors_is_found_and_its_end_does_not_overflow() {
        let mut disk = vec![0; 40_000];
        disk[4096..4104].copy_from_slice(b"EFI PART");
        disk[4096 + 32..][..8].fill(0xff);
        assert_eq!(of(&disk).gpt_end, Some(u64::MAX));
    }

    #[test]
    fn the_footer_of_a_fixed_vpc_image_is_found() {
        let mut disk = vec![0; 2048];
        disk[1536..1544].copy_from_slice(b"conectix");
        assert!(of(&disk).has_vpc_footer);
        assert_eq!(of(&disk).detected(), "raw");
    }

    #[test]
    fn an_iso_is_found_where_its_descriptor_lies() {
        let mut disk = vec![0; 40_000];
        disk[ISO_AT..HEAD].copy_from_slice(b"CD001");
        assert_eq!(of(&disk).contents, ["iso"]);
        assert!(of(&disk[..HEAD - 1]).contents.is_empty());
    }
}
