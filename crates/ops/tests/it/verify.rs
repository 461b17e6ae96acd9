//! Conversions that are verified: what is seen, and what becomes of the target then.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use blockmirror_block::{ByteRange, Visit, WriteFlags};
use blockmirror_image::{
    CreateSettings, CreateSpec, Format, Kept, NewImage, OpenOptions, ReferencePolicy, Replacement,
    TargetOptions,
};
use blockmirror_mirror::Reflink;
use blockmirror_ops::{CheckpointOptions, Convert, ConvertError, ConvertOutcome, Mismatch, Verify};

const LEN: usize = 1 << 20;
const FILL: u8 = 7;

/// A folder with `disk.raw`: 64 KiB of sevens in 1 MiB of zeros.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let mut disk = vec![0; LEN];
        disk[65_536..131_072].fill(FILL);
        fs::write(folder.path("disk.raw"), disk).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn convert(&self, target: &str, format: Format) -> Convert {
        Convert::new(self.path("disk.raw"), self.path(target)).target_format(format).verify(Verify::Full)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Converts, and once all is copied changes a byte of the target behind the back of the conversion.
fn corrupted(convert: &Convert, target: &Path) -> Result<ConvertOutcome, ConvertError> {
    corrupted_until(convert, target, &mut |_| ControlFlow::Continue(()))
}

/// The same; the verification goes on as long as `progress` says so.
fn corrupted_until(
    convert: &Convert,
    target: &Path,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> Result<ConvertOutcome, ConvertError> {
    let checked = convert.check(convert.open_source().unwrap()).unwrap();
    let prepared = checked.prepare().unwrap();
    let file = prepared.partial_paths().first().cloned().unwrap_or_else(|| target.to_owned());
    let job = prepared.start(&|| false)?;
    while !job.control().wait_timeout(Duration::from_secs(1)) {}
    let bytes = fs::read(&file).unwrap();
    let data = bytes.windows(512).position(|window| window == [FILL; 512]).unwrap();
    let file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(&[FILL ^ 0xff], data as u64 + 1000).unwrap();
    job.finish_with(progress)
}

fn mismatch(result: Result<ConvertOutcome, ConvertError>) -> Mismatch {
    match result.unwrap_err() {
        ConvertError::Mismatch(mismatch) => *mismatch,
        other => panic!("{other}"),
    }
}

/// The sector of the byte that [`corrupted`] changes.
fn assert_sector(mismatch: &Mismatch) {
    let ranges: Vec<_> = mismatch.ranges.runs().map(|run| ByteRange::new(run.start, run.end)).collect();
    assert_eq!(ranges, [ByteRange::at(65_536 + 512, 512)]);
}

#[test]
fn an_equal_copy_is_verified_and_has_its_name() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = Folder::new();
        let outcome = folder.convert("new", format).run(&AtomicBool::new(false), |_| {}).unwrap();
        let verified = outcome.verified.unwrap();
        assert_eq!((verified.mode, verified.bytes), (Verify::Full, LEN as u64));
        assert_eq!(folder.names(), ["disk.raw", "new"]);
    }
}

/// The old target stays, and so does the copy: most of it is right.
#[test]
fn a_new_file_that_differs_is_kept_under_its_temporary_name() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = Folder::new();
        fs::write(folder.path("new"), b"old").unwrap();
        let mismatch = mismatch(corrupted(&folder.convert("new", format), &folder.path("new")));
        assert_sector(&mismatch);
        let Kept::Partial(paths) = &mismatch.kept else { panic!("{mismatch:?}") };
        assert!(mismatch.to_string().ends_with(&format!("kept as {}", paths[0].display())), "{mismatch}");
        assert!(paths[0].exists());
        assert_eq!(fs::read(folder.path("new")).unwrap(), b"old");
        assert_eq!(folder.names().len(), 3, "{:?}", folder.names());
    }
}

#[test]
fn an_image_in_place_that_differs_is_marked_corrupt() {
    let folder = Folder::new();
    let target = folder.path("disk.qcow2");
    fs::write(&target, b"old").unwrap();
    let in_place = TargetOptions::new().replacement(Replacement::InPlace);
    let convert = folder.convert("disk.qcow2", Format::Qcow2).target_file(in_place);
    let found = mismatch(corrupted(&convert, &target));
    assert_sector(&found);
    assert_eq!(found.kept, Kept::Corrupt);
    assert_corrupt(&target);
    let existing = folder.path("existing");
    Convert::new(folder.path("disk.raw"), &existing)
        .target_format(Format::Qcow2)
        .run(&AtomicBool::new(false), |_| {})
        .unwrap();
    let found =
        mismatch(corrupted(&folder.convert("existing", Format::Qcow2).existing_image(true), &existing));
    assert_sector(&found);
    assert_eq!(found.kept, Kept::Corrupt);
    assert_corrupt(&existing);
}

fn assert_corrupt(image: &Path) {
    OpenOptions::new().open(image).unwrap();
    let refused = OpenOptions::new().writable(true).open(image).unwrap_err();
    assert!(refused.to_string().contains("corrupt"), "{refused}");
}

/// A raw image has no mark. Version 2 of qcow2 has no corrupt bit: a new image stays unfinished.
#[test]
fn what_has_no_mark_is_kept_as_it_is() {
    let folder = Folder::new();
    let target = folder.path("target");
    fs::write(&target, vec![1; LEN]).unwrap();
    let in_place = TargetOptions::new().replacement(Replacement::InPlace);
    for convert in [
        folder.convert("target", Format::Raw).target_file(in_place),
        folder.convert("target", Format::Raw).existing_image(true),
    ] {
        let found = mismatch(corrupted(&convert, &target));
        assert_sector(&found);
        assert_eq!(found.kept, Kept::Unmarked);
    }
    let settings = settings("compat=0.10");
    let convert = folder.convert("target", Format::Qcow2).target_file(in_place).settings(settings);
    let found = mismatch(corrupted(&convert, &target));
    assert_eq!(found.kept, Kept::Unfinished);
    assert!(OpenOptions::new().open(&target).is_err());
    assert_eq!(folder.names(), ["disk.raw", "target"]);
}

#[test]
fn a_cancelled_verification_removes_the_new_file() {
    let folder = Folder::new();
    let convert = folder.convert("new", Format::Qcow2);
    let prepared = convert.check(convert.open_source().unwrap()).unwrap().prepare().unwrap();
    let job = prepared.start(&|| false).unwrap();
    let error = job.finish_with(&mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!(folder.names(), ["disk.raw"]);
}

/// What was found before the stop was lost with it: a run without verification went on with the checkpoint
/// and gave the copy its name.
#[test]
fn a_stop_does_not_make_a_difference_unknown() {
    let folder = Folder::new();
    let place = CheckpointOptions::file(folder.path("log"));
    let stop_after_it = &mut |at| match at > 131_072 {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let convert = folder.convert("new", Format::Qcow2).checkpoint(place);
    let found = mismatch(corrupted_until(&convert, &folder.path("new"), stop_after_it));
    assert_sector(&found);
    assert!(found.to_string().contains("; there may be more"), "{found}");
    assert!(matches!(found.kept, Kept::Partial(_)) && found.checkpoint.is_none());
    assert!(!folder.path("log").exists());
    let existing = folder.path("existing");
    let plain = Convert::new(folder.path("disk.raw"), &existing).target_format(Format::Qcow2);
    plain.run(&AtomicBool::new(false), |_| {}).unwrap();
    let convert = folder.convert("existing", Format::Qcow2).existing_image(true);
    let found = mismatch(corrupted_until(&convert, &existing, stop_after_it));
    assert_eq!(found.kept, Kept::Corrupt);
    assert_corrupt(&existing);
}

/// The checkpoint's file alone was removed: one that came back, or had another name, led to the copy.
#[test]
fn the_checkpoint_of_a_copy_that_differs_leads_to_nothing() {
    let folder = Folder::new();
    let (log, link) = (folder.path("log"), folder.path("link"));
    let convert = folder.convert("new", Format::Raw).checkpoint(CheckpointOptions::file(&log));
    let found = mismatch(corrupted_until(&convert, &folder.path("new"), &mut |_| {
        let _ = fs::hard_link(&log, &link);
        ControlFlow::Continue(())
    }));
    assert!(matches!(found.kept, Kept::Partial(_)) && found.checkpoint.is_none());
    assert!(!log.exists());
    let convert = Convert::new(folder.path("disk.raw"), folder.path("new")).target_format(Format::Raw);
    let convert = convert.checkpoint(CheckpointOptions::file(&link));
    let checked = convert.check(convert.open_source().unwrap()).unwrap();
    assert!(checked.interrupted().unwrap().is_none());
    assert!(checked.prepare().unwrap().resumes().is_none());
}

/// The old image was gone, and the reason that was given was not true.
#[test]
fn what_sees_only_what_is_copied_is_refused_where_all_must_be_shared() {
    let folder = Folder::new();
    let target = folder.path("target");
    fs::write(&target, b"old").unwrap();
    let in_place = TargetOptions::new().replacement(Replacement::InPlace);
    for mode in [Verify::Hash, Verify::Readback] {
        let convert = folder.convert("target", Format::Raw).target_file(in_place).verify(mode);
        let convert = convert.reflink(Reflink::Always);
        let refused = convert.check(convert.open_source().unwrap()).unwrap_err();
        assert!(matches!(refused, ConvertError::NotSharedVerified { .. }), "{refused}");
        assert!(refused.to_string().contains(mode.as_str()), "{refused}");
        assert_eq!(fs::read(&target).unwrap(), b"old");
    }
}

/// With sync mode top the layers below are none of the copy's business: another base shows something else.
#[test]
fn what_lies_below_the_top_is_not_compared() {
    let folder = Folder::new();
    fs::write(folder.path("other.raw"), vec![9; LEN]).unwrap();
    let first = folder.path("first");
    let on = |base: &str| settings(&format!("backing_file={base},backing_fmt=raw"));
    let spec = CreateSpec::new(Format::Qcow2, LEN as u64, on("disk.raw"));
    NewImage::create(&first, &spec).unwrap().persist().unwrap();
    let policy = ReferencePolicy::beside(&first).unwrap();
    let image = OpenOptions::new().writable(true).policy(policy).open(&first).unwrap();
    image.device().write_at(&[5; 65_536], 262_144, WriteFlags::NONE).unwrap();
    image.close().unwrap();
    let convert = Convert::new(&first, folder.path("second")).target_format(Format::Qcow2);
    let convert = convert.settings(on("other.raw")).verify(Verify::Full);
    let outcome = convert.run(&AtomicBool::new(false), |_| {}).unwrap();
    assert_eq!(outcome.verified.unwrap().bytes, 65_536);
}

fn settings(options: &str) -> CreateSettings {
    let mut settings = CreateSettings::default();
    settings.parse(Format::Qcow2, options).unwrap();
    settings
}
