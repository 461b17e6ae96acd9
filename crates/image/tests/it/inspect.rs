//! Inspection: each finding, at least three images of each; what is accepted opens and names nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use blockmirror_block::{ByteRange, WriteFlags};
use blockmirror_image::FindingKind::{
    self, BackingFile, Corrupt, DataFile, Dirty, Encrypted, FormatConfusion, LimitExceeded, Malformed,
    Truncated, UnknownFeatures, UnsupportedFormat,
};
use blockmirror_image::{
    CreateSettings, CreateSpec, Format, ImageInfo, Inspection, NewImage, OpenOptions, ReferencePolicy,
};
use blockmirror_testing::hostile::one_l2_table;
use blockmirror_testing::mutate::mutations;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Manifest, folder};

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

    /// A qcow2 image of 1 MiB, as bytes.
    fn sound(&self, options: &str) -> Vec<u8> {
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, options).unwrap();
        let path = self.path();
        NewImage::create(&path, &CreateSpec::new(Format::Qcow2, 1 << 20, settings))
            .unwrap()
            .persist()
            .unwrap();
        fs::read(path).unwrap()
    }

    /// The same with a disk that has `bytes` at `offset`.
    fn holding(&self, options: &str, bytes: &[u8], offset: u64) -> Vec<u8> {
        self.sound(options);
        let image = OpenOptions::new().format(Format::Qcow2).writable(true).open(self.path()).unwrap();
        image.device().write_at(bytes, offset, WriteFlags::NONE).unwrap();
        image.device().flush().unwrap();
        drop(image);
        fs::read(self.path()).unwrap()
    }

    fn inspect(&self, bytes: &[u8], format: Option<Format>) -> Inspection {
        fs::write(self.path(), bytes).unwrap();
        Inspection::read(self.path(), &OpenOptions::new().format(format)).unwrap()
    }

    /// The kinds of what is found in `bytes`, in any order; each message is a text of one line.
    fn kinds(&self, bytes: &[u8], format: Option<Format>) -> Vec<FindingKind> {
        let found = self.inspect(bytes, format).findings;
        assert!(
            found.iter().all(|found| !found.message.is_empty() && !found.message.contains('\n')),
            "{found:?}"
        );
        let mut kinds: Vec<_> = found.iter().map(|found| found.kind).collect();
        kinds.sort_by_key(|kind| FindingKind::ALL.iter().position(|known| known == kind));
        kinds.dedup();
        kinds
    }
}

/// `image` with other bytes at some places.
fn with(image: &[u8], changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut out = image.to_vec();
    for (at, bytes) in changes {
        out[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    out
}

/// The first bytes of an image in each format that is not read.
const FOREIGN: [(&[u8], &str); 9] = [
    (b"KDMV\x01\0\0\0", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# x\n \nversion=1\nRW 8 FLAT \"/etc/shadow\" 0\n", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"QED\0", "qed"),
    (b"QFI\xfb\0\0\0\x01", "qcow"),
    (b"WithoutFreeSpace", "parallels"),
    (b"Bochs Virtual HD Image", "bochs"),
];

const BACKING_OFFSET: usize = 8;
const BACKING_SIZE: usize = 16;
const CRYPT: usize = 32;
const INCOMPATIBLE: usize = 72;

#[test]
fn what_is_sound_is_accepted() {
    let folder = Folder::new();
    for options in
        ["compat=v3", "compat=v2", "cluster_size=512", "cluster_size=2M,extended_l2=on", "refcount_bits=1"]
    {
        let image = folder.sound(options);
        for format in [None, Some(Format::Qcow2)] {
            let seen = folder.inspect(&image, format);
            assert_eq!((seen.format, seen.virtual_size), ("qcow2", Some(1 << 20)), "{options}");
            assert_eq!(seen.findings, [], "{options}");
        }
    }
    for (bytes, size) in [(vec![], 0), (vec![7; 700], 1024), (vec![0; 1 << 20], 1 << 20)] {
        let seen = folder.inspect(&bytes, None);
        assert_eq!((seen.format, seen.virtual_size, &*seen.findings), ("raw", Some(size), &[][..]));
    }
}

#[test]
fn backing_files_are_found_whatever_else_is_wrong() {
    let folder = Folder::new();
    let (plain, v2) = (folder.sound(""), folder.sound("compat=v2"));
    let name: &[(usize, &[u8])] = &[
        (BACKING_OFFSET, &0x2000u64.to_be_bytes()),
        (BACKING_SIZE, &[0, 0, 0, 11]),
        (0x2000, b"/etc/shadow"),
    ];
    for image in [&plain, &v2] {
        let seen = folder.inspect(&with(image, name), None);
        assert_eq!(seen.findings.len(), 1, "{seen:?}");
        assert_eq!(seen.findings[0].message, "the header names \"/etc/shadow\", of no format");
        assert_eq!(seen.refusals(&[BackingFile]).count(), 0);
        assert_eq!(seen.refusals(&[Corrupt, DataFile]).count(), 1);
    }
    let named = with(&plain, name);
    // A place for a name, of no bytes; a name that lies past the first cluster.
    assert_eq!(folder.kinds(&with(&named, &[(BACKING_SIZE, &[0; 4])]), None), [BackingFile]);
    assert_eq!(
        folder.kinds(&with(&named, &[(BACKING_OFFSET, &(1u64 << 40).to_be_bytes())]), None),
        [BackingFile, Malformed]
    );
    assert_eq!(folder.kinds(&with(&named, &[(BACKING_SIZE, &[0xff; 4])]), None), [BackingFile, Malformed]);
    // Each of these alone makes the parser refuse the header before it comes to the name.
    for (at, bytes, kind) in [
        (INCOMPATIBLE, &[0x80][..], UnknownFeatures),
        (CRYPT, &[0, 0, 0, 2], Encrypted),
        (20, &[0, 0, 0, 77], Malformed),
        (36, &[0xff; 4], LimitExceeded),
        (100, &[0, 0, 0, 3], Malformed),
        (7, &[9], UnsupportedFormat),
        (7, &[1], UnsupportedFormat),
    ] {
        assert_eq!(folder.kinds(&with(&named, &[(at, bytes)]), None), [BackingFile, kind], "{at}");
    }
    for name in ["json:{\"driver\":\"nbd\"}", "nbd://host/export", "fat:/etc"] {
        let size = u32::try_from(name.len()).unwrap();
        let image = with(&named, &[(BACKING_SIZE, &size.to_be_bytes()), (0x2000, name.as_bytes())]);
        assert_eq!(folder.kinds(&image, None), [BackingFile], "{name}");
    }
}

#[test]
fn data_files() {
    let folder = Folder::new();
    let external = folder.sound("data_file=data.raw");
    let raw = folder.sound("data_file=data2.raw,data_file_raw=on");
    for image in [&external, &raw] {
        assert_eq!(folder.kinds(image, None), [DataFile]);
    }
    let plain = folder.sound("");
    let bit: &[(usize, &[u8])] = &[(INCOMPATIBLE + 7, &[4])];
    assert_eq!(folder.kinds(&with(&plain, bit), None), [DataFile], "no name");
    // Without the feature, no program opens it; the name is there all the same.
    assert_eq!(folder.kinds(&with(&external, &[(INCOMPATIBLE + 7, &[0])]), None), [DataFile]);
}

#[test]
fn features_and_marks() {
    let folder = Folder::new();
    let plain = folder.sound("");
    let features = |bits: u64| with(&plain, &[(INCOMPATIBLE, &bits.to_be_bytes())]);
    for bit in [5, 40, 63] {
        assert_eq!(folder.kinds(&features(1 << bit), None), [UnknownFeatures], "{bit}");
    }
    for options in ["", "lazy_refcounts=on", "extended_l2=on"] {
        let image = folder.sound(options);
        let mark = |mark: u8| with(&image, &[(INCOMPATIBLE + 7, &[image[INCOMPATIBLE + 7] | mark])]);
        assert_eq!(folder.kinds(&mark(1), None), [Dirty]);
        assert_eq!(folder.kinds(&mark(2), None), [Corrupt]);
        assert_eq!(folder.kinds(&mark(3), None), [Dirty, Corrupt]);
        assert_eq!(folder.kinds(&mark(0x23), None), [UnknownFeatures, Dirty, Corrupt]);
    }
    for method in [1, 2, 77] {
        assert_eq!(folder.kinds(&with(&plain, &[(CRYPT + 3, &[method])]), None), [Encrypted]);
    }
    // The extension without a method, in place of the names of features.
    assert_eq!(folder.kinds(&with(&plain, &[(112, b"\x05\x37\xbe\x77")]), None), [Encrypted]);
    let mut luks = vec![0; 8192];
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    for format in [None, Some(Format::Raw)] {
        assert_eq!(folder.kinds(&luks, format), [Encrypted]);
    }
}

#[test]
fn files_that_were_cut_short() {
    let folder = Folder::new();
    let full = folder.holding("", &vec![7; 300 << 10], 0);
    for len in [50, 100, 70_000, 140_000, 200_000, full.len() - 65_536, full.len() - 100_000] {
        let kinds = folder.kinds(&full[..len], None);
        assert!(kinds.contains(&Truncated), "{len}: {kinds:?}");
    }
    assert_eq!(folder.kinds(&full, None), []);
    assert_eq!(
        folder.kinds(&with(&full, &[(4, &[0xff, 0xff, 0xff, 0xfe])]), None),
        [Truncated],
        "unfinished"
    );
    let mut disk = vec![0; 1 << 20];
    disk[512..520].copy_from_slice(b"EFI PART");
    // The second header is in sector 2047, low byte first.
    disk[544..546].copy_from_slice(&[0xff, 7]);
    let seen = folder.inspect(&disk, None);
    assert_eq!((&*seen.contents, &*seen.findings), (&["gpt"][..], &[][..]));
    assert_eq!(folder.kinds(&disk[..(1 << 20) - 512], None), [Truncated]);
}

#[test]
fn foreign_formats_are_named() {
    let folder = Folder::new();
    for (magic, name) in FOREIGN {
        let mut file = vec![0; 64 << 10];
        file[..magic.len()].copy_from_slice(magic);
        let seen = folder.inspect(&file, None);
        assert_eq!(seen.format, name);
        assert_eq!(folder.kinds(&file, None), [UnsupportedFormat], "{name}");
        for format in Format::ALL {
            let kinds = folder.kinds(&file, Some(format));
            assert_eq!(kinds, [FormatConfusion], "{name} as {format}");
        }
    }
    let mut vdi = vec![0; 512];
    vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    assert_eq!(folder.inspect(&vdi, None).format, "vdi");
    for version in [0, 4, 0x7fff_ffff] {
        let image = with(&folder.sound(""), &[(4, &u32::to_be_bytes(version))]);
        assert_eq!(folder.kinds(&image, None), [UnsupportedFormat], "{version}");
    }
}

#[test]
fn one_file_in_two_formats() {
    let folder = Folder::new();
    let plain = folder.sound("");
    assert_eq!(folder.kinds(&plain, Some(Format::Raw)), [FormatConfusion]);
    assert_eq!(folder.kinds(&[0; 4096], Some(Format::Qcow2)), [FormatConfusion]);
    assert_eq!(folder.kinds(&[], Some(Format::Qcow2)), [FormatConfusion]);
    // Its snapshots begin where a vdi image has its magic.
    let vdi = with(&plain, &[(0x40, &[0x7f, 0x10, 0xda, 0xbe])]);
    assert!(folder.kinds(&vdi, None).contains(&FormatConfusion));
    assert!(folder.kinds(&vdi, Some(Format::Qcow2)).contains(&FormatConfusion));
    for (at, magic) in [(0x8001, &b"CD001"[..]), (4096, b"EFI PART"), (512, b"EFI PART")] {
        assert_eq!(folder.kinds(&with(&plain, &[(at, magic)]), None), [FormatConfusion], "{at}");
    }
    let mut end = vec![0; 8192];
    end[8192 - 512..][..8].copy_from_slice(b"conectix");
    assert_eq!(folder.kinds(&end, None), [FormatConfusion]);
    assert_eq!(folder.kinds(&end, Some(Format::Raw)), [FormatConfusion]);
    assert_eq!(folder.kinds(&[&plain[..], &end].concat(), None), [FormatConfusion]);
    // The format of a backing file, and no backing file.
    let stray = with(&plain, &[(112, b"\xe2\x79\x2a\xca\0\0\0\x04vmdk")]);
    assert_eq!(folder.kinds(&stray, None), [FormatConfusion]);
}

/// Converted to raw, such a disk is an image for every program that probes.
#[test]
fn an_image_inside_of_the_disk() {
    let folder = Folder::new();
    for (magic, name) in FOREIGN {
        // The file ends with zeros.
        let image = folder.holding("", &[magic, &[0; 4096]].concat(), 0);
        let seen = folder.inspect(&image, None);
        assert_eq!(seen.findings.len(), 1, "{name}: {seen:?}");
        assert_eq!(seen.findings[0].message, format!("the disk in the image begins as {name} does"));
    }
    let image = folder.holding("extended_l2=on", b"QFI\xfb\0\0\0\x03", 0);
    assert_eq!(folder.kinds(&image, Some(Format::Qcow2)), [FormatConfusion]);
    let image = folder.holding("compat=v2", b"conectix", (1 << 20) - 512);
    assert_eq!(folder.kinds(&image, None), [FormatConfusion]);
    // What a guest puts on a disk.
    let image = folder.holding("", b"LUKS\xba\xbe\0\x02", 0);
    let seen = folder.inspect(&image, None);
    assert_eq!((&*seen.contents, &*seen.findings), (&["luks"][..], &[][..]));
}

#[test]
fn metadata_that_makes_no_sense() {
    let folder = Folder::new();
    let plain = folder.holding("", &[7; 512], 0);
    let cases: [(usize, &[u8]); 8] = [
        (20, &[0, 0, 0, 8]),
        (20, &[0, 0, 0, 22]),
        (40, &[0, 0, 0, 0, 0, 3, 0, 1]),
        (48, &[0, 0, 0, 0, 0, 1, 0, 2]),
        (56, &[0; 4]),
        (96, &[0, 0, 0, 7]),
        (100, &[0, 0, 0, 105]),
        (36, &[0; 4]),
    ];
    for (at, bytes) in cases {
        assert_eq!(folder.kinds(&with(&plain, &[(at, bytes)]), None), [Malformed], "{at}");
    }
    // Snapshots past the end of the file.
    let far = with(&plain, &[(60, &[0, 0, 0, 1]), (64, &(1u64 << 30).to_be_bytes())]);
    assert_eq!(folder.kinds(&far, None), [Malformed]);
    assert_eq!(folder.inspect(&far, None).snapshots, 1);
}

#[test]
fn sizes_over_a_limit() {
    let folder = Folder::new();
    let plain = folder.sound("");
    let cases: [(usize, &[u8]); 5] = [
        (24, &(1u64 << 60).to_be_bytes()),
        (24, &u64::MAX.to_be_bytes()),
        (36, &[0xff; 4]),
        (56, &[0xff; 4]),
        (60, &[0, 1, 0, 1]),
    ];
    for (at, bytes) in cases {
        assert_eq!(folder.kinds(&with(&plain, &[(at, bytes)]), None), [LimitExceeded], "{at}");
    }
    one_l2_table(&folder.path()).unwrap();
    let seen = Inspection::read(folder.path(), &OpenOptions::new()).unwrap();
    assert_eq!(seen.findings[0].kind, LimitExceeded);
    // As long as a disk may be, and a sector more.
    for (size, found) in [(64u64 << 40, 0), ((64 << 40) + 512, 1)] {
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, "cluster_size=2M").unwrap();
        let spec = CreateSpec::new(Format::Qcow2, size, settings);
        NewImage::create(folder.path(), &spec).unwrap().persist().unwrap();
        let seen = Inspection::read(folder.path(), &OpenOptions::new()).unwrap();
        assert_eq!((seen.findings.len(), seen.virtual_size), (found, Some(size)));
    }
}

#[test]
fn snapshots_and_bitmaps_are_counted() {
    let dir = scratch().unwrap();
    let manifest = Manifest::load(&folder()).unwrap();
    for (name, snapshots, bitmaps) in
        [("v3-4k-snapshot.qcow2", true, false), ("v3-4k-bitmap.qcow2", false, true)]
    {
        let path = manifest.entry(name).unwrap().unpack(&folder(), dir.path()).unwrap();
        let seen = Inspection::read(&path, &OpenOptions::new()).unwrap();
        assert_eq!((seen.snapshots > 0, seen.bitmaps > 0), (snapshots, bitmaps), "{seen:?}");
        assert_eq!(seen.findings, [], "{name}");
    }
}

#[test]
fn a_file_that_is_not_there_is_an_error() {
    let dir = scratch().unwrap();
    for path in [dir.path().join("missing"), dir.path().to_owned(), Path::new("/dev/null/x").to_owned()] {
        assert!(Inspection::read(&path, &OpenOptions::new()).is_err());
    }
}

/// What is accepted opens without any other file, and says of itself that it names none.
fn is_what_it_seems(path: &Path, label: &str) -> bool {
    let seen = Inspection::read(path, &OpenOptions::new()).unwrap();
    if seen.refusals(&[]).next().is_some() {
        return false;
    }
    let options = OpenOptions::new().policy(ReferencePolicy::deny());
    let info = ImageInfo::read(path, &options).unwrap();
    assert_eq!((info.format.as_str(), Some(info.virtual_size)), (seen.format, seen.virtual_size), "{label}");
    assert!(info.backing.is_none() && info.qcow2.is_none_or(|qcow2| qcow2.cut_short.is_none()), "{label}");
    let image = options.open(path).unwrap_or_else(|error| panic!("{label}: {error}"));
    assert_eq!(image.device().len(), info.virtual_size, "{label}");
    let sector = ByteRange::new(0, 512.min(info.virtual_size));
    image.device().read_at(&mut vec![0; sector.len() as usize], 0).unwrap();
    true
}

#[test]
fn what_is_accepted_of_damaged_images_opens_and_names_nothing() {
    let dir = scratch().unwrap();
    let manifest = Manifest::load(&folder()).unwrap();
    let (mut accepted, mut refused) = (0, 0);
    for name in [
        "v2-4k-plain.qcow2",
        "v3-4k-bitmap.qcow2",
        "v3-4k-snapshot.qcow2",
        "v3-4k-zstd.qcow2",
        "v3-512-lazy.qcow2",
        "v3-4k-chain.qcow2",
        "v3-4k-data_file_raw.qcow2",
        "v3-4k-dirty.qcow2",
    ] {
        let path = manifest.entry(name).unwrap().unpack(&folder(), dir.path()).unwrap();
        let sound = fs::read(&path).unwrap();
        for mutation in mutations(&sound) {
            let mut bytes = sound.clone();
            bytes[mutation.offset..mutation.offset + mutation.new.len()].copy_from_slice(&mutation.new);
            fs::write(&path, bytes).unwrap();
            let label = format!("{name}: {}", mutation.label);
            *(if is_what_it_seems(&path, &label) { &mut accepted } else { &mut refused }) += 1;
        }
    }
    assert!(accepted > 100 && refused > 100, "{accepted} accepted, {refused} refused");
}

#[test]
fn a_disk_too_long_for_raw_is_refused() {
    let dir = scratch().unwrap();
    let path = dir.path().join("long");
    let file = File::create(&path).unwrap();
    // Some file systems have no file that long.
    for (len, found) in [(64u64 << 40, 0), ((64 << 40) + 1, 1)] {
        if file.set_len(len).is_err() {
            blockmirror_testing::skip_unsupported(format_args!("a file of {len} bytes"));
            return;
        }
        let seen = Inspection::read(&path, &OpenOptions::new()).unwrap();
        assert_eq!(seen.findings.len(), found, "{seen:?}");
    }
}
