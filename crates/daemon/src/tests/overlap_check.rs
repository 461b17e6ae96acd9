//! `overlap-check` of qcow2 nodes: which structures writes are checked against.

use serde_json::json;

use super::*;

/// Zeros at the end of the guest cluster 1.
const AT: u64 = 0x2_0000 - 512;

impl Client {
    /// An image whose guest cluster 1 is mapped to its refcount block, in a file node.
    fn image_mapped_to_its_refcounts(&mut self) {
        self.image("a.qcow2", 1, None);
        let path = self.path("a.qcow2");
        let mut bytes = std::fs::read(&path).unwrap();
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
        let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
        let block = word(word(48));
        bytes[l2 as usize + 8..][..8].copy_from_slice(&(block | 1 << 63).to_be_bytes());
        std::fs::write(&path, bytes).unwrap();
        self.run("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": path}));
    }

    fn write_to_a(&self) -> blockmirror_block::Result<()> {
        let tap = Arc::clone(&self.daemon.services.context.graph.lock().find("a").unwrap().tap);
        tap.write_at(&[0; 512], AT, WriteFlags::NONE)
    }
}

fn node(check: Value) -> Value {
    json!({"driver": "qcow2", "node-name": "a", "file": "f", "overlap-check": check})
}

#[test]
fn writes_are_checked_against_what_the_node_says() {
    let mut client = Client::new();
    client.image_mapped_to_its_refcounts();
    for wrong in
        [json!("most"), json!({"template": "most"}), json!({"refcount-block": 1}), json!({"l1": true})]
    {
        client.refused("blockdev-add", node(wrong));
    }
    client.run("blockdev-add", node(json!({"template": "all", "refcount-block": false})));
    client.write_to_a().unwrap();
    for (check, passes) in [
        (json!("none"), true),
        (json!("constant"), true),
        (json!({"template": "constant", "refcount-block": false}), true),
        (json!({"template": "constant", "refcount-block": true}), false),
    ] {
        client.run("blockdev-reopen", json!({"options": [node(check.clone())]}));
        let written = client.write_to_a();
        assert_eq!(written.is_ok(), passes, "{check}: {written:?}");
    }
    let image = blockmirror_image::ImageInfo::read(client.path("a.qcow2"), &OpenOptions::new()).unwrap();
    assert!(image.qcow2.unwrap().header.is_corrupt());
}

#[test]
fn the_usual_checks_are_made_where_the_node_says_nothing() {
    let mut client = Client::new();
    client.image_mapped_to_its_refcounts();
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "a", "file": "f"}));
    assert!(client.write_to_a().unwrap_err().to_string().contains("a refcount block"));
}
