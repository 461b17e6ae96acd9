//! Conversions that are killed or fail, and are gone on with.
//!
//! A child, this very test program, is killed in the middle of a copy at a point that does not depend on
//! time: a read of the source fails, which stops the job, and then the child kills itself.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use blockmirror_image::{CreateSettings, Format, ImageName};
use blockmirror_mirror::{JobState, MirrorOptions, OnError};
use blockmirror_ops::{CheckpointOptions, Convert, ConvertError, ConvertOutcome, Verify};
use blockmirror_testing::qemu::{have, run};

const MIB: u64 = 1 << 20;
/// The source's length, and where its read fails.
pub(super) const LEN: u64 = 64 * MIB;
const BAD: u64 = 40 * MIB;
const INTERVAL: u64 = 4 * MIB;
/// Each operation in flight keeps a region from being done; another one is done in part.
const IN_FLIGHT: u64 = 5 * MIB;
/// What the child reads its folder from.
const CHILD: &str = "BLOCKMIRROR_TEST_RESUME";

pub(super) struct Folder(pub(super) tempfile::TempDir);

impl Folder {
    /// With `disk.raw`, all data but for a hole of 8 MiB at 20 MiB.
    pub(super) fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let file = fs::File::create(folder.path("disk.raw")).unwrap();
        file.set_len(LEN).unwrap();
        for at in (0..LEN / MIB).filter(|mib| !(20..28).contains(mib)) {
            file.write_all_at(&vec![at as u8 + 1; MIB as usize], at * MIB).unwrap();
        }
        let rules = format!("[inject-error]\nevent = \"read_aio\"\nsector = \"{}\"\n", BAD / 512);
        fs::write(folder.path("rules"), rules).unwrap();
        folder
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !matches!(&**name, "disk.raw" | "rules"));
        names.sort();
        names
    }

    /// The conversion, of the disk itself or with a sector that cannot be read.
    pub(super) fn convert(&self, format: Format, place: &CheckpointOptions, bad: bool) -> Convert {
        convert(self.0.path(), format, place, bad)
    }

    pub(super) fn same(&self, format: Format) {
        let (disk, copy) = (self.path("disk.raw"), self.path("copy"));
        if format == Format::Raw {
            assert!(fs::read(disk).unwrap() == fs::read(copy).unwrap());
        } else if have("resume", &["qemu-img"]) {
            run("qemu-img", self.0.path(), ["check", "-q", "-f", "qcow2", "copy"]).unwrap();
            let args = ["compare", "-q", "-f", "raw", "-F", "qcow2", "disk.raw", "copy"];
            run("qemu-img", self.0.path(), args).unwrap();
        }
    }
}

pub(super) fn convert(folder: &Path, format: Format, place: &CheckpointOptions, bad: bool) -> Convert {
    let source = match bad {
        true => format!("blkdebug:{}:{}", folder.join("rules").display(), folder.join("disk.raw").display()),
        false => folder.join("disk.raw").display().to_string(),
    };
    let mut source = ImageName::parse(Path::new(&source)).unwrap();
    source.format = Some(Format::Raw);
    let job = options().on_source_error(OnError::Stop);
    Convert::new(source, folder.join("copy"))
        .target_format(format)
        .checkpoint(place.clone().interval(INTERVAL))
        .mirror(job)
}

fn options() -> MirrorOptions {
    MirrorOptions::new().buf_size(MIB).max_in_flight(4)
}

pub(super) fn go(convert: &Convert) -> Result<ConvertOutcome, ConvertError> {
    convert.run(&AtomicBool::new(false), |_| {})
}

pub(super) fn places(folder: &Path) -> [CheckpointOptions; 2] {
    [CheckpointOptions::file(folder.join("log")), CheckpointOptions::beside()]
}

/// The part of the child: not a test by itself.
#[test]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let [folder, format, place] = task.split(' ').collect::<Vec<_>>()[..] else { panic!("{task}") };
    let folder = Path::new(folder);
    let place = &places(folder)[place.parse::<usize>().unwrap()];
    let convert = convert(folder, format.parse().unwrap(), place, true);
    let job =
        convert.check(convert.open_source().unwrap()).unwrap().prepare().unwrap().start(&|| false).unwrap();
    // It stops at the sector that cannot be read, when all that began before it has ended.
    while job.control().progress().state != JobState::Paused || job.control().progress().in_flight > 0 {
        std::thread::yield_now();
    }
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
}

/// Kills a child in the middle of a copy.
pub(super) fn kill_one(folder: &Folder, format: Format, place: usize) {
    let killed = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "resume::child", "--test-threads=1", "-q"])
        .env(CHILD, format!("{} {format} {place}", folder.0.path().display()))
        .output()
        .unwrap();
    assert_eq!(killed.status.signal(), Some(9), "{killed:?}");
}

#[test]
fn a_killed_copy_is_gone_on_with_and_little_is_copied_again() {
    for format in [Format::Raw, Format::Qcow2] {
        for place in 0..2 {
            let folder = Folder::new();
            kill_one(&folder, format, place);
            assert!(!folder.path("copy").exists(), "it looks finished");
            assert_eq!(folder.names().len(), 2, "{:?}", folder.names());
            let place = places(folder.0.path())[place].clone();
            let checked = folder.convert(format, &place, false);
            let checked = checked.check(checked.open_source().unwrap()).unwrap();
            let found = checked.interrupted().unwrap().unwrap();
            assert_eq!((found.changed, found.len), (None, LEN));
            // Everything before the bad sector but two intervals of data, and what others had begun behind
            // it.
            assert!(found.done >= BAD - 2 * INTERVAL - IN_FLIGHT && found.done < LEN, "{}", found.done);
            let outcome = go(&folder.convert(format, &place, false)).unwrap();
            assert_eq!(outcome.resumed, found.done);
            assert!(outcome.copy.copied <= LEN - found.done, "{outcome:?}");
            folder.same(format);
            assert_eq!(folder.names(), ["copy"]);
        }
    }
}

/// Killed again and again at the same place, it loses nothing; then it goes on.
#[test]
fn a_copy_that_is_killed_while_it_goes_on_goes_on_all_the_same() {
    let folder = Folder::new();
    for _ in 0..3 {
        kill_one(&folder, Format::Qcow2, 1);
        assert_eq!(folder.names().len(), 2, "{:?}", folder.names());
    }
    let outcome = go(&folder.convert(Format::Qcow2, &CheckpointOptions::beside(), false)).unwrap();
    assert!(outcome.resumed > 0);
    folder.same(Format::Qcow2);
}

/// A conversion that fails, or is cancelled, keeps all that it has copied.
#[test]
fn a_failed_copy_says_where_it_is_and_is_gone_on_with() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = Folder::new();
        let place = CheckpointOptions::beside();
        let failing = folder.convert(format, &place, true);
        let failing = failing.mirror(options());
        let Err(ConvertError::Interrupted(kept)) = go(&failing) else { panic!("it did not fail") };
        let (done, len) = (kept.done, kept.len);
        assert!(kept.partial.exists() && kept.checkpoint.exists() && !folder.path("copy").exists());
        assert!(len == LEN && done >= BAD - IN_FLIGHT, "{done}");
        let outcome = go(&folder.convert(format, &place, false)).unwrap();
        assert_eq!(outcome.resumed, done);
        folder.same(format);
        assert_eq!(folder.names(), ["copy"]);
    }
}

#[test]
fn a_copy_that_has_not_come_far_leaves_nothing() {
    let folder = Folder::new();
    let cancelled = folder.convert(Format::Raw, &CheckpointOptions::beside(), false);
    assert!(cancelled.run(&AtomicBool::new(true), |_| {}).unwrap_err().is_cancelled());
    assert_eq!(folder.names(), [""; 0]);
}

fn changed(convert: &Convert) -> String {
    match go(convert) {
        Err(ConvertError::Changed { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

/// Whatever has changed, nothing is gone on with, and nothing is lost.
#[test]
fn a_copy_of_something_else_is_not_gone_on_with() {
    for place in 0..2 {
        let folder = Folder::new();
        kill_one(&folder, Format::Qcow2, place);
        let place = places(folder.0.path())[place].clone();
        let names = folder.names();
        let same = || folder.convert(Format::Qcow2, &place, false);
        assert!(changed(&same().target_format(Format::Raw)).contains("format"));
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, "cluster_size=4k").unwrap();
        assert!(changed(&same().settings(settings)).contains("options"));
        assert!(changed(&same().mirror(MirrorOptions::new().min_zero_run(0))).contains("sparseness"));
        let disk = fs::File::options().write(true).open(folder.path("disk.raw")).unwrap();
        // The same byte: what counts is that it was written.
        disk.write_all_at(&[1], 0).unwrap();
        assert!(changed(&same()).contains("file of the source"));
        assert_eq!(folder.names(), names);
        let outcome = go(&folder.convert(Format::Qcow2, &place.clone().restart(true), false)).unwrap();
        assert_eq!(outcome.resumed, 0);
        folder.same(Format::Qcow2);
        assert_eq!(folder.names(), ["copy"]);
    }
}

/// A temporary file that is another one, or is cut, or is gone.
/// A run that verified nothing finished the copy, and nothing said that the verification was missing.
#[test]
fn a_verification_that_was_interrupted_is_not_passed_over() {
    for from_the_beginning in [true, false] {
        let folder = Folder::new();
        let place = CheckpointOptions::file(folder.path("log"));
        let failing = folder.convert(Format::Raw, &place, true).mirror(options());
        let failing = if from_the_beginning { failing.verify(Verify::Full) } else { failing };
        assert!(matches!(go(&failing), Err(ConvertError::Interrupted(_))));
        let plain = folder.convert(Format::Raw, &place, false);
        let verifying = plain.clone().verify(Verify::Full);
        if !from_the_beginning {
            let checked = verifying.check(verifying.open_source().unwrap()).unwrap();
            let job = checked.prepare().unwrap().start(&|| false).unwrap();
            let stopped = job.finish_with(&mut |_| ControlFlow::Break(()));
            assert!(matches!(stopped, Err(ConvertError::Interrupted(_))), "{stopped:?}");
        }
        assert_eq!(changed(&plain), "it was to be verified, and is not to be any more (--verify)");
        assert_eq!(folder.names().len(), 2);
        let outcome = go(&plain.clone().verify(Verify::Hash)).unwrap();
        assert!(outcome.verified.is_some() && outcome.resumed > 0, "{outcome:?}");
        folder.same(Format::Raw);
    }
}

#[test]
fn a_temporary_file_that_has_changed_is_not_gone_on_with() {
    let folder = Folder::new();
    kill_one(&folder, Format::Raw, 0);
    let place = places(folder.0.path())[0].clone();
    let again = || folder.convert(Format::Raw, &place, false);
    let partial = folder.names().into_iter().find(|name| name.ends_with(".partial")).unwrap();
    let partial = folder.path(&partial);
    let cut = |len| fs::File::options().write(true).open(&partial).unwrap().set_len(len).unwrap();
    cut(LEN - 512);
    assert!(matches!(go(&again()), Err(ConvertError::Image(_))), "cut");
    cut(LEN);
    // Anything but the place of the copy is the owner's.
    fs::copy(&partial, folder.path("other")).unwrap();
    fs::rename(folder.path("other"), &partial).unwrap();
    assert!(changed(&again()).contains("temporary file"));
    fs::remove_file(&partial).unwrap();
    assert!(changed(&again()).contains("temporary file"));
    assert_eq!(folder.names(), ["log"]);
}

#[test]
fn a_file_that_is_no_checkpoint_is_not_written_over() {
    let folder = Folder::new();
    fs::write(folder.path("log"), "precious").unwrap();
    for restart in [false, true] {
        let place = CheckpointOptions::file(folder.path("log")).restart(restart);
        let refused = go(&folder.convert(Format::Raw, &place, false));
        assert!(matches!(refused, Err(ConvertError::Checkpoint(_))), "{refused:?}");
        assert_eq!(fs::read(folder.path("log")).unwrap(), b"precious");
        assert_eq!(folder.names(), ["log"]);
    }
}

#[test]
fn what_cannot_have_a_checkpoint_is_refused_or_goes_without() {
    let folder = Folder::new();
    fs::write(folder.path("copy"), vec![0; LEN as usize]).unwrap();
    let named = CheckpointOptions::file(folder.path("log"));
    let existing = |place| folder.convert(Format::Raw, place, false).existing_image(true);
    assert!(matches!(go(&existing(&named)), Err(ConvertError::NoCheckpoint { .. })));
    let itself = CheckpointOptions::file(folder.path("copy"));
    assert!(matches!(
        go(&folder.convert(Format::Raw, &itself, false)),
        Err(ConvertError::NoCheckpoint { .. })
    ));
    go(&existing(&CheckpointOptions::beside())).unwrap();
    folder.same(Format::Raw);
    assert_eq!(folder.names(), ["copy"]);
}
