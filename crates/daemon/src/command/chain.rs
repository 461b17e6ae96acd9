//! Chains of images: `block-stream`, `block-commit`, `change-backing-file`.

use std::sync::Arc;

use blockmirror_mirror::OnError;
use blockmirror_qmp::schema::{BOOL, Command, INT, Member, STR, Type, opt, req};
use blockmirror_qmp::{Args, ErrorClass, QmpError, Session};
use serde_json::Value;

use super::Commands;
use super::block::ON_ERROR;
use crate::Reply;
use crate::daemon::Daemon;
use crate::driver::qmp_error;
use crate::graph::{Graph, Node};
use crate::job::{ChainRequest, JobOptions};

const JOB_ID: Member = opt("job-id", STR, "name of the job; has to be given");
const MASK: Member = opt("backing-mask-protocol", BOOL, "without effect").default("false");
const SPEED: Member = opt("speed", INT, "bytes per second").default("0: no limit");
const ON: Member =
    opt("on-error", Type::Enum(&ON_ERROR), "what happens when a request fails").default("report");
const FILTER: Member = opt("filter-node-name", STR, "a free name; no node gets it, as none is put in front");
const AUTO_FINALIZE: Member =
    opt("auto-finalize", BOOL, "whether the job ends without `job-finalize`").default("true");
const AUTO_DISMISS: Member =
    opt("auto-dismiss", BOOL, "whether it vanishes without `job-dismiss`").default("true");
const BACKING_FILE: Member = opt("backing-file", STR, "what the header calls the new backing file").default(
    "the shortest relative name that leads there if the old name was relative, else its absolute path",
);

static STREAM: Command = Command::new(
    "block-stream",
    "Starts a job that brings up into an image what it shows of its backing files, down to a base or all of it. Then the \
     image stands on the base, or alone.",
    &[
        JOB_ID,
        req("device", STR, "the image"),
        opt("base", STR, "the base, by its file name"),
        opt("base-node", STR, "the base").default("none: the image stands alone afterwards"),
        BACKING_FILE,
        MASK,
        opt("bottom", STR, "the last image that is brought up, instead of the base, which is below it"),
        SPEED,
        ON,
        FILTER,
        AUTO_FINALIZE,
        AUTO_DISMISS,
    ],
)
.differs("into qcow2 images only, and no node is put in front of the device");
static COMMIT: Command = Command::new(
    "block-commit",
    "Starts a job that writes images of a chain into one below them. From the top of the chain it is a mirror: it becomes \
     ready, and `job-complete` moves the users of the device to the base. From further down it ends by itself.",
    &[
        JOB_ID,
        req("device", STR, "the top of the chain"),
        opt("base-node", STR, "the image that is written").default("the lowest of the chain"),
        opt("base", STR, "the same, by its file name"),
        opt("top-node", STR, "the highest image that is committed").default("the device"),
        opt("top", STR, "the same, by its file name"),
        BACKING_FILE,
        MASK,
        SPEED,
        ON,
        FILTER,
        AUTO_FINALIZE,
        AUTO_DISMISS,
    ],
)
.differs(
    "the base has to be open for writing: it was given as `backing` by its name. What lies below the top has no other user, \
     no node is put in front of the device, and dirty bitmaps go with the users to the base and join those there",
);
static CHANGE: Command = Command::new(
    "change-backing-file",
    "Changes what the header of an image calls its backing file. What is open stays.",
    &[
        req("device", STR, "the top of the chain"),
        req("image-node-name", STR, "the image"),
        req("backing-file", STR, "the name"),
    ],
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&STREAM, stream).add(&COMMIT, commit).add(&CHANGE, change_backing_file);
}

fn request(daemon: &Daemon, args: &Args, kind: &'static str) -> Reply<ChainRequest> {
    let speed = u64::try_from(args.opt_i64("speed")?.unwrap_or(0))
        .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
    let id = args.opt_str("job-id")?.unwrap_or_default().to_owned();
    let reserved = daemon.jobs.reserve(&id)?;
    if let Some(name) = args.opt_str("filter-node-name")? {
        let before = if kind == "stream" { "Could not create node: " } else { "" };
        let free = daemon.graph.lock().check_name(name);
        free.map_err(|error| QmpError::generic(format!("{before}{}", error.desc)))?;
    }
    let job = JobOptions {
        id,
        kind,
        speed,
        auto_finalize: args.opt_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: args.opt_bool("auto-dismiss")?.unwrap_or(true),
    };
    let on_error = match args.opt_str("on-error")? {
        Some("ignore") => OnError::Ignore,
        Some("stop") => OnError::Stop,
        Some("enospc") => OnError::Enospc,
        Some("auto") => OnError::Auto,
        _ => OnError::Report,
    };
    Ok(ChainRequest {
        job,
        _reserved: reserved,
        on_error,
        backing_file: args.opt_str("backing-file")?.map(str::to_owned),
    })
}

fn not_both(args: &Args, one: &str, other: &str) -> Reply<()> {
    if args.has(one) && args.has(other) {
        return Err(QmpError::generic(format!("'{one}' and '{other}' cannot be specified at the same time")));
    }
    Ok(())
}

/// The image of the chain below `device` that has the file name `file`.
fn by_file<'a>(graph: &'a Graph, device: &'a str, file: &str) -> Reply<&'a Node> {
    let chain = graph.chain(device);
    let found = (1..chain.len()).find(|index| is_called(&chain, *index, file)).map(|index| chain[index]);
    found.ok_or_else(|| QmpError::generic(format!("Can't find '{file}' in the backing chain")))
}

/// Whether `file` means the image number `index` of a chain: it is its own name, or leads to it from the
/// image above, whose header may call it so.
fn is_called(chain: &[&Node], index: usize, file: &str) -> bool {
    let node = chain[index];
    if node.is_called(file) {
        return true;
    }
    // Filters have no headers.
    let Some(above) = chain[..index].iter().rev().find(|above| !above.is_filter()) else { return false };
    let header = above.qcow2.as_ref().map(|image| image.header());
    let by_header =
        header.as_ref().and_then(|header| header.backing.as_ref()).map(|backing| backing.name.as_path());
    let leads_there = || {
        let named = blockmirror_image::join_name(above.path.as_deref()?, std::ffi::OsStr::new(file))?;
        Some(node.is_called(named.to_str()?))
    };
    by_header.is_some_and(|name| name == std::path::Path::new(file)) || leads_there() == Some(true)
}

/// `block-stream`.
pub(super) fn stream(daemon: &Arc<Daemon>, session: &Session, args: &Args) -> Reply<Value> {
    not_both(args, "base", "base-node")?;
    not_both(args, "base", "bottom")?;
    not_both(args, "bottom", "base-node")?;
    let device = args.str("device")?;
    let base = {
        let graph = daemon.graph.lock();
        graph.find(device)?;
        let chain = graph.chain(device);
        if let Some(file) = args.opt_str("base")? {
            Some(by_file(&graph, device, file)?.name.clone())
        } else if let Some(name) = args.opt_str("base-node")? {
            graph.find_node(name)?;
            if !chain.iter().skip(1).any(|node| node.name == name) {
                return Err(QmpError::generic(format!("Node '{name}' is not a backing image of '{device}'")));
            }
            Some(name.to_owned())
        } else if let Some(name) = args.opt_str("bottom")? {
            graph.find_node(name)?;
            let position = chain.iter().position(|node| node.name == name);
            let position = position.ok_or_else(|| {
                QmpError::generic(format!("Node '{name}' is not in a chain starting from '{device}'"))
            })?;
            chain.get(position + 1).map(|node| node.name.clone())
        } else {
            None
        }
    };
    if base.is_none() && args.has("backing-file") {
        return Err(QmpError::generic("backing file specified, but streaming the entire chain"));
    }
    daemon.start_stream(session, request(daemon, args, "stream")?, device, base.as_deref())?;
    Ok(Value::Null)
}

fn commit(daemon: &Arc<Daemon>, session: &Session, args: &Args) -> Reply<Value> {
    let device = args.str("device")?;
    let (top, base) = {
        let graph = daemon.graph.lock();
        if graph.get(device).is_none() {
            return Err(QmpError::new(ErrorClass::DeviceNotFound, format!("Device '{device}' not found")));
        }
        for (one, other) in [("top-node", "top"), ("base-node", "base")] {
            if args.has(one) && args.has(other) {
                return Err(QmpError::generic(format!("'{one}' and '{other}' are mutually exclusive")));
            }
        }
        let chain = graph.chain(device);
        let in_chain = |name: &str, from: usize| -> Reply<usize> {
            graph.find_node(name)?;
            let position = chain.iter().skip(from).position(|node| node.name == name);
            position
                .map(|position| position + from)
                .ok_or_else(|| QmpError::generic(format!("'{name}' is not in this backing file chain")))
        };
        let named = |file: &str| (0..chain.len()).find(|index| is_called(&chain, *index, file));
        let top = match (args.opt_str("top-node")?, args.opt_str("top")?) {
            (Some(name), _) => in_chain(name, 0)?,
            (None, Some(file)) => {
                named(file).ok_or_else(|| QmpError::generic(format!("Top image file {file} not found")))?
            }
            (None, None) => 0,
        };
        let base = match (args.opt_str("base-node")?, args.opt_str("base")?) {
            (Some(name), _) => in_chain(name, top)?,
            (None, Some(file)) => named(file)
                .ok_or_else(|| QmpError::generic(format!("Can't find '{file}' in the backing chain")))?,
            (None, None) => chain.len() - 1,
        };
        if base <= top {
            return Err(QmpError::generic("cannot commit an image into itself"));
        }
        if chain[..top].iter().all(|node| node.is_filter()) && args.has("backing-file") {
            return Err(QmpError::generic("'backing-file' specified, but 'top' is the active layer"));
        }
        (chain[top].name.clone(), chain[base].name.clone())
    };
    daemon.start_commit(session, request(daemon, args, "commit")?, device, &top, &base)?;
    Ok(Value::Null)
}

fn change_backing_file(daemon: &Arc<Daemon>, _: &Session, args: &Args) -> Reply<Value> {
    let name = args.str("image-node-name")?;
    let (path, format) = {
        let graph = daemon.graph.lock();
        let device = args.str("device")?;
        graph.find(device)?;
        let image = graph.find_node(name)?;
        let (true, Some(below)) = (image.qcow2.is_some(), graph.backing_of(name)) else {
            return Err(QmpError::generic(
                "not allowing backing file change on an image without a backing file",
            ));
        };
        if !graph.chain(device).iter().any(|node| node.name == name) {
            return Err(QmpError::generic(format!("'{device}' and image file are not in the same chain")));
        }
        (image.path.clone(), graph.in_headers(below).format_in_headers())
    };
    if let Some(path) = path {
        daemon.check_backing(&path, None, args.str("backing-file")?, Some(format))?;
    }
    // For the time of the change, if it was not.
    let writable = daemon.make_writable(name)?;
    let image = daemon.graph.lock().find_node(name).map(|node| node.qcow2.clone());
    let changed = image.and_then(|image| match image {
        Some(image) => image
            .set_backing_file(Some(args.str("backing-file")?.as_bytes()), Some(format.as_str()))
            .map_err(qmp_error),
        None => Ok(()),
    });
    daemon.make_read_only(writable);
    changed.map(|()| Value::Null)
}
