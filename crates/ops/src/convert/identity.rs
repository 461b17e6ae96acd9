//! Identity of a conversion: what must be the same for one to go on where another was interrupted.
//!
//! Kept in the checkpoint ([`super::checkpoint`]). The keys are documented in `docs/checkpoint.md`.

use std::path::absolute;

use blockmirror_checkpoint::Identity;
use blockmirror_image::{CreateSettings, Format, PartialFile};
use blockmirror_mirror::SyncMode;

use super::{Convert, ConvertSource};

/// The number in the temporary file's name. Where a copy is found is no part of what it is of.
pub(super) const PARTIAL: &str = "partial";
/// Which file the temporary one is.
pub(super) const PARTIAL_FILE: &str = "partial-file";

const SOURCE_FILE: &str = "source-file";

/// What a conversion of `source` to a new image of `format` is; `None` if the source does not lie in regular
/// files, so that a change of it would not be seen.
pub(super) fn of(
    convert: &Convert,
    source: &ConvertSource,
    format: Format,
    settings: &CreateSettings,
    sync: SyncMode,
) -> Option<Identity> {
    let mut identity = Identity::new();
    identity.push("target", absolute(&convert.target).ok()?.as_os_str().as_encoded_bytes());
    identity.push("format", format.to_string());
    identity.push("length", source.device().len().to_string());
    identity.push("sync", format!("{sync:?}"));
    identity.push("options", format!("{settings:?}"));
    identity.push("compress", convert.compress.to_string());
    identity.push("sparseness", format!("{:?}", convert.mirror.sparseness()));
    identity.push("snapshot", format!("{:?}", convert.snapshot));
    identity.push("range", format!("{:?}", convert.source_range));
    for (name, image) in convert.sources.iter().zip(source.images()) {
        identity.push("source-format", image.format().to_string());
        identity.push("source-part", format!("{:?} {}", name.node.part, name.node.no_backing));
        for stamp in image.stamps()? {
            identity.push(SOURCE_FILE, stamp.to_string());
        }
    }
    Some(identity)
}

/// `identity` with where the copy lies.
pub(super) fn with_partial(mut identity: Identity, partial: &PartialFile) -> Identity {
    identity.push(PARTIAL, format!("{:08x}", partial.number));
    identity.push(PARTIAL_FILE, partial.stamp.to_string());
    identity
}

/// What has changed, where the entries of `key` differ.
pub(super) fn explain(key: &str) -> String {
    match key {
        SOURCE_FILE => "a file of the source has changed, or is another one".to_owned(),
        "source-format" | "source-part" | "range" | "snapshot" | "length" => {
            "the source is another".to_owned()
        }
        "target" => "it was a copy to another target".to_owned(),
        key => format!("the options of the target are others ({key})"),
    }
}
