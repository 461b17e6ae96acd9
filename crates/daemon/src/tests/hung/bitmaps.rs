//! Storing bitmaps beside what hangs or fails.

use blockmirror_block::testing::{Fault, FaultStorage, Faults, OpKind};
use blockmirror_block::{ErrorKind, cancel};
use blockmirror_mirror::Tap;
use blockmirror_qcow2::{BitmapOptions, OpenOptions};
use blockmirror_testing::eventually;

use super::*;
use crate::graph::StoredBitmaps;

/// A snapshot held the guest for as long as a read hung.
#[test]
fn bitmaps_are_not_stored_while_a_read_hangs() {
    let client = Client::new();
    client.image("d", 1, None);
    let hung = Hung::holding(&std::fs::read(client.path("d")).unwrap());
    let image = Arc::new(OpenOptions::new().writable(true).open(Arc::clone(&hung) as _).unwrap());
    image.add_bitmap("p", &BitmapOptions::new()).unwrap();
    // What leads to the block is in memory.
    image.read_at(&mut [0; 512], 1 << 16).unwrap();
    let tap = Tap::new(Arc::clone(&image) as _);
    hung.set_free(false);
    let reader = {
        let image = Arc::clone(&image);
        std::thread::spawn(move || image.read_at(&mut [0; 512], 1 << 16))
    };
    hung.wait_for_caller();
    let (stored, is_stored) = mpsc::channel();
    let bitmaps = StoredBitmaps { tap, image };
    std::thread::spawn(move || {
        let result = bitmaps.store_within(Duration::ZERO);
        let _ = stored.send((result, cancel::is_cancelled()));
    });
    let (result, is_cancelled) = is_stored.recv_timeout(GUARD).expect("it waits for the read");
    assert_eq!(result.unwrap_err().desc, "A read does not end: bitmaps were not stored");
    assert!(!is_cancelled, "what its thread does next is not");
    hung.set_free(true);
    reader.join().unwrap().unwrap();
}

/// The image tried once more when its last user dropped it, and waited as long as it took.
#[test]
fn what_could_not_be_stored_at_the_close_is_not_tried_again() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add_file("f");
    let faults = Faults::new();
    {
        let mut graph = client.daemon.services.context.graph.lock();
        let storage = Hung::holding(&std::fs::read(client.path("d")).unwrap());
        graph.get_mut("f").unwrap().storage = Some(Arc::new(FaultStorage::new(storage, faults.clone())));
    }
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "d", "file": "f"}));
    client.run("block-dirty-bitmap-add", json!({"node": "d", "name": "p", "persistent": true}));
    let (image, tap) = {
        let graph = client.daemon.services.context.graph.lock();
        let node = graph.find("d").unwrap();
        (node.qcow2.clone().unwrap(), Arc::clone(&node.tap))
    };
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::FUA).unwrap();
    drop(tap);
    faults.inject(Fault::on(OpKind::Write).with(ErrorKind::NoSpace).forever());
    client.run("blockdev-del", json!({"node-name": "d"}));
    assert!(faults.failed() > 0);
    // The thread that flushed may hold it for a moment.
    eventually("the last user", || Arc::strong_count(&image) == 1);
    let seen = faults.seen(OpKind::Any);
    drop(image);
    assert_eq!(faults.seen(OpKind::Any), seen);
}
