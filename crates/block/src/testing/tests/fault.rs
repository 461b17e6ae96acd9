//! Faults hit what they were aimed at, and gates hold.

use std::sync::Arc;
use std::thread;

use crate::Visit;
use crate::storage::Storage;
use crate::testing::{Done, Fault, FaultDisk, FaultStorage, Faults, MemoryDisk, MemoryStorage, OpKind};
use crate::{BlockDevice, WriteFlags, ZeroFlags};
use crate::{ByteRange, ErrorKind};

fn disk() -> (Arc<MemoryDisk>, FaultDisk, Faults) {
    let memory = Arc::new(MemoryDisk::new(1 << 20).named("inner"));
    let faults = Faults::new();
    (Arc::clone(&memory), FaultDisk::new(memory, faults.clone()), faults)
}

#[test]
fn the_nth_operation_fails_once_or_for_ever() {
    let (_, disk, faults) = disk();
    faults.inject(Fault::on(OpKind::Write).after(1).with(ErrorKind::NoSpace));
    let results: Vec<_> =
        (0..4).map(|i| disk.write_at(&[1], i, WriteFlags::NONE).map_err(|e| e.kind())).collect();
    assert_eq!(results, [Ok(()), Err(ErrorKind::NoSpace), Ok(()), Ok(())]);

    faults.inject(Fault::on(OpKind::Read).forever());
    assert!(disk.read_at(&mut [0], 0).is_err() && disk.read_at(&mut [0], 0).is_err());
    disk.flush().unwrap();
    faults.heal();
    disk.read_at(&mut [0], 0).unwrap();
    assert_eq!((faults.seen(OpKind::Write), faults.seen(OpKind::Read), faults.seen(OpKind::Any)), (4, 3, 8));
    assert_eq!(faults.failed(), 3);
}

#[test]
fn only_operations_in_the_range_fail_and_the_error_says_where() {
    let (_, disk, faults) = disk();
    faults.inject(Fault::on(OpKind::Any).within(ByteRange::new(512, 1024)).forever());
    disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    disk.discard(ByteRange::new(1024, 2048)).unwrap();
    let error = disk.write_zeroes(ByteRange::new(1000, 2000), ZeroFlags::NONE).unwrap_err();
    assert_eq!(error.to_string(), "write zeroes: inner at 1000: injected fault");
    assert!(disk.extents(ByteRange::new(0, 4096), &mut |_| Visit::Continue(())).is_err());
}

#[test]
fn a_failed_write_may_have_happened_in_part() {
    let (memory, disk, faults) = disk();
    faults.inject(Fault::on(OpKind::Write).having_done(Done::Half));
    assert!(disk.write_at(&[1; 2048], 100, WriteFlags::NONE).is_err());
    let bytes = memory.contents().unwrap();
    // Half of it ends inside a sector; whole sectors are written.
    assert!(bytes[100..1024].iter().all(|b| *b == 1) && bytes[1024..].iter().all(|b| *b == 0));
    faults.inject(Fault::on(OpKind::Discard).having_done(Done::Everything));
    assert!(disk.discard(ByteRange::new(0, 4096)).is_err());
    assert_eq!(memory.allocated_bytes(), 0);
}

#[test]
fn after_a_failed_flush_no_flush_of_a_storage_succeeds() {
    let faults = Faults::new();
    let storage = FaultStorage::new(Arc::new(MemoryStorage::new()), faults.clone());
    faults.inject(Fault::on(OpKind::Flush));
    assert_eq!(storage.flush().unwrap_err().kind(), ErrorKind::Io);
    faults.heal();
    assert_eq!(storage.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    storage.write_at(&[1], 0).unwrap();
    assert_eq!(storage.len().unwrap(), 1);
}

#[test]
fn a_gate_holds_what_it_was_set_for_and_nothing_else() {
    let (memory, disk, faults) = disk();
    let gate = faults.hold(OpKind::Write, Some(ByteRange::new(0, 4096)));
    thread::scope(|s| {
        let held = s.spawn(|| disk.write_at(&[7], 0, WriteFlags::NONE));
        gate.wait_held(1);
        disk.write_at(&[8], 8192, WriteFlags::NONE).unwrap();
        assert_eq!((memory.contents().unwrap()[0], memory.contents().unwrap()[8192]), (0, 8));
        gate.open();
        held.join().unwrap().unwrap();
    });
    assert_eq!(memory.contents().unwrap()[0], 7);
    assert_eq!(gate.held(), 0);
    disk.write_at(&[9], 1, WriteFlags::NONE).unwrap();
}

#[test]
fn cancelling_sends_held_operations_away() {
    let (memory, disk, faults) = disk();
    let gate = faults.hold(OpKind::Read, None);
    thread::scope(|s| {
        let held = s.spawn(|| disk.read_at(&mut [0], 0));
        gate.wait_held(1);
        disk.cancel_in_flight();
        assert_eq!(held.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    });
    drop(gate);
    disk.read_at(&mut [0], 0).unwrap();
    assert_eq!(memory.allocated_bytes(), 0);
}
