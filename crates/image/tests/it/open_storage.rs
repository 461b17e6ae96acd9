//! Images in descriptors that a manager has opened.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs::OpenOptions as Open;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::WriteFlags;
use blockmirror_file::{FileOptions, FileStorage};
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions, ReferencePolicy};

fn create(path: &Path, format: Format) {
    let spec = CreateSpec::new(format, 1 << 20, CreateSettings::default());
    NewImage::create(path, &spec).unwrap().persist().unwrap();
}

/// As a manager hands it over.
fn passed(path: &Path, writable: bool) -> Arc<FileStorage> {
    let descriptor = Open::new().read(true).write(writable).open(path).unwrap();
    Arc::new(FileOptions::new().writable(writable).from_fd(descriptor.into(), path).unwrap())
}

#[test]
fn an_image_in_a_descriptor_is_written_read_and_seen_as_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Qcow2, Format::Raw] {
        let path = dir.path().join("disk");
        create(&path, format);
        // No name is looked up: what the descriptor is of may have none any more.
        let moved = dir.path().join("moved");
        let storage = passed(&path, true);
        std::fs::rename(&path, &moved).unwrap();
        let options = OpenOptions::new().format(format).policy(ReferencePolicy::beside(&moved).unwrap());
        let image = options.open_storage(storage, &path).unwrap();
        assert_eq!((image.format(), image.qcow2().is_some()), (format, format == Format::Qcow2));
        image.device().write_at(b"boot", 4096, WriteFlags::NONE).unwrap();
        image.device().flush().unwrap();
        drop(image);
        let again = options.open_storage(passed(&moved, false), &moved).unwrap();
        let mut found = [0; 4];
        again.device().read_at(&mut found, 4096).unwrap();
        assert_eq!(&found, b"boot");
        assert!(!again.device().geometry().writable, "the descriptor is read-only");
    }
}
