//! Snapshots inside of a qcow2 image: taken and deleted while the guest is held; taken in transactions too.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use blockmirror_mirror::Drained;
use blockmirror_qcow2::{NewSnapshot, Qcow2, Snapshot, SnapshotRef};
use blockmirror_qmp::schema::{Command, INT, Object, STR, Type, opt, req};
use blockmirror_qmp::{QmpError, Session};
use serde_json::{Value, json};

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Arguments, arguments};
use crate::context::Context;
use crate::errors::qmp_error;
use crate::graph::HOLD_LIMIT;

arguments! {
    /// The arguments of `blockdev-snapshot-internal-sync`, in a transaction too.
    pub(super) struct TakeArgs("BlockdevSnapshotInternal", "A new snapshot inside of an image.") {
        device: String = "device", "the node, an image";
        name: String = "name", "the new snapshot";
    }
}

arguments! {
    struct DeleteArgs {
        device: String = "device", "the node, an image";
        id: Option<String> = "id", "id of the snapshot";
        name: Option<String> = "name", "name of the snapshot";
    }
}

static SNAPSHOT_INFO: Object = Object::new(
    "SnapshotInfo",
    "A snapshot inside of an image.",
    &[
        req("id", STR, "its id"),
        req("name", STR, "its name"),
        req("vm-state-size", INT, "bytes of the guest's state"),
        req("date-sec", INT, "when it was taken, in seconds since 1970"),
        req("date-nsec", INT, "the rest, in nanoseconds"),
        req("vm-clock-sec", INT, "the guest's clock"),
        req("vm-clock-nsec", INT, "the rest, in nanoseconds"),
        opt("icount", INT, "instructions that the guest had executed"),
    ],
);

static TAKE: Command = Command::new(
    "blockdev-snapshot-internal-sync",
    "Takes a snapshot inside of an image.",
    TakeArgs::MEMBERS,
)
.differs("the node must not be in use by a job");

static DELETE: Command = Command::new(
    "blockdev-snapshot-delete-internal-sync",
    "Deletes a snapshot inside of an image.",
    DeleteArgs::MEMBERS,
)
.differs("the node must not be in use by a job")
.returns(Type::Object(&SNAPSHOT_INFO), "the snapshot that was deleted");

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add(&TAKE, |services, _, args: TakeArgs| take(&services.context, &args).map(|_| Value::Null))
        .add(&DELETE, delete);
}

/// A snapshot that has been taken, as long as it can be undone.
pub(super) struct TakenSnapshot {
    device: String,
    image: Arc<Qcow2>,
    id: String,
    name: String,
}

impl TakenSnapshot {
    /// Deletes it. The guest is held.
    ///
    /// # Errors
    /// It cannot be deleted, and stays.
    pub(super) fn undo(self) -> Reply<()> {
        let Self { device, image, id, name } = self;
        let deleted = image.delete_snapshot(&SnapshotRef::IdAndName { id, name: name.clone() });
        let stays = |error| QmpError::generic(format!("snapshot '{name}' of '{device}' stays: {error}"));
        deleted.map(drop).map_err(stays)
    }
}

/// The image of the node `device`, whose guest is held.
fn held_image(context: &Context, device: &str) -> Reply<(Drained, Arc<Qcow2>)> {
    let (tap, image) = {
        let graph = context.graph.lock();
        let node = graph.find(device)?;
        if graph.attachments_of(device).any(|(_, u)| u.parent_node().is_some()) {
            return Err(QmpError::generic("Need a root block node"));
        }
        graph.check_no_job(device)?;
        if node.read_only {
            return Err(QmpError::generic(format!("Device '{device}' is read only")));
        }
        let image = node.qcow2.clone().ok_or_else(|| {
            QmpError::generic(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                node.driver.name
            ))
        })?;
        (Arc::clone(&node.tap), image)
    };
    let drained = tap.drain_for(HOLD_LIMIT);
    let drained =
        drained.ok_or_else(|| QmpError::generic("A write of a guest does not end: nothing was changed"))?;
    Ok((drained, image))
}

/// `blockdev-snapshot-internal-sync`.
pub(super) fn take(context: &Context, TakeArgs { device, name }: &TakeArgs) -> Reply<TakenSnapshot> {
    let (_held, image) = held_image(context, device)?;
    if name.is_empty() {
        return Err(QmpError::generic("Name is empty"));
    }
    if image.snapshots().map_err(qmp_error)?.iter().any(|snapshot| snapshot.name == *name) {
        return Err(QmpError::generic(format!(
            "Snapshot with name '{name}' already exists on device '{device}'"
        )));
    }
    // There is no guest whose clock could be asked.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let new = NewSnapshot::new(&**name).date(now).vm_clock(now);
    let Snapshot { id, name, .. } = image.create_snapshot(&new).map_err(qmp_error)?;
    Ok(TakenSnapshot { device: device.clone(), image, id, name })
}

fn delete(services: &Arc<Services>, _: &Session, args: DeleteArgs) -> Reply<Value> {
    let DeleteArgs { device, id, name } = args;
    let (_held, image) = held_image(&services.context, &device)?;
    let wanted = match (id.clone(), name.clone()) {
        (Some(id), Some(name)) => SnapshotRef::IdAndName { id, name },
        (Some(id), None) => SnapshotRef::Id(id),
        (None, Some(name)) => SnapshotRef::Name(name),
        (None, None) => return Err(QmpError::generic("Name or id must be provided")),
    };
    if wanted.find(&image.snapshots().map_err(qmp_error)?).is_none() {
        let [id, name] = [id, name].map(|given| given.unwrap_or_else(|| "null".to_owned()));
        return Err(QmpError::generic(format!(
            "Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"
        )));
    }
    image.delete_snapshot(&wanted).map(|snapshot| info(&snapshot)).map_err(qmp_error)
}

fn info(snapshot: &Snapshot) -> Value {
    let mut info = json!({
        "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.as_secs(), "date-nsec": snapshot.date.subsec_nanos(),
        "vm-clock-sec": snapshot.vm_clock.as_secs(), "vm-clock-nsec": snapshot.vm_clock.subsec_nanos(),
    });
    if let Some(icount) = snapshot.icount {
        info["icount"] = icount.into();
    }
    info
}
