//! Raw nodes on a part of a file.

use super::*;

/// An image between 4096 bytes of 5 and 4096 of 6.
fn slice(client: &Client) -> u64 {
    client.image("i.qcow2", 3, None);
    let image = std::fs::read(client.path("i.qcow2")).unwrap();
    let mut bytes = vec![5; 4096];
    bytes.extend(&image);
    bytes.resize(4096 + (1 << 20), 0);
    bytes.extend([6; 4096]);
    std::fs::write(client.path("f"), bytes).unwrap();
    1 << 20
}

#[test]
fn an_image_lives_in_a_part_of_a_file() {
    let mut client = Client::new();
    let size = slice(&client);
    let file = json!({"driver": "file", "filename": client.path("f")});
    let raw = json!({"driver": "raw", "node-name": "part", "offset": 4096, "size": size, "file": file});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": raw}));
    assert_eq!(client.blocks("n"), [3]);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("n").unwrap().tap);
    for block in 0..8_u64 {
        tap.write_at(&[9; 65536], block << 16, WriteFlags::NONE).unwrap();
    }
    tap.flush().unwrap();
    assert_eq!(client.blocks("n"), [9; 8]);
    // Full: it does not grow past its end.
    for block in 8..(SIZE >> 16) {
        let _ = tap.write_at(&[9; 65536], block << 16, WriteFlags::NONE);
    }
    let bytes = std::fs::read(client.path("f")).unwrap();
    assert!(bytes[..4096] == [5; 4096] && bytes[bytes.len() - 4096..] == [6; 4096]);
    assert_eq!(bytes.len(), 8192 + (1 << 20));
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let part = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "part").unwrap();
    let described: Value = serde_json::from_str(&part["file"].as_str().unwrap()[5..]).unwrap();
    assert_eq!((&described["offset"], &described["size"]), (&json!(4096), &json!(size)));
    // No header can say where it is.
    let path = client.path("over.qcow2");
    let snapshot = json!({"node-name": "n", "snapshot-file": path, "snapshot-node-name": "over"});
    assert!(client.refused("blockdev-snapshot-sync", snapshot).contains("lies in a part of a file"));
    assert!(!path.exists());
}

#[test]
fn a_part_has_the_rules_of_qemu() {
    let mut client = Client::new();
    std::fs::write(client.path("f"), vec![7; 10_000]).unwrap();
    let path = client.path("f");
    client.run("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": path}));
    let raw = |more: Value| {
        let mut options = json!({"driver": "raw", "node-name": "r", "file": "f"});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    for (more, word) in [
        (json!({"offset": 10_241}), "past the end"),
        (json!({"size": 1000}), "not a multiple of 512"),
        (json!({"offset": 1, "size": 10_240}), "past the end"),
        (json!({"offset": u64::MAX, "size": u64::MAX - 511}), "past the end"),
        (json!({"offset": -1}), "offset"),
        (json!({"offset": "512"}), "offset"),
    ] {
        let text = client.refused("blockdev-add", raw(more.clone()));
        assert!(text.contains(word), "{more}: {text}");
    }
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "z", "size": 10_240}));
    let on_disk = json!({"driver": "raw", "node-name": "r", "file": "z", "offset": 512});
    assert!(client.refused("blockdev-add", on_disk).contains("raw nodes on files"));
    client.run("blockdev-add", raw(json!({"offset": 512, "size": 1024})));
    let len = |client: &Client| client.daemon.services.context.graph.lock().find("r").unwrap().device.len();
    assert_eq!(len(&client), 1024);
    assert!(client.refused("block_resize", json!({"node-name": "r", "size": 2048})).contains("fixed"));
    // Both stay as they are.
    for more in [json!({}), json!({"offset": 512}), json!({"offset": 0, "size": 1024})] {
        client.refused("blockdev-reopen", json!({"options": [raw(more)]}));
    }
    client.run("blockdev-reopen", json!({"options": [raw(json!({"offset": 512, "size": 1024}))]}));
    client.run("blockdev-del", json!({"node-name": "r"}));
    client.run("blockdev-add", raw(json!({"offset": 1000})));
    client.run("block_resize", json!({"node-name": "r", "size": 20_480}));
    assert_eq!((len(&client), std::fs::metadata(&path).unwrap().len()), (20_480, 21_480));
}
