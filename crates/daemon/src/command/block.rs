//! Nodes and mirrors: `blockdev-add`, `blockdev-del`, `blockdev-mirror`, `quit`.

use std::sync::Arc;

use blockmirror_qmp::Session;
use blockmirror_qmp::schema::Command;
use serde_json::Value;

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Arguments, NoArguments, arguments};
use crate::driver::{BLOCKDEV_OPTIONS, NodeOptions};
use crate::job::MirrorRequest;
use crate::schema::MirrorArgs;

static BLOCKDEV_ADD: Command = Command::boxed(
    "blockdev-add",
    "Opens a node, and those described inside its options.",
    &BLOCKDEV_OPTIONS,
);

arguments! {
    struct DelArgs {
        node_name: String = "node-name", "the node";
    }
}

static BLOCKDEV_DEL: Command = Command::new(
    "blockdev-del",
    "Closes a node that is not in use, and those that were opened with it.",
    DelArgs::MEMBERS,
);

static BLOCKDEV_MIRROR: Command = Command::new(
    "blockdev-mirror",
    "Starts copying a node to another while it is written. When source and target are equal the job is ready \
     (`BLOCK_JOB_READY`) and stays so; `job-complete` then moves the users of the source to the target, \
     `block-job-cancel` \
     keeps the target as a copy of one instant, and `job-cancel` gives it up. Nodes of different lengths \
     make the job fail.",
    MirrorArgs::MEMBERS,
)
.differs(
    "no node is put in front of the device, `replaces` names the device or what filters below it stand on, \
     what is in flight is tracked by bytes \
     and not by granules, dirty bitmaps go with the users to the target and join those there, and a granule \
     of which a few \
     bytes were written is copied in units of 4 KiB",
);

static QUIT: Command = Command::new("quit", "Ends the daemon: jobs are given up, images closed.", &[]);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_quick(&BLOCKDEV_ADD, |services, _, options: NodeOptions| {
            services.context.add_node(&options.0).map(|()| Value::Null)
        })
        .add_deferred(&BLOCKDEV_DEL, false, |services, args: DelArgs| {
            let released = services.context.graph.lock().remove(&args.node_name)?;
            let services = Arc::clone(services);
            Ok(Box::new(move || {
                services.context.close(released);
                Ok(Value::Null)
            }))
        })
        .add(&BLOCKDEV_MIRROR, blockdev_mirror)
        .add_quick(&QUIT, |services, session, _: NoArguments| {
            let services = Arc::clone(services);
            session.after_answer(move || services.quit.ask());
            Ok(Value::Null)
        });
}

fn blockdev_mirror(services: &Arc<Services>, session: &Session, args: MirrorArgs) -> Reply<Value> {
    let prepared = services.jobs.prepare_mirror(MirrorRequest::new(&services.context, args)?)?;
    services.jobs.start_mirror(Some(session), prepared)?;
    Ok(Value::Null)
}
