//! Copies with a checkpoint that meet trouble: at their end, with the log, or with who owns it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs::{self, Permissions};
use std::io::IoSliceMut;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use blockmirror_image::Format;
use blockmirror_ops::{CheckpointOptions, ConvertError, PreparedConvert};
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::resume::{Folder, LEN, go, places};

/// What the child reads its folder from.
const CHILD: &str = "BLOCKMIRROR_TEST_DROP_BOX";
/// A user without rights.
const UNPRIVILEGED: u32 = 65534;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

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
        let prepared = prepare(&folder, format, &place);
        let resumable = prepared.resumable().unwrap();
        assert!(!resumable.get());
        let job = prepared.start(&|| false).unwrap();
        fs::write(folder.path("copy"), "other").unwrap();
        let kept = match job.finish() {
            Err(ConvertError::Interrupted(kept)) => kept,
            other => panic!("{other:?}"),
        };
        assert!(kept.to_string().contains("exists"), "{kept}");
        assert_eq!((kept.done, kept.len, resumable.get()), (LEN, LEN, true));
        assert!(kept.partial.exists() && kept.checkpoint.exists(), "{:?}", folder.names());
        fs::remove_file(folder.path("copy")).unwrap();
        let outcome = go(&folder.convert(format, &place, false)).unwrap();
        assert_eq!((outcome.resumed, outcome.copy.copied), (LEN, 0));
        folder.same(format);
        assert_eq!(folder.names(), ["copy"]);
    }
}

/// Copies failed that had gone well before there were checkpoints.
#[test]
fn a_log_beside_that_cannot_be_made_is_no_reason_to_fail() {
    let folder = Folder::new();
    let prepared = prepare(&folder, Format::Qcow2, &CheckpointOptions::beside());
    let log = prepared.partial_paths()[0].with_extension("resume");
    fs::write(&log, "precious").unwrap();
    let job = prepared.start(&|| false).unwrap();
    assert!(job.no_checkpoint().is_some_and(|why| why.to_string().contains("exists")));
    job.finish().unwrap();
    folder.same(Format::Qcow2);
    assert_eq!(fs::read(&log).unwrap(), b"precious", "it is another's");
}

/// The part of the child: not a test by itself.
#[test]
fn drop_box_child() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let place = CheckpointOptions::beside();
    let job = super::resume::convert(Path::new(&folder), Format::Raw, &place, false);
    let job = job.check(job.open_source().unwrap()).unwrap().prepare().unwrap().start(&|| false).unwrap();
    assert!(job.no_checkpoint().is_none(), "{:?}", job.no_checkpoint());
    job.finish().unwrap();
}

/// A directory that may be written and not read cannot be opened to be flushed.
#[test]
fn a_directory_that_cannot_be_read_has_a_checkpoint() {
    let folder = Folder::new();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "resume_trouble::drop_box_child", "--test-threads=1", "-q"]);
    child.env(CHILD, folder.0.path()).current_dir("/");
    if is_root() {
        chown(folder.0.path(), Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
        child.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
    }
    fs::set_permissions(folder.0.path(), Permissions::from_mode(0o300)).unwrap();
    let ended = match child.output() {
        Err(error) if is_root() => return eprintln!("that user cannot run this program: {error}"),
        ended => ended.unwrap(),
    };
    fs::set_permissions(folder.0.path(), Permissions::from_mode(0o700)).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    folder.same(Format::Raw);
    assert_eq!(folder.names(), ["copy"]);
}

/// Another user's file could say that regions are copied.
#[test]
fn a_checkpoint_in_the_file_of_another_user_is_refused() {
    if !is_root() {
        return;
    }
    for contents in ["", "log"] {
        let folder = Folder::new();
        let log = folder.path("log");
        if contents == "log" {
            super::resume::kill_one(&folder, Format::Raw, 0);
        } else {
            fs::write(&log, "").unwrap();
        }
        chown(&log, Some(UNPRIVILEGED), None).unwrap();
        let (names, before) = (folder.names(), fs::read(&log).unwrap());
        let refused = go(&folder.convert(Format::Raw, &CheckpointOptions::file(&log), false));
        let Err(error @ ConvertError::Checkpoint(_)) = refused else { panic!("{refused:?}") };
        assert!(error.to_string().contains("another user"), "{error}");
        assert!(fs::read(&log).unwrap() == before && folder.names() == names, "{:?}", folder.names());
    }
}

/// Whether the page of `file` at `offset` is in the page cache; `None` if the system does not tell.
fn is_cached(file: &Path, offset: u64) -> Option<bool> {
    let file = fs::File::open(file).unwrap();
    let mut byte = [0];
    let buffers = &mut [IoSliceMut::new(&mut byte)];
    match preadv2(&file, buffers, offset, ReadWriteFlags::NOWAIT) {
        Ok(_) => Some(true),
        Err(Errno::AGAIN) => Some(false),
        Err(_) => None,
    }
}

/// After a write that failed the page cache shows what the disk does not have. (Where the cache is the file
/// system this asks nothing.)
#[test]
fn what_is_gone_on_with_is_read_from_the_disk() {
    let folder = Folder::new();
    let probe = fs::File::create(folder.path("probe")).unwrap();
    probe.write_all_at(&[1; 4096], 0).unwrap();
    probe.sync_all().unwrap();
    rustix::fs::fadvise(&probe, 0, None, Advice::DontNeed).unwrap();
    if is_cached(&folder.path("probe"), 0) != Some(false) {
        return eprintln!("the file system keeps its pages");
    }
    super::resume::kill_one(&folder, Format::Raw, 1);
    let outcome = go(&folder.convert(Format::Raw, &CheckpointOptions::beside(), false)).unwrap();
    assert!(outcome.resumed > 0);
    // It was copied by the first run, and the second has no reason to read it.
    assert_eq!(is_cached(&folder.path("copy"), 12 << 20), Some(false));
    folder.same(Format::Raw);
}
