//! Block devices as storage, by a loop device over a file. Needs root and `losetup`; skipped visibly without.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;

use blockmirror_block::{ByteRange, ErrorKind, Storage, Visit, ZeroFlags};
use blockmirror_file::{FileOptions, LockMode};
use blockmirror_testing::LoopDevice;

const LEN: u64 = 4 * 1024 * 1024;

/// A loop device, and the file below it.
struct Loop {
    device: LoopDevice,
    _dir: tempfile::TempDir,
}

impl Loop {
    fn attach() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("below");
        std::fs::write(&file, vec![0x2a; LEN as usize]).unwrap();
        Some(Self { device: LoopDevice::on(&file)?, _dir: dir })
    }

    fn path(&self) -> &Path {
        self.device.path()
    }
}

fn exercise(path: &Path, direct: bool) {
    let device = FileOptions::new().writable(true).direct(direct).open(path).unwrap();
    let info = device.info();
    assert!(device.is_block_device() && info.fixed_len && !info.zero_init);
    assert!(info.request_alignment >= 512);
    assert_eq!(device.len().unwrap(), LEN);

    let byte = |at| {
        let mut buf = [0xee];
        device.read_at(&mut buf, at).unwrap();
        buf[0]
    };
    device.write_at(b"abc", 1000).unwrap();
    assert_eq!([byte(999), byte(1000), byte(1002), byte(1003)], [0x2a, b'a', b'c', 0x2a]);
    for flags in [ZeroFlags::NONE, ZeroFlags::MAY_UNMAP] {
        device.write_at(&[7; 65536], 65536).unwrap();
        device.write_zeroes(ByteRange::new(65536 + 100, 131_072 - 100), flags).unwrap();
        assert_eq!([byte(65635), byte(65636), byte(130_971), byte(130_972)], [7, 0, 0, 7], "{flags:?}");
    }
    device.discard(ByteRange::new(1_000_000, 2_000_001)).unwrap();
    assert_eq!(byte(999_999), 0x2a);
    assert!([0, 0x2a].contains(&byte(1_500_000)));
    assert_eq!(byte(2_000_001), 0x2a);

    let mut runs = Vec::new();
    device
        .extents(ByteRange::new(512, u64::MAX), &mut |run| {
            runs.push((run.range.start(), run.range.end(), run.hole));
            Visit::Continue(())
        })
        .unwrap();
    assert_eq!(runs, [(512, LEN, false)]);

    assert_eq!(device.write_at(&[1; 1024], LEN - 512).unwrap_err().kind(), ErrorKind::NoSpace);
    let past = device.write_zeroes(ByteRange::at(LEN, 512), ZeroFlags::NONE).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::NoSpace);
    assert_eq!(device.set_len(LEN * 2).unwrap_err().kind(), ErrorKind::Unsupported);
    device.set_len(LEN).unwrap();
    assert_eq!(device.allocate(ByteRange::new(0, 512)).unwrap_err().kind(), ErrorKind::Unsupported);
    let mut tail = [0xee; 1024];
    device.read_at(&mut tail, LEN - 100).unwrap();
    assert!(tail[100..].iter().all(|b| *b == 0), "zeros past the end");
    device.flush().unwrap();
}

#[test]
fn a_block_device_is_storage_of_fixed_length() {
    let Some(device) = Loop::attach() else { return };
    exercise(device.path(), false);
}

#[test]
fn without_the_page_cache_as_well() {
    let Some(device) = Loop::attach() else { return };
    exercise(device.path(), true);
}

#[test]
fn a_block_device_is_locked_and_known_like_a_file() {
    let Some(device) = Loop::attach() else { return };
    let first = FileOptions::new().writable(true).open(device.path()).unwrap();
    assert!(first.lock().unwrap().is_enforced());
    assert_eq!(FileOptions::new().open(device.path()).unwrap_err().kind(), ErrorKind::Locked);
    let second = FileOptions::new().lock(LockMode::Off).open(device.path()).unwrap();
    assert_eq!(first.id(), second.id());
    let stamp = second.device_stamp().unwrap().unwrap();
    assert_eq!(first.device_stamp().unwrap().as_ref(), Some(&stamp));
    let stamp = stamp.to_string();
    assert!(stamp.starts_with("device 7:") && stamp.contains("/below offset 0 inode "), "{stamp}");
}
