//! Nodes as a monitor tells of them: `query-named-block-nodes`, and in QEMU `query-block` for the names of
//! its devices.

use blockmirror_image::Format;
use blockmirror_qmp::{Client, ClientError, ErrorClass};
use serde_json::{Map, Value, json};

use crate::failure::{Failure, Outcome};

/// A node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    /// Every member of the answer, by QMP's own names.
    pub(super) fields: Map<String, Value>,
}

impl Node {
    fn new(value: Value) -> Option<Self> {
        let Value::Object(fields) = value else { return None };
        let name = fields.get("node-name")?.as_str()?.to_owned();
        Some(Self { name, fields })
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key)?.as_str()
    }

    fn of_image(&self, key: &str) -> Option<&str> {
        self.fields.get("image")?.get(key)?.as_str()
    }

    /// Length of the disk.
    pub(super) fn size(&self) -> Option<u64> {
        self.fields.get("image")?.get("virtual-size")?.as_u64()
    }

    /// What the server calls its file.
    pub(super) fn filename(&self) -> Option<&str> {
        self.of_image("filename")
    }

    /// The format of the image, if the node is an image of a format that is known here. A protocol node shows
    /// its file as it is.
    pub(super) fn format(&self) -> Option<Format> {
        match self.text("drv")? {
            "nbd" => Some(Format::Raw),
            driver => Format::in_header(driver).ok(),
        }
    }

    /// Whether something lies below it now.
    pub(super) fn has_backing(&self) -> bool {
        let depth = self.fields.get("backing_file_depth").and_then(Value::as_u64);
        depth.is_some_and(|depth| depth > 0) || self.fields.contains_key("backing_file")
    }

    /// Its backing file and the format of that, as its header has them.
    pub(super) fn backing(&self) -> Option<(&str, Option<&str>)> {
        let name = self.of_image("full-backing-filename").or_else(|| self.of_image("backing-filename"))?;
        Some((name, self.of_image("backing-filename-format")))
    }
}

/// All nodes, in the order of the server: the newest first.
pub(super) fn nodes(client: &mut Client) -> Result<Vec<Node>, ClientError> {
    let answer = client.execute("query-named-block-nodes", json!({"flat": true}))?;
    let Value::Array(nodes) = answer else { return Ok(Vec::new()) };
    Ok(nodes.into_iter().filter_map(Node::new).collect())
}

/// The node called `name`, or that the device `name` of QEMU has.
pub(super) fn find(client: &mut Client, name: &str) -> Outcome<Node> {
    let nodes = nodes(client)?;
    if let Some(node) = nodes.iter().find(|node| node.name == name) {
        return Ok(node.clone());
    }
    if let Some(node) = of_device(client, name)? {
        return Ok(node);
    }
    // Those that the server has named itself are no use to a person who has mistyped a name.
    let names = nodes.iter().map(|node| node.name.as_str()).filter(|name| !name.starts_with('#'));
    let names = names.collect::<Vec<_>>().join(", ");
    Err(Failure::failed(match names.is_empty() {
        true => format!("no node '{name}': there are none"),
        false => format!("no node '{name}': there is {names}"),
    }))
}

/// The node of a device that QEMU's machine has. A storage daemon has no devices, and no such command.
fn of_device(client: &mut Client, name: &str) -> Outcome<Option<Node>> {
    let answer = match client.execute("query-block", json!({})) {
        Err(error) if error.refusal().is_some_and(|e| e.class == ErrorClass::CommandNotFound) => {
            return Ok(None);
        }
        answer => answer?,
    };
    let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let is_named = |device: &&Value| {
        ["device", "qdev"].iter().any(|key| device.get(key).and_then(Value::as_str) == Some(name))
    };
    let inserted = devices.iter().find(is_named).and_then(|device| device.get("inserted"));
    Ok(inserted.and_then(|node| Node::new(node.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_tells_of_a_node() {
        let node = Node::new(json!({
            "node-name": "disk", "drv": "qcow2",
            "image": {"virtual-size": 1024, "filename": "d.qcow2", "backing-filename": "b",
                      "backing-filename-format": "raw"},
        }));
        let node = node.unwrap();
        assert_eq!(
            (node.name.as_str(), node.size(), node.format()),
            ("disk", Some(1024), Some(Format::Qcow2))
        );
        assert_eq!((node.filename(), node.backing()), (Some("d.qcow2"), Some(("b", Some("raw")))));
        let node = Node::new(json!({"node-name": "f", "drv": "throttle"})).unwrap();
        assert_eq!((node.size(), node.format(), node.backing()), (None, None, None));
        assert!(Node::new(json!({"drv": "qcow2"})).is_none());
    }
}
