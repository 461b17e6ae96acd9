//! Snapshots inside of an image, in the words of qemu-storage-daemon.

use blockmirror_testing::qemu::{have, run};

use super::*;

#[test]
fn internal_snapshots_are_taken_and_deleted() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    let take = |name: &str| json!({"device": "d", "name": name});
    client.run("blockdev-snapshot-internal-sync", take("s"));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("d").unwrap().tap);
    tap.write_at(&[9; 65536], 1 << 16, WriteFlags::FUA).unwrap();
    let said = client.refused("blockdev-snapshot-internal-sync", take("s"));
    assert_eq!(said, "Snapshot with name 's' already exists on device 'd'");
    assert_eq!(client.refused("blockdev-snapshot-internal-sync", take("")), "Name is empty");
    let node = json!({"device": "x", "name": "s"});
    let said = client.refused("blockdev-snapshot-internal-sync", node);
    assert_eq!(said, "Cannot find device='x' nor node-name='x'");
    client.run("blockdev-snapshot-internal-sync", take("t"));
    let said = client.refused("blockdev-snapshot-delete-internal-sync", json!({"device": "d"}));
    assert_eq!(said, "Name or id must be provided");
    let other = json!({"device": "d", "id": "9", "name": "s"});
    let said = client.refused("blockdev-snapshot-delete-internal-sync", other);
    assert_eq!(said, "Snapshot with id '9' and name 's' does not exist on device 'd'");
    let gone = client.run("blockdev-snapshot-delete-internal-sync", take("t"));
    assert_eq!((&gone["id"], &gone["name"], &gone["vm-state-size"]), (&json!("2"), &json!("t"), &json!(0)));
    drop(tap);
    client.run("blockdev-del", json!({"node-name": "d"}));
    if have("internal snapshots", &["qemu-img", "qemu-io"]) {
        let dir = client.dir.path();
        run("qemu-img", dir, ["check", "-q", "d"]).unwrap();
        run("qemu-img", dir, ["snapshot", "-q", "-a", "s", "d"]).unwrap();
        run("qemu-io", dir, ["-c", "read -P 1 64k 64k", "d"]).unwrap();
    }
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    let said = client.refused("blockdev-snapshot-internal-sync", json!({"device": "n", "name": "s"}));
    assert_eq!(said, "Block format 'null-co' used by device 'n' does not support internal snapshots");
}

/// The names of the snapshots in the image of `d`.
fn names(client: &Client) -> Vec<String> {
    let graph = client.daemon.services.context.graph.lock();
    let image = graph.find("d").unwrap().qcow2.clone().unwrap();
    image.snapshots().unwrap().into_iter().map(|snapshot| snapshot.name).collect()
}

fn action(name: &str) -> Value {
    json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "d", "name": name}})
}

#[test]
fn a_transaction_takes_them_or_leaves_none() {
    let mut client = Client::new();
    client.image("d", 1, None);
    client.add("d", "d", Value::Null);
    let overlay = json!({
        "node-name": "d", "snapshot-file": client.path("o"), "snapshot-node-name": "o",
    });
    let overlay = json!({"type": "blockdev-snapshot-sync", "data": overlay});
    let bitmap = json!({"node": "d", "name": "p", "persistent": true});
    let bitmap = json!({"type": "block-dirty-bitmap-add", "data": bitmap});
    let abort = json!({"type": "abort", "data": {}});
    for (actions, said) in [
        (json!([action("s"), abort]), "Transaction aborted using Abort action"),
        (json!([action("s"), bitmap, overlay, abort]), "Transaction aborted using Abort action"),
        (json!([action("s"), action("s")]), "Snapshot with name 's' already exists on device 'd'"),
        (json!([action("s"), overlay, action("t")]), "Need a root block node"),
        (json!([action("s"), action("")]), "Name is empty"),
    ] {
        assert_eq!(client.refused("transaction", json!({"actions": actions})), said);
        assert_eq!(names(&client), [""; 0]);
    }
    let grouped = json!({"actions": [action("s")], "properties": {"completion-mode": "grouped"}});
    assert_eq!(
        client.refused("transaction", grouped),
        "Action 'blockdev-snapshot-internal-sync' does not support transaction property completion-mode = \
         grouped"
    );
    client.run("transaction", json!({"actions": [action("s"), bitmap, action("t"), overlay]}));
    assert_eq!(names(&client), ["s", "t"]);
    client.run("blockdev-del", json!({"node-name": "o"}));
    client.run("blockdev-del", json!({"node-name": "d"}));
    if have("internal snapshots", &["qemu-img"]) {
        let dir = client.dir.path();
        run("qemu-img", dir, ["check", "-q", "d"]).unwrap();
        run("qemu-img", dir, ["snapshot", "-q", "-d", "t", "d"]).unwrap();
    }
}
