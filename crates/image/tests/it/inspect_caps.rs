//! Every named cap of the format, by at least three images: just over it, well over it, and the largest
//! number that its field holds. An inspection refuses each with a reason, and so does `info`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use blockmirror_image::{CreateSettings, CreateSpec, Format, ImageInfo, Inspection, NewImage, OpenOptions};
use blockmirror_testing::scratch::scratch;

/// Where a directory of snapshots or bitmaps is put: past all that a new image has.
const DIRECTORY: u64 = 1 << 20;
/// Where the first extension of a new image's header lies.
const EXTENSIONS: u64 = 112;
const CLUSTER: u64 = 64 << 10;

struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        Self { dir: scratch().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// A new image of 1 MiB with other bytes at some places.
    fn image(&self, options: &str, changes: &[(u64, Vec<u8>)]) -> File {
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, options).unwrap();
        let spec = CreateSpec::new(Format::Qcow2, 1 << 20, settings);
        NewImage::create(self.path(), &spec).unwrap().persist().unwrap();
        let file = File::options().write(true).open(self.path()).unwrap();
        for (at, bytes) in changes {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    /// What an inspection finds in the image, which is refused by `info` as well.
    fn refused(&self, label: &str) -> String {
        let seen = Inspection::read(self.path(), &OpenOptions::new()).unwrap();
        assert!(!seen.findings.is_empty(), "{label}");
        let why = ImageInfo::read(self.path(), &OpenOptions::new()).unwrap_err().to_string();
        let found: Vec<_> =
            seen.findings.iter().map(|found| format!("{}: {}", found.kind, found.message)).collect();
        assert!(!why.is_empty(), "{label}");
        found.join("; ")
    }
}

fn be32(number: u64) -> Vec<u8> {
    u32::try_from(number).unwrap().to_be_bytes().to_vec()
}

fn be64(number: u64) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

const MAX32: u64 = u32::MAX as u64;

#[test]
fn caps_of_the_header() {
    let folder = Folder::new();
    // Name, offset, bytes, values, and what has to be said of each.
    let fields: [(&str, u64, usize, [u64; 3], &str); 9] = [
        ("MAX_L1_BYTES", 36, 4, [(4 << 20) + 1, 8 << 20, MAX32], "limit_exceeded: the L1 table"),
        (
            "MAX_L1_BYTES, size",
            24,
            8,
            [(1 << 51) + 512, 1 << 60, u64::MAX],
            "limit_exceeded: the L1 table for",
        ),
        ("MAX_REFCOUNT_TABLE_BYTES", 56, 4, [129, 1 << 20, MAX32], "limit_exceeded: the refcount table"),
        ("MAX_REFCOUNT_ORDER", 96, 4, [7, 63, MAX32], "malformed: header field refcount_order"),
        (
            "MAX_HOST_OFFSET, L1",
            40,
            8,
            [1 << 56, 1 << 60, u64::MAX - CLUSTER + 1],
            "malformed: header field l1_table",
        ),
        ("MAX_HOST_OFFSET, refcounts", 48, 8, [1 << 56, 1 << 60, u64::MAX - CLUSTER + 1], "malformed: "),
        (
            "MAX_HOST_OFFSET, snapshots",
            64,
            8,
            [(1 << 56) + CLUSTER, 1 << 60, u64::MAX - CLUSTER + 1],
            "malformed: ",
        ),
        ("MAX_SNAPSHOTS", 60, 4, [65_537, 1 << 20, MAX32], "limit_exceeded: the number of snapshots"),
        ("cluster_bits", 20, 4, [22, 64, MAX32], "malformed: header field cluster_bits"),
    ];
    for (name, at, len, values, what) in fields {
        for value in values {
            let bytes = if len == 4 { be32(value) } else { be64(value) };
            folder.image("", &[(at, bytes)]);
            let found = folder.refused(name);
            assert!(found.contains(what), "{name} = {value}: {found}");
        }
    }
    for len in [1024, 4096, MAX32] {
        folder.image("", &[(8, be64(0x2000)), (16, be32(len)), (0x2000, vec![b'x'; 0x2000])]);
        let found = folder.refused("MAX_BACKING_NAME");
        assert!(
            found.contains("backing_file: ") && found.contains("malformed: header field backing"),
            "{found}"
        );
    }
    for len in [16, 100, 4000] {
        let extension = [be32(0xe279_2aca), be32(len), vec![b'x'; 4000]].concat();
        folder.image("", &[(EXTENSIONS, extension)]);
        let found = folder.refused("MAX_BACKING_FORMAT");
        assert!(found.contains("malformed: header extension backing format"), "{found}");
    }
    for bits in [9, 12, 13] {
        folder.image(&format!("cluster_size={}", 1 << bits), &[(72, be64(1 << 4))]);
        let found = folder.refused("MIN_EXTENDED_L2_CLUSTER_BITS");
        assert!(found.contains("malformed: header field cluster_bits"), "{found}");
    }
}

/// An entry of the table of snapshots, without what follows its fixed part.
fn snapshot(extra: u64, id: u16, name: u16) -> Vec<u8> {
    let lengths = [id.to_be_bytes(), name.to_be_bytes()].concat();
    [be64(0), be32(0), lengths, be32(0), be32(0), be64(0), be32(0), be32(extra)].concat()
}

#[test]
fn caps_of_snapshots() {
    let folder = Folder::new();
    let count = |count: u64| vec![(60, be32(count)), (64, be64(DIRECTORY))];
    for extra in [1025, 4096, MAX32] {
        let entry = (DIRECTORY, snapshot(extra, 1, 1));
        let file = folder.image("", &[count(1), vec![entry]].concat());
        file.set_len(2 * DIRECTORY).unwrap();
        let found = folder.refused("MAX_SNAPSHOT_EXTRA");
        assert!(found.contains("limit_exceeded: the extra data of a snapshot"), "{found}");
    }
    // Entries with the longest names, until the table is too long.
    for (id, name) in [(u16::MAX, u16::MAX), (u16::MAX, 0), (1, u16::MAX)] {
        let stride = (40 + u64::from(id) + u64::from(name)).next_multiple_of(8);
        let entries = (64 << 20) / stride + 2;
        let file = folder.image("", &count(entries));
        for i in 0..entries {
            file.write_all_at(&snapshot(0, id, name), DIRECTORY + i * stride).unwrap();
        }
        file.set_len(DIRECTORY + (entries + 1) * stride).unwrap();
        let found = folder.refused("MAX_SNAPSHOT_TABLE_BYTES");
        assert!(found.contains("limit_exceeded: the snapshot table"), "{found}");
    }
}

/// The header of an image with the extension for bitmaps in the place of all others.
fn bitmaps(count: u64, size: u64) -> Vec<(u64, Vec<u8>)> {
    let data = [be32(count), be32(0), be64(size), be64(DIRECTORY)].concat();
    vec![(EXTENSIONS, [be32(0x2385_2875), be32(24), data, be64(0)].concat()), (88, be64(1))]
}

/// An entry of the directory of bitmaps.
fn bitmap(granularity_bits: u8, name: u64) -> Vec<u8> {
    let name_len = u16::try_from(name).unwrap().to_be_bytes().to_vec();
    let fixed = [be64(2 << 20), be32(1), be32(0), vec![1, granularity_bits], name_len, be32(0)].concat();
    let mut entry = [fixed, vec![b'n'; usize::try_from(name).unwrap()]].concat();
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

#[test]
fn caps_of_bitmaps() {
    let folder = Folder::new();
    for count in [65_536, 1 << 20, MAX32] {
        folder.image("", &bitmaps(count, 32));
        let found = folder.refused("MAX_BITMAPS");
        assert!(found.contains("limit_exceeded: the number of bitmaps"), "{found}");
    }
    for size in [(64 << 20) + 8, 1 << 40, u64::MAX] {
        folder.image("", &bitmaps(1, size));
        let found = folder.refused("MAX_BITMAP_DIRECTORY_BYTES");
        assert!(found.contains("limit_exceeded: the bitmap directory"), "{found}");
    }
    for (label, entry) in [
        ("BITMAP_GRANULARITY_BITS", bitmap(8, 4)),
        ("BITMAP_GRANULARITY_BITS", bitmap(32, 4)),
        ("BITMAP_GRANULARITY_BITS", bitmap(255, 4)),
        ("MAX_BITMAP_NAME", bitmap(16, 0)),
        ("MAX_BITMAP_NAME", bitmap(16, 1024)),
        ("MAX_BITMAP_NAME", bitmap(16, 65_535)),
    ] {
        let changes = [bitmaps(1, entry.len() as u64), vec![(DIRECTORY, entry)]].concat();
        folder.image("", &changes).set_len(4 << 20).unwrap();
        let found = folder.refused(label);
        assert!(found.contains("malformed: bitmap directory, entry 0"), "{label}: {found}");
    }
    // That the directory is read at all.
    let entry = bitmap(16, 4);
    let changes = [bitmaps(1, entry.len() as u64), vec![(DIRECTORY, entry)]].concat();
    folder.image("", &changes).set_len(4 << 20).unwrap();
    let seen = Inspection::read(folder.path(), &OpenOptions::new()).unwrap();
    assert_eq!((seen.bitmaps, &*seen.findings), (1, &[][..]));
}
