//! The NBD server and exports.

use std::sync::Arc;

use blockmirror_qmp::schema::{BOOL, Command, Member, Object, STR, Type, req};
use blockmirror_qmp::{QmpError, Session};
use serde_json::{Map, Value};

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Argument, Arguments, NoArguments, arguments, choice, variant};
use crate::export::NewExport;
use crate::schema::{BitmapRef, NbdServerArgs};

static NBD_SERVER_START: Command = Command::new(
    "nbd-server-start",
    "Starts the NBD server, of which there is one at most.",
    NbdServerArgs::MEMBERS,
)
.differs("`tls-authz` is refused");

static NBD_SERVER_STOP: Command =
    Command::new("nbd-server-stop", "Stops the NBD server; all exports go with it.", &[]);

choice! {
    enum ExportType("BlockExportType", "How it is exported.", differs "there are no vhost-user, vduse and \
     FUSE exports") {
        Nbd = "nbd", "by the NBD server";
    }
}

arguments! {
    struct NbdExport("BlockExportOptionsNbd", "An export over NBD.") {
        name: Option<String> = "name", "what clients ask for" [default "the node's name"];
        description: Option<String> = "description", "words for people";
        bitmaps: Option<Vec<BitmapRef>> = "bitmaps", "bitmaps that clients may read";
        allocation_depth: Option<bool> = "allocation-depth", "whether clients may ask which image of the \
         chain holds what"
            [default "false"];
    }
}

arguments! {
    struct AnyExport {
        _kind: ExportType = "type", "how";
        id: String = "id", "name of the export, for commands";
        node_name: String = "node-name", "the node";
        writable: Option<bool> = "writable", "whether clients may write" [default "false"];
        writethrough: Option<bool> = "writethrough", "refused if true";
        _fixed_iothread: Option<bool> = "fixed-iothread", "without effect";
        iothread: Option<String> = "iothread", "without effect but that the iothread object is in use";
        _allow_inactive: Option<bool> = "allow-inactive", "without effect";
    }
}

/// What is to be exported.
pub(crate) static EXPORT_OPTIONS: Object = Object::union(
    "BlockExportOptions",
    "What is to be exported, and how.",
    AnyExport::MEMBERS,
    "type",
    &[variant::<NbdExport>("nbd")],
);

/// The arguments of `block-export-add`.
pub(crate) struct ExportArgs {
    any: AnyExport,
    nbd: NbdExport,
}

impl Arguments for ExportArgs {
    const MEMBERS: &'static [Member] = AnyExport::MEMBERS;
    const CHANGEABLE: &'static [(&'static str, bool)] = &[];

    fn parse(members: &Map<String, Value>) -> Reply<Self> {
        Ok(Self { any: AnyExport::parse(members)?, nbd: NbdExport::parse(members)? })
    }
}

static BLOCK_EXPORT_ADD: Command = Command::boxed("block-export-add", "Exports a node.", &EXPORT_OPTIONS);

choice! {
    enum RemoveModeArg("BlockExportRemoveMode", "What becomes of clients.") {
        Safe = "safe", "the export stays while it has any";
        Hard = "hard", "they are cut off";
    }
}

arguments! {
    struct ExportDelArgs {
        id: String = "id", "the export";
        mode: Option<RemoveModeArg> = "mode", "what becomes of clients" [default "safe"];
    }
}

static BLOCK_EXPORT_DEL: Command =
    Command::new("block-export-del", "Removes an export.", ExportDelArgs::MEMBERS);

arguments! {
    struct NbdAddArgs {
        device: String = "device", "the node";
        name: Option<String> = "name", "what clients ask for" [default "the node's name"];
        description: Option<String> = "description", "words for people";
        writable: Option<bool> = "writable", "whether clients may write" [default "false"];
        bitmap: Option<String> = "bitmap", "a bitmap that clients may read";
    }
}

static NBD_SERVER_ADD: Command = Command::new(
    "nbd-server-add",
    "Exports a node; `block-export-add` in its older form.",
    NbdAddArgs::MEMBERS,
)
.differs("it is not deprecated");

arguments! {
    struct NbdRemoveArgs {
        name: String = "name", "the export: its id, which is its name if that command gave it";
        mode: Option<RemoveModeArg> = "mode", "what becomes of clients" [default "safe"];
    }
}

static NBD_SERVER_REMOVE: Command = Command::new(
    "nbd-server-remove",
    "Removes an export that was added by `nbd-server-add`; `block-export-del` in its older form.",
    NbdRemoveArgs::MEMBERS,
)
.differs("it is not deprecated");

static EXPORT_INFO: Object = Object::new(
    "BlockExportInfo",
    "An export.",
    &[
        req("id", STR, "its name, for commands"),
        req("type", ExportType::TYPE, "how it is exported"),
        req("node-name", STR, "the node, which a pivot changes"),
        req("shutting-down", BOOL, "whether it is going"),
    ],
);

static QUERY_BLOCK_EXPORTS: Command = Command::new("query-block-exports", "Lists the exports.", &[])
    .returns(Type::Array(&Type::Object(&EXPORT_INFO)), "the exports, newest first");

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_for_exports(&NBD_SERVER_START, |services, _, args: NbdServerArgs| {
            services.exports.start_nbd_server(args).map(|()| Value::Null)
        })
        .add_for_exports(&NBD_SERVER_STOP, |services, _, _: NoArguments| {
            services.exports.stop_nbd_server().map(|()| Value::Null)
        })
        .add_for_exports(&BLOCK_EXPORT_ADD, |services, _, args: ExportArgs| {
            services.add_export_by(&args).map(|()| Value::Null)
        })
        .add_deferred(&BLOCK_EXPORT_DEL, true, |services, args: ExportDelArgs| {
            services.exports.remove_export(&args.id, args.mode == Some(RemoveModeArg::Hard))
        })
        .add_for_exports(&NBD_SERVER_ADD, nbd_server_add)
        .add_deferred(&NBD_SERVER_REMOVE, true, |services, args: NbdRemoveArgs| {
            services.exports.remove_export(&args.name, args.mode == Some(RemoveModeArg::Hard))
        })
        .add_quick(&QUERY_BLOCK_EXPORTS, |services, _, _: NoArguments| Ok(services.exports.list()));
}

fn nbd_server_add(services: &Arc<Services>, _: &Session, args: NbdAddArgs) -> Reply<Value> {
    let device = &*args.device;
    let read_only = services.context.graph.lock().find(device)?.read_only;
    let name = args.name.as_deref().unwrap_or(device);
    let bitmap = args.bitmap.map(|name| BitmapRef { node: None, name });
    services.exports.add_export(&NewExport {
        id: name,
        node: device,
        name: Some(name),
        description: args.description.as_deref(),
        // As in QEMU: this older form makes the best of it.
        writable: args.writable.unwrap_or(false) && !read_only,
        allocation_depth: false,
        bitmaps: bitmap.as_slice(),
        iothread: None,
    })?;
    Ok(Value::Null)
}

impl Services {
    /// `block-export-add`, from the command line too.
    pub(crate) fn add_export_by(&self, ExportArgs { any, nbd }: &ExportArgs) -> Reply<()> {
        if any.writethrough == Some(true) {
            return Err(QmpError::generic("'writethrough' is not supported"));
        }
        self.exports.add_export(&NewExport {
            id: &any.id,
            node: &any.node_name,
            name: nbd.name.as_deref(),
            description: nbd.description.as_deref(),
            writable: any.writable.unwrap_or(false),
            allocation_depth: nbd.allocation_depth.unwrap_or(false),
            bitmaps: nbd.bitmaps.as_deref().unwrap_or_default(),
            iothread: any.iothread.as_deref(),
        })
    }
}
