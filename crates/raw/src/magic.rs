//! What the first sector of other formats looks like.
//!
//! A guest owns every byte of a raw disk. If the format of that disk is guessed at each open, a guest that
//! writes a qcow2 header into sector 0, naming `/etc/shadow` as the backing file, is handed that file at the
//! next one (CVE-2008-2004 and its many successors). The list is of formats that QEMU or this project would
//! guess from the first sector.

/// Where a magic lies, what it is, and whose.
const MAGICS: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
];

/// The format that probing would detect in a disk with this first sector, if it is not raw.
pub fn foreign_format(sector: &[u8]) -> Option<&'static str> {
    foreign_formats(sector).next()
}

/// All formats whose magic this first sector has; programs that look for them in another order detect
/// another one.
pub fn foreign_formats(sector: &[u8]) -> impl Iterator<Item = &'static str> {
    let matches = MAGICS
        .iter()
        .filter(move |(at, magic, _)| sector.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    let by_text = is_vmdk_descriptor(sector).then_some("vmdk");
    matches.map(|(_, _, format)| *format).chain(by_text)
}

/// Whether probing takes `sector` for the text that describes a VMDK image, and that names its files: lines
/// of comments and of spaces, and then a version. QEMU asks for no other beginning of it.
fn is_vmdk_descriptor(sector: &[u8]) -> bool {
    let is_passed_over = |line: &[u8]| line.starts_with(b"#") || line.trim_ascii().is_empty();
    let mut lines = sector[..sector.len().min(512)].split(|byte| *byte == b'\n');
    let version = lines.find(|line| !is_passed_over(line)).and_then(|line| line.strip_prefix(b"version="));
    matches!(version.map(<[u8]>::trim_ascii_end), Some([b'1'..=b'3']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_sector_and_zeros_have_no_magic() {
        let mut sector = [0; 512];
        assert_eq!(foreign_format(&sector), None);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(foreign_format(&sector), None);
        assert_eq!(foreign_format(&[]), None);
    }

    #[test]
    fn every_magic_is_found_where_it_lies() {
        for (at, magic, format) in MAGICS {
            let mut sector = [0; 512];
            sector[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(foreign_format(&sector), Some(format));
        }
    }

    /// QEMU's probing does not need the line `# Disk DescriptorFile`: a disk whose guest left it out was
    /// raw here, and there an image with files of the host's as its extents.
    #[test]
    fn a_vmdk_descriptor_needs_no_heading() {
        for text in ["version=1\n", "# x\n  \n#\nversion=2\r\nCID=1\n", " \r\nversion=3\n"] {
            assert_eq!(foreign_format(text.as_bytes()), Some("vmdk"), "{text:?}");
        }
        for text in ["version=4\n", " version=1\n", "a\nversion=1\n", "version=11\n", "# version=1\n", "#"] {
            assert_eq!(foreign_format(text.as_bytes()), None, "{text:?}");
        }
        let late = [&b"#"[..], &[b'x'; 511], b"\nversion=1\n"].concat();
        assert_eq!(foreign_format(&late), None);
        assert_eq!(foreign_formats(b"# Disk DescriptorFile\nversion=1\n").collect::<Vec<_>>(), ["vmdk"; 2]);
    }

    #[test]
    fn a_sector_of_two_formats_is_both() {
        let mut sector = [0; 512];
        sector[..4].copy_from_slice(b"QFI\xfb");
        sector[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(foreign_formats(&sector).collect::<Vec<_>>(), ["qcow2", "vdi"]);
        assert_eq!(foreign_format(&sector), Some("qcow2"));
    }
}
