//! Rebases in memory: what a crash, a failure or an odd chain leaves.

use blockmirror_block::testing::{
    CrashPoint, Fault, FaultDisk, FaultStorage, Faults, MemoryDisk, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{ByteRange, ErrorKind, Extent, ExtentKind, Visit, WriteFlags, ZeroFlags};
use blockmirror_image::Format;
use blockmirror_qcow2::{CreateOptions, OpenOptions as Qcow2Options, Version};

use super::*;

const LEN: u64 = 300 << 10;

#[test]
fn the_default_takes_an_image_off_its_backing_file() {
    let rebase = Rebase::new("overlay");
    assert!(rebase.name().is_none() && !rebase.header_only);
    assert_eq!(rebase.onto("base", Format::Raw).name(), Some(&b"base"[..]));
}

/// A disk of `len` bytes, of which each run of 5 KiB holds data that depends on `seed`, or zeros.
fn disk(seed: u64, len: u64) -> Arc<dyn BlockDevice> {
    let disk = MemoryDisk::new(len);
    for (index, run) in ByteRange::new(0, len).pieces(5 << 10).enumerate() {
        // Some runs are the same for each seed, some zero for one of them, some never written.
        let byte = match (index as u64 * 7 + seed) % 5 {
            0 => continue,
            1 => 0,
            2 => 0x55,
            other => (other + seed * 16 + index as u64 % 3) as u8,
        };
        disk.write_at(&vec![byte; run.len() as usize], run.start(), WriteFlags::NONE).unwrap();
    }
    Arc::new(disk)
}

/// How an overlay is made.
#[derive(Clone, Copy, Debug)]
struct Kind {
    version: Version,
    cluster: u64,
    extended: bool,
}

const KINDS: [Kind; 4] = [
    Kind { version: Version::V3, cluster: 4096, extended: false },
    Kind { version: Version::V2, cluster: 4096, extended: false },
    Kind { version: Version::V3, cluster: 16 << 10, extended: true },
    Kind { version: Version::V3, cluster: 65536, extended: false },
];

/// The bytes of an overlay on `old` with some data, zeros and discards of its own.
fn overlay(kind: Kind, old: &Arc<dyn BlockDevice>) -> Vec<u8> {
    let storage = Arc::new(RecordingStorage::default());
    let mut options = CreateOptions::new(LEN);
    (options.version, options.cluster_size, options.extended_l2) =
        (kind.version, kind.cluster, kind.extended);
    options.backing_file = Some(b"old".to_vec());
    options.backing_format = Some("raw".to_owned());
    options.create(&*storage, None).unwrap();
    let open = Qcow2Options::new().writable(true).backing(Arc::clone(old));
    let image = open.open(Arc::clone(&storage) as _).unwrap();
    image.write_at(&[9; 9000], 30_000, WriteFlags::NONE).unwrap();
    image.write_zeroes(ByteRange::at(80 << 10, 50 << 10), ZeroFlags::MAY_UNMAP).unwrap();
    image.discard(ByteRange::at(96 << 10, 20 << 10)).unwrap();
    image.write_at(&[8; 70_000], 150_000, WriteFlags::NONE).unwrap();
    image.flush().unwrap();
    storage.to_vec()
}

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0; disk.len() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

fn base(device: &Arc<dyn BlockDevice>) -> Base {
    Base { device: Arc::clone(device), name: b"new".to_vec(), format: Some("raw".to_owned()) }
}

/// What the image in `storage` reads as on the disk that its header names.
fn read(
    storage: MemoryStorage,
    old: &Arc<dyn BlockDevice>,
    new: Option<&Arc<dyn BlockDevice>>,
) -> (Option<String>, Vec<u8>) {
    let header = blockmirror_qcow2::Header::read(&storage).unwrap();
    let name = header.backing.as_ref().map(|backing| backing.name.to_string());
    let options = match (name.as_deref(), new) {
        (Some("old"), _) => Qcow2Options::new().backing(Arc::clone(old)),
        (Some("new"), Some(new)) => Qcow2Options::new().backing(Arc::clone(new)),
        (None, None) => Qcow2Options::new(),
        other => panic!("the header names {:?}", other.0),
    };
    let image = options.writable(true).open(Arc::new(storage)).unwrap();
    (name, contents(&image))
}

/// Rebases each kind of overlay onto `new`, and reads it as each crash leaves it.
fn rebase_and_crash(old_len: u64, new_len: Option<u64>, compress: bool) {
    let old = disk(1, old_len);
    let new = new_len.map(|len| disk(2, len));
    for kind in KINDS {
        let bytes = overlay(kind, &old);
        let storage = Arc::new(RecordingStorage::with_contents(&bytes));
        let open = Qcow2Options::new().writable(true).backing(Arc::clone(&old));
        let image = Arc::new(open.open(Arc::clone(&storage) as _).unwrap());
        let want = contents(&*image);
        let (copy, options) = (Arc::clone(&image), JobOptions::default());
        let job = match compress {
            true => RebaseJob::start_compressed(copy, new.as_ref().map(base), None, options),
            false => RebaseJob::start(copy, new.as_ref().map(base), None, options),
        };
        job.unwrap().wait().unwrap();
        assert!(contents(&*image) == want, "{kind:?}: the open image");
        drop(image);
        let points: Vec<CrashPoint> = storage.crash_points().collect();
        let mut names = Vec::new();
        for point in &points {
            let (name, found) = read(point.storage(), &old, new.as_ref());
            assert!(found == want, "{kind:?}: {point}");
            names.push(name);
        }
        names.dedup();
        assert_eq!(names.len(), 2, "the name changes once: {names:?}");
        let report = blockmirror_qcow2::check(&storage.snapshot(), &mut ());
        assert!(report.unwrap().is_clean(), "{kind:?}");
    }
}

#[test]
fn each_crash_leaves_the_image_as_it_read() {
    rebase_and_crash(LEN, Some(LEN), false);
    rebase_and_crash(LEN, None, false);
}

#[test]
fn disks_below_may_be_shorter_and_longer() {
    rebase_and_crash(LEN / 2 + 512, Some(LEN + 4096), false);
    rebase_and_crash(LEN + 4096, Some(LEN / 3), false);
}

/// Clusters that the image decides in part are stored whole.
#[test]
fn data_may_be_stored_compressed() {
    rebase_and_crash(LEN, None, true);
    rebase_and_crash(LEN / 2 + 512, Some(LEN / 3), true);
    let old = disk(1, LEN);
    let storage = Arc::new(MemoryStorage::with_contents(&overlay(KINDS[3], &old)));
    let open = Qcow2Options::new().writable(true).backing(Arc::clone(&old));
    let image = Arc::new(open.open(Arc::clone(&storage) as _).unwrap());
    RebaseJob::start_compressed(image, None, None, JobOptions::default()).unwrap().wait().unwrap();
    let report = blockmirror_qcow2::check(&*storage, &mut ()).unwrap();
    assert!(report.is_clean() && report.compressed_clusters > 0, "{report:?}");
}

/// Onto a deeper layer of its own chain: what that decides is not read at all.
#[test]
fn what_both_chains_share_is_left_below() {
    let deep = disk(1, LEN);
    let kind = KINDS[0];
    let middle = Arc::new(MemoryStorage::with_contents(&overlay(kind, &deep)));
    let middle = Qcow2Options::new().backing(Arc::clone(&deep)).open(middle).unwrap();
    let middle: Arc<dyn BlockDevice> = Arc::new(middle);
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(LEN);
    options.cluster_size = kind.cluster;
    options.backing_file = Some(b"middle".to_vec());
    options.create(&*storage, None).unwrap();
    let open = Qcow2Options::new().writable(true).backing(Arc::clone(&middle));
    let image = Arc::new(open.open(storage).unwrap());
    let want = contents(&*image);
    let job = RebaseJob::start(Arc::clone(&image), Some(base(&deep)), Some(2), JobOptions::default());
    let moved = job.unwrap().wait().unwrap().moved;
    assert!(contents(&*image) == want);
    // The middle has 79,000 bytes of data, and 30 KiB of zeros over data.
    assert!((79_000..140_000).contains(&moved), "{moved}");
    assert!(matches!(
        RebaseJob::start(image, Some(base(&deep)), Some(0), JobOptions::default()),
        Err(Error::NoLayers { .. })
    ));
}

#[test]
fn a_failure_leaves_the_image_on_its_old_backing_file() {
    let (old, new) = (disk(1, LEN), disk(2, LEN));
    for (kind, after) in [(OpKind::Write, 0), (OpKind::Write, 7), (OpKind::Flush, 0)] {
        let memory = Arc::new(RecordingStorage::with_contents(&overlay(KINDS[0], &old)));
        let faults = Faults::new();
        let storage = Arc::new(FaultStorage::new(Arc::clone(&memory) as _, faults.clone()));
        let open = Qcow2Options::new().writable(true).backing(Arc::clone(&old));
        let image = Arc::new(open.open(storage).unwrap());
        let want = contents(&*image);
        faults.inject(Fault::on(kind).after(after).with(ErrorKind::NoSpace));
        let job = RebaseJob::start(Arc::clone(&image), Some(base(&new)), None, JobOptions::default());
        let error = job.unwrap().wait().unwrap_err();
        assert_eq!(error.device_error().map(|error| error.kind()), Some(ErrorKind::NoSpace), "{error}");
        assert!(contents(&*image) == want);
        drop(image);
        let (name, found) = read(memory.snapshot(), &old, Some(&new));
        assert!(name.as_deref() == Some("old") && found == want, "{kind:?} {after}");
    }
}

/// The job waits in a read of the new backing file when it is cancelled.
#[test]
fn a_rebase_that_is_cancelled_leaves_the_image_on_its_old_backing_file() {
    let (old, new) = (disk(1, LEN), disk(2, LEN));
    let storage = Arc::new(RecordingStorage::with_contents(&overlay(KINDS[0], &old)));
    let faults = Faults::new();
    let gate = faults.hold(OpKind::Read, None);
    let slow: Arc<dyn BlockDevice> = Arc::new(FaultDisk::new(Arc::clone(&new), faults));
    let open = Qcow2Options::new().writable(true).backing(Arc::clone(&old));
    let image = Arc::new(open.open(Arc::clone(&storage) as _).unwrap());
    let want = contents(&*image);
    let job = RebaseJob::start(Arc::clone(&image), Some(base(&slow)), None, JobOptions::default()).unwrap();
    gate.wait_held(1);
    job.control().force_cancel().unwrap();
    gate.open();
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
    drop(image);
    let (name, found) = read(storage.snapshot(), &old, Some(&new));
    assert!(name.as_deref() == Some("old") && found == want);
}

/// Where the old file shows zeros, the image gets them as data if it is to; past its end it never does.
#[test]
fn zeros_of_the_old_file_are_data_if_they_are_to_be() {
    let old: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(LEN / 2));
    let new: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&vec![0x77; LEN as usize]));
    for (way, kind) in [(Way::AllocateZeros, ExtentKind::Data), (Way::Plain, ExtentKind::Zero)] {
        let storage = Arc::new(MemoryStorage::with_contents(&overlay(KINDS[0], &old)));
        let open = Qcow2Options::new().writable(true).backing(Arc::clone(&old));
        let image = Arc::new(open.open(storage).unwrap());
        let want = contents(&*image);
        let copy = Arc::clone(&image);
        let job = RebaseJob::start_with(copy, Some(base(&new)), None, way, JobOptions::default());
        job.unwrap().wait().unwrap();
        assert!(contents(&*image) == want, "{way:?}");
        let kind_at = |at| {
            let mut found = None;
            let visit = &mut |extent: Extent| {
                found = Some(extent.kind);
                Visit::Break(())
            };
            image.extents(ByteRange::at(at, 512), visit).unwrap();
            found.unwrap()
        };
        assert_eq!((kind_at(0), kind_at(LEN - 512)), (kind, ExtentKind::Zero), "{way:?}");
    }
}

/// The files of a folder by their names in it.
fn named(folder: &std::path::Path, name: &str) -> String {
    format!(r#""file.filename":"{}""#, folder.join(name).display())
}

fn contents_of(name: &ImageName) -> Vec<u8> {
    let policy = AllowedReferences::new().policy_for(&name.path).unwrap();
    let options = OpenOptions::new().policy(policy).format(name.format).node(name.node.clone());
    contents(&**options.open(&name.path).unwrap().device())
}

/// A layer that is the same file in the same format reads otherwise by options that are typed: nothing was
/// copied, and the image read as the other disk afterwards.
#[test]
fn a_layer_that_is_typed_is_shared_only_if_it_reads_as_its_file() {
    const MIB: u64 = 1 << 20;
    for (typed, new, format, copies) in [
        (r#""driver":"raw","offset":1048576,"size":1048576,BB"#, "bb", Format::Raw, true),
        (r#""driver":"qcow2",MID,"backing":{"driver":"raw",OTHER}"#, "mid", Format::Qcow2, true),
        (r#""driver":"qcow2",MID,"backing":null"#, "mid", Format::Qcow2, true),
        (r#""driver":"qcow2",MID"#, "mid", Format::Qcow2, false),
        (r#""driver":"qcow2",MID"#, "bb", Format::Raw, false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let two = [[1; MIB as usize], [2; MIB as usize]].concat();
        std::fs::write(path("bb"), two).unwrap();
        std::fs::write(path("other"), [3; MIB as usize]).unwrap();
        for name in ["mid", "top"] {
            let mut options = CreateOptions::new(MIB);
            options.backing_file = Some(b"bb".to_vec());
            options.backing_format = Some("raw".to_owned());
            let storage = MemoryStorage::default();
            options.create(&storage, None).unwrap();
            std::fs::write(path(name), storage.to_vec()).unwrap();
        }
        let mut typed = typed.to_owned();
        for (short, file) in [("BB", "bb"), ("MID", "mid"), ("OTHER", "other")] {
            typed = typed.replace(short, &named(dir.path(), file));
        }
        let top = named(dir.path(), "top");
        let name = format!(r#"json:{{"driver":"qcow2",{top},"backing":{{{typed}}}}}"#);
        let name = ImageName::parse(std::path::Path::new(&name)).unwrap();
        let before = contents_of(&name);
        let rebase = Rebase::new(name).onto(new, format);
        let outcome = rebase.run(&AtomicBool::new(false), |_| {}).unwrap();
        assert!(contents_of(&path("top").into()) == before, "{typed} onto {new}");
        assert_eq!(outcome.moved > 0, copies, "{typed} onto {new}: {outcome:?}");
    }
}
