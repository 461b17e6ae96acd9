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
    MAGICS
        .iter()
        .find(|(at, magic, _)| sector.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map(|(_, _, format)| *format)
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
}
