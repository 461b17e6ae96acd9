//! Objects that others refer to.

use serde_json::json;

use super::*;

#[test]
fn io_threads_are_kept_for_what_names_them() {
    let mut client = Client::new();
    for node in ["n", "m"] {
        client.run("blockdev-add", json!({"driver": "null-co", "node-name": node, "size": super::SIZE}));
    }
    let address = json!({"type": "unix", "data": {"path": client.path("nbd")}});
    client.run("nbd-server-start", json!({"addr": address}));
    let options = json!({"qom-type": "iothread", "id": "t", "poll-max-ns": 1000, "thread-pool-max": 8});
    client.run("object-add", options.clone());
    let duplicate = client.refused("object-add", options);
    assert_eq!(duplicate, "attempt to add duplicate property 't' to object (type 'container')");
    for (member, value, why) in [
        ("poll-max-ns", -1, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ("aio-max-batch", -1, "aio-max-batch value must be in range [0, 9223372036854775807]"),
        ("thread-pool-min", 65, "bad thread-pool-min/thread-pool-max values"),
        ("thread-pool-max", 0, "bad thread-pool-min/thread-pool-max values"),
    ] {
        let refused = client.refused("object-add", json!({"qom-type": "iothread", "id": "u", member: value}));
        assert_eq!(refused, why);
    }
    let export = |thread: &str| json!({"type": "nbd", "id": "e", "node-name": "n", "iothread": thread});
    assert_eq!(client.refused("block-export-add", export("u")), "iothread \"u\" not found");
    client.run("block-export-add", export("t"));
    let in_use = "object 't' is in use, can not be deleted";
    assert_eq!(client.refused("object-del", json!({"id": "t"})), in_use);
    client.run("block-export-del", json!({"id": "e"}));
    client.run("object-del", json!({"id": "t"}));
    client.run("object-add", json!({"qom-type": "iothread", "id": "t"}));

    let set = |node: &str, thread: Value| json!({"node-name": node, "iothread": thread});
    let command = "x-blockdev-set-iothread";
    client.run(command, set("m", json!("t")));
    assert_eq!(client.refused("object-del", json!({"id": "t"})), in_use);
    client.run(command, set("m", Value::Null));
    client.run("object-del", json!({"id": "t"}));
    client.run("object-add", json!({"qom-type": "iothread", "id": "t"}));
    client.run(command, set("m", json!("t")));
    client.run("blockdev-del", json!({"node-name": "m"}));
    assert_eq!(client.refused(command, set("n", json!("u"))), "Cannot find iothread u");
    assert_eq!(client.refused(command, set("m", json!("t"))), "Failed to find node with node-name='m'");
    client.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "n"}));
    let busy = client.refused(command, set("n", json!("t")));
    assert_eq!(
        busy,
        "Node n is associated with a BlockBackend and could be in use (use force=true to override this check)"
    );
    let mut forced = set("n", json!("t"));
    forced["force"] = json!(true);
    client.run(command, forced);
    assert_eq!(client.refused("object-del", json!({"id": "t"})), in_use);
    client.run("block-export-del", json!({"id": "e"}));
    client.run("blockdev-del", json!({"node-name": "n"}));
    client.run("object-del", json!({"id": "t"}));
}
