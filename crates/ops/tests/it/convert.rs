//! Conversions as a library call: what is refused, what a cancellation leaves, and the steps one by one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use blockmirror_image::{
    CreateSettings, Format, ImageInfo, ImageName, OpenOptions, Replacement, TargetOptions,
};
use blockmirror_mirror::SyncMode;
use blockmirror_ops::{Convert, ConvertError};

const LEN: usize = 1 << 20;

/// A folder with `disk.raw`: 64 KiB of data in 1 MiB.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let mut disk = vec![0; LEN];
        disk[65_536..131_072].fill(7);
        fs::write(folder.path("disk.raw"), disk).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn convert(&self, target: &str) -> Convert {
        Convert::new(self.path("disk.raw"), self.path(target)).target_format(Format::Qcow2)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn run(convert: &Convert) -> Result<blockmirror_ops::ConvertOutcome, ConvertError> {
    convert.run(&AtomicBool::new(false), |_| {})
}

#[test]
fn a_new_image_has_its_name_once_it_is_complete() {
    let folder = Folder::new();
    let prepared = folder.convert("new.qcow2");
    let source = prepared.open_source().unwrap();
    let prepared = prepared.check(source).unwrap().prepare().unwrap();
    assert_eq!((prepared.files().len(), prepared.partial_paths().len()), (1, 1));
    let job = prepared.start(&|| false).unwrap();
    assert!(!folder.path("new.qcow2").exists());
    let outcome = job.finish().unwrap();
    assert_eq!((outcome.format, outcome.len, outcome.durable), (Format::Qcow2, LEN as u64, true));
    assert_eq!(outcome.copy.copied, 65_536);
    assert_eq!(folder.names(), ["disk.raw", "new.qcow2"]);
}

#[test]
fn a_cancelled_conversion_leaves_the_old_target() {
    let folder = Folder::new();
    fs::write(folder.path("old"), "before").unwrap();
    let error = folder.convert("old").run(&AtomicBool::new(true), |_| {}).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!(fs::read(folder.path("old")).unwrap(), b"before");
    assert_eq!(folder.names(), ["disk.raw", "old"]);
}

#[test]
fn a_dropped_step_leaves_the_old_target() {
    let folder = Folder::new();
    fs::write(folder.path("old"), "before").unwrap();
    let convert = folder.convert("old");
    let prepare = || convert.check(convert.open_source().unwrap()).unwrap().prepare().unwrap();
    drop(prepare());
    drop(prepare().start(&|| false).unwrap());
    assert_eq!(fs::read(folder.path("old")).unwrap(), b"before");
    assert_eq!(folder.names(), ["disk.raw", "old"]);
}

#[test]
fn a_dry_run_makes_nothing() {
    let folder = Folder::new();
    let convert = folder.convert("new.qcow2");
    let plan = convert.check(convert.open_source().unwrap()).unwrap().plan(&|| false).unwrap();
    assert_eq!((plan.len, plan.copy + plan.skip), (LEN as u64, LEN as u64));
    assert_eq!(folder.names(), ["disk.raw"]);
    let stopped = convert.check(convert.open_source().unwrap()).unwrap().plan(&|| true).unwrap_err();
    assert!(stopped.is_cancelled(), "{stopped}");
}

#[test]
fn an_existing_image_may_be_longer() {
    let folder = Folder::new();
    fs::write(folder.path("longer.raw"), vec![1; 2 * LEN]).unwrap();
    let convert = folder.convert("longer.raw").target_format(Format::Raw).existing_image(true);
    let prepared = convert.check(convert.open_source().unwrap()).unwrap().prepare().unwrap();
    assert_eq!(prepared.bytes_past_end(), LEN as u64);
    prepared.start(&|| false).unwrap().finish().unwrap();
    let target = fs::read(folder.path("longer.raw")).unwrap();
    assert_eq!(target[..LEN], fs::read(folder.path("disk.raw")).unwrap());
    assert!(target[LEN..].iter().all(|byte| *byte == 1));
}

#[test]
fn the_source_is_never_the_target() {
    let folder = Folder::new();
    let before = fs::read(folder.path("disk.raw")).unwrap();
    for convert in [folder.convert("disk.raw"), folder.convert("disk.raw").existing_image(true)] {
        assert!(matches!(run(&convert), Err(ConvertError::IsSource { .. })));
    }
    let mut settings = CreateSettings::default();
    settings.parse(Format::Qcow2, "data_file=disk.raw").unwrap();
    assert!(matches!(run(&folder.convert("new").settings(settings)), Err(ConvertError::IsSource { .. })));
    assert_eq!(fs::read(folder.path("disk.raw")).unwrap(), before);
}

#[test]
fn settings_that_do_not_fit_are_refused_before_the_target_is_touched() {
    let folder = Folder::new();
    fs::write(folder.path("old"), "before").unwrap();
    let with = |text: &str| {
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, text).unwrap();
        run(&folder.convert("old").settings(settings)).unwrap_err()
    };
    assert!(matches!(with("size=1M,backing_file=disk.raw"), ConvertError::Backing { .. }));
    assert!(matches!(with("size=2M"), ConvertError::Size { len: 1_048_576, .. }));
    assert!(matches!(with("cluster_size=3000"), ConvertError::Settings(_)));
    let several = folder.convert("old").add_source(folder.path("disk.raw")).sync(SyncMode::Top);
    assert!(matches!(run(&several), Err(ConvertError::SeveralSources { with_backing: false, .. })));
    assert_eq!(fs::read(folder.path("old")).unwrap(), b"before");
}

#[test]
fn an_overlay_keeps_its_backing_file() {
    let folder = Folder::new();
    let mut settings = CreateSettings::default();
    settings.parse(Format::Qcow2, "backing_file=disk.raw,backing_fmt=raw").unwrap();
    run(&folder.convert("overlay.qcow2").settings(settings)).unwrap();
    let copy = Convert::new(folder.path("overlay.qcow2"), folder.path("copy.qcow2")).sync(SyncMode::Top);
    let outcome = run(&copy).unwrap();
    assert_eq!(outcome.format, Format::Qcow2);
    let info = ImageInfo::read(folder.path("copy.qcow2"), &OpenOptions::new()).unwrap();
    assert_eq!(info.backing.unwrap().name, PathBuf::from("disk.raw"));
}

#[test]
fn several_sources_are_concatenated() {
    let folder = Folder::new();
    let convert = folder.convert("both.raw").add_source(folder.path("disk.raw")).target_format(Format::Raw);
    assert_eq!(run(&convert).unwrap().len, 2 * LEN as u64);
    let half = fs::read(folder.path("disk.raw")).unwrap();
    assert_eq!(fs::read(folder.path("both.raw")).unwrap(), [&*half, &*half].concat());
}

/// With one new file and one that is written in place the error said nothing.
#[test]
fn a_failure_says_that_one_of_two_files_has_lost_its_contents() {
    let folder = Folder::new();
    run(&folder.convert("bad.qcow2")).unwrap();
    // Its last cluster is lost: the copy fails.
    let bad = fs::OpenOptions::new().write(true).open(folder.path("bad.qcow2")).unwrap();
    bad.set_len(bad.metadata().unwrap().len() - 65_536).unwrap();
    let mut settings = CreateSettings::default();
    settings.parse(Format::Qcow2, "data_file=data").unwrap();
    let in_place = TargetOptions::new().replacement(Replacement::InPlace).force(true);
    for (old, lost) in
        [(&[][..], false), (&["image"][..], true), (&["data"], true), (&["image", "data"], true)]
    {
        for name in ["image", "data"] {
            let _ = fs::remove_file(folder.path(name));
        }
        for name in old {
            fs::write(folder.path(name), "before").unwrap();
        }
        let convert = Convert::new(folder.path("bad.qcow2"), folder.path("image"))
            .target_format(Format::Qcow2)
            .settings(settings.clone())
            .target_file(in_place);
        match run(&convert).unwrap_err() {
            ConvertError::Copy { incomplete, .. } => assert_eq!(incomplete, lost, "{old:?}"),
            other => panic!("{old:?}: {other}"),
        }
    }
}

#[test]
fn a_compressed_target_has_whole_clusters_of_data_and_no_more() {
    let folder = Folder::new();
    // A part of a cluster, and a cluster that ends with a hole of the source.
    let mut disk = fs::read(folder.path("disk.raw")).unwrap();
    disk[300_000..300_700].fill(9);
    fs::write(folder.path("disk.raw"), &disk).unwrap();
    let outcome = run(&folder.convert("new.qcow2").compress(true)).unwrap();
    assert_eq!(outcome.copy.copied, 2 * 65_536);
    let image = OpenOptions::new().open(folder.path("new.qcow2")).unwrap();
    let mut compressed = 0;
    let device = image.device();
    let mut visit = |extent: blockmirror_block::Extent| {
        compressed += if extent.compressed { extent.range.len() } else { 0 };
        blockmirror_block::Visit::Continue(())
    };
    device.extents(blockmirror_block::ByteRange::new(0, LEN as u64), &mut visit).unwrap();
    assert_eq!(compressed, 2 * 65_536);
    let mut read = vec![0; LEN];
    device.read_at(&mut read, 0).unwrap();
    assert!(read == disk);
}

#[test]
fn what_cannot_be_compressed_is_refused_before_the_target_loses_anything() {
    let folder = Folder::new();
    fs::write(folder.path("old"), "before").unwrap();
    let raw = folder.convert("old").target_format(Format::Raw).compress(true);
    let error = run(&raw).unwrap_err();
    assert!(matches!(error, ConvertError::Settings(_)), "{error}");
    let existing = folder.convert("old").target_format(Format::Raw).existing_image(true).compress(true);
    let error = run(&existing).unwrap_err();
    assert!(error.to_string().ends_with("a raw image holds no compressed data"), "{error}");
    assert_eq!(fs::read(folder.path("old")).unwrap(), b"before");
}

/// The copy named the file, and read as another part of it.
#[test]
fn a_backing_file_that_is_typed_is_not_shared_unless_it_reads_as_its_file() {
    let folder = Folder::new();
    run(&folder.convert("top")).unwrap();
    for (typed, shares) in [(r#""offset":65536,"#, false), ("", true)] {
        let name = format!(
            r#"json:{{"driver":"qcow2","file.filename":"{}","backing":{{"driver":"raw",{typed}"file.filename":"{}"}}}}"#,
            folder.path("top").display(),
            folder.path("disk.raw").display()
        );
        let source = ImageName::parse(name.as_ref()).unwrap();
        let convert = Convert::new(source, folder.path("copy")).target_format(Format::Qcow2);
        let ended = run(&convert.sync(Some(SyncMode::Top)));
        assert_eq!(folder.path("copy").exists(), shares);
        match shares {
            true => assert!(ended.is_ok(), "{ended:?}"),
            false => assert!(matches!(ended, Err(ConvertError::BackingName { .. })), "{ended:?}"),
        }
    }
}
