//! Chains of images: `block-stream`, `block-commit`, `change-backing-file`.

use std::sync::Arc;

use blockmirror_qmp::schema::Command;
use blockmirror_qmp::{ErrorClass, QmpError, Session};
use serde_json::Value;

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Arguments, arguments};
use crate::errors::qmp_error;
use crate::graph::{Graph, Node};
use crate::job::{ChainRequest, JobOptions, job_span};
use crate::schema::OnErrorArg;

arguments! {
    pub(super) struct StreamArgs {
        job_id: Option<String> = "job-id", "name of the job; has to be given";
        device: String = "device", "the image";
        base: Option<String> = "base", "the base, by its file name";
        base_node: Option<String> = "base-node", "the base" [default "none: the image stands alone \
         afterwards"];
        backing_file: Option<String> = "backing-file", "what the header calls the new backing file"
            [default "the shortest relative name that leads there if the old name was relative, else its \
             absolute path"];
        _backing_mask_protocol: Option<bool> = "backing-mask-protocol", "without effect" [default "false"];
        bottom: Option<String> = "bottom", "the last image that is brought up, instead of the base, which \
         is below it";
        speed: Option<i64> = "speed", "bytes per second" [default "0: no limit"];
        on_error: Option<OnErrorArg> = "on-error", "what happens when a request fails" [default "report"];
        filter_node_name: Option<String> = "filter-node-name", "a free name; no node gets it, as none is \
         put in front";
        auto_finalize: Option<bool> = "auto-finalize", "whether the job ends without \
         `job-finalize`" [default "true"];
        auto_dismiss: Option<bool> = "auto-dismiss", "whether it vanishes without \
         `job-dismiss`" [default "true"];
    }
}

arguments! {
    struct CommitArgs {
        job_id: Option<String> = "job-id", "name of the job; has to be given";
        device: String = "device", "the top of the chain";
        base_node: Option<String> = "base-node", "the image that is written" [default "the lowest of the \
         chain"];
        base: Option<String> = "base", "the same, by its file name";
        top_node: Option<String> = "top-node", "the highest image that is committed" [default "the device"];
        top: Option<String> = "top", "the same, by its file name";
        backing_file: Option<String> = "backing-file", "what the header calls the new backing file"
            [default "the shortest relative name that leads there if the old name was relative, else its \
             absolute path"];
        _backing_mask_protocol: Option<bool> = "backing-mask-protocol", "without effect" [default "false"];
        speed: Option<i64> = "speed", "bytes per second" [default "0: no limit"];
        on_error: Option<OnErrorArg> = "on-error", "what happens when a request fails" [default "report"];
        filter_node_name: Option<String> = "filter-node-name", "a free name; no node gets it, as none is \
         put in front";
        auto_finalize: Option<bool> = "auto-finalize", "whether the job ends without \
         `job-finalize`" [default "true"];
        auto_dismiss: Option<bool> = "auto-dismiss", "whether it vanishes without \
         `job-dismiss`" [default "true"];
    }
}

arguments! {
    struct ChangeArgs {
        device: String = "device", "the top of the chain";
        image_node_name: String = "image-node-name", "the image";
        backing_file: String = "backing-file", "the name";
    }
}

static STREAM: Command = Command::new(
    "block-stream",
    "Starts a job that brings up into an image what it shows of its backing files, down to a base or all of \
     it. Then the \
     image stands on the base, or alone.",
    StreamArgs::MEMBERS,
)
.differs("into qcow2 images only, and no node is put in front of the device");
static COMMIT: Command = Command::new(
    "block-commit",
    "Starts a job that writes images of a chain into one below them. From the top of the chain it is a \
     mirror: it becomes \
     ready, and `job-complete` moves the users of the device to the base. From further down it ends by \
     itself.",
    CommitArgs::MEMBERS,
)
.differs(
    "the base has to be open for writing: it was given as `backing` by its name. What lies below the top \
     has no other user, \
     no node is put in front of the device, and dirty bitmaps go with the users to the base and join those \
     there",
);
static CHANGE: Command = Command::new(
    "change-backing-file",
    "Changes what the header of an image calls its backing file. What is open stays.",
    ChangeArgs::MEMBERS,
);

/// What both jobs are asked for.
struct JobParams {
    id: Option<String>,
    kind: &'static str,
    speed: Option<i64>,
    on_error: Option<OnErrorArg>,
    filter: Option<String>,
    backing_file: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&STREAM, stream).add(&COMMIT, commit).add(&CHANGE, change_backing_file);
}

impl JobParams {
    fn request(self, services: &Services) -> Reply<ChainRequest> {
        let speed = u64::try_from(self.speed.unwrap_or(0))
            .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
        let id = self.id.unwrap_or_default();
        let reserved = services.jobs.reserve(&id)?;
        if let Some(name) = &self.filter {
            let before = if self.kind == "stream" { "Could not create node: " } else { "" };
            let free = services.context.graph.lock().check_name(name);
            free.map_err(|error| QmpError::generic(format!("{before}{}", error.desc)))?;
        }
        let job = JobOptions {
            span: job_span(&id, self.kind),
            id,
            kind: self.kind,
            speed,
            auto_finalize: self.auto_finalize.unwrap_or(true),
            auto_dismiss: self.auto_dismiss.unwrap_or(true),
        };
        let on_error = OnErrorArg::policy(self.on_error);
        Ok(ChainRequest { job, _reserved: reserved, on_error, backing_file: self.backing_file })
    }
}

fn not_both(one: (&str, &Option<String>), other: (&str, &Option<String>)) -> Reply<()> {
    match (one, other) {
        ((one, Some(_)), (other, Some(_))) => {
            Err(QmpError::generic(format!("'{one}' and '{other}' cannot be specified at the same time")))
        }
        _ => Ok(()),
    }
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
pub(super) fn stream(services: &Arc<Services>, session: &Session, args: StreamArgs) -> Reply<Value> {
    let (base, node, bottom) =
        (("base", &args.base), ("base-node", &args.base_node), ("bottom", &args.bottom));
    not_both(base, node)?;
    not_both(base, bottom)?;
    not_both(bottom, node)?;
    let device = args.device;
    let base = {
        let graph = services.context.graph.lock();
        graph.find(&device)?;
        let chain = graph.chain(&device);
        if let Some(file) = &args.base {
            Some(by_file(&graph, &device, file)?.name.clone())
        } else if let Some(name) = args.base_node {
            graph.find_node(&name)?;
            if !chain.iter().skip(1).any(|node| node.name == name) {
                return Err(QmpError::generic(format!("Node '{name}' is not a backing image of '{device}'")));
            }
            Some(name)
        } else if let Some(name) = args.bottom {
            graph.find_node(&name)?;
            let position = chain.iter().position(|node| node.name == name);
            let position = position.ok_or_else(|| {
                QmpError::generic(format!("Node '{name}' is not in a chain starting from '{device}'"))
            })?;
            chain.get(position + 1).map(|node| node.name.clone())
        } else {
            None
        }
    };
    if base.is_none() && args.backing_file.is_some() {
        return Err(QmpError::generic("backing file specified, but streaming the entire chain"));
    }
    let params = JobParams {
        id: args.job_id,
        kind: "stream",
        speed: args.speed,
        on_error: args.on_error,
        filter: args.filter_node_name,
        backing_file: args.backing_file,
        auto_finalize: args.auto_finalize,
        auto_dismiss: args.auto_dismiss,
    };
    services.jobs.start_stream(session, params.request(services)?, &device, base.as_deref())?;
    Ok(Value::Null)
}

fn commit(services: &Arc<Services>, session: &Session, args: CommitArgs) -> Reply<Value> {
    let device = &*args.device;
    let (top, base) = {
        let graph = services.context.graph.lock();
        if graph.get(device).is_none() {
            return Err(QmpError::new(ErrorClass::DeviceNotFound, format!("Device '{device}' not found")));
        }
        if args.top_node.is_some() && args.top.is_some() {
            return Err(QmpError::generic("'top-node' and 'top' are mutually exclusive"));
        }
        if args.base_node.is_some() && args.base.is_some() {
            return Err(QmpError::generic("'base-node' and 'base' are mutually exclusive"));
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
        let top = match (&args.top_node, &args.top) {
            (Some(name), _) => in_chain(name, 0)?,
            (None, Some(file)) => {
                named(file).ok_or_else(|| QmpError::generic(format!("Top image file {file} not found")))?
            }
            (None, None) => 0,
        };
        let base = match (&args.base_node, &args.base) {
            (Some(name), _) => in_chain(name, top)?,
            (None, Some(file)) => named(file)
                .ok_or_else(|| QmpError::generic(format!("Can't find '{file}' in the backing chain")))?,
            (None, None) => chain.len() - 1,
        };
        if base <= top {
            return Err(QmpError::generic("cannot commit an image into itself"));
        }
        if chain[..top].iter().all(|node| node.is_filter()) && args.backing_file.is_some() {
            return Err(QmpError::generic("'backing-file' specified, but 'top' is the active layer"));
        }
        (chain[top].name.clone(), chain[base].name.clone())
    };
    let params = JobParams {
        id: args.job_id,
        kind: "commit",
        speed: args.speed,
        on_error: args.on_error,
        filter: args.filter_node_name,
        backing_file: args.backing_file,
        auto_finalize: args.auto_finalize,
        auto_dismiss: args.auto_dismiss,
    };
    services.jobs.start_commit(session, params.request(services)?, device, &top, &base)?;
    Ok(Value::Null)
}

fn change_backing_file(services: &Arc<Services>, _: &Session, args: ChangeArgs) -> Reply<Value> {
    let name = &*args.image_node_name;
    let (path, format) = {
        let graph = services.context.graph.lock();
        let device = &*args.device;
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
        services.context.check_backing(&path, None, &args.backing_file, Some(format))?;
    }
    // For the time of the change, if it was not.
    let writable = services.context.make_writable(name)?;
    let image = services.context.graph.lock().find_node(name).map(|node| node.qcow2.clone());
    let changed = image.and_then(|image| match image {
        Some(image) => image
            .set_backing_file(Some(args.backing_file.as_bytes()), Some(format.as_str()))
            .map_err(qmp_error),
        None => Ok(()),
    });
    services.context.make_read_only(writable);
    changed.map(|()| Value::Null)
}
