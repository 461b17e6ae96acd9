//! Identity of a conversion: what must be the same for one to go on where another was interrupted.
//!
//! Kept in the checkpoint ([`super::checkpoint`]). The keys are documented in `docs/checkpoint.md`.

use std::path::absolute;

use blockmirror_checkpoint::Identity;
use blockmirror_image::{CopyPlace, CreateSettings, Format, is_uri};
use blockmirror_mirror::SyncMode;

use super::{Convert, ConvertSource};

/// The number in the temporary file's name. Where a copy is found is no part of what it is of.
pub(super) const PARTIAL: &str = "partial";
/// Which file the temporary one is.
pub(super) const PARTIAL_FILE: &str = "partial-file";
/// Which file, block device or export is written in place.
pub(super) const IN_PLACE: &str = "in-place";
/// What says where the copy is.
pub(super) const WHERE: [&str; 3] = [PARTIAL, PARTIAL_FILE, IN_PLACE];

const SOURCE_FILE: &str = "source-file";
const SOURCE_STORAGE: &str = "source-storage";

/// What a conversion of `source` to a new image of `format` with all its `settings` is, and whether a change
/// of the source would show in that; `None` if the source lies nowhere.
pub(super) fn of(
    convert: &Convert,
    source: &ConvertSource,
    format: Format,
    settings: &CreateSettings,
    sync: SyncMode,
) -> Option<(Identity, bool)> {
    let (mut identity, mut shows_writes) = (Identity::new(), true);
    let target = match is_uri(&convert.target) {
        true => convert.target.clone(),
        false => absolute(&convert.target).ok()?,
    };
    identity.push("target", target.as_os_str().as_encoded_bytes());
    identity.push("format", format.to_string());
    identity.push("length", source.device().len().to_string());
    identity.push("sync", format!("{sync:?}"));
    if let Some(name) = &settings.backing_file {
        identity.push("backing", name);
    }
    identity.push("options", format!("{settings:?}"));
    identity.push("compress", convert.compress.to_string());
    identity.push("sparseness", format!("{:?}", convert.mirror.sparseness()));
    identity.push("snapshot", format!("{:?}", convert.snapshot));
    identity.push("range", format!("{:?}", convert.source_range));
    for (name, image) in convert.sources.iter().zip(source.images()) {
        identity.push("source-format", image.format().to_string());
        identity.push("source-part", name.node.selection());
        for stamp in image.stamps()? {
            let key = if stamp.shows_writes() { SOURCE_FILE } else { SOURCE_STORAGE };
            shows_writes &= stamp.shows_writes();
            identity.push(key, stamp.to_string());
        }
    }
    Some((identity, shows_writes))
}

/// `identity` with where the copy lies.
pub(super) fn with_place(mut identity: Identity, place: &CopyPlace) -> Identity {
    match place {
        CopyPlace::Partial(partial) => {
            identity.push(PARTIAL, format!("{:08x}", partial.number));
            identity.push(PARTIAL_FILE, partial.stamp.to_string());
        }
        CopyPlace::InPlace(stamp) => identity.push(IN_PLACE, stamp.to_string()),
        // A kind of place that is not known here is not gone on with.
        other => identity.push("place", format!("{other:?}")),
    }
    identity
}

/// What `identity` says of which storage the copy is in, as it is kept.
pub(super) fn stamp(identity: &Identity) -> &str {
    identity.get(IN_PLACE).or(identity.get(PARTIAL_FILE)).unwrap_or_default()
}

/// What has changed, where the entries of `key` differ.
pub(super) fn explain(key: &str) -> String {
    match key {
        SOURCE_FILE => "a file of the source has changed, or is another one".to_owned(),
        SOURCE_STORAGE => "a block device or an export of the source is another one".to_owned(),
        "source-format" | "source-part" | "range" | "snapshot" | "length" => {
            "the source is another".to_owned()
        }
        "backing" => "the backing file of the target is another".to_owned(),
        "target" => "it was a copy to another target".to_owned(),
        key => format!("the options of the target are others ({key})"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use blockmirror_image::{CreateSpec, ImageName, NewImage, TargetOptions};

    use super::super::CheckpointOptions;
    use super::*;

    fn qcow2(path: &Path, backing: Option<&str>) {
        let mut settings = CreateSettings::default();
        settings.backing_file = backing.map(str::to_owned);
        settings.backing_format = backing.map(|_| Format::Qcow2);
        let spec = CreateSpec::new(Format::Qcow2, 1 << 20, settings).target(TargetOptions::new());
        NewImage::create(path, &spec).unwrap().persist().unwrap();
    }

    /// The source's backing file is the target's, by a name that led elsewhere once the directory had another
    /// name: the copy went on with a header that named another file.
    #[test]
    fn the_backing_file_that_is_shared_is_part_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("cur")).unwrap();
        qcow2(&path("cur/base"), None);
        qcow2(&path("cur/top"), Some("base"));
        let identity = |top: &str| {
            let source = ImageName::parse(&path(top)).unwrap();
            let convert = Convert::new(source, path("copy"))
                .target_format(Format::Qcow2)
                .sync(Some(SyncMode::Top))
                .checkpoint(CheckpointOptions::beside());
            convert.check(convert.open_source().unwrap()).unwrap().checkpoint.unwrap().identity
        };
        let before = identity("cur/top");
        assert_eq!(before.first_difference(&identity("cur/top"), &[]), None);
        fs::rename(path("cur"), path("old")).unwrap();
        assert_eq!(before.first_difference(&identity("old/top"), &[]).as_deref(), Some("backing"));
    }

    /// The files stayed the same, and the copy went on with another part of one of them.
    #[test]
    fn what_is_typed_of_the_sources_backing_file_is_part_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        qcow2(&path("base"), None);
        qcow2(&path("top"), None);
        let identity = |options: &str| {
            let (top, base) = (path("top"), path("base"));
            let options = options.replace("BASE", &format!(r#""file.filename":"{}""#, base.display()));
            let name = format!(r#"json:{{"driver":"qcow2","file.filename":"{}"{options}}}"#, top.display());
            let source = ImageName::parse(Path::new(&name)).unwrap();
            let convert = Convert::new(source, path("copy")).target_format(Format::Raw);
            let convert = convert.checkpoint(CheckpointOptions::beside());
            convert.check(convert.open_source().unwrap()).unwrap().checkpoint.unwrap().identity
        };
        let typed = [
            "",
            r#","backing":null"#,
            r#","backing":{"driver":"raw",BASE}"#,
            r#","backing":{"driver":"raw","offset":512,BASE}"#,
            r#","backing":{"driver":"raw","offset":512,"size":65536,BASE}"#,
            r#","backing":{"driver":"qcow2",BASE}"#,
            r#","backing":{"driver":"qcow2",BASE,"backing":null}"#,
        ]
        .map(|options| (options, identity(options)));
        for (a, of_a) in &typed {
            for (b, of_b) in &typed {
                let differs = of_a.first_difference(of_b, &[]).is_some();
                assert_eq!(differs, a != b, "{a:?} {b:?}");
            }
        }
        // Without what may differ from one run to the next.
        let cached = identity(r#","backing":{"driver":"raw","cache.direct":false,BASE}"#);
        assert_eq!(typed[2].1.first_difference(&cached, &[]), None);
    }
}
