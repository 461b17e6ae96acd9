//! `block_resize` of an image whose file fails.

use std::fs;

use blockmirror_image::ImageInfo;

use super::*;
use crate::driver::Child;

impl Client {
    /// The length of a node as a client, and as a guest, sees it.
    fn lengths(&mut self, node: &str) -> (u64, u64) {
        let nodes = self.run("query-named-block-nodes", json!({}));
        let found = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap();
        let tap = Arc::clone(&self.daemon.services.context.graph.lock().find(node).unwrap().tap);
        (found["image"]["virtual-size"].as_u64().unwrap(), tap.len())
    }
}

/// It was opened before the resize and attached after it, and kept the length of before.
#[test]
fn a_node_that_was_resized_while_it_was_opened_is_not_stood_on() {
    let mut client = Client::new();
    let path = client.path("r");
    fs::write(&path, [0; 65536]).unwrap();
    client.run("blockdev-add", json!({"driver": "file", "node-name": "r", "filename": path}));
    let context = &client.daemon.services.context;
    let link = Child::named(context, "r".into()).unwrap().file_link("file", false, false);
    context.graph.lock().check_holds(&link).unwrap();
    client.run("block_resize", json!({"node-name": "r", "size": 131_072}));
    let refused = client.daemon.services.context.graph.lock().check_holds(&link).unwrap_err();
    assert_eq!(refused.desc, "Node 'r' was resized meanwhile");
}

/// The header had the new length, the guest and the bitmaps had the old one.
#[test]
fn a_shrink_that_fails_after_the_header_is_reported_and_finished() {
    let mut client = Client::new();
    client.image("s.qcow2", 9, None);
    let path = client.path("s.qcow2");
    let l1 = ImageInfo::read(&path, &OpenOptions::new()).unwrap().qcow2.unwrap().header.l1_offset as usize;
    let l2 = |bytes: &[u8]| {
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let table = word(l1) & !(1 << 63);
        (table, word(table as usize + 9 * 8))
    };
    let (table, entry) = l2(&fs::read(&path).unwrap());
    assert_ne!(entry, 0);
    // The header is written, the L2 table is not.
    let rule = json!({
        "event": "write_aio", "iotype": "write", "sector": table / 512, "errno": 28, "once": true,
    });
    let image = json!({"driver": "file", "filename": path});
    let file = json!({"driver": "blkdebug", "image": image, "inject-error": [rule]});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "s", "file": file}));
    client.run("block-dirty-bitmap-add", json!({"node": "s", "name": "b", "granularity": 65536}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("s").unwrap().tap);
    tap.write_at(&[3; 65536], 9 << 16, WriteFlags::FUA).unwrap();
    let dirty = || tap.bitmap("b").unwrap().dirty_bytes();
    assert_eq!((client.lengths("s"), dirty()), ((SIZE, SIZE), 65536));

    let shrink = json!({"node-name": "s", "size": SIZE / 2});
    let said = client.refused("block_resize", shrink.clone());
    assert!(said.contains("No space left") || said.contains("no space"), "{said}");
    assert_eq!((client.lengths("s"), dirty()), ((SIZE / 2, SIZE / 2), 0));
    assert_eq!(l2(&fs::read(&path).unwrap()).1, entry);
    client.run("block_resize", shrink);
    assert_eq!(client.lengths("s"), (SIZE / 2, SIZE / 2));
    assert_eq!(l2(&fs::read(&path).unwrap()), (table, 0));
}
