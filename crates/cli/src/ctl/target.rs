//! The target of `mirror`: a node that is there, or one that is added for a file, a block device or an NBD
//! export.
//!
//! Everything is asked of the server: what a path leads to there counts, and whether it exists. Only a
//! relative path is taken from where we are.

use std::ffi::OsStr;
use std::path::Path;

use blockmirror_image::{Format, is_uri};
use blockmirror_nbd::{NbdAddress, NbdUri};
use blockmirror_qmp::Client;
use serde_json::{Value, json};

use super::added::{Added, Found, Names, NewFile};
use super::node::{Node, nodes};
use crate::args::{CtlMirrorArgs, JobSync};
use crate::failure::{Failure, Outcome};

/// A target that is open.
#[derive(Debug)]
pub(super) struct Target {
    /// Its node.
    pub(super) node: String,
    /// What it is, for people.
    pub(super) shown: String,
    /// Whether it is a file that existed.
    pub(super) is_overwritten: bool,
    /// The format that it was opened in, if it was opened here.
    pub(super) format: Option<Format>,
    /// Its path, if it is a file or a block device.
    pub(super) path: Option<String>,
}

/// Opens the target of `args` for a mirror of `device`, under `names` if it is not a node already. It is as
/// long as `device`, as far as the server tells.
pub(super) fn open(
    client: &mut Client,
    added: &mut Added,
    args: &CtlMirrorArgs,
    device: &Node,
    names: &Names,
) -> Outcome<Target> {
    if args.reconnect_delay.is_some() && !is_uri(&args.target) {
        let target = &args.target;
        return Err(Failure::usage(format_args!("--reconnect-delay: '{target}' is no export of a server")));
    }
    let target = find_or_add(client, added, args, device, names)?;
    let there = nodes(client)?.into_iter().find(|node| node.name == target.node);
    match (there.as_ref().and_then(Node::size), device.size()) {
        (Some(has), Some(needs)) if has != needs => Err(Failure::failed(format_args!(
            "{}: it has {has} bytes, and {} has {needs}: a mirror needs a target of the same length",
            args.target, device.name
        ))),
        _ => Ok(target),
    }
}

fn find_or_add(
    client: &mut Client,
    added: &mut Added,
    args: &CtlMirrorArgs,
    device: &Node,
    names: &Names,
) -> Outcome<Target> {
    let name = &args.target;
    let needs_backing = args.sync == JobSync::Top && device.has_backing();
    if is_uri(name) {
        refuse_existing(name, needs_backing)?;
        return export(client, added, args, names);
    }
    if nodes(client)?.iter().any(|node| node.name == *name) {
        if args.target_format.is_some() {
            return Err(Failure::usage(format_args!("{name} is a node, which has a format already (-O)")));
        }
        refuse_existing(name, needs_backing)?;
        let shown = format!("node {name}");
        return Ok(Target { node: name.clone(), shown, is_overwritten: false, format: None, path: None });
    }
    let is_path = !name.starts_with("json:") && (name.contains('/') || format_of_name(name).is_some());
    if !is_path {
        return Err(Failure::failed(format_args!(
            "no node '{name}'; a file of that name is written ./{name}"
        )));
    }
    let path = absolute(Path::new(name))?;
    let found = added.file(client, &names.file, &path, true)?;
    refuse_existing(name, needs_backing && found != Found::Nothing)?;
    let by_name = args.target_format.or_else(|| format_of_name(&path));
    let format = match found {
        Found::Nothing => {
            let format = by_name.or_else(|| device.format()).unwrap_or(Format::Raw);
            create(client, added, args, device, names, (&path, format))?;
            format
        }
        Found::Device => args.target_format.unwrap_or(Format::Raw),
        // What a file begins with is not believed: a guest may have written it.
        Found::File => by_name.ok_or_else(|| {
            Failure::usage(format_args!("{name}: it exists, and its name does not say its format; -O does"))
        })?,
    };
    added.node(client, image(format, names, json!(names.file)))?;
    let created = if found == Found::Nothing { ", created" } else { "" };
    Ok(Target {
        node: names.node.clone(),
        shown: format!("{name} ({format}{created})"),
        is_overwritten: found == Found::File,
        format: Some(format),
        path: Some(path),
    })
}

/// Refuses a target that is not created with the backing file that it needs: it may lack what the source
/// shows of its own.
fn refuse_existing(name: &str, needs_backing: bool) -> Outcome<()> {
    match needs_backing {
        true => Err(Failure::usage(format_args!(
            "{name}: with --sync top the target has to be a new file, on the source's backing file"
        ))),
        false => Ok(()),
    }
}

/// Creates the file of the target. The mirror writes all of it; a copy of the top image alone stands on what
/// that stands on.
fn create(
    client: &mut Client,
    added: &mut Added,
    args: &CtlMirrorArgs,
    device: &Node,
    names: &Names,
    (path, format): (&str, Format),
) -> Outcome<()> {
    let name = &args.target;
    let no = |why: &str| Err(Failure::usage(format_args!("{name}: {why}")));
    let Some(size) = device.size() else {
        return Err(Failure::failed(format_args!("the length of '{}' is not known", device.name)));
    };
    let has_backing = args.sync == JobSync::Top && device.has_backing();
    let backing = match (has_backing, device.backing()) {
        (true, Some(_)) if format == Format::Raw => {
            return no("with --sync top the target has a backing file, as a raw image cannot");
        }
        (true, Some((file, _))) if device.text("backing_file") != Some(file) => {
            return no("the backing file of the source is not the one that its header names");
        }
        (true, Some((file, Some(format)))) => {
            if !file.starts_with('/') {
                return no(&format!("the server has only a relative name of its backing file, {file}"));
            }
            Some((file, format))
        }
        (true, Some((file, None))) => {
            return no(&format!("the format of its backing file {file} is not in a header"));
        }
        (true, None) => return no("the header of the source names no backing file"),
        (false, _) => None,
    };
    NewFile { path, format, size, backing }.create(client, added, names)
}

/// An export of an NBD server. It exists, or the server says that it does not.
fn export(client: &mut Client, added: &mut Added, args: &CtlMirrorArgs, names: &Names) -> Outcome<Target> {
    let name = &args.target;
    let wrong = |why: &dyn std::fmt::Display| Failure::usage(format_args!("{name}: {why}"));
    let uri: NbdUri = name.parse().map_err(|error| wrong(&error))?;
    let server = match &uri.address {
        NbdAddress::Tcp { host, port } => json!({"type": "inet", "host": host, "port": port.to_string()}),
        NbdAddress::Unix(path) if !path.as_os_str().as_encoded_bytes().starts_with(b"\0") => {
            json!({"type": "unix", "path": absolute(path)?})
        }
        _ => return Err(wrong(&"an abstract socket is not supported here")),
    };
    let mut file = json!({"driver": "nbd", "server": server, "export": uri.export});
    if let Some(seconds) = args.reconnect_delay {
        file["reconnect-delay"] = seconds.into();
    }
    if uri.tls {
        let Some(folder) = &uri.tls_certificates else {
            return Err(wrong(&"with TLS it needs ?tls-certificates=DIR"));
        };
        let credentials = json!({
            "qom-type": "tls-creds-x509", "id": names.credentials, "endpoint": "client",
            "dir": absolute(folder)?, "verify-peer": uri.tls_verify_peer.unwrap_or(true),
        });
        added.object(client, credentials)?;
        file["tls-creds"] = names.credentials.as_str().into();
        if let Some(host) = &uri.tls_hostname {
            file["tls-hostname"] = host.as_str().into();
        }
    }
    let format = args.target_format.unwrap_or(Format::Raw);
    added.node(client, image(format, names, file))?;
    let (node, shown) = (names.node.clone(), format!("{name} ({format})"));
    Ok(Target { node, shown, is_overwritten: false, format: Some(format), path: None })
}

/// The options of the node `names.node` for the image in `file`.
fn image(format: Format, names: &Names, file: Value) -> Value {
    json!({"driver": format.as_str(), "node-name": names.node, "file": file, "discard": "unmap"})
}

/// The format that the name of a file ends with.
fn format_of_name(path: &str) -> Option<Format> {
    match Path::new(path).extension().and_then(OsStr::to_str)? {
        "qcow2" => Some(Format::Qcow2),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    }
}

/// `path` for a server that runs in another directory.
pub(super) fn absolute(path: &Path) -> Outcome<String> {
    let absolute = std::path::absolute(path);
    let absolute = absolute.map_err(|e| Failure::failed(format_args!("{}: {e}", path.display())))?;
    let text = absolute.to_str().map(str::to_owned);
    text.ok_or_else(|| Failure::usage(format_args!("{}: it is not UTF-8, as QMP is", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_name_says_the_format() {
        let format = |name| format_of_name(name).map(Format::as_str);
        assert_eq!(format("/a.b/c.qcow2"), Some("qcow2"));
        assert_eq!((format("c.img"), format("c.raw")), (Some("raw"), Some("raw")));
        assert_eq!((format("/x.raw/c"), format("c.vmdk"), format(".qcow2")), (None, None, None));
    }
}
