//! What a tap costs a request: nanoseconds more than the same request to the disk itself.
//!
//! `cargo run --release -p blockmirror-mirror --example tap_cost`

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use blockmirror_block::{
    self as block, BlockDevice, ByteRange, Extent, Geometry, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::Tap;

/// Few enough for a thread to do them undisturbed on a busy machine now and then.
const ROUNDS: u32 = 20_000;
const REPEATS: u32 = 500;

/// A disk that does nothing, so that what is left is the way to it.
#[derive(Debug)]
struct Nothing;

impl BlockDevice for Nothing {
    fn len(&self) -> u64 {
        1 << 40
    }

    fn name(&self) -> &str {
        "nothing"
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> block::Result<()> {
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> block::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> block::Result<()> {
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> block::Result<()> {
        Ok(())
    }

    fn flush(&self) -> block::Result<()> {
        Ok(())
    }

    fn extents(&self, _: ByteRange, _: &mut dyn FnMut(Extent) -> Visit) -> block::Result<()> {
        Ok(())
    }
}

/// Nanoseconds per request and thread while `threads` of them do nothing else; the best of some tries.
fn cost(disk: &dyn BlockDevice, threads: usize, write: bool) -> f64 {
    let one = |start: &Barrier| {
        let mut buf = [0; 512];
        start.wait();
        let begun = Instant::now();
        for i in 0..u64::from(ROUNDS) {
            let done = if write {
                disk.write_at(&buf, i * 512, WriteFlags::NONE)
            } else {
                disk.read_at(&mut buf, i * 512)
            };
            assert!(done.is_ok());
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
    };
    let try_once = |_| {
        let start = Barrier::new(threads);
        thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(|| one(&start))).collect();
            running.into_iter().filter_map(|thread| thread.join().ok()).fold(0.0, f64::max)
        })
    };
    (0..REPEATS).map(try_once).fold(f64::INFINITY, f64::min)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let disk: Arc<dyn BlockDevice> = Arc::new(Nothing);
    let idle = Tap::new(Arc::clone(&disk));
    let watched = Tap::new(Arc::clone(&disk));
    watched.add_bitmap("b", 65_536)?;
    println!("{:<10} {:>8} {:>10} {:>10} {:>12}", "request", "threads", "no tap", "idle tap", "with bitmap");
    for (name, write) in [("read", false), ("write", true)] {
        for threads in [1, 2] {
            let figures = [&*disk, &*idle, &*watched].map(|disk| cost(disk, threads, write));
            println!(
                "{name:<10} {threads:>8} {:>7.1} ns {:>7.1} ns {:>9.1} ns",
                figures[0], figures[1], figures[2]
            );
        }
    }
    Ok(())
}
