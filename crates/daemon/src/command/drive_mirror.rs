//! `drive-mirror`: a mirror to a file that is named, and made if need be.
//!
//! What must hold: a mirror that does not start leaves the target as it was: a new file gets its name once
//! the job runs, and one that is written in place loses its contents after all checks that need no image. The
//! target's node has no other owner: it goes with the job, unless the users of the source have moved to it.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_image::Format;
use blockmirror_nbd::NbdUri;
use blockmirror_qmp::schema::{Command, Member, STR, Type, opt, req};
use blockmirror_qmp::{Args, QmpError, Session};
use blockmirror_raw::SECTOR;
use serde_json::{Map, Value, json};

use super::Commands;
use super::block::{
    AUTO_DISMISS, AUTO_FINALIZE, BITMAP, BITMAP_MODE_MEMBER, BUF_SIZE, COPY, GRANULARITY, JOB_ID, ON_SOURCE,
    ON_TARGET, REPLACES, SPEED, SYNC_MEMBER, TARGET_IS_ZERO, UNMAP,
};
use super::snapshot::NEW_IMAGE_MODE;
use crate::Reply;
use crate::daemon::Daemon;
use crate::driver::{Found, Inherited, backing_in_header, probe_format};
use crate::graph::Node;
use crate::job::MirrorRequest;
use crate::new_image::{CreatedFile, NewFileSpec, format_named, protocol_node};

static MEMBERS: [Member; 21] = [
    JOB_ID,
    req("device", STR, "the node to copy from"),
    req("target", STR, "path of the target, or the URI of an export"),
    opt("format", STR, "its format")
        .default("that of the device; of a target that is there, what it is found to be"),
    opt("node-name", STR, "name of its node").default("one that starts with `#block`"),
    REPLACES,
    SYNC_MEMBER,
    BITMAP,
    BITMAP_MODE_MEMBER,
    opt("mode", Type::Enum(&NEW_IMAGE_MODE), "whether it is made").default("absolute-paths"),
    SPEED,
    GRANULARITY,
    BUF_SIZE,
    ON_SOURCE,
    ON_TARGET,
    UNMAP,
    COPY,
    TARGET_IS_ZERO,
    AUTO_FINALIZE,
    AUTO_DISMISS,
    opt("filter-node-name", STR, "a free name; no node gets it, as none is put in front").ours(),
];

static DRIVE_MIRROR: Command = Command::new(
    "drive-mirror",
    "As `blockdev-mirror`, to a target that is named by its path. A new target stands on the device's backing file for `sync` \
     top, on the device for none, and alone otherwise; one that is there, on what its header names.",
    &MEMBERS,
)
.differs(
    "as for `blockdev-mirror`; an invalid argument leaves no file behind; what a server exports can be a target with `mode` \
     existing only, and without TLS",
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&DRIVE_MIRROR, drive_mirror);
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
pub(super) fn drive_mirror(daemon: &Arc<Daemon>, session: &Session, args: &Args) -> Reply<Value> {
    let path = args.str("target")?;
    let existing = args.opt_str("mode")? == Some("existing");
    let (mut request, below, size, backing, source_format) = {
        let graph = daemon.graph.lock();
        let source = graph.find(args.str("device")?)?;
        if let Some(name) = args.opt_str("node-name")? {
            graph.check_name(name)?;
        }
        let shared = graph.backing_of(&source.name);
        let (below, stands_on) = match (args.str("sync")?, shared) {
            ("top", Some(shared)) => (Below::Shared(shared.name.clone()), Some(shared)),
            ("none", _) => (Below::Source, Some(source)),
            _ => (Below::Nothing, None),
        };
        // A target that is there stands on what its own header names.
        let below = (!existing).then_some(below);
        let backing = stands_on.map(|node| graph.in_headers(node));
        let backing = backing.filter(|_| !existing);
        let backing =
            backing.map(|node| Ok::<_, QmpError>((graph.header_name(&node.name)?, node.format_in_headers())));
        let backing = backing.transpose()?;
        let (size, format) = (source.device.len(), graph.in_headers(source).format_in_headers());
        drop(graph);
        (MirrorRequest::new(daemon, args, "")?, below, size, backing, format)
    };
    daemon.check_mirror(&mut request)?;
    if request.below_filters && !args.has("node-name") {
        return Err(QmpError::generic(
            "a node-name must be provided when replacing a named node of the graph",
        ));
    }
    let format = match args.opt_str("format")? {
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
            let check = || daemon.try_mirror(&request, size.next_multiple_of(SECTOR));
            Some(CreatedFile::create(daemon, &request.source, new, check)?)
        }
        _ => None,
    };
    let found = created.as_ref().and_then(CreatedFile::found);
    let named = NamedTarget { path, found, format, node: args.opt_str("node-name")? };
    let (target, below) = open(daemon, &request.source, named, below)?;
    request.target = target.clone();
    let started = match below {
        Below::Source => put_on_source(daemon, &request.source, &target),
        _ => Ok(()),
    };
    let prepared = started.and_then(|()| daemon.prepare_mirror(request));
    // Once it is prepared the job uses the target: its end, or its failing to start, closes the node.
    let prepared = prepared.inspect_err(|_| daemon.undo_node(&target))?;
    daemon.start_mirrors(Some(session), vec![prepared], |runs| match &mut created {
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
    daemon: &Daemon,
    source: &str,
    target: NamedTarget<'_>,
    below: Option<Below>,
) -> Reply<(String, Below)> {
    let NamedTarget { path, found, format, node } = target;
    let options = |value: Value| match value {
        Value::Object(options) => options,
        _ => Map::new(),
    };
    let file = options(protocol_node(path));
    // Whether anything is unmapped is for the job to say.
    let inherited = Inherited { unmap: true, ..Inherited::default() };
    let file = daemon.open_node_on(&file, inherited, found)?;
    let opened = (|| {
        let format = format.map_or_else(|| probe(daemon, &file), Ok)?;
        let below = match below {
            Some(below) => below,
            None if format == Format::Qcow2 => named_by(daemon, source, &file)?,
            None => Below::Nothing,
        };
        let mut image = options(json!({"driver": format.as_str(), "file": file}));
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
        Ok((daemon.open_node(&image, inherited)?, below))
    })();
    opened.inspect_err(|_| daemon.undo_node(&file))
}

/// The format of what is in the node `file`.
fn probe(daemon: &Daemon, file: &str) -> Reply<Format> {
    let (storage, filename) = {
        let graph = daemon.graph.lock();
        let node = graph.find(file)?;
        (node.storage.clone(), node.filename.clone())
    };
    storage.map_or(Ok(Format::Raw), |storage| probe_format(&*storage, &filename))
}

/// What the header of the image in the node `file` says it stands on. A node of the source's chain on the
/// very file that is named is shared: the file may be open for writing there.
fn named_by(daemon: &Daemon, source: &str, file: &str) -> Reply<Below> {
    let Some(named) = backing_in_header(daemon, file)? else { return Ok(Below::Nothing) };
    let graph = daemon.graph.lock();
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
fn put_on_source(daemon: &Daemon, source: &str, target: &str) -> Reply<()> {
    let (link, image) = {
        let mut graph = daemon.graph.lock();
        let Some(image) = graph.find(target)?.qcow2.clone() else { return Ok(()) };
        (graph.attach_backing(target, source)?, image)
    };
    image.replace_backing(Some(link));
    Ok(())
}
