//! `qcow2`: an image, its data file, and its chain of backing files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_file::FileId;
use blockmirror_image::{Detected, Format, PROBE_LEN, Resolved, Role, detect};
use blockmirror_qcow2::{Error as Qcow2Error, Header, OpenOptions, OverlapChecks, Qcow2};
use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::{Alternate, Type};
use serde_json::{Map, Value};

use super::schema::{NodeRef, NodeRefOrNull};
use super::{Driver, OpenNode, OpenedAgain};
use crate::Reply;
use crate::arguments::{Argument, arguments, choice, disagreement};
use crate::context::Context;
use crate::driver::{Child, Opened, Opening, flattened};
use crate::errors::{cannot_change, is_read_only, qmp_error, refuse};
use crate::graph::{BackingLink, Kind, Node};

arguments! {
    pub(super) struct Encrypt("BlockdevQcow2Encryption", "Refused.") {
        _format: String = "format", "refused";
    }
}

const OVERLAP_CHECK: &str = "overlap-check";

choice! {
    pub(super) enum OverlapMode("Qcow2OverlapCheckMode", "Which structures writes are checked against.") {
        None = "none", "none";
        Constant = "constant", "those that take no look at tables to know";
        Cached = "cached", "all but the L2 tables of snapshots";
        All = "all", "all";
    }
}

arguments! {
    pub(super) struct OverlapFlags("Qcow2OverlapCheckFlags", "Which structures writes are checked against.") {
        _template: Option<OverlapMode> = "template", "what is not said" [default "cached"];
        _main_header: Option<bool> = "main-header", "the header";
        _active_l1: Option<bool> = "active-l1", "the L1 table";
        _active_l2: Option<bool> = "active-l2", "the L2 tables";
        _refcount_table: Option<bool> = "refcount-table", "the refcount table";
        _refcount_block: Option<bool> = "refcount-block", "the refcount blocks";
        _snapshot_table: Option<bool> = "snapshot-table", "the table of snapshots";
        _inactive_l1: Option<bool> = "inactive-l1", "the L1 tables of snapshots";
        _inactive_l2: Option<bool> = "inactive-l2", "the L2 tables of snapshots";
        _bitmap_directory: Option<bool> = "bitmap-directory", "the directory of persistent bitmaps";
    }
}

/// Which structures writes are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct OverlapCheck(OverlapChecks);

impl Argument for OverlapCheck {
    const TYPE: Type = {
        static OVERLAP: Alternate = Alternate::new(
            "Qcow2OverlapChecks",
            "Which structures writes are checked against: a set of them, or one by one.",
            &[OverlapFlags::TYPE, OverlapMode::TYPE],
        );
        Type::Alternate(&OVERLAP)
    };

    fn read(value: &Value) -> Option<Self> {
        OverlapMode::read(value).map(drop).or_else(|| OverlapFlags::read(value).map(drop))?;
        let mut options = Map::new();
        options.insert(OVERLAP_CHECK.to_owned(), value.clone());
        Some(Self(overlap_checks(&flattened(&options))))
    }
}

/// What the options of a node, by dotted names, say that writes are checked against.
pub(crate) fn overlap_checks(options: &BTreeMap<String, Value>) -> OverlapChecks {
    let texts: Vec<_> = options
        .iter()
        .filter(|(name, _)| name.starts_with(OVERLAP_CHECK))
        .map(|(name, value)| (name, value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
        .collect();
    let texts = texts.iter().map(|(name, text)| (name.as_str(), text.as_str()));
    // Those of a node were read as arguments.
    OverlapChecks::from_options(texts).unwrap_or_default()
}

arguments! {
    pub(super) struct Qcow2Args("BlockdevOptionsQcow2", "An image.") {
        file: NodeRef = "file", "the node that the image lies in" [reopen];
        backing: Option<NodeRefOrNull> = "backing", "its backing file; null for none"
            [default "the one that the image names, if the daemon may open it", reopen];
        data_file: Option<NodeRef> = "data-file", "its data file" [default "the one that the image names"];
        _lazy_refcounts: Option<bool> = "lazy-refcounts", "without effect" [reopen];
        _pass_discard_request: Option<bool> = "pass-discard-request", "without effect: discards of freed \
         clusters are passed on"
            [reopen];
        _pass_discard_snapshot: Option<bool> = "pass-discard-snapshot", "without effect" [reopen];
        _pass_discard_other: Option<bool> = "pass-discard-other", "without effect" [reopen];
        _discard_no_unref: Option<bool> = "discard-no-unref", "without effect" [reopen];
        overlap_check: Option<OverlapCheck> = "overlap-check", "which structures writes are checked against"
            [default "cached", reopen];
        cache_size: Option<i64> = "cache-size", "bytes of metadata that are kept in memory"
            [default "32 MiB", reopen];
        l2_cache_size: Option<i64> = "l2-cache-size", "the same, where `cache-size` is not given" [reopen];
        _l2_cache_entry_size: Option<i64> = "l2-cache-entry-size", "without effect" [reopen];
        _refcount_cache_size: Option<i64> = "refcount-cache-size", "without effect" [reopen];
        _cache_clean_interval: Option<i64> = "cache-clean-interval", "without effect" [reopen];
        encrypt: Option<Encrypt> = "encrypt", "refused";
    }
}

/// An image.
pub(super) struct Qcow2Driver;

impl Driver for Qcow2Driver {
    const NAME: &'static str = "qcow2";
    const DOC: &'static str = "an image in that format";
    type Options = Qcow2Args;

    fn kind(_: bool) -> Kind {
        Kind::Format
    }

    fn open(opening: &mut Opening<'_>, options: Qcow2Args) -> Reply<Opened> {
        open(opening, &options)
    }

    fn reopen_rw(node: &OpenNode) -> Reply<Option<OpenedAgain>> {
        let Some(image) = node.image.as_ref().filter(|image| !image.geometry().writable) else {
            return Ok(None);
        };
        open_again(node, image, image.storage(), true).map(Some)
    }

    fn reopen_on(node: &OpenNode) -> Reply<OpenedAgain> {
        let (Some(image), Some(storage)) = (&node.image, &node.storage) else {
            return Err(cannot_change("file"));
        };
        open_again(node, image, storage, image.geometry().writable)
    }

    fn writes_past_tap(_: &Node) -> bool {
        true
    }
}

/// Opens `image`, which the node has, once more in `storage`.
fn open_again(
    node: &OpenNode,
    image: &Qcow2,
    storage: &Arc<dyn Storage>,
    writable: bool,
) -> Reply<OpenedAgain> {
    let figure = |name: &str| node.options.get(name).and_then(Value::as_i64);
    let options = with_cache(figure("cache-size").or_else(|| figure("l2-cache-size")))?;
    let mut options = options.writable(writable).overlap_checks(overlap_checks(&node.options));
    if let Some(data) = &node.data {
        options = options.data_file(Arc::clone(data));
    }
    if let Some(backing) = image.backing() {
        options = options.backing(backing);
    }
    let opened = options.open(Arc::clone(storage));
    let image = opened.map_err(|e| qmp_error(e.in_file(&node.filename.as_str().into())))?;
    let image = Arc::new(image);
    Ok(OpenedAgain { device: Arc::clone(&image) as _, image: Some(image) })
}

fn open(opening: &mut Opening<'_>, args: &Qcow2Args) -> Reply<Opened> {
    refuse(args.encrypt.is_some(), "qcow2", "encrypt")?;
    let common = opening.common;
    let file = opening.child(&args.file, common.for_file())?;
    let storage = file.storage()?;
    let read_only = common.read_only || file.read_only;
    if !common.read_only && file.read_only {
        return Err(is_read_only());
    }
    let header = Header::read(&*storage).map_err(|e| unreadable(e, &file))?;
    opening.common.count_l1(header.l1_entries, &file.filename)?;

    let mut children = vec![file.file_link("file", read_only, common.force_share)];
    let mut options = with_cache(args.cache_size.or(args.l2_cache_size))?.writable(!read_only);
    if let Some(OverlapCheck(checks)) = args.overlap_check {
        options = options.overlap_checks(checks);
    }
    if let Some(data) = data_file(opening, args, &header, &file)? {
        children.push(data.file_link("data-file", read_only, common.force_share));
        options = options.data_file(data.storage()?);
    }
    if let Some(backing) = backing(opening, args, &header, &file)? {
        let link = BackingLink::for_overlay(Arc::clone(&backing.device) as _);
        children.push(backing.backing_link(Arc::clone(&link)));
        options = options.backing(link);
    }
    let image = options.open(storage).map_err(|e| qmp_error(e.in_file(&file.filename.as_str().into())))?;
    let image = Arc::new(image);
    Ok(Opened {
        qcow2: Some(Arc::clone(&image)),
        path: file.path,
        read_only,
        children,
        ..Opened::leaf(image, file.filename)
    })
}

fn with_cache(bytes: Option<i64>) -> Reply<OpenOptions> {
    let options = OpenOptions::new();
    Ok(match bytes {
        Some(bytes) => {
            let bytes = u64::try_from(bytes).map_err(|_| disagreement("cache-size"))?;
            options.cache_bytes(usize::try_from(bytes).unwrap_or(usize::MAX))
        }
        None => options,
    })
}

fn data_file(
    opening: &mut Opening<'_>,
    args: &Qcow2Args,
    header: &Header,
    file: &Child,
) -> Reply<Option<Child>> {
    let inherited = opening.common.for_file();
    if let Some(reference) = &args.data_file {
        if header.data_file.is_none() {
            return Err(QmpError::generic(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        return opening.child(reference, inherited).map(Some);
    }
    let Some(data) = &header.data_file else { return Ok(None) };
    let Some(name) = &data.name else {
        return Err(QmpError::generic("'data-file' is required for this image"));
    };
    let found = resolve(opening.context, file, Role::Data, name.as_path())?;
    opening.child_on(found, inherited).map(Some)
}

fn backing(
    opening: &mut Opening<'_>,
    args: &Qcow2Args,
    header: &Header,
    file: &Child,
) -> Reply<Option<Child>> {
    let inherited = opening.common.for_backing();
    match &args.backing {
        Some(NodeRefOrNull(None)) => return Ok(None),
        Some(NodeRefOrNull(Some(reference))) => return opening.child(reference, inherited).map(Some),
        None => {}
    }
    let Some(backing) = &header.backing else { return Ok(None) };
    let found = resolve(opening.context, file, Role::Backing, backing.name.as_path())?;
    let given = backing.format.as_deref().map(Format::in_header).transpose().map_err(qmp_error)?;
    let file = opening.child_on(found, inherited)?;
    let format = match given {
        Some(format) => format,
        None => probe_format(&*file.storage()?, &file.filename)?,
    };
    // Read-only because backing files are, not because the user says so: a job may open it for writing.
    let mut node = Map::new();
    node.insert("driver".to_owned(), format.as_str().into());
    node.insert("file".to_owned(), file.name.into());
    opening.child(&NodeRef::Options(node), inherited).map(Some)
}

/// A backing file that a header names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NamedBacking {
    pub(crate) file: FileId,
    /// Its format, if the header says that too.
    pub(crate) format: Option<Format>,
}

/// The backing file that the header of the image in the node `file` names, if the policy lets it be opened;
/// `None` if the header names none.
pub(crate) fn backing_in_header(context: &Context, file: &str) -> Reply<Option<NamedBacking>> {
    let file = Child::named(context, file.to_owned())?;
    let header = Header::read(&*file.storage()?).map_err(|e| unreadable(e, &file))?;
    let Some(backing) = &header.backing else { return Ok(None) };
    let found = resolve(context, &file, Role::Backing, backing.name.as_path())?;
    let format = backing.format.as_deref().map(Format::in_header).transpose().map_err(qmp_error)?;
    Ok(found.handle.id().map(|file| NamedBacking { file, format }))
}

/// Why the header of the image in `file` cannot be read.
fn unreadable(error: Qcow2Error, file: &Child) -> QmpError {
    match error {
        Qcow2Error::NotQcow2 { .. } => QmpError::generic("Image is not in qcow2 format"),
        error => qmp_error(error.in_file(&file.filename.as_str().into())),
    }
}

/// The file that `name` in the header of the image in `file` leads to, if the policy lets it be opened.
fn resolve(context: &Context, file: &Child, role: Role, name: &Path) -> Reply<Resolved> {
    let Some(image) = &file.path else {
        return Err(QmpError::generic(format!(
            "{}: names the {} '{}', which has to be given as an option, for the image is no file",
            file.filename,
            role.as_str(),
            name.display(),
        )));
    };
    let mut policy = context.policy_for(image)?;
    if let Some(id) = file.file {
        policy = policy.for_opened_file(image, id);
    }
    // A node that is read-only now may be written later.
    if role == Role::Data {
        policy = policy.for_writing();
    }
    policy.resolve(image, role, OsStr::new(name)).map_err(|e| {
        QmpError::generic(format!("{e}; give it as an option, or allow its directory with --allow-backing"))
    })
}

/// The format of the image in `storage`.
pub(crate) fn probe_format(storage: &dyn Storage, filename: &str) -> Reply<Format> {
    let mut head = [0; PROBE_LEN];
    storage.read_at(&mut head, 0).map_err(qmp_error)?;
    match detect(&head) {
        Detected::Known(format) => Ok(format),
        Detected::Foreign(format) => {
            Err(QmpError::generic(format!("{filename}: the format {format} is not supported")))
        }
        _ => Err(QmpError::generic(format!("{filename}: its format is not known"))),
    }
}
