//! `object-add`, `object-del`, and what assigns nodes to I/O threads.

use std::sync::Arc;

use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::{Alternate, Command, NULL, STR, Type};
use serde_json::Value;

use super::Commands;
use crate::Reply;
use crate::arguments::{Argument, Arguments, arguments};
use crate::context::Context;
use crate::graph::Parent;
use crate::schema::{OBJECT_OPTIONS, ObjectArgs};

static OBJECT_ADD: Command =
    Command::boxed("object-add", "Makes an object that others refer to.", &OBJECT_OPTIONS);

arguments! {
    struct ObjectDelArgs {
        id: String = "id", "the object";
    }
}

static OBJECT_DEL: Command =
    Command::new("object-del", "Forgets an object that is not in use.", ObjectDelArgs::MEMBERS);

/// The id of an I/O thread, or none.
#[derive(Clone, Debug)]
struct IothreadOrNull(Option<String>);

impl Argument for IothreadOrNull {
    const TYPE: Type = {
        static STR_OR_NULL: Alternate =
            Alternate::new("StrOrNull", "The id of an I/O thread, or none.", &[STR, NULL]);
        Type::Alternate(&STR_OR_NULL)
    };

    fn read(value: &Value) -> Option<Self> {
        Some(Self(value.as_str().map(str::to_owned)))
    }
}

arguments! {
    struct SetIothreadArgs {
        node_name: String = "node-name", "the node";
        iothread: IothreadOrNull = "iothread", "the thread; null for none";
        force: Option<bool> = "force", "whether it may be in use by an export or a job" [default "false"];
    }
}

static SET_IOTHREAD: Command = Command::new(
    "x-blockdev-set-iothread",
    "Assigns a node to an I/O thread. Without effect but that the object is in use.",
    SetIothreadArgs::MEMBERS,
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_quick(&OBJECT_ADD, |services, _, args: ObjectArgs| {
            services.context.objects.add(args).map(|()| Value::Null)
        })
        .add(&SET_IOTHREAD, |services, _, args: SetIothreadArgs| {
            let force = args.force.unwrap_or(false);
            set_iothread(&services.context, &args.node_name, args.iothread.0.as_deref(), force)
                .map(|()| Value::Null)
        })
        .add_quick(&OBJECT_DEL, |services, _, args: ObjectDelArgs| {
            services.context.objects.remove(&args.id).map(|()| Value::Null)
        });
}

/// `x-blockdev-set-iothread`.
fn set_iothread(context: &Context, node: &str, thread: Option<&str>, force: bool) -> Reply<()> {
    let tap = {
        let graph = context.graph.lock();
        let found = graph
            .get(node)
            .ok_or_else(|| QmpError::generic(format!("Failed to find node with node-name='{node}'")))?;
        let is_busy = graph
            .attachments_of(node)
            .any(|(_, u)| matches!(u.parent, Parent::Export(_) | Parent::Job { .. }));
        if is_busy && !force {
            return Err(QmpError::generic(format!(
                "Node {node} is associated with a BlockBackend and could be in use (use force=true to \
                 override this check)"
            )));
        }
        Arc::clone(&found.tap)
    };
    let thread = match thread {
        None => None,
        Some(id) => {
            let thread = context.objects.iothread(id);
            Some(thread.ok_or_else(|| QmpError::generic(format!("Cannot find iothread {id}")))?)
        }
    };
    context.objects.assign(&tap, thread);
    Ok(())
}
