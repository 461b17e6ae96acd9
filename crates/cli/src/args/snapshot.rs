//! The command line of `blockmirror snapshot`, and which snapshot `convert -l` means.

use std::path::PathBuf;

use blockmirror_image::{CacheMode, Format, NodeOptions, SnapshotRef};
use blockmirror_qmp::keyval;
use clap::Args;

use super::LockArgs;

pub(super) const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  blockmirror snapshot -c before-upgrade disk.qcow2
  blockmirror snapshot disk.qcow2
  blockmirror snapshot -a before-upgrade disk.qcow2
  blockmirror snapshot -d before-upgrade disk.qcow2
  blockmirror convert -l before-upgrade disk.qcow2 old.raw";

#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// The image; unless snapshots are only listed it must not be in use
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// List the snapshots; so does the command without a verb
    #[arg(short = 'l', long, group = "verb")]
    pub(crate) list: bool,

    /// Take a snapshot with this name, which need not be unique
    #[arg(short = 'c', long, value_name = "NAME", group = "verb")]
    pub(crate) create: Option<String>,

    /// Make the disk what the snapshot with this id, or else with this name, shows; what it holds is lost
    #[arg(short = 'a', long, value_name = "SNAPSHOT", group = "verb")]
    pub(crate) apply: Option<String>,

    /// Delete the first snapshot with this name
    #[arg(short = 'd', long, value_name = "NAME", group = "verb")]
    pub(crate) delete: Option<String>,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// List the snapshots of an image that is in use elsewhere; what is listed may not be so
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    pub(crate) force_share: bool,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Treat the image's name as options: driver=FORMAT,file.filename=PATH
    #[arg(long)]
    pub(crate) image_opts: bool,

    /// Write to a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    /// Cache mode of the image: `none` and `directsync` bypass the host's page cache; `writeback`,
    /// `writethrough` and `unsafe` use it [default: writeback]
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) source_cache: CacheMode,

    /// Print errors and the list only
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

/// What `convert -l` takes: an id or a name, or `snapshot.id=ID,snapshot.name=NAME`.
pub(super) fn source_snapshot(text: &str) -> Result<SnapshotRef, String> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotRef::IdOrName(text.to_owned()));
    }
    let members = keyval::parse(text, None).map_err(|error| error.to_string())?;
    let wrong = || format!("\"{text}\": it has snapshot.id or snapshot.name, or both, and nothing else");
    let [(_, members)] = &*members.iter().collect::<Vec<_>>() else { return Err(wrong()) };
    let members = members.as_object().ok_or_else(wrong)?;
    let known = members.keys().all(|key| matches!(key.as_str(), "id" | "name"));
    let get = |key| members.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    match (get("id"), get("name")) {
        (Some(id), Some(name)) if known => Ok(SnapshotRef::IdAndName { id, name }),
        (Some(id), None) if known => Ok(SnapshotRef::Id(id)),
        (None, Some(name)) if known => Ok(SnapshotRef::Name(name)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_named_as_qemu_img_names_it() {
        let (id, name) = (|| "1".to_owned(), || "a,b".to_owned());
        for (text, wanted) in [
            ("1", SnapshotRef::IdOrName(id())),
            ("a,b", SnapshotRef::IdOrName(name())),
            ("snapshot.id=1", SnapshotRef::Id(id())),
            ("snapshot.name=a,,b", SnapshotRef::Name(name())),
            ("snapshot.name=a,,b,snapshot.id=1", SnapshotRef::IdAndName { id: id(), name: name() }),
        ] {
            assert_eq!(source_snapshot(text), Ok(wanted), "{text}");
        }
        for text in ["snapshot.", "snapshot.foo=1", "snapshot.id=1,snapshot.foo=1", "snapshot.id=1,b=2"] {
            assert!(source_snapshot(text).is_err(), "{text}");
        }
    }
}
