//! `nodes`, `bitmaps` and `exports`: what a server has besides jobs, as tables and as JSON.
//!
//! The JSON is the server's own answer, of which the table shows a part; a bitmap has the name of its node
//! besides.

use blockmirror_block::size::human_size;
use blockmirror_qmp::Client;
use serde_json::{Map, Value, json};

use super::node::{Node, nodes};
use super::table::columns;
use crate::args::{Output, OutputArgs};
use crate::console::Console;
use crate::failure::{Exit, Outcome, one_line};
use crate::json::pretty;

pub(super) fn list_nodes(console: &mut Console<'_>, client: &mut Client, args: &OutputArgs) -> Outcome {
    let nodes = nodes(client)?;
    let text = node_table(&nodes);
    print(console, args, text, nodes.into_iter().map(|node| Value::Object(node.fields)).collect())
}

pub(super) fn list_bitmaps(console: &mut Console<'_>, client: &mut Client, args: &OutputArgs) -> Outcome {
    let bitmaps = bitmaps(nodes(client)?);
    print(console, args, bitmap_table(&bitmaps), bitmaps.into_iter().map(Value::Object).collect())
}

pub(super) fn list_exports(console: &mut Console<'_>, client: &mut Client, args: &OutputArgs) -> Outcome {
    let answer = client.execute("query-block-exports", json!({}))?;
    let exports = match answer {
        Value::Array(exports) => exports,
        _ => Vec::new(),
    };
    print(console, args, export_table(&exports), exports)
}

fn print(console: &mut Console<'_>, args: &OutputArgs, table: String, all: Vec<Value>) -> Outcome {
    match args.output {
        Output::Human => console.print(&table)?,
        Output::Json => console.print(&format!("{}\n", pretty(&Value::Array(all))))?,
    }
    Ok(Exit::Done)
}

fn node_table(nodes: &[Node]) -> String {
    let rows = nodes.iter().map(|node| {
        let mode = match node.fields.get("ro").and_then(Value::as_bool) {
            Some(true) => "read-only",
            _ => "writable",
        };
        vec![
            one_line(&node.name),
            one_line(node.text("drv").unwrap_or("-")),
            mode.to_owned(),
            node.size().map_or("-".into(), human_size),
            one_line(node.filename().or_else(|| node.text("file")).unwrap_or("-")),
        ]
    });
    columns(&["NODE", "DRIVER", "MODE", "SIZE", "FILE"], &[3], rows.collect(), "no nodes")
}

/// The bitmaps of `nodes`, each with the name of its node.
fn bitmaps(nodes: Vec<Node>) -> Vec<Map<String, Value>> {
    let of_node = |node: Node| {
        let Node { name, mut fields } = node;
        let bitmaps = match fields.remove("dirty-bitmaps") {
            Some(Value::Array(bitmaps)) => bitmaps,
            _ => Vec::new(),
        };
        bitmaps.into_iter().filter_map(move |bitmap| {
            let Value::Object(bitmap) = bitmap else { return None };
            let mut all = Map::new();
            all.insert("node".into(), name.as_str().into());
            all.extend(bitmap);
            Some(all)
        })
    };
    nodes.into_iter().flat_map(of_node).collect()
}

fn bitmap_table(bitmaps: &[Map<String, Value>]) -> String {
    let rows = bitmaps.iter().map(|bitmap| {
        let text = |key: &str| one_line(bitmap.get(key).and_then(Value::as_str).unwrap_or("-"));
        let size = |key: &str| bitmap.get(key).and_then(Value::as_u64).map_or("-".into(), human_size);
        let is = |key: &str| bitmap.get(key).and_then(Value::as_bool) == Some(true);
        let mut state = vec![if is("recording") { "recording" } else { "disabled" }];
        let more = ["busy", "persistent", "inconsistent"];
        state.extend(more.into_iter().filter(|key| is(key)));
        vec![text("node"), text("name"), size("granularity"), size("count"), state.join(", ")]
    });
    columns(&["NODE", "BITMAP", "GRANULARITY", "DIRTY", "STATE"], &[2, 3], rows.collect(), "no bitmaps")
}

fn export_table(exports: &[Value]) -> String {
    let rows = exports.iter().map(|export| {
        let text = |key: &str| one_line(export.get(key).and_then(Value::as_str).unwrap_or("-"));
        let state = match export.get("shutting-down").and_then(Value::as_bool) {
            Some(true) => "shutting down",
            _ => "",
        };
        vec![text("id"), text("type"), text("node-name"), state.to_owned()]
    });
    columns(&["EXPORT", "TYPE", "NODE", ""], &[], rows.collect(), "no exports")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_in_their_row() {
        let node = |fields: Value| Node {
            name: "disk".into(),
            fields: fields.as_object().cloned().unwrap_or_default(),
        };
        let nodes = [
            node(json!({"drv": "qcow2", "ro": false,
                        "image": {"virtual-size": 1 << 30, "filename": "a\nb"},
                        "dirty-bitmaps": [{"name": "b\u{1b}[2J", "granularity": 65536, "count": 131_072,
                                           "recording": true, "busy": false, "persistent": true}]})),
            node(json!({"drv": 7, "ro": true})),
        ];
        let want = "\
NODE  DRIVER  MODE        SIZE  FILE
disk  qcow2   writable   1 GiB  a\\nb
disk  -       read-only      -  -
";
        assert_eq!(node_table(&nodes), want);
        let bitmaps = bitmaps(nodes.into());
        let want = "\
NODE  BITMAP      GRANULARITY    DIRTY  STATE
disk  b\\u{1b}[2J       64 KiB  128 KiB  recording, persistent
";
        assert_eq!(bitmap_table(&bitmaps), want);
        assert_eq!(bitmaps[0]["node"], "disk");
        assert_eq!((node_table(&[]), bitmap_table(&[])), ("no nodes\n".into(), "no bitmaps\n".into()));
        assert_eq!(export_table(&[]), "no exports\n");
    }
}
