//! Clusters that share blocks with another file: at each crash a byte is old or new, and a clone that fails
//! leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{
    BlockDevice, ByteRange, CloneUnits, ErrorKind, HostRun, Storage, WriteFlags, ZeroFlags,
};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2, check};

const K: u64 = 1024;
const LEN: u64 = 128 * K;

/// A file whose bytes tell where they are, and are never zero.
fn source() -> HostRun {
    let bytes: Vec<u8> = (0..LEN).map(|at| (at / 512) as u8 | 1).collect();
    HostRun { storage: Arc::new(MemoryStorage::with_contents(&bytes)), offset: 0 }
}

fn from(run: &HostRun, offset: u64) -> HostRun {
    HostRun { storage: Arc::clone(&run.storage), offset }
}

fn contents(image: &Qcow2) -> Vec<u8> {
    let mut all = vec![0; LEN as usize];
    image.read_at(&mut all, 0).unwrap();
    all
}

fn new_image(storage: &Arc<RecordingStorage>, cluster: u64, extended: bool) -> Qcow2 {
    let mut options = CreateOptions::new(LEN);
    (options.cluster_size, options.extended_l2) = (cluster, extended);
    options.create(&**storage, None).unwrap();
    storage.flush().unwrap();
    OpenOptions::new().writable(true).open(Arc::clone(storage) as _).unwrap()
}

#[test]
fn whole_clusters_are_cloned_and_no_others() {
    let storage = Arc::new(RecordingStorage::default());
    let image = new_image(&storage, 16 * K, false);
    let run = source();
    assert_eq!(image.clone_units(&*run.storage), Some(CloneUnits { device: 16 * K, file: 4096 }));
    for (offset, len) in [(512, 16 * K), (0, 4096), (16 * K, 20 * K)] {
        let refused = image.clone_range(offset, &run, len).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
    }
    let outside = image.clone_range(LEN - 16 * K, &run, 32 * K).unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::OutOfBounds);
    assert!(contents(&image).iter().all(|byte| *byte == 0));
    assert_eq!(image.clone_range(16 * K, &from(&run, 4096), 32 * K).unwrap(), 1);
    let mut want = vec![0; LEN as usize];
    run.storage.read_at(&mut want[16 << 10..48 << 10], 4096).unwrap();
    assert!(contents(&image) == want);
    // A block of the file system holds several of these.
    let small = new_image(&Arc::new(RecordingStorage::default()), 2048, false);
    assert_eq!(small.clone_units(&*run.storage), None);
}

#[test]
fn each_crash_leaves_old_bytes_or_new_ones() {
    for (cluster, extended) in [(4096, false), (16 * K, false), (16 * K, true)] {
        let storage = Arc::new(RecordingStorage::default());
        let image = new_image(&storage, cluster, extended);
        let run = source();
        let begun = storage.position();
        // What the disk shows after each step, and where in the log; the steps that ended with a flush.
        let mut seen = vec![(begun, contents(&image), true)];
        let step = |number: usize| match number {
            0 => image.clone_range(0, &run, 64 * K).map(drop),
            1 => image.write_at(&[0xff; 5000], 3000, WriteFlags::NONE),
            // Over clusters that are there, and some that are not.
            3 => image.clone_range(32 * K, &from(&run, 4096), 64 * K).map(drop),
            4 => image.write_zeroes(ByteRange::new(0, 48 * K), ZeroFlags::MAY_UNMAP),
            6 => image.clone_range(16 * K, &from(&run, 64 * K), 16 * K).map(drop),
            _ => image.flush(),
        };
        for number in 0..8 {
            step(number).unwrap();
            seen.push((storage.position(), contents(&image), matches!(number, 2 | 5 | 7)));
        }
        drop(image);
        for (number, point) in storage.crash_points().enumerate() {
            let at = point.position();
            if at < begun {
                continue;
            }
            // The last state that a flush has made durable, and all from there to the step at hand.
            let durable = seen.iter().rposition(|(position, _, flush)| *flush && *position <= at).unwrap();
            let last = seen.iter().position(|(position, ..)| *position >= at).unwrap_or(seen.len() - 1);
            let left = Arc::new(point.storage());
            if number % 8 == 0 {
                assert_eq!(check(&*left, &mut ()).unwrap().corruptions, 0, "{cluster}: {point}");
            }
            let found = contents(&OpenOptions::new().open(left).unwrap());
            for (i, byte) in found.iter().enumerate() {
                let allowed = seen[durable..=last].iter().any(|(_, state, _)| state[i] == *byte);
                assert!(allowed, "{cluster}: {point}: byte {i} is {byte:#x}");
            }
        }
    }
}

#[test]
fn a_clone_that_fails_maps_nothing_and_leaks_nothing() {
    for (kind, done) in [(ErrorKind::Unsupported, Done::Nothing), (ErrorKind::NoSpace, Done::Everything)] {
        let storage = Arc::new(RecordingStorage::default());
        drop(new_image(&storage, 4096, false));
        let faults = Faults::new();
        let faulty = Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone()));
        let image = OpenOptions::new().writable(true).open(faulty).unwrap();
        image.write_at(&[7; 4096], 0, WriteFlags::NONE).unwrap();
        let before = contents(&image);
        faults.inject(Fault::on(OpKind::Clone).with(kind).refused().having_done(done));
        let error = image.clone_range(4096, &source(), 32 * K).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(contents(&image) == before, "{kind:?}");
        // Its place is free for the copy that follows.
        let bytes = vec![9; 32 << 10];
        image.write_at(&bytes, 4096, WriteFlags::NONE).unwrap();
        image.flush().unwrap();
        drop(image);
        let report = check(&storage.snapshot(), &mut ()).unwrap();
        assert!(report.is_clean() && report.allocated_clusters == 9, "{kind:?}: {report:?}");
    }
}
