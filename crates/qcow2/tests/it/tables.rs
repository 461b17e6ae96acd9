//! The snapshot table and the bitmap directory: what QEMU wrote is read. What is refused is in the table of
//! malformed images.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{ErrorKind, Storage};
use blockmirror_file::FileOptions;
use blockmirror_qcow2::format::bitmaps::{BitmapEntry, Bitmaps};
use blockmirror_qcow2::format::snapshot::{Snapshot, Snapshots};
use blockmirror_qcow2::{CreateOptions, Error, Header};
use blockmirror_testing::qemu::have;

const TABLE: u64 = 0x50000;

fn header() -> Header {
    let storage = MemoryStorage::new();
    CreateOptions::new(1 << 20).create(&storage, None).unwrap();
    Header::read(&storage).unwrap()
}

/// A snapshot entry with the given extra data, id and name.
fn entry(extra_declared: u32, extra: &[u8], id: &[u8], name: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(0x90000u64.to_be_bytes());
    out.extend(2u32.to_be_bytes());
    out.extend((id.len() as u16).to_be_bytes());
    out.extend((name.len() as u16).to_be_bytes());
    out.extend(1_700_000_000u32.to_be_bytes());
    out.extend(5u32.to_be_bytes());
    out.extend(3_000_000_007u64.to_be_bytes());
    out.extend(77u32.to_be_bytes());
    out.extend(extra_declared.to_be_bytes());
    out.extend(extra);
    out.extend(id);
    out.extend(name);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn snapshots(count: u32, table: &[u8]) -> Vec<Result<Snapshot, Error>> {
    let mut header = header();
    (header.snapshot_count, header.snapshots_offset) = (count, TABLE);
    let storage = MemoryStorage::new();
    storage.write_at(table, TABLE).unwrap();
    Snapshots::new(&storage, &header).unwrap().collect()
}

#[test]
fn entries_of_every_age_are_read() {
    let words = [5u64 << 32, 1 << 30, 12345].map(u64::to_be_bytes).concat();
    let table = [
        entry(0, b"", b"1", b"old"),
        entry(16, &words[..16], b"2", b"newer"),
        entry(24, &words, b"3", b"new"),
    ];
    let all: Vec<_> = snapshots(3, &table.concat()).into_iter().map(Result::unwrap).collect();
    let brief: Vec<_> = all
        .iter()
        .map(|s| (s.id.as_str(), s.name.as_str(), s.vm_state_size, s.disk_size, s.icount))
        .collect();
    assert_eq!(
        brief,
        [
            ("1", "old", 77, None, None),
            ("2", "newer", 5 << 32, Some(1 << 30), None),
            ("3", "new", 5 << 32, Some(1 << 30), Some(12345)),
        ]
    );
    assert_eq!(all[0].date.as_nanos(), 1_700_000_000_000_000_005);
    assert_eq!(all[0].vm_clock.as_nanos(), 3_000_000_007);
}

#[test]
fn cap_snapshot_extra_data() {
    let fits = snapshots(1, &entry(1024, &[0xff; 1024], b"1", b"n"));
    assert_eq!(fits[0].as_ref().unwrap().icount, None);
    let too_much = snapshots(1, &entry(1025, &[0; 1025], b"1", b"n"));
    assert_eq!(too_much[0].as_ref().unwrap_err().kind(), ErrorKind::LimitExceeded);
}

#[test]
fn a_snapshot_table_ends_at_the_end_of_the_file_and_after_the_first_error() {
    let one = entry(0, b"", b"1", b"n");
    let got = snapshots(65536, &one);
    assert_eq!(got.len(), 2);
    let error = got[1].as_ref().unwrap_err();
    assert!(matches!(error, Error::TableEntry { index: 1, .. }), "{error}");
    let mut long_name = one;
    long_name[14..16].copy_from_slice(&[0xff, 0xff]);
    assert!(
        snapshots(1, &long_name)[0].as_ref().unwrap_err().to_string().contains("past the end of the file")
    );
}

/// A directory entry whose fields can be changed by offset.
fn bitmap(name: &[u8], change: &[(usize, u8)]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(0x90000u64.to_be_bytes());
    out.extend(1u32.to_be_bytes());
    out.extend(2u32.to_be_bytes());
    out.extend([1, 16]);
    out.extend((name.len() as u16).to_be_bytes());
    out.extend([0; 4]);
    out.extend(name);
    for (at, value) in change {
        out[*at] = *value;
    }
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn bitmaps(count: u32, directory: &[u8]) -> Vec<Result<BitmapEntry, Error>> {
    let storage = MemoryStorage::new();
    CreateOptions::new(1 << 20).create(&storage, None).unwrap();
    // The extension takes the place of the feature names.
    let mut extension = vec![0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
    extension.extend(count.to_be_bytes());
    extension.extend([0; 4]);
    extension.extend((directory.len() as u64).to_be_bytes());
    extension.extend(TABLE.to_be_bytes());
    extension.extend([0; 8]);
    storage.write_at(&extension, 112).unwrap();
    storage.write_at(directory, TABLE).unwrap();
    let header = Header::read(&storage).unwrap();
    Bitmaps::new(&storage, &header.bitmaps.unwrap()).unwrap().collect()
}

#[test]
fn a_bitmap_directory_is_read_in_order() {
    let directory = [bitmap(b"first", &[]), bitmap(b"second", &[(15, 1), (17, 9)])].concat();
    let all: Vec<_> = bitmaps(2, &directory).into_iter().map(Result::unwrap).collect();
    assert_eq!(
        (&*all[0].name.to_text(), all[0].granularity, all[0].auto, all[0].in_use),
        ("first", 65536, true, false)
    );
    assert_eq!(
        (&*all[1].name.to_text(), all[1].granularity, all[1].auto, all[1].in_use),
        ("second", 512, false, true)
    );
}

#[test]
fn what_qemu_wrote_is_read() {
    if !have("what_qemu_wrote_is_read", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    crate::qemu::img(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]).unwrap();
    crate::qemu::io(dir, "a.qcow2", &["write 0 1M"]).unwrap();
    for name in ["before", "after all"] {
        crate::qemu::img(dir, &["snapshot", "-c", name, "a.qcow2"]).unwrap();
    }
    crate::qemu::img(dir, &["bitmap", "--add", "-g", "32768", "a.qcow2", "b0"]).unwrap();
    crate::qemu::img(dir, &["bitmap", "--add", "--disable", "a.qcow2", "b1"]).unwrap();

    let storage = FileOptions::new().open(dir.join("a.qcow2")).unwrap();
    let header = Header::read(&storage).unwrap();
    let found: Vec<_> = Snapshots::new(&storage, &header).unwrap().map(Result::unwrap).collect();
    let theirs = crate::qemu::info(dir, "a.qcow2");
    for (ours, theirs) in found.iter().zip(theirs["snapshots"].as_array().unwrap()) {
        assert_eq!(ours.id, theirs["id"]);
        assert_eq!(ours.name, theirs["name"]);
        assert_eq!(ours.date.as_secs(), theirs["date-sec"]);
        assert_eq!(ours.vm_state_size, theirs["vm-state-size"]);
        assert_eq!(ours.disk_size, Some(8 << 20));
    }
    assert_eq!(found.len(), 2);

    assert!(header.bitmaps_valid());
    let entries: Vec<_> =
        Bitmaps::new(&storage, &header.bitmaps.unwrap()).unwrap().map(Result::unwrap).collect();
    let brief: Vec<_> = entries.iter().map(|b| (b.name.to_text(), b.granularity, b.auto, b.in_use)).collect();
    assert_eq!(brief, [("b0".into(), 32768, true, false), ("b1".into(), 65536, false, false)]);
}
