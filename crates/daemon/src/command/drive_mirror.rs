//! `drive-mirror`: a mirror to a file that is named, and made if need be.
//!
//! What must hold: a mirror that does not start leaves the target as it was: a new file gets its name once
//! the
//! job runs, and one that is written in place loses its contents after all checks that need no image. The
//! target's node has no other owner: it goes with the job, unless the users of the source have moved to it.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_image::Format;
use blockmirror_nbd::NbdUri;
use blockmirror_qmp::schema::Command;
use blockmirror_qmp::{QmpError, Session};
use blockmirror_raw::SECTOR;
use serde_json::{Map, Value, json};

use super::snapshot::NewImageMode;
use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Arguments, Int64};
use crate::context::Context;
use crate::driver::{Found, Inherited, backing_in_header, probe_format};
use crate::graph::{Node, NodeId};
use crate::job::MirrorRequest;
use crate::new_image::{CreatedFile, NewFileSpec, format_named, protocol_node};
use crate::schema::{BitmapSync, CopyModeArg, MirrorArgs, OnErrorArg, ReflinkArg, Sync, mirror_arguments};

mirror_arguments! {
    pub(super) struct DriveMirrorArgs {
        job_id: Option<String> = "job-id", "name of the job; has to be given";
        device: String = "device", "the node to copy from";
        target: String = "target", "path of the target, or the URI of an export";
        format: Option<String> = "format", "its format"
            [default "that of the device; of a target that is there, what it is found to be"];
        node_name: Option<String> = "node-name", "name of its node" [default "one that starts with `#block`"];
    } contents {
        mode: Option<NewImageMode> = "mode", "whether it is made" [default "absolute-paths"];
    } pace {
        unmap: Option<bool> = "unmap", "whether zeros may give space back" [default "true"];
    } end {
        filter_node_name: Option<String> = "filter-node-name", "a free name; no node gets it, as none is \
         put in front" [ours];
    }
}

impl DriveMirrorArgs {
    /// What it has in common with `blockdev-mirror`, to a node that is still to be opened.
    fn mirror(&self) -> MirrorArgs {
        let args = self.clone();
        MirrorArgs {
            job_id: args.job_id,
            device: args.device,
            target: String::new(),
            replaces: args.replaces,
            sync: args.sync,
            bitmap: args.bitmap,
            bitmap_mode: args.bitmap_mode,
            speed: args.speed,
            granularity: args.granularity,
            buf_size: args.buf_size,
            on_source_error: args.on_source_error,
            on_target_error: args.on_target_error,
            filter_node_name: args.filter_node_name,
            copy_mode: args.copy_mode,
            target_is_zero: args.target_is_zero,
            x_reflink: args.x_reflink,
            auto_finalize: args.auto_finalize,
            auto_dismiss: args.auto_dismiss,
            x_log: None,
        }
    }
}

static DRIVE_MIRROR: Command = Command::new(
    "drive-mirror",
    "As `blockdev-mirror`, to a target that is named by its path. A new target stands on the device's \
     backing file for `sync` \
     top, on the device for none, and alone otherwise; one that is there, on what its header names.",
    DriveMirrorArgs::MEMBERS,
)
.differs(
    "as for `blockdev-mirror`; an invalid argument leaves no file behind; what a server exports can be a \
     target with `mode` \
     existing only, and without TLS",
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&DRIVE_MIRROR, start);
}

/// What the target stands on.
#[derive(Debug)]
enum Below {
    Nothing,
    /// This node, of the source's chain.
    Shared(String),
    /// The source.
    Source,
    /// A file that its header names and that is no part of the source's chain.
    Named,
}

/// `drive-mirror`.
pub(super) fn start(services: &Arc<Services>, session: &Session, args: DriveMirrorArgs) -> Reply<Value> {
    let context = &services.context;
    let path = &*args.target;
    let existing = args.mode == Some(NewImageMode::Existing);
    let (mut request, below, size, backing, source_format) = {
        let graph = context.graph.lock();
        let source = graph.find(&args.device)?;
        if let Some(name) = &args.node_name {
            graph.check_name(name)?;
        }
        let shared = graph.backing_of(&source.name);
        let (below, stands_on) = match (args.sync, shared) {
            (Sync::Top, Some(shared)) => (Below::Shared(shared.name.clone()), Some(shared)),
            (Sync::None, _) => (Below::Source, Some(source)),
            _ => (Below::Nothing, None),
        };
        // A target that is there stands on what its own header names.
        let below = (!existing).then_some(below);
        let backing = stands_on.map(|node| graph.in_headers(node)).filter(|_| !existing);
        let backing =
            backing.map(|node| Ok::<_, QmpError>((graph.header_name(&node.name)?, node.format_in_headers())));
        let backing = backing.transpose()?;
        let (size, format) = (source.device.len(), graph.in_headers(source).format_in_headers());
        drop(graph);
        (MirrorRequest::new(context, args.mirror())?.unmap(args.unmap), below, size, backing, format)
    };
    services.jobs.check_mirror(&mut request)?;
    if request.below_filters && args.node_name.is_none() {
        return Err(QmpError::generic(
            "a node-name must be provided when replacing a named node of the graph",
        ));
    }
    let format = match &args.format {
        Some(name) => Some(format_named(name)?),
        None if existing => None,
        None => Some(source_format),
    };
    let mut created = match format {
        Some(format) if !existing => {
            if NbdUri::looks_like_uri(Path::new(path)) {
                return Err(QmpError::generic("An export cannot be made: give 'mode' existing"));
            }
            let new = NewFileSpec { path, format, size, backing };
            let check = || services.jobs.try_mirror(&request, size.next_multiple_of(SECTOR));
            Some(CreatedFile::create(context, &request.source, new, check)?)
        }
        _ => None,
    };
    let found = created.as_ref().and_then(CreatedFile::found);
    let named = NamedTarget { path, found, format, node: args.node_name.as_deref() };
    let (target, below) = open(context, &request.source, named, below)?;
    request.target.clone_from(&target.name);
    let started = match below {
        Below::Source => put_on_source(context, &request.source, &target.name),
        _ => Ok(()),
    };
    let prepared = started.and_then(|()| services.jobs.prepare_mirror(request));
    // Once it is prepared the job uses the target: its end, or its failing to start, closes the node.
    let prepared = prepared.inspect_err(|_| context.undo_node(&target))?;
    services.jobs.start_mirrors(Some(session), vec![prepared], |runs| match &mut created {
        Some(created) if runs => created.give_name(),
        _ => Ok(()),
    })?;
    if let Some(created) = created {
        created.keep();
    }
    Ok(Value::Null)
}

/// The target as the arguments describe it.
struct NamedTarget<'a> {
    path: &'a str,
    /// The file that will be there.
    found: Option<Found>,
    format: Option<Format>,
    node: Option<&'a str>,
}

/// Opens the target on what it is to stand on, by default on what its header names; its node has no owner.
/// Also says what that is.
fn open(
    context: &Context,
    source: &str,
    target: NamedTarget<'_>,
    below: Option<Below>,
) -> Reply<(NodeId, Below)> {
    let NamedTarget { path, found, format, node } = target;
    let options = |value: Value| match value {
        Value::Object(options) => options,
        _ => Map::new(),
    };
    let (file, found) = protocol_node(path, found)?;
    // Whether anything is unmapped is for the job to say.
    let inherited = Inherited { unmap: true, ..Inherited::default() };
    let file = context.open_node_on(&file, inherited, found)?;
    let opened = (|| {
        let format = format.map_or_else(|| probe(context, &file.name), Ok)?;
        let below = match below {
            Some(below) => below,
            None if format == Format::Qcow2 => named_by(context, source, &file.name)?,
            None => Below::Nothing,
        };
        let mut image = options(json!({"driver": format.as_str(), "file": file.name}));
        if let Some(name) = node {
            image.insert("node-name".to_owned(), json!(name));
        }
        let backing = match &below {
            // The driver follows the header.
            Below::Named => None,
            Below::Shared(backing) => Some(json!(backing)),
            Below::Nothing | Below::Source => Some(Value::Null),
        };
        if let Some(backing) = backing.filter(|_| format == Format::Qcow2) {
            image.insert("backing".to_owned(), backing);
        }
        Ok((context.open_node(&image, inherited)?, below))
    })();
    opened.inspect_err(|_| context.undo_node(&file))
}

/// The format of what is in the node `file`.
fn probe(context: &Context, file: &str) -> Reply<Format> {
    let (storage, filename) = {
        let graph = context.graph.lock();
        let node = graph.find(file)?;
        (node.storage.clone(), node.filename.clone())
    };
    storage.map_or(Ok(Format::Raw), |storage| probe_format(&*storage, &filename))
}

/// What the header of the image in the node `file` says it stands on. A node of the source's chain on the
/// very file that is named is shared: the file may be open for writing there.
fn named_by(context: &Context, source: &str, file: &str) -> Reply<Below> {
    let Some(named) = backing_in_header(context, file)? else { return Ok(Below::Nothing) };
    let graph = context.graph.lock();
    let is_named = |node: &&Node| {
        let format = graph.in_headers(node).format_in_headers();
        // A raw image of no stated format would have to be probed first.
        let same_format = named.format.map_or(format == Format::Qcow2, |named| named == format);
        // A raw node may show a part of its file.
        let is_part = ["offset", "size"].iter().any(|option| node.options.contains_key(*option));
        same_format && !is_part && graph.file_below(&node.name) == Some(named.file)
    };
    Ok(match graph.chain(source).into_iter().find(is_named) {
        Some(node) if node.name == source => Below::Source,
        Some(node) => Below::Shared(node.name.clone()),
        None => Below::Named,
    })
}

/// Puts the target on the source, whose users go on writing it: what they write shows in the target at once,
/// as it has to.
fn put_on_source(context: &Context, source: &str, target: &str) -> Reply<()> {
    let (link, image) = {
        let mut graph = context.graph.lock();
        let Some(image) = graph.find(target)?.qcow2.clone() else { return Ok(()) };
        (graph.attach_backing(target, source)?, image)
    };
    image.replace_backing(Some(link));
    Ok(())
}
