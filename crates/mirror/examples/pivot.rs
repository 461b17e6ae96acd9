//! A disk that is written all the time moves to another image: mirror, READY, pivot.
//!
//! `cargo run -p blockmirror-mirror --example pivot`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_mirror::{CopyMode, Event, MirrorJob, MirrorOptions, Tap};

const LEN: u64 = 64 << 20;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let tap = Tap::new(Arc::new(MemoryDisk::new(LEN).named("old")));
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(65_536).named("new"));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // The guest: it knows the tap only.
        let guest = scope.spawn(|| {
            let mut count: u64 = 0;
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                tap.write_at(&count.to_be_bytes(), count * 4096 % LEN, WriteFlags::NONE)?;
            }
            Ok::<u64, blockmirror_block::Error>(count)
        });
        // This guest never rests, so its writes go to both sides: the copy catches up whatever it does.
        let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
        let moved = move_over(&tap, &target, options);
        stop.store(true, Ordering::Relaxed);
        let count = guest.join().map_err(|_| "the guest panicked")??;
        moved?;
        let mut last = [0; 8];
        target.read_at(&mut last, count * 4096 % LEN)?;
        assert_eq!(u64::from_be_bytes(last), count, "the last write is on the new disk");
        println!("{count} writes, none lost; now on {:?}", tap.device().name());
        Ok(())
    })
}

fn move_over(
    tap: &Arc<Tap>,
    target: &Arc<MemoryDisk>,
    options: MirrorOptions,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let job = MirrorJob::attach(tap, Arc::clone(target) as _, options)?;
    while let Some(event) = job.control().next_event(None) {
        println!("{event:?}");
        if event == Event::Ready {
            job.control().complete()?;
        }
    }
    job.wait()?;
    Ok(())
}
