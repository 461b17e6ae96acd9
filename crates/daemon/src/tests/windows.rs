//! What other clients and jobs do between two steps of a command: the second step finds another graph than
//! the first. The steps are called one by one.

use super::*;
use crate::driver::Inherited;

/// A refresh that had looked the node up before a snapshot put the guest back on the frozen node.
#[test]
fn a_late_refresh_leaves_the_guest_on_its_overlay() {
    let mut client = Client::new();
    for (name, block) in [("n", 1), ("ov", 2)] {
        client.image(name, block, None);
        client.add(name, name, Value::Null);
    }
    client.run("block_resize", json!({"node-name": "ov", "size": 2 * SIZE}));
    let (tap, device) = {
        let graph = client.daemon.services.context.graph.lock();
        let node = graph.find("n").unwrap();
        (Arc::clone(&node.tap), Arc::clone(&node.device))
    };
    client.run("blockdev-snapshot", json!({"node": "n", "overlay": "ov"}));
    client.daemon.services.context.refresh_tap("n", &tap, &device, Duration::ZERO);
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("n"), client.blocks("ov")), (vec![1], vec![1, 2, 4]));
}

/// The second half of the removal of an export found another one by its id, and removed that.
#[test]
fn a_removal_leaves_a_later_export_of_the_same_id() {
    let mut client = Client::new();
    client.chain();
    let export = |name: &str| json!({"type": "nbd", "id": "e", "node-name": "top", "name": name});
    for (round, name) in ["first", "second"].into_iter().enumerate() {
        let address = json!({"type": "unix", "data": {"path": client.path(&format!("nbd{round}"))}});
        client.run("nbd-server-start", json!({"addr": address}));
        client.run("block-export-add", export(name));
        if round == 0 {
            let rest = client.daemon.services.exports.remove_export("e", true).unwrap();
            client.run("nbd-server-stop", json!({}));
            client.run("nbd-server-start", json!({"addr": address}));
            client.run("block-export-add", export(name));
            // Whether the server that has ended still finds its export does not matter.
            let _ = rest();
            assert_eq!(client.run("query-block-exports", json!({}))[0]["id"], "e");
            client.run("nbd-server-stop", json!({}));
        }
    }
    // One that was not replaced goes.
    client.run("block-export-del", json!({"id": "e"}));
    assert_eq!(client.run("query-block-exports", json!({})), json!([]));
}

/// A command that failed took its node back by name, although the node had gone with its last user: that of
/// another client went instead.
#[test]
fn a_node_that_is_taken_back_is_no_other_of_its_name() {
    let mut client = Client::new();
    let null = json!({"driver": "null-co", "node-name": "t", "size": SIZE});
    let opened =
        client.daemon.services.context.open_node(null.as_object().unwrap(), Inherited::default()).unwrap();
    client.daemon.services.context.undo_node(&opened);
    client.run("blockdev-add", null);
    client.daemon.services.context.undo_node(&opened);
    client.run("blockdev-del", json!({"node-name": "t"}));
}

/// The target of a mirror was put on a node while a command resumed the mirror: the image that was opened
/// anew for that had no backing file.
#[test]
fn an_image_that_is_opened_anew_stands_where_the_graph_says() {
    let mut client = Client::new();
    client.chain();
    for (name, block) in [("n", 5), ("t", 9)] {
        client.image(name, block, None);
        client.add(name, name, Value::Null);
    }
    client.run("blockdev-mirror", json!({"job-id": "j", "device": "top", "target": "t", "sync": "top"}));
    client.wait("BLOCK_JOB_READY");
    let (device, image) = {
        let graph = client.daemon.services.context.graph.lock();
        let node = graph.find("t").unwrap();
        (Arc::clone(&node.device), node.qcow2.clone().unwrap())
    };
    let fresh = Arc::new(image.reopen().unwrap());
    client.run("blockdev-snapshot", json!({"node": "n", "overlay": "t"}));
    client.daemon.services.context.replace_image("t", &device, fresh);
    assert_eq!(client.blocks("t"), [3, 5, 9]);
}
