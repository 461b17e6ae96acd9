//! Persistent bitmaps: stored when a node is closed or gets an overlay, loaded when it is opened; after a
//! kill they are inconsistent.

mod pivoted;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_mirror::Tap;
use blockmirror_qcow2::{BitmapOptions, CreateOptions};
use blockmirror_testing::qemu::{have, run};

use super::*;
use crate::graph::StoredBitmaps;

impl Client {
    /// The dirty bitmaps of `node`: name, dirty bytes, and whether it is recording, persistent, inconsistent.
    fn bitmaps_of(&mut self, node: &str) -> Vec<(String, u64, [bool; 3])> {
        let nodes = self.run("query-named-block-nodes", json!({}));
        let found = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap();
        let bitmaps = found["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        let flag = |bitmap: &Value, name: &str| bitmap[name].as_bool().unwrap_or(false);
        let bitmap = |bitmap: &Value| {
            let flags = ["recording", "persistent", "inconsistent"].map(|name| flag(bitmap, name));
            (bitmap["name"].as_str().unwrap().to_owned(), bitmap["count"].as_u64().unwrap(), flags)
        };
        bitmaps.iter().map(bitmap).collect()
    }

    fn guest_write(&self, node: &str, block: u64) {
        let tap = Arc::clone(&self.daemon.services.context.graph.lock().find(node).unwrap().tap);
        tap.write_at(&[7; 65536], block << 16, WriteFlags::FUA).unwrap();
    }

    fn bitmap(&mut self, verb: &str, node: &str, name: &str) -> Result<Value, String> {
        self.ask(&format!("block-dirty-bitmap-{verb}"), json!({"node": node, "name": name}))
    }
}

const RECORDING: [bool; 3] = [true, true, false];

fn persistent(node: &str, name: &str) -> Value {
    json!({"node": node, "name": name, "granularity": 65536, "persistent": true})
}

#[test]
fn they_are_stored_at_close_and_loaded_at_open() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "p"));
    client.run("block-dirty-bitmap-add", json!({"node": "d", "name": "t", "granularity": 65536}));
    client.guest_write("d", 3);
    assert_eq!(client.bitmaps_of("d").len(), 2);
    client.run("blockdev-del", json!({"node-name": "d"}));
    if have("persistent bitmaps", &["qemu-img"]) {
        run("qemu-img", client.dir.path(), ["check", "-q", "d"]).unwrap();
    }
    client.add("d", "d", Value::Null);
    assert_eq!(client.bitmaps_of("d"), [("p".to_owned(), 65536, RECORDING)]);
    // It goes on where it was; what is done to it stays, too.
    client.guest_write("d", 5);
    client.bitmap("disable", "d", "p").unwrap();
    client.guest_write("d", 6);
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.add("d", "d", Value::Null);
    assert_eq!(client.bitmaps_of("d"), [("p".to_owned(), 2 * 65536, [false, true, false])]);
    client.bitmap("enable", "d", "p").unwrap();
    client.bitmap("clear", "d", "p").unwrap();
    client.guest_write("d", 7);
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.add("d", "d", Value::Null);
    assert_eq!(client.bitmaps_of("d"), [("p".to_owned(), 65536, RECORDING)]);
    let said = client.ask("block-dirty-bitmap-add", persistent("d", "p")).unwrap_err();
    assert_eq!(said, "Bitmap already exists: p");
    client.bitmap("remove", "d", "p").unwrap();
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.add("d", "d", Value::Null);
    assert_eq!(client.bitmaps_of("d"), []);
}

/// What a kill leaves is what is in the file while the node is open.
#[test]
fn after_a_kill_they_are_inconsistent_and_not_used() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "p"));
    client.guest_write("d", 3);
    std::fs::copy(client.path("d"), client.path("killed")).unwrap();
    client.add("k", "killed", Value::Null);
    assert_eq!(client.bitmaps_of("k"), [("p".to_owned(), 0, [false, true, true])]);
    let said = "Bitmap 'p' is inconsistent and cannot be used";
    for verb in ["enable", "disable", "clear"] {
        assert_eq!(client.bitmap(verb, "k", "p").unwrap_err(), said);
    }
    client.bitmap("remove", "k", "p").unwrap();
    assert_eq!(client.bitmap("remove", "k", "p").unwrap_err(), "Dirty bitmap 'p' not found");
    client.run("block-dirty-bitmap-add", persistent("k", "p"));
    assert_eq!(client.bitmaps_of("k"), [("p".to_owned(), 0, RECORDING)]);
}

/// An enabled bitmap that was disabled in the image, and one that others were merged into, must not look
/// consistent without those writes after a kill.
#[test]
fn what_is_done_to_them_survives_a_kill_or_makes_them_inconsistent() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    let mut disabled = persistent("d", "p");
    disabled["disabled"] = true.into();
    client.run("block-dirty-bitmap-add", disabled);
    client.run("block-dirty-bitmap-add", json!({"node": "d", "name": "t", "granularity": 65536}));
    client.guest_write("d", 2);
    client.run("block-dirty-bitmap-merge", json!({"node": "d", "target": "p", "bitmaps": ["t"]}));
    std::fs::copy(client.path("d"), client.path("merged")).unwrap();
    client.add("m", "merged", Value::Null);
    assert_eq!(client.bitmaps_of("m"), [("p".to_owned(), 65536, [false, true, false])]);
    client.bitmap("enable", "d", "p").unwrap();
    client.guest_write("d", 3);
    std::fs::copy(client.path("d"), client.path("enabled")).unwrap();
    client.add("e", "enabled", Value::Null);
    assert_eq!(client.bitmaps_of("e"), [("p".to_owned(), 0, [false, true, true])]);
}

#[test]
fn at_a_snapshot_they_stay_with_the_node_and_are_stored_there() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "p"));
    client.guest_write("d", 3);
    let file = client.path("o");
    client.run(
        "blockdev-snapshot-sync",
        json!({"node-name": "d", "snapshot-file": file, "snapshot-node-name": "o"}),
    );
    assert_eq!(client.bitmaps_of("o"), []);
    assert_eq!(client.bitmaps_of("d"), [("p".to_owned(), 65536, RECORDING)]);
    std::fs::copy(client.path("d"), client.path("stored")).unwrap();
    client.add("s", "stored", Value::Null);
    assert_eq!(client.bitmaps_of("s"), [("p".to_owned(), 65536, RECORDING)]);
}

#[test]
fn what_cannot_hold_them_is_refused() {
    let mut client = Client::new();
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    let said = client.ask("block-dirty-bitmap-add", persistent("n", "p")).unwrap_err();
    assert_eq!(said, "Can't store persistent bitmaps to n: Operation not supported");
    assert_eq!(client.bitmaps_of("n"), []);
}

#[test]
fn a_transaction_that_fails_leaves_them_as_they_were() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "old"));
    client.guest_write("d", 3);
    let actions = json!([
        {"type": "block-dirty-bitmap-add", "data": persistent("d", "new")},
        {"type": "block-dirty-bitmap-remove", "data": {"node": "d", "name": "old"}},
        {"type": "abort", "data": {}},
    ]);
    client.ask("transaction", json!({"actions": actions})).unwrap_err();
    assert_eq!(client.bitmaps_of("d"), [("old".to_owned(), 65536, RECORDING)]);
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.add("d", "d", Value::Null);
    assert_eq!(client.bitmaps_of("d"), [("old".to_owned(), 65536, RECORDING)]);
}

/// It was gone.
#[test]
fn an_inconsistent_one_that_a_failed_transaction_has_removed_is_there_again() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "p"));
    client.guest_write("d", 3);
    std::fs::copy(client.path("d"), client.path("killed")).unwrap();
    client.add("k", "killed", Value::Null);
    let before = client.bitmaps_of("k");
    assert_eq!(before, [("p".to_owned(), 0, [false, true, true])]);
    let actions = json!([
        {"type": "block-dirty-bitmap-remove", "data": {"node": "k", "name": "p"}},
        {"type": "block-dirty-bitmap-add", "data": persistent("k", "p")},
        {"type": "abort", "data": {}},
    ]);
    client.ask("transaction", json!({"actions": actions})).unwrap_err();
    assert_eq!(client.bitmaps_of("k"), before);
    client.guest_write("k", 4);
    client.run("blockdev-del", json!({"node-name": "k"}));
    if have("persistent bitmaps", &["qemu-img"]) {
        run("qemu-img", client.dir.path(), ["check", "-q", "killed"]).unwrap();
    }
    client.add("k", "killed", Value::Null);
    assert_eq!(client.bitmaps_of("k"), before);
}

/// They were changed in memory only, and the image looked consistent without it.
#[test]
fn those_of_a_node_that_is_read_only_are_not_changed() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "p"));
    client.run("block-dirty-bitmap-add", json!({"node": "d", "name": "t", "granularity": 65536}));
    client.guest_write("d", 3);
    let file = client.path("o");
    client.run(
        "blockdev-snapshot-sync",
        json!({"node-name": "d", "snapshot-file": file, "snapshot-node-name": "o"}),
    );
    let said = "Bitmap 'p' is readonly and cannot be modified";
    let before = client.bitmaps_of("d");
    for verb in ["enable", "disable", "clear", "remove"] {
        assert_eq!(client.bitmap(verb, "d", "p").unwrap_err(), said, "{verb}");
        let data = json!({"node": "d", "name": "p"});
        let actions = json!([{"type": format!("block-dirty-bitmap-{verb}"), "data": data}]);
        assert_eq!(client.ask("transaction", json!({"actions": actions})).unwrap_err(), said, "{verb}");
    }
    let merge = |target: &str, other: &str| json!({"node": "d", "target": target, "bitmaps": [other]});
    assert_eq!(client.ask("block-dirty-bitmap-merge", merge("p", "t")).unwrap_err(), said);
    assert_eq!(client.bitmaps_of("d"), before);
    // One that the image does not store is in memory only.
    client.bitmap("clear", "d", "t").unwrap();
    client.run("block-dirty-bitmap-merge", merge("t", "p"));
}

/// The snapshot had stored them as the transaction had made them, and what was undone was undone in memory
/// only.
#[test]
fn what_a_failed_transaction_with_a_snapshot_undoes_is_undone_in_the_image() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    client.run("block-dirty-bitmap-add", persistent("d", "cleared"));
    client.run("block-dirty-bitmap-add", persistent("d", "disabled"));
    client.guest_write("d", 3);
    client.bitmap("disable", "d", "cleared").unwrap();
    let one = |name: &str| json!({"node": "d", "name": name});
    let file = client.path("o");
    let overlay = json!({"node-name": "d", "snapshot-file": file, "snapshot-node-name": "o"});
    let actions = json!([
        {"type": "block-dirty-bitmap-clear", "data": one("cleared")},
        {"type": "block-dirty-bitmap-disable", "data": one("disabled")},
        {"type": "blockdev-snapshot-sync", "data": overlay},
        {"type": "abort", "data": {}},
    ]);
    client.ask("transaction", json!({"actions": actions})).unwrap_err();
    client.guest_write("d", 5);
    std::fs::copy(client.path("d"), client.path("killed")).unwrap();
    client.add("k", "killed", Value::Null);
    let expected = [
        ("cleared".to_owned(), 65536, [false, true, false]),
        ("disabled".to_owned(), 0, [false, true, true]),
    ];
    let mut found = client.bitmaps_of("k");
    found.sort();
    assert_eq!(found, expected);
}

/// Storing the bits of a node's bitmap fails at each write and each flush: the image keeps the bitmap.
#[test]
fn a_failed_store_loses_no_bitmap() {
    let mut failed = 0;
    for kind in [OpKind::Write, OpKind::Flush] {
        for nth in 0.. {
            let storage = Arc::new(MemoryStorage::new());
            CreateOptions::new(1 << 20).create(&*storage, None).unwrap();
            let faults = Faults::new();
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone()));
            let image = Arc::new(blockmirror_qcow2::OpenOptions::new().writable(true).open(faulty).unwrap());
            image.add_bitmap("p", &BitmapOptions::new()).unwrap();
            let tap = Tap::new(Arc::clone(&image) as _);
            let mut bits = image.read_bitmap("p").unwrap();
            bits.set(0..65536);
            tap.adopt_bitmap("p", bits.clone(), true).unwrap();
            faults.inject(Fault::on(kind).after(nth));
            let stored = StoredBitmaps { tap, image }.store();
            let reader = blockmirror_qcow2::OpenOptions::new().open(storage).unwrap();
            let names: Vec<_> =
                reader.bitmaps().unwrap().into_iter().map(|entry| entry.name.to_string()).collect();
            assert_eq!(names, ["p"], "{kind:?} {nth}");
            if faults.failed() == 0 {
                stored.unwrap();
                assert_eq!(reader.read_bitmap("p").unwrap(), bits);
                break;
            }
            failed += 1;
        }
    }
    assert!(failed > 4, "only {failed} failures");
}
