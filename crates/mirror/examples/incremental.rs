//! A full copy, then one that takes only what was written since: a named bitmap says what that is.
//!
//! `cargo run -p blockmirror-mirror --example incremental`

use std::sync::Arc;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_mirror::{BitmapMode, Event, MirrorJob, MirrorOptions, Outcome, SyncMode, Tap};

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    let disk = MemoryDisk::new(64 << 20);
    disk.write_at(&vec![7; 16 << 20], 0, WriteFlags::NONE)?;
    let tap = Tap::new(Arc::new(disk));
    let backup = Arc::new(MemoryDisk::new(64 << 20));

    // Made before the first copy: what is written while that runs is in both, which does no harm.
    tap.add_bitmap("since-backup", 65_536)?;
    let full = copy(&tap, &backup, MirrorOptions::new())?;
    println!("full: {} bytes copied", full.copied);

    tap.write_at(b"a small change", 1 << 20, WriteFlags::NONE)?;
    let changed = tap.bitmap("since-backup")?.dirty_bytes();
    let options =
        MirrorOptions::new().sync(SyncMode::Incremental).bitmap("since-backup", BitmapMode::OnSuccess);
    let incremental = copy(&tap, &backup, options)?;
    println!("incremental: {changed} bytes marked, {} bytes copied", incremental.copied);
    assert!(incremental.copied <= changed);
    assert!(tap.bitmap("since-backup")?.is_clean());
    Ok(())
}

/// Mirrors until the copy is equal, and keeps it.
fn copy(tap: &Arc<Tap>, backup: &Arc<MemoryDisk>, options: MirrorOptions) -> Result<Outcome, AnyError> {
    let job = MirrorJob::attach(tap, Arc::clone(backup) as _, options)?;
    while let Some(event) = job.control().next_event(None) {
        if event == Event::Ready {
            job.control().keep_copy()?;
        }
    }
    Ok(job.wait()?)
}
