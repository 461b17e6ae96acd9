//! Nodes and mirrors: `blockdev-add`, `blockdev-del`, `blockdev-mirror`, `quit`.

use std::sync::Arc;

use blockmirror_qmp::schema::{BOOL, Command, Enum, INT64, Member, STR, Type, UINT32, opt, req, value};
use blockmirror_qmp::{Args, Session};
use serde_json::Value;

use super::Commands;
use super::schema::BLOCKDEV_OPTIONS;
use crate::Reply;
use crate::daemon::Daemon;
use crate::job::MirrorRequest;

static BLOCKDEV_ADD: Command = Command::boxed(
    "blockdev-add",
    "Opens a node, and those described inside its options.",
    &BLOCKDEV_OPTIONS,
);

static BLOCKDEV_DEL: Command = Command::new(
    "blockdev-del",
    "Closes a node that is not in use, and those that were opened with it.",
    &[req("node-name", STR, "the node")],
);

pub(crate) static SYNC: Enum = Enum::new(
    "MirrorSyncMode",
    "What is copied.",
    &[
        value("top", "what the top image itself holds"),
        value("full", "everything that the chain of images holds"),
        value("none", "only what is written from now on"),
        value("incremental", "what a bitmap says has changed; the bitmap starts anew if the job succeeds"),
        value("bitmap", "what a bitmap says has changed; `bitmap-mode` says what becomes of it"),
    ],
)
.differs("there, mirrors refuse `incremental` and `bitmap`");

static BITMAP_MODE: Enum = Enum::new(
    "BitmapSyncMode",
    "What becomes of the bitmap.",
    &[
        value("on-success", "it starts anew if the job succeeds"),
        value("never", "nothing"),
        value("always", "it starts anew; if the job fails it keeps what the target does not have"),
    ],
);

pub(crate) static ON_ERROR: Enum = Enum::new(
    "BlockdevOnError",
    "What happens when a request fails.",
    &[
        value("report", "the job fails"),
        value(
            "ignore",
            "the job goes on, and tries the range again, twice a second at most; a stream or commit fails in the end",
        ),
        value("enospc", "the job pauses if space ran out, and fails otherwise"),
        value("stop", "the job pauses"),
        value("auto", "the same as `enospc`"),
    ],
);

pub(crate) static COPY_MODE: Enum = Enum::new(
    "MirrorCopyMode",
    "When the target gets what is written meanwhile.",
    &[
        value("background", "when its turn comes"),
        value("write-blocking", "at once: a write ends when both have it"),
        value(
            "auto",
            "whichever serves: the job becomes ready whatever is written, and slows writes no more than needed",
        )
        .ours(),
    ],
);

pub(super) const JOB_ID: Member = opt("job-id", STR, "name of the job; has to be given");
pub(super) const SYNC_MEMBER: Member = req("sync", Type::Enum(&SYNC), "what is copied");
pub(super) const SPEED: Member = opt("speed", INT64, "bytes per second").default("0: no limit");
pub(super) const GRANULARITY: Member = opt(
    "granularity",
    UINT32,
    "bytes per bit of the dirty bitmap, a power of two between 512 and 64M; 0 is the default",
)
.default("the cluster size of the target, but at least 4096 and at most 65536; 65536 if it has none");
pub(super) const BUF_SIZE: Member = opt(
    "buf-size",
    INT64,
    "bytes that may be in flight, rounded up to a multiple of the granularity; 0 is the default",
)
.default("16 MiB");
pub(super) const ON_SOURCE: Member =
    opt("on-source-error", Type::Enum(&ON_ERROR), "what happens when reading fails").default("report");
pub(super) const ON_TARGET: Member =
    opt("on-target-error", Type::Enum(&ON_ERROR), "what happens when writing the target fails")
        .default("report");
pub(super) const COPY: Member =
    opt("copy-mode", Type::Enum(&COPY_MODE), "when the target gets what is written meanwhile")
        .default("background");
pub(super) const AUTO_FINALIZE: Member =
    opt("auto-finalize", BOOL, "whether the job ends without `job-finalize`").default("true");
pub(super) const AUTO_DISMISS: Member =
    opt("auto-dismiss", BOOL, "whether it vanishes without `job-dismiss`").default("true");
pub(super) const REPLACES: Member =
    opt("replaces", STR, "the node whose users go over: the device, or one below filters on it")
        .default("the device");
pub(super) const UNMAP: Member = opt("unmap", BOOL, "whether zeros may give space back").default("true");
pub(super) const TARGET_IS_ZERO: Member = opt(
    "target-is-zero",
    BOOL,
    "whether all of the target reads as zeros and will when its backing file is attached, so that zeros are left out; \
     an export is zeroed otherwise, whatever it says",
)
.default("false")
.ours();
pub(super) const BITMAP: Member =
    opt("bitmap", STR, "the bitmap of the device for `sync` incremental and bitmap").ours();
pub(super) const BITMAP_MODE_MEMBER: Member =
    opt("bitmap-mode", Type::Enum(&BITMAP_MODE), "what becomes of the bitmap").default("on-success").ours();

/// The arguments of `blockdev-mirror`, in a transaction too.
pub(crate) static BLOCKDEV_MIRROR_MEMBERS: &[Member] = &[
    JOB_ID,
    req("device", STR, "the node to copy from"),
    req("target", STR, "the node to copy to; it has no other user"),
    REPLACES,
    SYNC_MEMBER,
    BITMAP,
    BITMAP_MODE_MEMBER,
    SPEED,
    GRANULARITY,
    BUF_SIZE,
    ON_SOURCE,
    ON_TARGET,
    opt("filter-node-name", STR, "a free name; no node gets it, as none is put in front"),
    COPY,
    TARGET_IS_ZERO,
    AUTO_FINALIZE,
    AUTO_DISMISS,
];

static BLOCKDEV_MIRROR: Command = Command::new(
    "blockdev-mirror",
    "Starts copying a node to another while it is written. When source and target are equal the job is ready \
     (`BLOCK_JOB_READY`) and stays so; `job-complete` then moves the users of the source to the target, `block-job-cancel` \
     keeps the target as a copy of one instant, and `job-cancel` gives it up. Nodes of different lengths make the job fail.",
    BLOCKDEV_MIRROR_MEMBERS,
)
.differs(
    "no node is put in front of the device, `replaces` names the device or what filters below it stand on, what is in flight is tracked by bytes \
     and not by granules, dirty bitmaps go with the users to the target and join those there, and a granule of which a few \
     bytes were written is copied in units of 4 KiB",
);

static QUIT: Command = Command::new("quit", "Ends the daemon: jobs are given up, images closed.", &[]);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_quick(&BLOCKDEV_ADD, |daemon, _, args| daemon.add_node(args.map()).map(|()| Value::Null))
        .add_deferred(&BLOCKDEV_DEL, false, |daemon, args| {
            let released = daemon.graph.lock().remove(args.str("node-name")?)?;
            let daemon = Arc::clone(daemon);
            Ok(Box::new(move || {
                daemon.close(released);
                Ok(Value::Null)
            }))
        })
        .add(&BLOCKDEV_MIRROR, blockdev_mirror)
        .add_quick(&QUIT, |daemon, session, _| {
            let daemon = Arc::clone(daemon);
            session.after_answer(move || daemon.quit());
            Ok(Value::Null)
        });
}

fn blockdev_mirror(daemon: &Arc<Daemon>, session: &Session, args: &Args) -> Reply<Value> {
    let request = MirrorRequest::new(daemon, args, args.str("target")?)?;
    let prepared = daemon.prepare_mirror(request)?;
    daemon.start_mirror(Some(session), prepared)?;
    Ok(Value::Null)
}
