//! The header's parser against headers that are whole, at each cap, and with every byte changed in turn. What
//! is refused is in the table of malformed images.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use blockmirror_block::testing::MemoryStorage;
use blockmirror_qcow2::{CreateOptions, Error, Header, Version, WriteRefusal};

/// The first cluster of a new image.
fn image(options: &CreateOptions) -> Vec<u8> {
    let storage = MemoryStorage::new();
    options.create(&storage, None).unwrap();
    let mut bytes = vec![0; options.cluster_size as usize];
    blockmirror_block::Storage::read_at(&storage, &mut bytes, 0).unwrap();
    bytes
}

fn plain() -> Vec<u8> {
    image(&CreateOptions::new(1 << 30))
}

/// What the parser says about a plain header with `bytes` at `at`.
fn with(at: usize, bytes: &[u8]) -> Result<Header, Error> {
    let mut header = plain();
    header[at..at + bytes.len()].copy_from_slice(bytes);
    Header::parse(&header)
}

fn with_u32(at: usize, value: u32) -> Result<Header, Error> {
    with(at, &value.to_be_bytes())
}

fn with_u64(at: usize, value: u64) -> Result<Header, Error> {
    with(at, &value.to_be_bytes())
}

#[test]
fn a_new_image_parses_to_what_it_was_created_with() {
    let mut options = CreateOptions::new(10 << 30);
    options.backing_file = Some(b"base.raw".to_vec());
    options.backing_format = Some("raw".into());
    options.lazy_refcounts = true;
    insta::assert_snapshot!(format!("{:#?}", Header::parse(&image(&options)).unwrap()), @r#"
    Header {
        version: 3,
        cluster_bits: 16,
        virtual_size: 10737418240,
        l1_offset: 196608,
        l1_entries: 20,
        refcount_table_offset: 65536,
        refcount_table_clusters: 1,
        refcount_order: 4,
        incompatible: 0,
        compatible: 1,
        autoclear: 0,
        extended_l2: false,
        compression: Deflate,
        backing: Some(
            BackingRef {
                name: "base.raw",
                format: Some(
                    "raw",
                ),
            },
        ),
        data_file: None,
        snapshot_count: 0,
        snapshots_offset: 0,
        bitmaps: None,
        feature_names: [
            0:0 "dirty bit",
            0:1 "corrupt bit",
            0:2 "external data file",
            0:3 "compression type",
            0:4 "extended L2 entries",
            1:0 "lazy refcounts",
            2:0 "bitmaps",
            2:1 "raw external data",
        ],
        header_length: 112,
        unknown_fields: [],
        unknown_extensions: [],
    }
    "#);
}

#[test]
fn version_2_ends_at_72_bytes_and_has_no_features() {
    let mut options = CreateOptions::new(1 << 20);
    options.version = Version::V2;
    let mut bytes = image(&options);
    // Behind the end of the extensions anything may lie, where version 3 has its features.
    bytes[80..104].fill(0xff);
    let header = Header::parse(&bytes).unwrap();
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
    assert_eq!((header.refcount_order, header.header_length), (4, 72));
}

#[test]
fn unknown_fields_and_extensions_are_kept() {
    let mut bytes = plain();
    bytes[100..104].copy_from_slice(&120u32.to_be_bytes());
    let rest: Vec<u8> = bytes[112..1024].to_vec();
    bytes[112..120].copy_from_slice(b"new-data");
    bytes[120..132].copy_from_slice(b"\x12\x34\x56\x78\0\0\0\x03abc\0");
    bytes[132..136].fill(0);
    bytes[136..1048].copy_from_slice(&rest);
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.unknown_fields, b"new-data");
    assert_eq!(header.unknown_extensions.len(), 1);
    assert_eq!(header.unknown_extensions[0].magic, 0x1234_5678);
    assert_eq!(header.unknown_extensions[0].data, b"abc");
    assert_eq!(header.feature_names.len(), 8);
}

#[test]
fn at_the_caps_headers_are_accepted() {
    assert_eq!(with_u32(100, 104).unwrap().header_length, 104);
    assert_eq!(with_u32(96, 6).unwrap().refcount_bits(), 64);
    assert_eq!(with_u32(36, 4 << 20).unwrap().l1_entries, 4 << 20);
    assert_eq!(with_u32(56, 128).unwrap().refcount_table_clusters, 128);
    // As QEMU, which counts whole sectors.
    for (size, disk) in [(1_000_001, 999_936), (1000, 512), (511, 0)] {
        assert_eq!(with_u64(24, size).unwrap().virtual_size, disk, "{size}");
    }
    let mut bytes = plain();
    bytes[60..64].copy_from_slice(&65536u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&0x50000u64.to_be_bytes());
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.snapshot_count, 65536);
    header.check_writable().unwrap();
}

#[test]
fn a_backing_name_has_up_to_1023_bytes() {
    let named = |len: u32| {
        let mut bytes = plain();
        bytes[8..16].copy_from_slice(&0x300u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&len.to_be_bytes());
        bytes[0x300..0x300 + 1023].fill(b'n');
        Header::parse(&bytes).unwrap().backing
    };
    assert_eq!(named(1023).unwrap().name.as_bytes().len(), 1023);
    assert_eq!(named(0), None);
}

#[test]
fn marked_images_are_read_but_not_written() {
    let refusal = |header: Header| match header.check_writable() {
        Err(Error::NotWritable(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(with_u64(72, 1).unwrap().check_writable().is_ok(), "a dirty one is repaired");
    assert_eq!(refusal(with_u64(72, 2).unwrap()), WriteRefusal::Corrupt);
    let mut bytes = plain();
    bytes[95] = 1;
    bytes[112..120].copy_from_slice(&[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
    bytes[120..144].fill(0);
    bytes[123] = 2;
    bytes[135] = 64;
    bytes[141] = 5;
    bytes[144..152].fill(0);
    let header = Header::parse(&bytes).unwrap();
    assert!(header.check_writable().is_ok() && header.bitmaps_valid());
    assert_eq!(header.autoclear_when_written(), 1);
    // Without the autoclear bit the bitmaps are stale already, and must not be used.
    bytes[95] = 0;
    let header = Header::parse(&bytes).unwrap();
    assert!(header.check_writable().is_ok() && !header.bitmaps_valid() && header.bitmaps.is_some());
}

#[test]
fn autoclear_bits_of_others_do_not_survive_a_write() {
    assert_eq!(with_u64(88, !3).unwrap().autoclear_when_written(), 0);
    let mut bytes = plain();
    bytes[79] = 1 << 2;
    bytes[88..96].fill(0xff);
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.autoclear_when_written(), 2);
    let data_file = header.data_file.unwrap();
    assert!(data_file.raw && data_file.name.is_none());
}

#[test]
fn no_byte_makes_the_parser_panic() {
    let mut options = CreateOptions::new(1 << 30);
    options.cluster_size = 4096;
    options.backing_file = Some(b"base".to_vec());
    options.backing_format = Some("raw".into());
    let whole = image(&options);
    let mut accepted = 0;
    for at in 0..700 {
        for value in [0, 1, 2, 7, 0x20, 0x7f, 0x80, 0xff, !whole[at], whole[at] ^ 1] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            for len in [bytes.len(), 512, 112, 104] {
                if let Ok(header) = Header::parse(&bytes[..len]) {
                    assert!((9..=21).contains(&header.cluster_bits));
                    assert!(u64::from(header.l1_entries) * 8 <= 32 << 20);
                    accepted += 1;
                }
            }
        }
    }
    assert!(accepted > 1000);
}
