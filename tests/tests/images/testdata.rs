//! Reading without QEMU: every stored image holds what the manifest's checksum says, and those that must not
//! be written are refused by name.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::path::Path;

use blockmirror_block::BlockDevice;
use blockmirror_image::{OpenOptions, ReferencePolicy};
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Entry, Manifest, folder};

fn options(image: &Path) -> OpenOptions {
    OpenOptions::new().policy(ReferencePolicy::beside(image).unwrap())
}

fn hash(device: &dyn BlockDevice, piece: usize) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0xa5; piece];
    let mut at = 0;
    while at < device.len() {
        let take = usize::try_from(device.len() - at).unwrap().min(piece);
        device.read_at(&mut buf[..take], at).unwrap();
        hasher.update(&buf[..take]);
        at += take as u64;
    }
    hasher.finalize().to_hex().to_string()
}

fn read_one(entry: &Entry) {
    let dir = scratch().unwrap();
    let path = entry.unpack(&folder(), dir.path()).unwrap();
    let image = options(&path).open(&path).unwrap_or_else(|e| panic!("{}: {e}", entry.file));
    let device = image.device();
    assert_eq!(image.format().to_string(), entry.format, "{}", entry.file);
    assert_eq!(device.len().next_multiple_of(512), entry.virtual_size, "{}", entry.file);
    let wanted = entry.content_blake3.as_deref().unwrap();
    // In large pieces that cross clusters and tables, and in small ones that fit no cluster.
    assert_eq!(hash(&**device, 1 << 20), wanted, "{}", entry.file);
    if entry.virtual_size < 8 << 20 {
        assert_eq!(hash(&**device, 3 * 512 + 7), wanted, "{} in odd pieces", entry.file);
    }
}

#[test]
fn every_image_holds_what_its_checksum_says() {
    let manifest = Manifest::load(&folder()).unwrap();
    let mut read = 0;
    for entry in manifest.images.iter().filter(|e| e.content_blake3.is_some()) {
        read_one(entry);
        read += 1;
    }
    report(format_args!("testdata: {read} images read"));
    assert!(read > 80);
}

#[test]
fn an_encrypted_image_is_refused_by_name() {
    let manifest = Manifest::load(&folder()).unwrap();
    let dir = scratch().unwrap();
    let path = manifest.entry("v2-4k-aes.qcow2").unwrap().unpack(&folder(), dir.path()).unwrap();
    let error = options(&path).open(&path).unwrap_err().to_string();
    assert!(error.contains("encrypted") && error.contains("v2-4k-aes.qcow2"), "{error}");
}

/// Read, and not written.
#[test]
fn an_image_that_is_marked_corrupt_is_not_written() {
    const INCOMPATIBLE: usize = 79;
    let manifest = Manifest::load(&folder()).unwrap();
    let file = "v3-4k-plain.qcow2";
    let dir = scratch().unwrap();
    let path = manifest.entry(file).unwrap().unpack(&folder(), dir.path()).unwrap();
    let mut before = std::fs::read(&path).unwrap();
    before[INCOMPATIBLE] ^= 2;
    std::fs::write(&path, &before).unwrap();
    let error = options(&path).writable(true).open(&path).map(drop).unwrap_err().to_string();
    assert!(error.contains("corrupt") && error.contains(file), "{error}");
    assert!(std::fs::read(&path).unwrap() == before, "{file} was changed by a refused open");
    let image = options(&path).open(&path).unwrap();
    image.device().read_at(&mut [0; 4096], 40_960).unwrap();
}

/// The name comes from the image's own table, as a newer program wrote it.
#[test]
fn an_unknown_feature_is_refused_by_the_name_the_image_gives_it() {
    let manifest = Manifest::load(&folder()).unwrap();
    let dir = scratch().unwrap();
    let path = manifest.entry("v3-64k-plain.qcow2").unwrap().unpack(&folder(), dir.path()).unwrap();
    let mut image = std::fs::read(&path).unwrap();
    image[79] |= 0x20;
    // Gives bit 5 the place and a name of its own that bit 0, "dirty bit", has in the table.
    let at = image.windows(9).position(|w| w == b"dirty bit").unwrap();
    image[at - 1] = 5;
    image[at..at + 9].copy_from_slice(b"telepathy");
    std::fs::write(&path, &image).unwrap();
    let error = options(&path).open(&path).unwrap_err().to_string();
    assert!(error.contains("telepathy"), "{error}");
}
