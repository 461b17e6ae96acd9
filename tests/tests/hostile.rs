//! Damaged images: every field of the header, of L1, L2 and refcounts turned into values that hurt, one at a
//! time, on twenty images. Reading gives a typed error, or byte for byte what QEMU reads from the same file;
//! writing gives an error or not; nothing panics, hangs or grows.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blockmirror_block::WriteFlags;
use blockmirror_image::{Format, OpenOptions, ReferencePolicy};
use blockmirror_testing::mutate::{Mutation, mutations};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Manifest, folder};
use blockmirror_tests::mutant::{Reading, read, read_by_qemu};

/// A mutation that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(60);
/// Most memory that this process may ever have had resident.
const MOST_RSS_KIB: u64 = 256 << 10;

/// Writes here and there; whether that works is the image's business.
fn write(path: &Path) {
    let policy = ReferencePolicy::beside(path).unwrap();
    let options = OpenOptions::new().format(Format::Qcow2).policy(policy).writable(true);
    let Ok(image) = options.open(path) else { return };
    let device = image.device();
    for offset in [0, 5000, 40_000, device.len() / 2] {
        let _ = device.write_at(&[0x5a; 700], offset, WriteFlags::NONE);
    }
    let _ = device.flush();
}

/// Runs `work` on a thread of its own and waits no longer than [`LONGEST`].
fn bounded<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(LONGEST) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: took more than {LONGEST:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            panic!("{what}: panicked: {:?}", worker.join().unwrap_err().downcast_ref::<String>())
        }
    }
}

struct Tally {
    refused: usize,
    same: usize,
}

fn torment(qemu: Qemu, name: &str, tally: &mut Tally, wrong: &mut Vec<String>) {
    let dir = scratch().unwrap();
    let manifest = Manifest::load(&folder()).unwrap();
    let path = manifest.entry(name).unwrap().unpack(&folder(), dir.path()).unwrap();
    let sound = fs::read(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for Mutation { label, offset, old, new } in mutations(&sound) {
        file.write_all_at(&new, offset as u64).unwrap();
        let what = format!("{name}: {label}");
        let target = path.clone();
        match bounded(&what, move || read(&target).unwrap()) {
            Reading::Refused(error) => {
                tally.refused += 1;
                if error.is_empty() {
                    wrong.push(format!("{what}: an error without words"));
                }
            }
            Reading::Content(content) => {
                match read_by_qemu(qemu, &path, content.len(), &dir.path().join("judge")) {
                    Ok(theirs) if theirs == content => tally.same += 1,
                    Ok(_) => wrong.push(format!("{what}: reads differently")),
                    Err(e) => {
                        wrong.push(format!("{what}: we read it, QEMU does not: {}", e.to_string().trim_end()))
                    }
                }
            }
        }
        let victim: PathBuf = dir.path().join("victim.qcow2");
        fs::copy(&path, &victim).unwrap();
        bounded(&format!("{what}, written"), move || write(&victim));
        file.write_all_at(&old, offset as u64).unwrap();
    }
}

fn torment_all(names: [&str; 5]) {
    let Some(qemu) = Qemu::find("hostile") else { return };
    let (mut tally, mut wrong) = (Tally { refused: 0, same: 0 }, Vec::new());
    for name in names {
        torment(qemu, name, &mut tally, &mut wrong);
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let rss: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(rss < MOST_RSS_KIB, "{rss} KiB resident");
    let Tally { refused, same } = tally;
    report(format_args!(
        "hostile: {} mutations, {refused} refused, {same} read as QEMU reads them",
        refused + same
    ));
    assert!(refused > 500 && same > 500, "the mutations do not bite: {refused} refused, {same} the same");
}

#[test]
fn plain_images_of_512() {
    torment_all([
        "v2-512-plain.qcow2",
        "v3-512-plain.qcow2",
        "v3-512-refcount1.qcow2",
        "v3-512-refcount64.qcow2",
        "v3-512-lazy.qcow2",
    ]);
}

#[test]
fn compressed_images() {
    torment_all([
        "v2-512-deflate.qcow2",
        "v3-512-zstd.qcow2",
        "v3-4k-deflate.qcow2",
        "v3-4k-zstd.qcow2",
        "v3-64k-extended_l2_deflate.qcow2",
    ]);
}

#[test]
fn layered_images() {
    torment_all([
        "v2-512-chain.qcow2",
        "v3-512-chain.qcow2",
        "v3-512-zeroes.qcow2",
        "v3-4k-zeroes.qcow2",
        "v3-512-data_file.qcow2",
    ]);
}

#[test]
fn images_with_more_in_them() {
    torment_all([
        "v3-4k-snapshot.qcow2",
        "v3-4k-bitmap.qcow2",
        "v3-4k-data_file_raw.qcow2",
        "v3-16k-extended_l2_zeroes.qcow2",
        "v2-4k-plain.qcow2",
    ]);
}
