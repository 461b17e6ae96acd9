//! The schema of all commands is in order, and what the daemon answers is what its schema says.

use std::collections::BTreeSet;

use blockmirror_qmp::schema::lint;
use serde_json::{Value, json};

use super::Client;
use crate::Daemon;
use crate::command::table;

#[test]
fn the_schema_is_in_order() {
    let table = table(&Daemon::new(Vec::new()));
    assert_eq!(lint(table.commands(), table.events()), [""; 0]);
}

/// Answers that are not as the schema says are errors in tests (`Table::check_answers`), so it is enough to ask for all there
/// is, in a daemon that has something of everything: each kind of node, bitmaps, exports, jobs of each kind in several states.
#[test]
fn what_is_answered_is_what_the_schema_says() {
    let mut client = Client::new();
    client.chain();
    client.image("target.qcow2", 4, None);
    client.add("target", "target.qcow2", Value::Null);
    let limits = json!({"bps-total": 1 << 30});
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": limits}));
    let path = client.path("nbd");
    let address = json!({"type": "unix", "data": {"path": path}});
    client.run("nbd-server-start", json!({"addr": address}));
    let empty = |name: &str| json!({"driver": "null-co", "node-name": name, "size": super::SIZE, "read-zeroes": true});
    let rule = json!({"event": "write_aio", "errno": 28});
    for node in [
        empty("null"),
        empty("null2"),
        json!({"driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": empty("n1")}),
        json!({"driver": "copy-on-read", "node-name": "cor", "file": empty("n2")}),
        json!({"driver": "blkdebug", "node-name": "bad", "image": empty("n3"), "inject-error": [rule]}),
        json!({"driver": "raw", "node-name": "raw", "file": empty("n4"), "detect-zeroes": "on"}),
    ] {
        client.run("blockdev-add", node);
    }
    let export = json!({"type": "nbd", "id": "e", "node-name": "raw", "writable": true});
    client.run("block-export-add", export);
    let server = json!({"type": "unix", "path": path});
    client
        .run("blockdev-add", json!({"driver": "nbd", "node-name": "nbd", "server": server, "export": "raw"}));
    for (name, disabled) in [("b1", false), ("b2", true)] {
        client.run("block-dirty-bitmap-add", json!({"node": "top", "name": name, "disabled": disabled}));
    }

    let ask_all = |client: &mut Client| {
        for command in queries() {
            client.run(&command, json!({}));
        }
        client.run("query-named-block-nodes", json!({"flat": true}));
        client.run("query-blockstats", json!({"query-nodes": true}));
    };
    ask_all(&mut client);
    // A mirror that stands still, one that is ready, one that an error has stopped, one that failed.
    let mirror = |id: &str, device: &str, target: &str| json!({"job-id": id, "device": device, "target": target, "sync": "full", "auto-dismiss": false});
    let with = |mut arguments: Value, key: &str, value: Value| {
        arguments[key] = value;
        arguments
    };
    client.run("blockdev-mirror", with(mirror("still", "top", "target"), "speed", json!(1)));
    ask_all(&mut client);
    client.run("job-pause", json!({"id": "still"}));
    ask_all(&mut client);
    client.run("blockdev-mirror", mirror("ready", "null", "null2"));
    client.wait("BLOCK_JOB_READY");
    ask_all(&mut client);
    client.run("blockdev-mirror", with(mirror("short", "cor", "slow"), "copy-mode", json!("auto")));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "short"}));
    client.wait("BLOCK_JOB_COMPLETED");
    ask_all(&mut client);
    let other = json!({"driver": "null-co", "node-name": "other", "size": 512});
    client.run("blockdev-add", other);
    client.run("blockdev-mirror", mirror("failed", "nbd", "other"));
    client.wait("BLOCK_JOB_COMPLETED");
    ask_all(&mut client);
    let file = json!({"driver": "file", "filename": client.path("new"), "size": 0});
    client.run("blockdev-create", json!({"job-id": "create", "options": file}));
    client.wait_for_status("concluded");
    ask_all(&mut client);
    client.run("job-cancel", json!({"id": "still"}));
    client.wait("BLOCK_JOB_CANCELLED");
    let stream = json!({"job-id": "stream", "device": "top", "auto-dismiss": false});
    client.run("block-stream", stream);
    client.wait("BLOCK_JOB_COMPLETED");
    ask_all(&mut client);
    let told = client.run("query-block-jobs", json!({}));
    let kinds: BTreeSet<_> =
        told.as_array().into_iter().flatten().map(|job| job["type"].to_string()).collect();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["\"mirror\"", "\"stream\""]);
    assert!(!client.events.iter().any(|event| event["event"] == "SCHEMA_VIOLATION"), "{:?}", client.events);
}

/// All commands that answer something and need no arguments.
fn queries() -> Vec<String> {
    let table = table(&Daemon::new(Vec::new()));
    let queries = table.commands().filter(|command| {
        command.returns.is_some()
            && command.boxed.is_none()
            && command.members.iter().all(|member| member.optional)
    });
    queries.map(|command| command.name.to_owned()).collect()
}
