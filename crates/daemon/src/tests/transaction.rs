//! Transactions that fail: nothing of them is left.

use serde_json::json;

use super::*;

/// Nodes a and b, c and d, alike in pairs.
fn two_pairs(client: &mut Client) {
    for (index, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let file = format!("{name}.qcow2");
        client.image(&file, u8::try_from(index).unwrap() + 1, None);
        client.add(name, &file, Value::Null);
    }
}

fn mirror(id: &str, device: &str, target: &str, copy_mode: &str) -> Value {
    let data =
        json!({"job-id": id, "device": device, "target": target, "sync": "full", "copy-mode": copy_mode});
    json!({"type": "blockdev-mirror", "data": data})
}

fn impossible() -> Value {
    let data = json!({"job-id": "k", "device": "c", "target": "d", "sync": "incremental", "bitmap": "none"});
    json!({"type": "blockdev-mirror", "data": data})
}

/// The first mirror ran when the second was refused, and went only after the refusal: its name was taken for
/// a while, and clients got events of a job whose start had been refused.
#[test]
fn mirrors_that_were_not_all_started_are_none() {
    let mut client = Client::new();
    two_pairs(&mut client);
    for _ in 0..8 {
        let actions = json!([mirror("j", "a", "b", "background"), impossible()]);
        assert_eq!(client.refused("transaction", json!({"actions": actions})), "c has no bitmap \"none\"");
        assert_eq!(client.run("query-jobs", json!({})), json!([]));
        assert_eq!(client.events, Vec::<Value>::new());
    }
    // Nothing was copied.
    assert_eq!(client.blocks("b"), [2]);
    client.run("transaction", json!({"actions": [mirror("j", "a", "b", "background")]}));
    client.wait("BLOCK_JOB_READY");
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for_status("null");
    assert_eq!(client.blocks("b"), [1]);
}

/// While the first mirror was still going the snapshot below it was taken back in the graph only: the tap
/// went on writing to the overlay, which was closed and removed, and every write of the guest failed from
/// then on.
#[test]
fn a_snapshot_below_a_mirror_is_taken_back() {
    let mut client = Client::new();
    two_pairs(&mut client);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("a").unwrap().tap);
    let path = client.path("snap.qcow2");
    for (round, copy_mode) in ["background", "write-blocking"].into_iter().cycle().take(8).enumerate() {
        let snapshot = json!({"node-name": "a", "snapshot-file": path, "snapshot-node-name": "snap"});
        let snapshot = json!({"type": "blockdev-snapshot-sync", "data": snapshot});
        let actions = json!([snapshot, mirror("j", "snap", "b", copy_mode), impossible()]);
        client.refused("transaction", json!({"actions": actions}));
        assert!(!path.exists());
        assert!(client.daemon.services.context.graph.lock().get("snap").is_none());
        let byte = u8::try_from(round).unwrap() + 10;
        tap.write_at(&[byte; 65536], 1 << 16, WriteFlags::NONE).unwrap();
        assert_eq!(client.blocks("a"), [byte]);
    }
    assert_eq!(client.events, Vec::<Value>::new());
}
