//! Known-bug tests: those of the fifteen known bugs of mirrors that need real formats and files. Each test
//! has its number; the others are in the mirror's own crate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::env;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, Extent, Visit, WriteFlags, ZeroFlags};
use blockmirror_image::{CreateSettings, CreateSpec, Format, Image, NewImage, OpenOptions, ReferencePolicy};
use blockmirror_mirror::{Event, MirrorJob, MirrorOptions, SyncMode, Tap};
use blockmirror_qcow2 as qcow2;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

const MIB: u64 = 1 << 20;

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.len()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn assert_equal(found: &dyn BlockDevice, wanted: &dyn BlockDevice, what: &str) {
    let (found, wanted) = (contents(found), contents(wanted));
    let differs = found.iter().zip(&wanted).position(|(a, b)| a != b);
    assert_eq!((differs, found.len()), (None, wanted.len()), "first different byte: {what}");
}

fn until_ready(job: &MirrorJob) {
    while job.control().next_event(None).expect("the job ends early") != Event::Ready {}
}

fn create(path: &Path, size: u64) -> Image {
    let spec = CreateSpec::new(Format::Qcow2, size, CreateSettings::default());
    NewImage::create(path, &spec).unwrap().persist().unwrap();
    open(path)
}

fn open(path: &Path) -> Image {
    OpenOptions::new().format(Format::Qcow2).writable(true).open(path).unwrap()
}

/// A target whose backing file is not attached: what one small write leaves of a large cluster comes from the
/// source's own chain, and nothing of the target's other base.
#[test]
fn known_bug_06_the_rest_of_a_cluster_comes_from_the_source() {
    const SIZE: u64 = 8 * MIB + 512;
    let full_of = |byte| Arc::new(MemoryDisk::with_contents(&vec![byte; SIZE as usize]));
    let (source_base, target_base) = (full_of(0x11), full_of(0x22));
    for cluster_size in [MIB, 2 * MIB] {
        let overlay = |cluster_size| {
            let mut options = qcow2::CreateOptions::new(SIZE);
            options.cluster_size = cluster_size;
            options.backing_file = Some(b"base".to_vec());
            options.backing_format = Some("raw".into());
            let storage = Arc::new(MemoryStorage::new());
            options.create(&*storage, None).unwrap();
            storage
        };
        let writable = || qcow2::OpenOptions::new().writable(true);
        let source = Arc::new(writable().backing(source_base.clone()).open(overlay(65_536)).unwrap());
        source.write_at(&[0x33; 512], 3 * MIB + 1024, WriteFlags::NONE).unwrap();
        let storage = overlay(cluster_size);
        let target = Arc::new(writable().open(storage.clone()).unwrap());
        let tap = Tap::new(source.clone());
        let options = MirrorOptions::new().sync(SyncMode::Top).granularity(4096);
        let job = MirrorJob::attach(&tap, target, options).unwrap();
        until_ready(&job);
        tap.write_at(&[0x44; 512], 5 * MIB + 512, WriteFlags::NONE).unwrap();
        job.control().keep_copy().unwrap();
        job.wait().unwrap();

        let target = qcow2::OpenOptions::new().backing(target_base.clone()).open(storage).unwrap();
        let found = contents(&target);
        for written in [3 * MIB + 1024, 5 * MIB + 512] {
            let cluster = ByteRange::at(written, 512).align_outward(cluster_size);
            for at in (cluster.start()..cluster.end()).step_by(512) {
                let wanted = if at == 3 * MIB + 1024 {
                    0x33
                } else if at == 5 * MIB + 512 {
                    0x44
                } else {
                    0x11
                };
                assert_eq!(found[at as usize], wanted, "clusters of {cluster_size}, at {at}");
            }
        }
        assert_eq!(found[0], 0x22, "what was not written shows the target's own base");
    }
}

/// What reads as zero at the source, for whatever reason, must read as zero at the target, whatever it held;
/// and where a backing file must show nothing is written.
#[test]
fn known_bug_07_zeros_and_holes_over_old_bytes_and_over_a_backing_file() {
    const SIZE: u64 = 4 * MIB + 1536;
    let image = |version: qcow2::Version, backing: bool| {
        let mut options = qcow2::CreateOptions::new(SIZE);
        options.version = version;
        if backing {
            options.backing_file = Some(b"base".to_vec());
            options.backing_format = Some("raw".into());
        }
        let storage = Arc::new(MemoryStorage::new());
        options.create(&*storage, None).unwrap();
        storage
    };
    let old = Arc::new(MemoryDisk::with_contents(&vec![0x2a; SIZE as usize]));
    for target_version in [qcow2::Version::V2, qcow2::Version::V3] {
        for source_version in [qcow2::Version::V2, qcow2::Version::V3] {
            // Data, explicit zeros, zeros as data, something discarded, and what was never written.
            let storage = image(source_version, false);
            let source = Arc::new(qcow2::OpenOptions::new().writable(true).open(storage).unwrap());
            source.write_at(&[7; 100_000], 65_536, WriteFlags::NONE).unwrap();
            source.write_zeroes(ByteRange::at(MIB, 200_000), ZeroFlags::MAY_UNMAP).unwrap();
            source.write_at(&[0; 200_000], 2 * MIB, WriteFlags::NONE).unwrap();
            source.write_at(&[9; 200_000], 3 * MIB, WriteFlags::NONE).unwrap();
            source.discard(ByteRange::at(3 * MIB, 131_072)).unwrap();
            for granularity in [4096, 1 << 20] {
                // Over old bytes of its own, and over a backing file that is full of them.
                for over_backing in [false, true] {
                    let storage = image(target_version, over_backing);
                    let mut open = qcow2::OpenOptions::new().writable(true);
                    if over_backing {
                        open = open.backing(old.clone());
                    }
                    let target = Arc::new(open.open(storage).unwrap());
                    if !over_backing {
                        target.write_at(&vec![0x2a; SIZE as usize], 0, WriteFlags::NONE).unwrap();
                    }
                    let options = MirrorOptions::new().granularity(granularity);
                    MirrorJob::start(source.clone(), target.clone(), options).unwrap().wait().unwrap();
                    let what = format!(
                        "{source_version:?} to {target_version:?}, over a backing file: {over_backing}, {granularity}"
                    );
                    assert_equal(&*target, &*source, &what);
                }
            }
        }
        // Only the top: what it does not decide shows the base of the target.
        let storage = image(qcow2::Version::V3, true);
        let source =
            Arc::new(qcow2::OpenOptions::new().writable(true).backing(old.clone()).open(storage).unwrap());
        source.write_at(&[5; 512], MIB, WriteFlags::NONE).unwrap();
        source.write_zeroes(ByteRange::at(2 * MIB, 65_536), ZeroFlags::MAY_UNMAP).unwrap();
        let storage = image(target_version, true);
        let target =
            Arc::new(qcow2::OpenOptions::new().writable(true).backing(old.clone()).open(storage).unwrap());
        let options = MirrorOptions::new().sync(SyncMode::Top).granularity(64 << 20);
        MirrorJob::start(source.clone(), target.clone(), options).unwrap().wait().unwrap();
        assert_equal(&*target, &*source, &format!("the top to {target_version:?}"));
        let mut allocated = 0;
        let mut decided = |extent: Extent| {
            allocated += if extent.depth == 0 { extent.range.len() } else { 0 };
            Visit::Continue(())
        };
        target.extents(ByteRange::new(0, SIZE), &mut decided).unwrap();
        assert_eq!(allocated, 2 * 65_536, "more than the source's top was written");
    }
}

const CHILD: &str = "BLOCKMIRROR_PROVOCATION_11";

/// The job in a process of its own, which is killed the moment after it said that the job has completed.
#[test]
fn known_bug_11_a_process_killed_after_completed_leaves_a_whole_target() {
    let qemu = Qemu::find("known bug 11");
    for (ready_only, ending) in [(true, "READY"), (false, "COMPLETED")] {
        let dir = scratch().unwrap();
        let path = |name: &str| dir.path().join(name);
        create(&path("source"), 64 * MIB);
        create(&path("target"), 64 * MIB);
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "known_bugs::the_process_that_is_killed", "--ignored", "--nocapture"])
            .env(CHILD, dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut hear =
            |word: &str| while !said.next().expect("it says nothing more").unwrap().ends_with(word) {};
        hear("READY");
        if !ready_only {
            child.stdin.as_mut().unwrap().write_all(b"complete\n").unwrap();
            hear("COMPLETED");
        }
        // SIGKILL: it has no chance to bring anything to disk.
        child.kill().unwrap();
        child.wait().unwrap();
        let (source, target) = (open(&path("source")), open(&path("target")));
        // The source was flushed by its guest before READY, and not written since.
        assert_equal(&**target.device(), &**source.device(), ending);
        drop((source, target));
        if let Some(qemu) = qemu {
            qemu.check(&path("target")).unwrap();
            qemu.compare("qcow2", &path("source"), "qcow2", &path("target")).unwrap();
        }
    }
}

/// Not a test: what [`known_bug_11_a_process_killed_after_completed_leaves_a_whole_target`] runs and kills.
#[test]
#[ignore = "is run by another test"]
fn the_process_that_is_killed() {
    let Some(dir) = env::var_os(CHILD) else { return };
    let dir = Path::new(&dir);
    let (source, target) = (open(&dir.join("source")), open(&dir.join("target")));
    let tap = Tap::new(Arc::clone(source.device()));
    let write = |at: u64, byte| tap.write_at(&vec![byte; 300_000], at, WriteFlags::NONE).unwrap();
    (0..20).for_each(|i| write(i * 3 * MIB + 777, 1 + i as u8));
    tap.flush().unwrap();
    let job = MirrorJob::attach(&tap, Arc::clone(target.device()), MirrorOptions::new()).unwrap();
    until_ready(&job);
    println!("READY");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    (0..15).for_each(|i| write(i * 4 * MIB + 100, 101 + i as u8));
    tap.flush().unwrap();
    job.control().complete().unwrap();
    while !matches!(job.control().next_event(None), Some(Event::Completed { .. })) {}
    println!("COMPLETED");
    loop {
        std::thread::park();
    }
}

/// After the pivot any process may have the source file, while the guest goes on with the target's.
#[test]
fn known_bug_15_the_source_file_is_free_and_the_backing_file_opened_at_the_pivot() {
    let qemu = Qemu::find("known bug 15");
    let dir = scratch().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = create(&path("source"), 4 * MIB);
    source.device().write_at(&[1; 100_000], MIB, WriteFlags::NONE).unwrap();
    let tap = Tap::new(Arc::clone(source.device()));
    let busy = || OpenOptions::new().format(Format::Qcow2).writable(true).open(path("source")).err();
    drop(source);
    assert!(busy().is_some(), "the guest has it");
    let target = create(&path("target"), 4 * MIB);
    let job = MirrorJob::attach(&tap, Arc::clone(target.device()), MirrorOptions::new()).unwrap();
    drop(target);
    until_ready(&job);
    tap.flush().unwrap();
    job.control().complete().unwrap();
    // A handle of the job that is over is kept.
    let _control = job.control().clone();
    job.wait().unwrap();
    assert!(busy().is_none(), "the source is left busy: {:?}", busy());
    tap.write_at(&[2; 512], 0, WriteFlags::NONE).unwrap();
    tap.flush().unwrap();
    if let Some(qemu) = qemu {
        qemu.io("qcow2", &path("source"), &["read -P 1 1M 64k", "read -P 0 0 512", "write -P 9 0 512"])
            .unwrap();
    }
    let mut read = [0; 512];
    tap.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [2; 512], "the guest reads the old image");

    // An overlay whose backing file stays closed until the guest is over on it. It is the old image itself,
    // which could not be opened earlier: the guest was writing to it.
    let mut settings = CreateSettings::default();
    (settings.backing_file, settings.backing_format) = (Some("target".into()), Some(Format::Qcow2));
    let spec = CreateSpec::new(Format::Qcow2, 4 * MIB, settings);
    NewImage::create(path("overlay"), &spec).unwrap().persist().unwrap();
    let with_backing = || {
        let options = OpenOptions::new().format(Format::Qcow2).writable(true);
        options.policy(ReferencePolicy::beside(&path("overlay")).unwrap()).open(path("overlay"))
    };
    assert!(with_backing().is_err(), "its backing file is being written");
    let storage = {
        let options = blockmirror_file::FileOptions::new().writable(true);
        Arc::new(options.open(path("overlay")).unwrap())
    };
    let bare = Arc::new(qcow2::OpenOptions::new().writable(true).open(storage).unwrap());
    let job = MirrorJob::attach(&tap, bare, MirrorOptions::new().sync(SyncMode::None)).unwrap();
    until_ready(&job);
    tap.write_at(&[3; 512], 2 * MIB, WriteFlags::NONE).unwrap();
    let wanted = contents(&*tap);
    job.control().complete().unwrap();
    job.wait().unwrap();
    let mut drained = tap.drain();
    drained.device().flush().unwrap();
    let hole: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(4 * MIB));
    // The last holder of the two files closes them.
    drained.replace(hole).unwrap();
    drained.replace(Arc::clone(with_backing().unwrap().device())).unwrap();
    drop(drained);
    assert!(contents(&*tap) == wanted, "the guest sees another disk");
}
