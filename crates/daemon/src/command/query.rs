//! What is asked about nodes: `query-named-block-nodes`, `query-block`, `query-blockstats`.

use std::sync::atomic::Ordering;

use blockmirror_block::BlockDevice;
use blockmirror_image::qcow2_fields;
use blockmirror_qcow2::Qcow2;
use blockmirror_qmp::schema::{ANY, BOOL, Command, INT, Member, Object, STR, Type, opt, req};
use serde_json::{Map, Value, json};

use super::Commands;
use crate::arguments::{Arguments, NoArguments, arguments};
use crate::graph::{Counter, Graph, HostSizes, Node};

static BITMAP_INFO: Object = Object::new(
    "BlockDirtyInfo",
    "A dirty bitmap.",
    &[
        opt("name", STR, "its name"),
        req("count", INT, "bytes of the disk that are dirty"),
        req("granularity", INT, "bytes per bit"),
        req("recording", BOOL, "whether it records what is written"),
        req("busy", BOOL, "whether a job or an export uses it"),
        req("persistent", BOOL, "whether it is stored in the image"),
        opt("inconsistent", BOOL, "whether it has missed writes and can only be removed"),
    ],
);

static IMAGE_INFO: Object = Object::new(
    "ImageInfo",
    "An image.",
    &[
        req("filename", STR, "path or URI"),
        req("format", STR, "driver"),
        opt("dirty-flag", BOOL, "whether the image was not closed cleanly"),
        opt("actual-size", INT, "bytes that it occupies on the host"),
        req("virtual-size", INT, "length of the disk in bytes"),
        opt("cluster-size", INT, "bytes of a cluster"),
        opt("backing-filename", STR, "name of the backing file, from the image"),
        opt("full-backing-filename", STR, "the same as a path from where the daemon is"),
        opt("backing-filename-format", STR, "format of the backing file, from the image"),
        opt("format-specific", ANY, "what only this format has"),
        opt("backing-image", ANY, "the backing file, in the same form"),
    ],
);

static CACHE_INFO: Object = Object::new(
    "BlockdevCacheInfo",
    "How the host's cache is used.",
    &[
        req("writeback", BOOL, "writes may wait there for a flush: always"),
        req("direct", BOOL, "whether it is gone past"),
        req("no-flush", BOOL, "whether flushes are ignored"),
    ],
);

static NODE_INFO: Object = Object::new(
    "BlockDeviceInfo",
    "A node.",
    &[
        req("file", STR, "path or URI of what lies below"),
        opt("node-name", STR, "its name"),
        req("ro", BOOL, "whether it accepts no writes"),
        req("drv", STR, "its driver"),
        opt("backing_file", STR, "path or URI of its backing file"),
        req("backing_file_depth", INT, "how many backing files lie below; 0 if `flat`"),
        req("active", BOOL, "always true"),
        req("encrypted", BOOL, "always false"),
        req("detect_zeroes", STR, "whether writes of zeros are looked for"),
        req("bps", INT, "0: limits are those of throttle nodes"),
        req("bps_rd", INT, "0"),
        req("bps_wr", INT, "0"),
        req("iops", INT, "0"),
        req("iops_rd", INT, "0"),
        req("iops_wr", INT, "0"),
        req("image", Type::Object(&IMAGE_INFO), "the image"),
        req("cache", Type::Object(&CACHE_INFO), "how the host's cache is used"),
        req("write_threshold", INT, "0"),
        opt("dirty-bitmaps", Type::Array(&Type::Object(&BITMAP_INFO)), "its bitmaps, newest first"),
    ],
)
.differs(
    "limits with bursts are reported for throttle groups only, and snapshots inside an image not at all",
);

arguments! {
    struct NodesArgs {
        flat: Option<bool> = "flat", "leave `backing-image` out" [default "false"];
    }
}

static QUERY_NODES: Command = Command::new("query-named-block-nodes", "Lists the nodes.", NodesArgs::MEMBERS)
    .returns(Type::Array(&Type::Object(&NODE_INFO)), "the nodes, newest first");

static QUERY_BLOCK: Command =
    Command::new("query-block", "Lists the devices of a guest: there are none.", &[])
        .returns(Type::Array(&ANY), "nothing");

macro_rules! numbers {
    ($($name:literal: $doc:literal),* $(,)?) => {
        [
            $(req($name, INT, $doc),)*
            req("account_invalid", BOOL, "false"),
            req("account_failed", BOOL, "false"),
            req("timed_stats", Type::Array(&ANY), "none"),
        ]
    };
}
static STATS_MEMBERS: [Member; 32] = numbers![
    "rd_bytes": "bytes read", "wr_bytes": "bytes written", "zone_append_bytes": "0", "unmap_bytes": "bytes \
     discarded",
    "rd_operations": "reads", "wr_operations": "writes", "zone_append_operations": "0",
    "flush_operations": "flushes", "unmap_operations": "discards",
    "rd_total_time_ns": "time in reads", "wr_total_time_ns": "time in \
     writes", "zone_append_total_time_ns": "0",
    "flush_total_time_ns": "time in flushes", "unmap_total_time_ns": "time in discards",
    "wr_highest_offset": "end of the highest write",
    "rd_merged": "0", "wr_merged": "0", "zone_append_merged": "0", "unmap_merged": "0",
    "failed_rd_operations": "reads that failed", "failed_wr_operations": "writes that failed",
    "failed_zone_append_operations": "0", "failed_flush_operations": "flushes that failed",
    "failed_unmap_operations": "discards that failed",
    "invalid_rd_operations": "0", "invalid_wr_operations": "0", "invalid_zone_append_operations": "0",
    "invalid_flush_operations": "0", "invalid_unmap_operations": "0",
];
static STATS: Object = Object::new("BlockDeviceStats", "What a node has done.", &STATS_MEMBERS);
static NODE_STATS: Object = Object::new(
    "BlockStats",
    "What a node has done.",
    &[
        opt("node-name", STR, "the node"),
        req("stats", Type::Object(&STATS), "the figures"),
        opt("parent", Type::Object(&NODE_STATS), "the file it lives in"),
    ],
);
arguments! {
    struct StatsArgs {
        query_nodes: Option<bool> = "query-nodes", "tell of nodes, and not of the devices of a guest, of \
         which there are none"
            [default "false"];
    }
}

static QUERY_STATS: Command =
    Command::new("query-blockstats", "Tells what nodes have done.", StatsArgs::MEMBERS)
        .returns(Type::Array(&Type::Object(&NODE_STATS)), "the nodes, newest first");

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_quick(&QUERY_NODES, |services, _, args: NodesArgs| {
            let flat = args.flat.unwrap_or(false);
            let sizes = HostSizes::of(&services.context.graph.lock());
            sizes.ask();
            let graph = services.context.graph.lock();
            Ok(graph.nodes().into_iter().map(|node| describe(&graph, node, flat)).collect())
        })
        .add_quick(&QUERY_BLOCK, |_, _, _: NoArguments| Ok(json!([])))
        .add_quick(&QUERY_STATS, |services, _, args: StatsArgs| {
            if !args.query_nodes.unwrap_or(false) {
                return Ok(json!([]));
            }
            let graph = services.context.graph.lock();
            Ok(graph.nodes().into_iter().map(|node| stats(&graph, node)).collect())
        });
}

fn backing<'a>(graph: &'a Graph, node: &'a Node) -> Option<&'a Node> {
    graph.children(&node.name).find(|(role, _)| *role == "backing").map(|(_, backing)| backing)
}

fn describe(graph: &Graph, node: &Node, flat: bool) -> Value {
    let options = node.device.options();
    let chain: Vec<_> = std::iter::successors(backing(graph, node), |below| backing(graph, below)).collect();
    let mut info = json!({
        "file": node.filename,
        "node-name": node.name,
        "ro": node.read_only,
        "drv": node.driver.name,
        "backing_file_depth": if flat { 0 } else { chain.len() },
        "active": true,
        "encrypted": false,
        "detect_zeroes": match (options.detect_zeroes, options.detect_unmap) {
            (false, _) => "off",
            (true, false) => "on",
            (true, true) => "unmap",
        },
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "write_threshold": 0,
        "cache": {"writeback": true, "direct": node.direct, "no-flush": options.no_flush},
    });
    if let Some(below) = chain.first() {
        info["backing_file"] = json!(below.filename);
    }
    let image = match flat {
        true => image(graph, node),
        // From the bottom up, each put into the one above it.
        false => std::iter::once(&node).chain(&chain).rev().fold(Value::Null, |below, node| {
            let mut info = image(graph, node);
            if !below.is_null() {
                info["backing-image"] = below;
            }
            info
        }),
    };
    info["image"] = image;
    let bitmaps = bitmaps(node);
    if !bitmaps.is_empty() {
        info["dirty-bitmaps"] = bitmaps.into();
    }
    info
}

fn bitmaps(node: &Node) -> Vec<Value> {
    let entries = node.bitmap_entries();
    let mut bitmaps = node.tap.bitmaps();
    bitmaps.sort_by_key(|bitmap| std::cmp::Reverse(bitmap.number));
    let of_tap = bitmaps.iter().map(|bitmap| {
        let is_stored = entries.iter().any(|entry| !entry.in_use && entry.name == bitmap.name);
        json!({
            "name": bitmap.name, "count": bitmap.dirty_bytes, "granularity": bitmap.granularity,
            "recording": bitmap.enabled, "busy": bitmap.busy, "persistent": is_stored,
        })
    });
    let inconsistent = entries.iter().filter(|entry| entry.in_use).map(|entry| {
        json!({
            "name": entry.name.to_text(), "count": 0, "granularity": entry.granularity,
            "recording": false, "busy": false, "persistent": true, "inconsistent": true,
        })
    });
    of_tap.chain(inconsistent).collect()
}

fn image(graph: &Graph, node: &Node) -> Value {
    let mut info = json!({
        "filename": node.filename,
        "format": node.driver.name,
        "virtual-size": node.device.len(),
        "dirty-flag": false,
    });
    // It may lie in a file that has a node of its own.
    let below = || graph.children(&node.name).find(|(role, _)| *role == "file").map(|(_, file)| file);
    let file = if node.storage.is_some() { Some(node) } else { below() };
    if let Some(bytes) = file.and_then(|file| file.host_size.known().allocated) {
        info["actual-size"] = json!(bytes);
    }
    if node.file.is_some() {
        // It grows below the image that lives in it.
        if let Some(len) = node.host_size.known().len {
            info["virtual-size"] = json!(len.next_multiple_of(512));
        }
        info["format-specific"] = json!({"type": node.driver.name, "data": {}});
    }
    if let Some(size) = node.device.geometry().cluster_size {
        info["cluster-size"] = json!(size);
    }
    if let Some(qcow2) = &node.qcow2 {
        describe_qcow2(&mut info, node, qcow2);
    }
    info
}

fn describe_qcow2(info: &mut Value, node: &Node, qcow2: &Qcow2) {
    let header = qcow2.header();
    info["dirty-flag"] = json!(header.is_dirty());
    let mut data: Map<String, Value> =
        qcow2_fields(&header).map(|(key, value)| (key.to_owned(), value)).collect();
    // These two come last here.
    for key in ["data-file-raw", "data-file"] {
        if let Some(value) = data.shift_remove(key) {
            data.insert(key.to_owned(), value);
        }
    }
    info["format-specific"] = json!({"type": "qcow2", "data": data});
    if let Some(backing) = &header.backing {
        let name = backing.name.as_path();
        info["backing-filename"] = json!(name.display().to_string());
        let full = node.path.as_deref().and_then(|path| blockmirror_image::join_name(path, name.as_os_str()));
        if let Some(full) = full {
            info["full-backing-filename"] = json!(full.display().to_string());
        }
        if let Some(format) = &backing.format {
            info["backing-filename-format"] = json!(format);
        }
    }
}

/// The figures of a node, with those of the files below it.
fn stats(graph: &Graph, node: &Node) -> Value {
    let files: Vec<_> = std::iter::successors(Some(node), |node| file(graph, node)).collect();
    files.into_iter().rev().fold(Value::Null, |below, node| {
        let mut figures = own_stats(node);
        if !below.is_null() {
            figures["parent"] = below;
        }
        figures
    })
}

fn file<'a>(graph: &'a Graph, node: &'a Node) -> Option<&'a Node> {
    graph.children(&node.name).find(|(role, _)| *role == "file").map(|(_, file)| file)
}

fn own_stats(node: &Node) -> Value {
    let stats = node.device.stats();
    let mut figures = json!({
        "wr_highest_offset": stats.highest_write.load(Ordering::Relaxed),
        "account_invalid": false, "account_failed": false, "timed_stats": [],
    });
    let nothing = Counter::default();
    for (name, counter) in [
        ("rd", &stats.reads),
        ("wr", &stats.writes),
        ("zone_append", &nothing),
        ("flush", &stats.flushes),
        ("unmap", &stats.unmaps),
    ] {
        let mut put = |key: String, value: u64| figures[key] = json!(value);
        put(format!("{name}_operations"), counter.operations.load(Ordering::Relaxed));
        put(format!("{name}_total_time_ns"), counter.nanoseconds.load(Ordering::Relaxed));
        put(format!("failed_{name}_operations"), counter.failed.load(Ordering::Relaxed));
        put(format!("invalid_{name}_operations"), 0);
        if name != "flush" {
            put(format!("{name}_bytes"), counter.bytes.load(Ordering::Relaxed));
            put(format!("{name}_merged"), 0);
        }
    }
    json!({"node-name": node.name, "stats": figures})
}
