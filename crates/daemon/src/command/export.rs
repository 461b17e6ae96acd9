//! The NBD server and exports.

use std::sync::Arc;

use blockmirror_qmp::schema::{
    BOOL, Command, Enum, Event, Member, Object, STR, Type, UINT32, case, opt, req, value,
};
use blockmirror_qmp::{Args, Session};
use serde_json::Value;

use super::Commands;
use super::bitmap::BITMAP_OR_STR;
use super::schema::SOCKET_ADDRESS_LEGACY;
use crate::Reply;
use crate::daemon::Daemon;
use crate::export::NewExport;

static START_MEMBERS: [Member; 5] = [
    req("addr", Type::Object(&SOCKET_ADDRESS_LEGACY), "where it listens"),
    opt("handshake-max-seconds", UINT32, "how long a client may take to negotiate").default("10"),
    opt("tls-creds", STR, "id of TLS credentials for the server's end").default("no TLS"),
    opt("tls-authz", STR, "refused"),
    opt("max-connections", UINT32, "connections at the same time; 0 is no limit").default("100"),
];

static NBD_SERVER_START: Command =
    Command::new("nbd-server-start", "Starts the NBD server, of which there is one at most.", &START_MEMBERS)
        .differs("`tls-authz` is refused");

static NBD_SERVER_STOP: Command =
    Command::new("nbd-server-stop", "Stops the NBD server; all exports go with it.", &[]);

static EXPORT_TYPE: Enum =
    Enum::new("BlockExportType", "How it is exported.", &[value("nbd", "by the NBD server")])
        .differs("there are no vhost-user, vduse and FUSE exports");

static EXPORT_NBD: Object = Object::new(
    "BlockExportOptionsNbd",
    "An export over NBD.",
    &[
        opt("name", STR, "what clients ask for").default("the node's name"),
        opt("description", STR, "words for people"),
        opt("bitmaps", Type::Array(&Type::Alternate(&BITMAP_OR_STR)), "bitmaps that clients may read"),
        opt("allocation-depth", BOOL, "whether clients may ask which image of the chain holds what")
            .default("false"),
    ],
);

/// What is to be exported.
pub(crate) static EXPORT_OPTIONS: Object = Object::union(
    "BlockExportOptions",
    "What is to be exported, and how.",
    &[
        req("type", Type::Enum(&EXPORT_TYPE), "how"),
        req("id", STR, "name of the export, for commands"),
        req("node-name", STR, "the node"),
        opt("writable", BOOL, "whether clients may write").default("false"),
        opt("writethrough", BOOL, "refused if true"),
        opt("fixed-iothread", BOOL, "without effect"),
        opt("iothread", STR, "without effect but that the iothread object is in use"),
        opt("allow-inactive", BOOL, "without effect"),
    ],
    "type",
    &[case("nbd", &EXPORT_NBD)],
);

static BLOCK_EXPORT_ADD: Command = Command::boxed("block-export-add", "Exports a node.", &EXPORT_OPTIONS);

static REMOVE_MODE: Enum = Enum::new(
    "BlockExportRemoveMode",
    "What becomes of clients.",
    &[value("safe", "the export stays while it has any"), value("hard", "they are cut off")],
);
const MODE: Member = opt("mode", Type::Enum(&REMOVE_MODE), "what becomes of clients").default("safe");

static BLOCK_EXPORT_DEL: Command =
    Command::new("block-export-del", "Removes an export.", &[req("id", STR, "the export"), MODE]);

static NBD_SERVER_ADD: Command = Command::new(
    "nbd-server-add",
    "Exports a node; `block-export-add` in its older form.",
    &[
        req("device", STR, "the node"),
        opt("name", STR, "what clients ask for").default("the node's name"),
        opt("description", STR, "words for people"),
        opt("writable", BOOL, "whether clients may write").default("false"),
        opt("bitmap", STR, "a bitmap that clients may read"),
    ],
)
.differs("it is not deprecated");

static NBD_SERVER_REMOVE: Command = Command::new(
    "nbd-server-remove",
    "Removes an export that was added by `nbd-server-add`; `block-export-del` in its older form.",
    &[req("name", STR, "the export: its id, which is its name if that command gave it"), MODE],
)
.differs("it is not deprecated");

static EXPORT_INFO: Object = Object::new(
    "BlockExportInfo",
    "An export.",
    &[
        req("id", STR, "its name, for commands"),
        req("type", Type::Enum(&EXPORT_TYPE), "how it is exported"),
        req("node-name", STR, "the node, which a pivot changes"),
        req("shutting-down", BOOL, "whether it is going"),
    ],
);

static QUERY_BLOCK_EXPORTS: Command = Command::new("query-block-exports", "Lists the exports.", &[])
    .returns(Type::Array(&Type::Object(&EXPORT_INFO)), "the exports, newest first");

/// An export is gone.
pub(crate) static BLOCK_EXPORT_DELETED: Event =
    Event::new("BLOCK_EXPORT_DELETED", "An export is gone.", &[req("id", STR, "which")]);

/// All events of exports.
pub(super) static EVENTS: &[&Event] = &[&BLOCK_EXPORT_DELETED];

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_for_exports(&NBD_SERVER_START, |daemon, _, args| {
            daemon.start_nbd_server(args).map(|()| Value::Null)
        })
        .add_for_exports(&NBD_SERVER_STOP, |daemon, _, _| daemon.stop_nbd_server().map(|()| Value::Null))
        .add_for_exports(&BLOCK_EXPORT_ADD, |daemon, _, args| {
            daemon.add_export_by(args).map(|()| Value::Null)
        })
        .add_deferred(&BLOCK_EXPORT_DEL, true, |daemon, args| {
            daemon.remove_export(args.str("id")?, is_hard(args)?)
        })
        .add_for_exports(&NBD_SERVER_ADD, nbd_server_add)
        .add_deferred(&NBD_SERVER_REMOVE, true, |daemon, args| {
            daemon.remove_export(args.str("name")?, is_hard(args)?)
        })
        .add_quick(&QUERY_BLOCK_EXPORTS, |daemon, _, _| Ok(daemon.exports.list(daemon)));
}

fn is_hard(args: &Args) -> Reply<bool> {
    Ok(args.opt_str("mode")? == Some("hard"))
}

fn nbd_server_add(daemon: &Arc<Daemon>, _: &Session, args: &Args) -> Reply<Value> {
    let device = args.str("device")?;
    let read_only = daemon.graph.lock().find(device)?.read_only;
    let name = args.opt_str("name")?.unwrap_or(device);
    let bitmaps = args.opt_str("bitmap")?.map(|name| (None, name.to_owned())).into_iter().collect();
    daemon.add_export(&NewExport {
        id: name,
        node: device,
        name: Some(name),
        description: args.opt_str("description")?,
        // As in QEMU: this older form makes the best of it.
        writable: args.opt_bool("writable")?.unwrap_or(false) && !read_only,
        allocation_depth: false,
        bitmaps,
        iothread: None,
    })?;
    Ok(Value::Null)
}

impl Daemon {
    /// `block-export-add`, from the command line too.
    pub(crate) fn add_export_by(&self, args: &Args) -> Reply<()> {
        if args.opt_bool("writethrough")?.unwrap_or(false) {
            return Err(blockmirror_qmp::QmpError::generic("'writethrough' is not supported"));
        }
        let bitmaps = args.get("bitmaps").and_then(Value::as_array).into_iter().flatten();
        let bitmaps = bitmaps.map(|bitmap| match bitmap {
            Value::Object(members) => {
                let args = Args::new(members.clone());
                Ok((Some(args.str("node")?.to_owned()), args.str("name")?.to_owned()))
            }
            other => Ok((None, other.as_str().unwrap_or_default().to_owned())),
        });
        self.add_export(&NewExport {
            id: args.str("id")?,
            node: args.str("node-name")?,
            name: args.opt_str("name")?,
            description: args.opt_str("description")?,
            writable: args.opt_bool("writable")?.unwrap_or(false),
            allocation_depth: args.opt_bool("allocation-depth")?.unwrap_or(false),
            bitmaps: bitmaps.collect::<Reply<_>>()?,
            iothread: args.opt_str("iothread")?,
        })
    }
}
