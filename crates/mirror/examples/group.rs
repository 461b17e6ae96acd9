//! A machine with its data on one disk and its journal on another moves to new images, both at one instant.
//!
//! `cargo run -p blockmirror-mirror --example group`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{self as block, BlockDevice, WriteFlags};
use blockmirror_mirror::{CopyMode, GroupEvent, GroupMember, MirrorGroup, MirrorOptions, Tap};

const LEN: u64 = 16 << 20;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), AnyError> {
    let disk = |name| Arc::new(MemoryDisk::new(LEN).named(name));
    let (old_data, old_journal) = (disk("old data"), disk("old journal"));
    let (data, journal) = (Tap::new(Arc::clone(&old_data) as _), Tap::new(Arc::clone(&old_journal) as _));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // The guest: every change goes to the journal first, then to the data.
        let guest = scope.spawn(|| {
            let mut n: u64 = 0;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                journal.write_at(&n.to_be_bytes(), 0, WriteFlags::NONE)?;
                data.write_at(&n.to_be_bytes(), 0, WriteFlags::NONE)?;
                data.write_at(&n.to_be_bytes(), 4096 + n * 4096 % (LEN - 4096), WriteFlags::NONE)?;
            }
            Ok::<u64, block::Error>(n)
        });
        let moved = move_over([(&data, disk("new data")), (&journal, disk("new journal"))]);
        stop.store(true, Ordering::Relaxed);
        let n = guest.join().map_err(|_| "the guest panicked")??;
        moved?;

        // What stays behind shows one instant: the journal knows of at most one change that the data does not
        // have.
        let (before, after) = (stamp(&*old_journal)?, stamp(&*old_data)?);
        assert!(before == after || before == after + 1, "journal {before}, data {after}");
        assert_eq!((stamp(&*journal)?, stamp(&*data)?), (n, n), "nothing was lost");
        println!(
            "moved at change {before}, now at {n}, on {:?} and {:?}",
            data.device().name(),
            journal.device().name()
        );
        Ok(())
    })
}

fn move_over(disks: [(&Arc<Tap>, Arc<MemoryDisk>); 2]) -> Result<(), AnyError> {
    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
    let member = |(tap, target): (_, Arc<MemoryDisk>)| GroupMember::new(tap, target, options.clone());
    let group = MirrorGroup::attach(disks.into_iter().map(member).collect())?;
    while let Some(event) = group.control().next_event(None) {
        println!("{event:?}");
        if event == GroupEvent::Ready {
            group.control().complete()?;
        }
    }
    println!("the guest was held {} time(s)", group.control().attempts());
    group.wait()?;
    Ok(())
}

fn stamp(disk: &dyn BlockDevice) -> Result<u64, block::Error> {
    let mut bytes = [0; 8];
    disk.read_at(&mut bytes, 0)?;
    Ok(u64::from_be_bytes(bytes))
}
