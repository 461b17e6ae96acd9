//! Persistent bitmaps of a node onto which a mirror or a commit pivots: those of the same name join in
//! memory, so on disk they are in use until they are stored.

use super::*;

/// One that the image `d` stores, disabled, with the first block of 64 KiB; and the other one of that name, a
/// guest's, with block 5.
fn two_of_one_name(client: &mut Client, way: &str) {
    client.image("d", 1, None);
    client.image("s", 2, (way == "commit").then_some("d"));
    client.add("d", "d", Value::Null);
    let bitmap = |node: &str, persistent: bool| json!({"node": node, "name": "b", "granularity": 65536, "persistent": persistent});
    client.run("block-dirty-bitmap-add", bitmap("d", true));
    client.guest_write("d", 0);
    client.bitmap("disable", "d", "b").unwrap();
    // Stored so.
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.add("d", "d", Value::Null);
    client.add("s", "s", if way == "commit" { json!("d") } else { Value::Null });
    client.run("block-dirty-bitmap-add", bitmap("s", false));
    client.guest_write("s", 5);
}

fn start(client: &mut Client, way: &str) {
    match way {
        "mirror" => client
            .run("blockdev-mirror", json!({"job-id": "j", "device": "s", "target": "d", "sync": "full"})),
        _ => client.run("block-commit", json!({"job-id": "j", "device": "s"})),
    };
    client.wait("BLOCK_JOB_READY");
}

impl Client {
    /// The bitmaps in what a kill would leave of the image `d`: name, whether persistent, inconsistent.
    fn after_a_kill(&mut self) -> Vec<(String, [bool; 2])> {
        std::fs::copy(self.path("d"), self.path("killed")).unwrap();
        self.add("k", "killed", Value::Null);
        let found = self.bitmaps_of("k");
        self.run("blockdev-del", json!({"node-name": "k"}));
        let mut found: Vec<_> =
            found.into_iter().map(|(name, _, flags)| (name, [flags[1], flags[2]])).collect();
        found.sort();
        found
    }
}

fn inconsistent(names: &[&str]) -> Vec<(String, [bool; 2])> {
    names.iter().map(|name| ((*name).to_owned(), [true, true])).collect()
}

/// What the joined bitmap has was on disk only when the node was closed. After a kill before that the stored
/// one was consistent, and had nothing of what the guest had written since its last backup.
#[test]
fn a_joined_bitmap_is_in_use_on_disk_until_it_is_stored() {
    for way in ["mirror", "commit"] {
        let mut client = Client::new();
        two_of_one_name(&mut client, way);
        assert_eq!(client.after_a_kill(), [("b".to_owned(), [true, false])], "{way}, before");
        start(&mut client, way);
        client.run("job-complete", json!({"id": "j"}));
        client.wait_for_status("null");
        assert_eq!(client.after_a_kill(), inconsistent(&["b"]), "{way}, after the pivot");
        // What changes it, or another one, changes nothing about that.
        let another = json!({"node": "d", "name": "c", "granularity": 65536, "persistent": true});
        client.run("block-dirty-bitmap-add", another);
        client.bitmap("remove", "d", "c").unwrap();
        client.bitmap("disable", "d", "b").unwrap();
        client.bitmap("enable", "d", "b").unwrap();
        client.guest_write("d", 7);
        assert_eq!(client.after_a_kill(), inconsistent(&["b"]), "{way}, changed");
        assert_eq!(client.bitmaps_of("d"), [("b".to_owned(), 3 * 65536, [true, true, false])], "{way}");
        client.run("blockdev-del", json!({"node-name": "s"}));
        client.run("blockdev-del", json!({"node-name": "d"}));
        client.add("d", "d", Value::Null);
        assert_eq!(client.bitmaps_of("d"), [("b".to_owned(), 3 * 65536, [true, true, false])], "{way}");
    }
}

/// The job had begun when there was nothing to be marked yet.
#[test]
fn so_is_one_that_is_added_or_put_back_while_the_job_runs() {
    for way in ["mirror", "commit"] {
        let mut client = Client::new();
        two_of_one_name(&mut client, way);
        start(&mut client, way);
        client.run("block-dirty-bitmap-add", json!({"node": "s", "name": "n", "granularity": 65536}));
        client.guest_write("s", 6);
        let new =
            json!({"node": "d", "name": "n", "granularity": 65536, "persistent": true, "disabled": true});
        client.run("block-dirty-bitmap-add", new);
        assert_eq!(client.after_a_kill(), inconsistent(&["b", "n"]), "{way}, added");
        let actions = json!([
            {"type": "block-dirty-bitmap-remove", "data": {"node": "d", "name": "b"}},
            {"type": "abort", "data": {}},
        ]);
        client.refused("transaction", json!({"actions": actions}));
        assert_eq!(client.after_a_kill(), inconsistent(&["b", "n"]), "{way}, put back");
        client.run("job-complete", json!({"id": "j"}));
        client.wait_for_status("null");
        assert_eq!(client.after_a_kill(), inconsistent(&["b", "n"]), "{way}, after the pivot");
        client.run("blockdev-del", json!({"node-name": "s"}));
        client.run("blockdev-del", json!({"node-name": "d"}));
        client.add("d", "d", Value::Null);
        let mut found = client.bitmaps_of("d");
        found.sort();
        let expected =
            [("b", 3), ("n", 1)].map(|(n, count)| (n.to_owned(), count * 65536, [true, true, false]));
        assert_eq!(found, expected, "{way}");
    }
}

/// A job that does not pivot leaves them as they were.
#[test]
fn after_a_cancelled_job_they_are_stored_as_they_were() {
    for way in ["mirror", "commit"] {
        let mut client = Client::new();
        two_of_one_name(&mut client, way);
        start(&mut client, way);
        client.run("block-job-cancel", json!({"device": "j", "force": true}));
        client.wait_for_status("null");
        assert_eq!(client.after_a_kill(), [("b".to_owned(), [true, false])], "{way}, cancelled");
        client.run("blockdev-del", json!({"node-name": "s"}));
        client.run("blockdev-del", json!({"node-name": "d"}));
        assert_eq!(client.after_a_kill(), [("b".to_owned(), [true, false])], "{way}");
        client.add("d", "d", Value::Null);
        assert_eq!(client.bitmaps_of("d"), [("b".to_owned(), 65536, [false, true, false])], "{way}");
    }
}

/// The mirror was held for the transaction, and never started.
#[test]
fn so_are_they_after_a_transaction_that_failed() {
    let mut client = Client::new();
    two_of_one_name(&mut client, "mirror");
    let mirror = json!({"job-id": "j", "device": "s", "target": "d", "sync": "full"});
    let actions = json!([{"type": "blockdev-mirror", "data": mirror}, {"type": "abort", "data": {}}]);
    client.refused("transaction", json!({"actions": actions}));
    assert_eq!(client.after_a_kill(), [("b".to_owned(), [true, false])]);
    assert_eq!(client.bitmaps_of("d"), [("b".to_owned(), 65536, [false, true, false])]);
}

/// Its users went on to another target, with the tap and all bitmaps: the image was closed with nothing to
/// store, and stayed marked.
#[test]
fn a_target_that_is_the_source_of_the_next_mirror_stores_them() {
    let mut client = Client::new();
    two_of_one_name(&mut client, "mirror");
    client.image("e", 3, None);
    client.add("e", "e", Value::Null);
    for (source, target) in [("s", "d"), ("d", "e")] {
        let mirror = json!({"job-id": "j", "device": source, "target": target, "sync": "full"});
        client.run("blockdev-mirror", mirror);
        client.wait("BLOCK_JOB_READY");
        client.run("job-complete", json!({"id": "j"}));
        client.wait_for_status("null");
        client.events.clear();
    }
    let stored = [("b".to_owned(), 2 * 65536, [true, true, false])];
    assert_eq!(client.bitmaps_of("d"), stored);
    client.run("blockdev-del", json!({"node-name": "d"}));
    assert_eq!(client.after_a_kill(), [("b".to_owned(), [true, false])]);
    client.add("d", "d", Value::Null);
    assert_eq!(client.bitmaps_of("d"), stored);
}

/// The image of the target has an inconsistent bitmap of the name that the guest's has. What was asked of the
/// guest's one was refused, and its removal took both.
#[test]
fn an_inconsistent_one_of_the_same_name_is_another() {
    for way in ["mirror", "commit"] {
        let mut client = Client::new();
        two_of_one_name(&mut client, way);
        start(&mut client, way);
        assert_eq!(client.after_a_kill(), inconsistent(&["b"]), "{way}, before");
        client.run("block-job-cancel", json!({"device": "j", "force": true}));
        client.wait_for_status("null");
        client.events.clear();
        client.run("blockdev-del", json!({"node-name": "s"}));
        client.run("blockdev-del", json!({"node-name": "d"}));
        std::fs::rename(client.path("killed"), client.path("d")).unwrap();
        client.add("d", "d", Value::Null);
        client.add("s", "s", if way == "commit" { json!("d") } else { Value::Null });
        client.run("block-dirty-bitmap-add", json!({"node": "s", "name": "b", "granularity": 65536}));
        client.guest_write("s", 5);
        start(&mut client, way);
        client.run("job-complete", json!({"id": "j"}));
        client.wait_for_status("null");
        let (of_guest, of_image) = ([true, false, false], [false, true, true]);
        let both = |bits| [("b".to_owned(), bits, of_guest), ("b".to_owned(), 0, of_image)];
        assert_eq!(client.bitmaps_of("d"), both(65536), "{way}, after the pivot");
        for verb in ["disable", "enable", "clear"] {
            client.bitmap(verb, "d", "b").unwrap();
        }
        let merge = json!({"node": "d", "target": "b", "bitmaps": ["b"]});
        client.run("block-dirty-bitmap-merge", merge);
        assert_eq!(client.bitmaps_of("d"), both(0), "{way}, cleared");
        for left in [vec![("b".to_owned(), 0, of_image)], vec![]] {
            client.bitmap("remove", "d", "b").unwrap();
            assert_eq!(client.bitmaps_of("d"), left, "{way}");
        }
        client.bitmap("remove", "d", "b").unwrap_err();
    }
}
