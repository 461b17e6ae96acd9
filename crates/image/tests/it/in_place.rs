//! Images that are written in place: when the old contents go, and that an error says so.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockmirror_block::ErrorKind;
use blockmirror_image::{
    CreateSettings, CreateSpec, Error, Format, NewImage, PreparedImage, Replacement, TargetOptions,
};

const OLD: &[u8] = b"old disk of 21 bytes.";

fn spec(format: Format, size: u64, options: &str) -> CreateSpec {
    let mut settings = CreateSettings::default();
    settings.parse(format, options).unwrap();
    let target = TargetOptions::new().replacement(Replacement::InPlace);
    CreateSpec::new(format, size, settings).target(target).replace_data_file(true)
}

fn is_incomplete(error: &Error) -> bool {
    matches!(error, Error::Incomplete { .. })
}

/// Stops a creation at each of its questions. With `image`, an old image is written in place as well as its
/// data file; otherwise the image is new.
fn stop_everywhere(format: Format, options: &str, image: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (disk, data) = (dir.path().join("disk"), dir.path().join("data"));
    for call in 0.. {
        let case = format!("{format} {options} {image} {call}");
        assert!(call < 100, "{case}");
        let _ = fs::remove_file(&disk);
        if image {
            fs::write(&disk, OLD).unwrap();
        }
        fs::write(&data, OLD).unwrap();
        let calls = AtomicUsize::new(0);
        let prepared = PreparedImage::new(&disk, &spec(format, 1 << 20, options)).unwrap();
        let made = prepared.write_until(&|| calls.fetch_add(1, Ordering::SeqCst) >= call);
        let Err(error) = made.map(drop) else { break };
        let stopped = error.device_error().is_some_and(|error| error.kind() == ErrorKind::Cancelled);
        assert!(stopped, "{case}: {error}");
        let kept = fs::read(&data).unwrap() == OLD && (!image || fs::read(&disk).unwrap() == OLD);
        assert_eq!(is_incomplete(&error), !kept, "{case}: {error}");
        assert!(kept || call > 0, "{case}: {error}");
        assert!(image || !disk.exists(), "{case}");
    }
}

/// A signal that came before anything was written emptied the file.
#[test]
fn a_stop_takes_the_old_contents_only_if_it_says_so() {
    for options in ["", "preallocation=falloc", "preallocation=full"] {
        stop_everywhere(Format::Raw, options, true);
        stop_everywhere(Format::Qcow2, options, true);
    }
    for options in ["data_file=data", "data_file=data,preallocation=full"] {
        stop_everywhere(Format::Qcow2, options, true);
        stop_everywhere(Format::Qcow2, options, false);
    }
}

/// The trial made the old file longer, and a process that ended meanwhile left it so.
#[test]
fn the_space_is_tried_without_a_change_of_the_length() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, OLD).unwrap();
    let lengths = Mutex::new(Vec::new());
    let spec = spec(Format::Raw, 192 << 20, "preallocation=falloc");
    let error = PreparedImage::new(&disk, &spec)
        .unwrap()
        .write_until(&|| {
            let mut lengths = lengths.lock().unwrap();
            lengths.push(fs::metadata(&disk).unwrap().len());
            lengths.len() == 3
        })
        .unwrap_err();
    assert_eq!(lengths.into_inner().unwrap(), [21, 21, 21], "{error}");
    assert_eq!(fs::read(&disk).unwrap(), OLD, "{error}");
    assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 1 << 20, "the space is given back");
    assert!(!is_incomplete(&error), "{error}");
}

/// A file system in memory without `fallocate`, unmounted when dropped.
struct Ramfs<'a>(&'a Path);

impl<'a> Ramfs<'a> {
    fn mount(on: &'a Path) -> Option<Self> {
        match Command::new("mount").args(["-t", "ramfs", "ramfs"]).arg(on).output() {
            Ok(out) if out.status.success() => Some(Self(on)),
            other => {
                blockmirror_testing::skip_unsupported(format_args!("mount: {other:?}"));
                None
            }
        }
    }
}

impl Drop for Ramfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// The trial saw that space cannot be reserved, and the old contents went all the same. Needs root; skipped
/// visibly without.
#[test]
fn space_that_cannot_be_reserved_costs_no_old_contents() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mounted) = Ramfs::mount(dir.path()) else { return };
    let (disk, data) = (dir.path().join("disk"), dir.path().join("data"));
    for (format, options) in [
        (Format::Raw, "preallocation=falloc"),
        (Format::Qcow2, "preallocation=falloc"),
        (Format::Qcow2, "preallocation=falloc,data_file=data"),
    ] {
        for old in [OLD.to_vec(), vec![7; 2 << 20]] {
            fs::write(&disk, &old).unwrap();
            fs::write(&data, &old).unwrap();
            let error = NewImage::create(&disk, &spec(format, 1 << 20, options)).unwrap_err();
            assert!(fs::read(&disk).unwrap() == old, "{format} {options} {}: {error}", old.len());
            assert!(fs::read(&data).unwrap() == old, "{format} {options} {}: {error}", old.len());
            let kind = error.device_error().map(blockmirror_block::Error::kind);
            assert_eq!(kind, Some(ErrorKind::Unsupported), "{error}");
            assert!(!is_incomplete(&error), "{error}");
        }
    }
    for options in ["", "preallocation=full"] {
        NewImage::create(&disk, &spec(Format::Raw, 1 << 20, options)).unwrap().persist().unwrap();
        assert_eq!(fs::read(&disk).unwrap(), vec![0; 1 << 20], "{options}");
    }
    drop(mounted);
}

/// The error of the last step spoke of the name only.
#[test]
fn an_image_without_its_name_says_that_its_data_file_has_lost_its_contents() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, data) = (dir.path().join("disk"), dir.path().join("data"));
    fs::write(&data, OLD).unwrap();
    let new = NewImage::create(&disk, &spec(Format::Qcow2, 1 << 20, "data_file=data")).unwrap();
    fs::write(&disk, b"of another program").unwrap();
    let error = new.persist().unwrap_err();
    assert!(is_incomplete(&error), "{error}");
    assert_eq!(fs::read(&disk).unwrap(), b"of another program");
}
