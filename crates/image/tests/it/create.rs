//! Making images: what is there before, between and after.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use blockmirror_block::WriteFlags;
use blockmirror_image::{
    CreateSettings, CreateSpec, Error, Format, ImageInfo, MAX_CHAIN_DEPTH, NewImage, OpenOptions,
    ReferencePolicy, ReferenceRefusal,
};

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

/// A raw image was once made on a block device without touching it, so that a qcow2 header that had been
/// there still said what the device was. Needs root and `losetup`; skipped visibly without.
#[test]
fn a_raw_image_on_a_device_is_no_longer_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    NewImage::create(&below, &spec(Format::Qcow2, 1 << 20, "preallocation=full")).unwrap().persist().unwrap();
    let len = fs::metadata(&below).unwrap().len();
    assert_eq!(len % 512, 0);
    let attached = match Command::new("losetup").args(["--find", "--show"]).arg(&below).output() {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        other => return blockmirror_testing::skip_unsupported(format_args!("losetup: {other:?}")),
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

/// A base was replaced by an empty overlay of an image that stood on it.
#[test]
fn an_image_does_not_replace_what_it_would_stand_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let make = |name: &str, options: &str| {
        NewImage::create(path(name), &spec(Format::Qcow2, 1 << 20, options))?.persist()
    };
    make("base", "").unwrap();
    make("mid", "backing_file=base,backing_fmt=qcow2,data_file=data").unwrap();
    make("top", "backing_file=mid,backing_fmt=qcow2").unwrap();
    fs::hard_link(path("base"), path("other")).unwrap();
    std::os::unix::fs::symlink("base", path("link")).unwrap();
    let all = || ["base", "mid", "top", "data"].map(|name| fs::read(path(name)).unwrap());
    let before = all();
    for name in ["base", "mid", "top", "data", "other", "link"] {
        let error = make(name, "backing_file=top,backing_fmt=qcow2").unwrap_err();
        assert!(matches!(error, Error::Create { .. }), "{name}: {error}");
        let error = make("new", &format!("backing_file=top,backing_fmt=qcow2,data_file={name}")).unwrap_err();
        assert!(matches!(error, Error::Create { .. }), "{name} for data: {error}");
    }
    assert_eq!(all(), before);
    assert!(make("new", "backing_file=top,backing_fmt=qcow2").is_ok());
    // Nothing would be lost, but the chain would be a cycle.
    make("a", "backing_file=b,backing_fmt=qcow2").unwrap();
    assert!(matches!(make("b", "backing_file=a,backing_fmt=qcow2"), Err(Error::Create { .. })));
    fs::hard_link(path("a"), path("b")).unwrap();
    match make("c", "backing_file=a,backing_fmt=qcow2") {
        Err(Error::Reference(refused)) => assert!(matches!(refused.reason, ReferenceRefusal::Cycle)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chain_that_the_policy_hides_stands_on_nothing_that_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for folder in ["in", "out"] {
        fs::create_dir(path(folder)).unwrap();
    }
    let make = |name: &str, options: &str, allow: bool| {
        let mut policy = ReferencePolicy::beside(&path("in/top")).unwrap();
        if allow {
            policy.allow_dir(&path("out")).unwrap();
        }
        NewImage::create(path(name), &spec(Format::Qcow2, 1 << 20, options).policy(policy))?.persist()
    };
    make("base", "", false).unwrap();
    make("out/mid", "backing_file=../base,backing_fmt=qcow2", false).unwrap();
    make("in/top", "backing_file=../out/mid,backing_fmt=qcow2", false).unwrap();
    let over = |name: &str, allow| make(name, "backing_file=in/top,backing_fmt=qcow2", allow);
    assert!(matches!(over("base", false), Err(Error::Reference(_))));
    assert!(matches!(over("base", true), Err(Error::Create { .. })));
    assert!(over("new", false).is_ok());
}

#[test]
fn a_chain_does_not_become_too_deep_to_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let make = |index: u32| {
        let backing = index.checked_sub(1).map(|below| format!("backing_file={below},backing_fmt=qcow2"));
        let spec = spec(Format::Qcow2, 65536, &backing.unwrap_or_default());
        NewImage::create(dir.path().join(index.to_string()), &spec)?.persist()
    };
    // From the top down: there is nothing below to look at yet.
    for index in (0..MAX_CHAIN_DEPTH).rev() {
        make(index).unwrap();
    }
    let top = dir.path().join((MAX_CHAIN_DEPTH - 1).to_string());
    OpenOptions::new().policy(ReferencePolicy::beside(&top).unwrap()).open(&top).unwrap();
    match make(MAX_CHAIN_DEPTH) {
        Err(Error::Reference(refused)) => assert!(matches!(refused.reason, ReferenceRefusal::TooDeep(_))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_is_not_lost_to_a_chain_that_cannot_be_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let make = |name: &str, backing: &str, format: Option<Format>, unknown: bool| {
        let mut settings = CreateSettings::default();
        settings.backing_file = (!backing.is_empty()).then(|| backing.into());
        settings.backing_format = format;
        let spec = CreateSpec::new(Format::Qcow2, 1 << 20, settings).unknown_chain(unknown);
        NewImage::create(path(name), &spec)?.persist()
    };
    let raw = Some(Format::Raw);
    let qcow2 = Some(Format::Qcow2);
    fs::write(path("base"), vec![7; 1 << 20]).unwrap();
    fs::write(path("foreign"), [b"KDMV".to_vec(), vec![0; 4096]].concat()).unwrap();
    fs::write(path("damaged"), b"QFI\xfb and no more").unwrap();
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base"}}"#;
    for (top, backing, format) in
        [("a", json, raw), ("b", "nbd:localhost:1", raw), ("c", "foreign", None), ("d", "damaged", qcow2)]
    {
        make(top, backing, format, false).unwrap();
        match make("base", top, qcow2, false) {
            Err(Error::ChainUnknown { path: lost, .. }) => assert_eq!(lost, path("base"), "{backing}"),
            other => panic!("{backing}: {other:?}"),
        }
        assert_eq!(fs::read(path("base")).unwrap(), vec![7; 1 << 20], "{backing}");
        make("new", top, qcow2, false).unwrap();
        fs::remove_file(path("new")).unwrap();
    }
    // A plain name that leads to nothing is the end.
    make("e", "missing", qcow2, false).unwrap();
    make("other", "", None, false).unwrap();
    make("other", "e", qcow2, false).unwrap();
    make("base", "a", qcow2, true).unwrap();
    // A link to where the new image would be.
    std::os::unix::fs::symlink("later", path("link")).unwrap();
    std::os::unix::fs::symlink("link", path("link2")).unwrap();
    make("f", "link2", qcow2, false).unwrap();
    for name in ["later", "link", "link2"] {
        let made = make(name, "f", qcow2, false);
        assert!(matches!(made, Err(Error::Create { .. })), "{name}: {made:?}");
    }
    assert!(!path("later").exists());
}

#[test]
fn an_image_is_not_its_own_data_file_by_any_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("in")).unwrap();
    std::os::unix::fs::symlink("image", dir.path().join("link")).unwrap();
    for name in ["image", "./image", "in/../image", "link"] {
        let spec = spec(Format::Qcow2, 1 << 20, &format!("data_file={name}"));
        let made = NewImage::create(dir.path().join("image"), &spec).map(drop);
        assert!(matches!(made, Err(Error::Create { .. })), "{name}: {made:?}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn an_image_that_does_not_get_its_name_leaves_the_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = (dir.path().join("image"), dir.path().join("data"));
    let spec = spec(Format::Qcow2, 1 << 20, "data_file=data").replace_data_file(true);
    NewImage::create(&image, &spec).unwrap().persist().unwrap();
    fs::write(&data, vec![7; 1 << 20]).unwrap();
    let new = NewImage::create(&image, &spec).unwrap();
    fs::copy(&image, dir.path().join("copy")).unwrap();
    fs::rename(dir.path().join("copy"), &image).unwrap();
    let error = new.persist().unwrap_err().to_string();
    assert!(error.contains("another file has taken the name"), "{error}");
    assert_eq!(fs::read(&data).unwrap(), vec![7; 1 << 20]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// The data file stayed, and the next run was refused because of it.
#[test]
fn an_image_that_does_not_get_its_name_takes_its_new_data_file_along() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let new = NewImage::create(&image, &spec(Format::Qcow2, 1 << 20, "data_file=data")).unwrap();
    fs::write(&image, b"of another program").unwrap();
    new.persist().unwrap_err();
    assert_eq!(names(dir.path()), ["image"]);
    assert_eq!(fs::read(&image).unwrap(), b"of another program");
}

/// Another process makes the file again and again, at any moment.
#[test]
fn a_data_file_that_appears_meanwhile_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let (over, kept) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let maker = scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                // Of an image that came first; its maker has it open at most.
                let _ = fs::remove_file(&data);
                let Ok(file) = fs::File::create_new(&data) else { continue };
                let inode = file.metadata().unwrap().ino();
                std::thread::sleep(Duration::from_micros(200));
                assert_eq!(fs::metadata(&data).unwrap().ino(), inode, "it was replaced");
                kept.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut index = 0;
        // On a busy machine the other program may not have run at all by then.
        while index < 200 || kept.load(Ordering::SeqCst) == 0 && !maker.is_finished() {
            index += 1;
            let path = dir.path().join(index.to_string());
            // Whether it succeeds depends on who was first.
            let made = NewImage::create(&path, &spec(Format::Qcow2, 1 << 20, "data_file=data"));
            let _ = made.and_then(NewImage::persist);
        }
        over.store(true, Ordering::SeqCst);
        maker.join().unwrap();
    });
}

#[test]
fn a_data_file_of_zeros_is_taken_if_it_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = (dir.path().join("image"), dir.path().join("data"));
    let refused = spec(Format::Qcow2, 1 << 20, "data_file=data");
    let mut settings = CreateSettings::default();
    settings.parse(Format::Qcow2, "data_file=data").unwrap();
    settings.blank_data_file = true;
    let taken = CreateSpec::new(Format::Qcow2, 1 << 20, settings);
    for old in [vec![], vec![0; 3 << 20]] {
        fs::write(&data, &old).unwrap();
        let made = NewImage::create(&image, &refused).map(drop);
        assert!(matches!(made, Err(Error::DataFileExists { .. })), "{made:?}");
        NewImage::create(&image, &taken).unwrap().persist().unwrap();
        assert_eq!(fs::metadata(&data).unwrap().len(), 1 << 20);
    }
    let mut old = vec![0; 3 << 20];
    old[(2 << 20) + 5] = 1;
    fs::write(&data, &old).unwrap();
    let made = NewImage::create(&image, &taken).map(drop);
    assert!(matches!(made, Err(Error::DataFileExists { .. })), "{made:?}");
    assert_eq!(fs::read(&data).unwrap(), old);
}
