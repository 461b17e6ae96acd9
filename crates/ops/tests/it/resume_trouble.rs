//! Copies with a checkpoint that meet trouble: at their end, with the log, or with who owns it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;

use blockmirror_image::Format;
use blockmirror_ops::{CheckpointOptions, ConvertError, PreparedConvert};

use super::resume::{Folder, LEN, go, places};

fn prepare(folder: &Folder, format: Format, place: &CheckpointOptions) -> PreparedConvert {
    let convert = folder.convert(format, place, false);
    convert.check(convert.open_source().unwrap()).unwrap().prepare().unwrap()
}

/// The whole copy went, and its checkpoint with it.
#[test]
fn a_copy_that_does_not_get_its_name_is_kept() {
    for (format, place) in [(Format::Raw, 0), (Format::Qcow2, 1)] {
        let folder = Folder::new();
        let place = places(folder.0.path())[place].clone();
        let job = prepare(&folder, format, &place).start(&|| false).unwrap();
        fs::write(folder.path("copy"), "other").unwrap();
        let kept = match job.finish() {
            Err(ConvertError::Interrupted(kept)) => kept,
            other => panic!("{other:?}"),
        };
        assert!(kept.to_string().contains("exists"), "{kept}");
        assert_eq!((kept.done, kept.len), (LEN, LEN));
        assert!(kept.partial.exists() && kept.checkpoint.exists(), "{:?}", folder.names());
        fs::remove_file(folder.path("copy")).unwrap();
        let outcome = go(&folder.convert(format, &place, false)).unwrap();
        assert_eq!((outcome.resumed, outcome.copy.copied), (LEN, 0));
        folder.same(format);
        assert_eq!(folder.names(), ["copy"]);
    }
}
