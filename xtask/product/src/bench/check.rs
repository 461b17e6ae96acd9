//! The checks that are timed: a long disk with few clusters, and a short one with many.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use serde_json::Value;

use super::case::Case;
use super::scenario::Scale;

/// Clusters of the long disk.
const SPREAD: u64 = 4096;
/// What both must count alike.
const FIELDS: [&str; 4] = ["total-clusters", "allocated-clusters", "fragmented-clusters", "image-end-offset"];

/// What the image is like.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// Clusters of 64 KiB, evenly spread over the disk.
    Spread,
    /// Clusters of 512 bytes, each of which is mapped.
    Small,
}

/// A check of one image.
#[derive(Debug)]
struct Check {
    name: &'static str,
    layout: Layout,
    len: u64,
}

/// Every check, in the order of the table.
pub(super) fn checks(scale: Scale) -> Vec<Box<dyn Case>> {
    vec![
        Box::new(Check { name: "check 8TiB", layout: Layout::Spread, len: scale.huge }),
        Box::new(Check { name: "check 512", layout: Layout::Small, len: scale.mixed }),
    ]
}

impl Case for Check {
    fn name(&self) -> &'static str {
        self.name
    }

    fn make_source(&self, qemu: Qemu, dir: &Path) -> Outcome<PathBuf> {
        let source = dir.join("source");
        let len = self.len.to_string();
        match self.layout {
            Layout::Spread => {
                qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "source", &len])?;
                let writes: Vec<_> =
                    (0..SPREAD).map(|i| format!("write -q {} 64k", self.len / SPREAD * i)).collect();
                let script: Vec<_> = writes.iter().map(String::as_str).collect();
                qemu.io("qcow2", &source, &script)?;
            }
            Layout::Small => {
                let options = "cluster_size=512,preallocation=metadata";
                qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "-o", options, "source", &len])?;
            }
        }
        Ok(source)
    }

    fn our_words(&self, program: &Path, source: &Path, _target: &Path) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![program.into()];
        words.extend(["check", "-q", "-f", "qcow2"].map(OsString::from));
        words.push(source.into());
        words
    }

    fn peer_words(&self, _program: &Path, source: &Path, _target: &Path) -> Vec<OsString> {
        let words = ["qemu-img", "check", "-q", "-f", "qcow2"].map(OsString::from);
        words.into_iter().chain([source.into()]).collect()
    }

    /// Both count the same clusters.
    fn judge(&self, qemu: Qemu, source: &Path, _targets: [&Path; 2]) -> Outcome {
        let words = ["check", "--output=json", "-f", "qcow2"].map(OsString::from);
        let words = words.into_iter().chain([source.into()]);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let ours = [OsString::from("blockmirror")].into_iter().chain(words.clone());
        if blockmirror_cli::run(ours, &mut out, &mut err) != 0 {
            return Err(String::from_utf8_lossy(&err).into_owned().into());
        }
        let (ours, theirs): (Value, Value) =
            (serde_json::from_slice(&out)?, serde_json::from_str(&qemu.img(words)?)?);
        match FIELDS.into_iter().find(|field| ours.get(field) != theirs.get(field)) {
            None => Ok(()),
            Some(field) => {
                Err(format!("{field}: {:?}, qemu-img {:?}", ours.get(field), theirs.get(field)).into())
            }
        }
    }
}
