//! Making images: what is there before, between and after.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use blockmirror_block::WriteFlags;
use blockmirror_image::{CreateSettings, CreateSpec, Format, ImageInfo, NewImage, OpenOptions};

fn spec(format: Format, size: u64, options: &str) -> CreateSpec {
    let mut settings = CreateSettings::default();
    settings.parse(format, options).unwrap();
    CreateSpec::new(format, size, settings)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_image_gets_its_name_when_it_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, b"old").unwrap();
    let new = NewImage::create(&path, &spec(Format::Qcow2, 1 << 20, "data_file=data")).unwrap();
    let image = new.open(&OpenOptions::new()).unwrap();
    image.device().write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(new.partial_paths().len(), 2);
    image.device().flush().unwrap();
    drop(image);
    new.persist().unwrap();
    assert_eq!(names(dir.path()), ["data", "disk"]);
    assert_eq!(ImageInfo::read(&path, &OpenOptions::new()).unwrap().virtual_size, 1 << 20);
}

#[test]
fn giving_up_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    drop(NewImage::create(&path, &spec(Format::Qcow2, 1 << 20, "data_file=data")).unwrap());
    for bad in ["cluster_size=3000", "refcount_bits=8,compat=v2", "data_file=nbd:x"] {
        assert!(NewImage::create(&path, &spec(Format::Qcow2, 1 << 20, bad)).is_err(), "{bad}");
    }
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}

#[test]
fn raw_images_take_the_space_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for (preallocation, allocated) in [("off", 0), ("falloc", 1 << 20), ("full", 1 << 20)] {
        let path = dir.path().join(preallocation);
        let options = format!("preallocation={preallocation}");
        NewImage::create(&path, &spec(Format::Raw, 1 << 20, &options)).unwrap().persist().unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), 1 << 20);
        assert!(meta.blocks() * 512 >= allocated && (allocated > 0 || meta.blocks() == 0), "{preallocation}");
    }
    let odd = dir.path().join("odd");
    NewImage::create(&odd, &spec(Format::Raw, 1000, "")).unwrap().persist().unwrap();
    assert_eq!(fs::metadata(odd).unwrap().len(), 1024);
}

/// A new image replaces what has its name: with its own backing file that would be the end of the data.
#[test]
fn an_image_is_never_put_in_the_place_of_what_it_stands_on() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    fs::write(&base, b"precious").unwrap();
    std::os::unix::fs::symlink("base", dir.path().join("link")).unwrap();
    for (name, options) in [
        ("base", "backing_file=base,backing_fmt=raw"),
        ("base", "backing_file=./link,backing_fmt=raw"),
        ("link", "backing_file=base,backing_fmt=raw"),
        ("base", "data_file=link"),
        ("new", "data_file=new"),
        ("new", "backing_file=base,backing_fmt=raw,data_file=link"),
    ] {
        let made = NewImage::create(dir.path().join(name), &spec(Format::Qcow2, 65536, options));
        assert!(made.is_err(), "{name} {options}");
    }
    assert_eq!(fs::read(&base).unwrap(), b"precious");
}

#[test]
fn an_image_in_use_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    NewImage::create(&path, &spec(Format::Raw, 65536, "")).unwrap().persist().unwrap();
    let user = OpenOptions::new().open(&path).unwrap();
    let refused = NewImage::create(&path, &spec(Format::Raw, 512, "")).unwrap_err().to_string();
    assert!(refused.contains("disk"), "{refused}");
    drop(user);
    NewImage::create(&path, &spec(Format::Raw, 512, "")).unwrap().persist().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 512);
}

/// A raw image was once made on a block device without touching it, so that a qcow2 header that had been there still
/// said what the device was. Needs root and `losetup`; skipped visibly without.
#[test]
fn a_raw_image_on_a_device_is_no_longer_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    NewImage::create(&below, &spec(Format::Qcow2, 1 << 20, "preallocation=full")).unwrap().persist().unwrap();
    let len = fs::metadata(&below).unwrap().len();
    assert_eq!(len % 512, 0);
    let attached = match Command::new("losetup").args(["--find", "--show"]).arg(&below).output() {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        other => return eprintln!("SKIPPED: losetup: {other:?}"),
    };
    let device = Path::new(attached.trim());
    let made = NewImage::create(device, &spec(Format::Raw, len, ""));
    let zeros = made.as_ref().map(NewImage::reads_as_zeros).ok();
    let persisted = made.and_then(NewImage::persist);
    let info = ImageInfo::read(device, &OpenOptions::new());
    Command::new("losetup").arg("--detach").arg(device).status().unwrap();
    persisted.unwrap();
    assert_eq!(zeros, Some(false));
    assert_eq!(info.unwrap().format, Format::Raw);
}
