//! `snapshot`: an overlay is created and becomes the disk.
//!
//! What must hold: the header of the overlay names the image that the disk was. A name that leads there only
//! from the server's own directory is not written.

use std::ffi::OsStr;
use std::path::Path;

use blockmirror_image::{FileId, Format, join_name};
use blockmirror_qmp::Client;
use serde_json::{Value, json};

use super::added::{Added, Found, Names, NewFile};
use super::job::list;
use super::node::{self, Node, nodes};
use super::start::first_free;
use super::target::absolute;
use crate::args::CtlSnapshotArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};

pub(super) fn snapshot(console: &mut Console<'_>, client: &mut Client, args: &CtlSnapshotArgs) -> Outcome {
    let device = node::find(client, &args.device)?;
    let (there, jobs) = (nodes(client)?, list(client)?);
    let is_free = |name: &str| Names::of_node(name).are_free(&there, &jobs);
    let overlay = args.node_name.clone().unwrap_or_else(|| first_free("overlay", is_free));
    let names = Names::of_node(&overlay);
    names.check("--node-name", &overlay)?;
    let (backing, format) = backing(&device, args)?;
    let path = absolute(&args.file)?;
    if let Some(given) = &args.backing_file {
        check_given(client, &device, &names, &path, given)?;
    }
    let size = device.size();
    let size =
        size.ok_or_else(|| Failure::failed(format_args!("the length of '{}' is not known", device.name)))?;
    let mut added = Added::default();
    let new =
        NewFile { path: &path, format: Format::Qcow2, size, backing: Some((&backing, format.as_str())) };
    let taken = take(client, &mut added, &device, &names, &new);
    if let Err(failure) = taken {
        added.remove(console, client);
        return Err(failure);
    }
    let text = format!("{overlay}: the disk is {path} now, on {backing}");
    console.report(&format!("{}\n", one_line(&text)));
    Ok(Exit::Done)
}

/// The name and the format of the backing file, for the header of the overlay.
fn backing(device: &Node, args: &CtlSnapshotArgs) -> Outcome<(String, Format)> {
    let node = &device.name;
    let format = device.format().filter(|_| matches!(device.text("drv"), Some("raw" | "qcow2")));
    let format = format.ok_or_else(|| {
        let driver = device.text("drv").unwrap_or_default();
        Failure::failed(format_args!("'{node}' is no image in a format, but a node of the driver {driver}"))
    })?;
    if let Some(given) = &args.backing_file {
        return Ok((given.clone(), format));
    }
    match device.filename() {
        Some(name) if name.starts_with('/') => Ok((name.to_owned(), format)),
        // It leads there from where the server was started, and not from the overlay.
        Some(name) => Err(Failure::usage(format_args!(
            "the server calls the image of '{node}' {name}; give its absolute path: --backing-file"
        ))),
        None => {
            Err(Failure::usage(format_args!("the image of '{node}' has no name; give it: --backing-file")))
        }
    }
}

/// Refuses a name `given` for the header of the overlay `path` that leads to no file, or to another one than
/// the image that the disk is, as far as that can be seen.
fn check_given(client: &mut Client, device: &Node, names: &Names, path: &str, given: &str) -> Outcome<()> {
    let found = join_name(Path::new(path), OsStr::new(given));
    let found = found.ok_or_else(|| Failure::usage(format_args!("--backing-file {given}: it is no path")))?;
    Added::must_exist(client, &names.file, &absolute(&found)?)?;
    let image = device.filename().filter(|name| name.starts_with('/'));
    let (image, found) = (image.and_then(|name| FileId::of(Path::new(name))), FileId::of(&found));
    match (image, found) {
        (Some(image), Some(found)) if image != found => Err(Failure::usage(format_args!(
            "--backing-file {given}: it is not the image of '{}'",
            device.name
        ))),
        _ => Ok(()),
    }
}

/// Creates the overlay, and puts it above the disk.
fn take(
    client: &mut Client,
    added: &mut Added,
    device: &Node,
    names: &Names,
    new: &NewFile<'_>,
) -> Outcome<()> {
    if added.file(client, &names.file, new.path, false)? != Found::Nothing {
        return Err(Failure::failed(format_args!("{}: it exists; a snapshot needs a new file", new.path)));
    }
    new.create(client, added, names)?;
    // It gets its backing file by the snapshot.
    let node = json!({
        "driver": "qcow2", "node-name": names.node, "file": names.file, "backing": Value::Null,
        "discard": "unmap",
    });
    added.node(client, node)?;
    client.execute("blockdev-snapshot", json!({"node": device.name, "overlay": names.node}))?;
    Ok(())
}
