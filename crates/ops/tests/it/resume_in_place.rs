//! Conversions that are written in place and gone on with: their checkpoint has a digest of each region,
//! which source and target are compared with.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockmirror_checkpoint::Checkpoint;
use blockmirror_file::FileOptions;
use blockmirror_hash::block_digest;
use blockmirror_image::{Format, Replacement, TargetOptions};
use blockmirror_mirror::{MirrorOptions, OnError, Reflink};
use blockmirror_ops::{CheckpointOptions, Convert, ConvertError, ResumeCheck};

use super::resume::{Folder, LEN, go, places};

const MIB: u64 = 1 << 20;

/// A copy in place, of the disk or of one with a sector that cannot be read.
fn in_place(folder: &Folder, format: Format, check: ResumeCheck, bad: bool) -> Convert {
    let place = CheckpointOptions::file(folder.path("log")).check(check);
    let convert = folder.convert(format, &place, bad);
    convert.target_file(TargetOptions::new().replacement(Replacement::InPlace))
}

/// A folder in which a copy in place has failed on its way.
fn failed(format: Format) -> Folder {
    let folder = Folder::new();
    fs::write(folder.path("copy"), "old").unwrap();
    let failing = in_place(&folder, format, ResumeCheck::Sample, true);
    let failing = failing.mirror(MirrorOptions::new().buf_size(MIB).max_in_flight(4));
    let kept = match go(&failing) {
        Err(ConvertError::Interrupted(kept)) => kept,
        other => panic!("{other:?}"),
    };
    assert_eq!(kept.partial, folder.path("copy"));
    assert!(kept.done > 16 * MIB && kept.to_string().contains("the target is incomplete"), "{kept}");
    assert_eq!(folder.names(), ["copy", "log"]);
    folder
}

fn change(folder: &Folder, name: &str, at: u64) {
    let file = fs::File::options().read(true).write(true).open(folder.path(name)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

fn refused(convert: &Convert) -> String {
    match go(convert) {
        Err(ConvertError::Changed { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_copy_in_place_that_failed_is_gone_on_with() {
    for format in [Format::Raw, Format::Qcow2] {
        for check in [ResumeCheck::Sample, ResumeCheck::All] {
            let folder = failed(format);
            let checked = in_place(&folder, format, check, false);
            let checked = checked.check(checked.open_source().unwrap()).unwrap();
            let found = checked.interrupted().unwrap().unwrap();
            assert_eq!((found.changed, found.len, found.partial), (None, LEN, folder.path("copy")));
            let outcome = go(&in_place(&folder, format, check, false)).unwrap();
            assert_eq!(outcome.resumed, found.done);
            assert!(outcome.copy.copied <= LEN - found.done, "{outcome:?}");
            folder.same(format);
            assert_eq!(folder.names(), ["copy"]);
        }
    }
}

/// Marks the first free cluster of the image `copy` as used, as a crash may have left it.
fn leak(folder: &Folder) {
    let file = fs::File::options().read(true).write(true).open(folder.path("copy")).unwrap();
    let pointer = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    // The header has where the table of refcount blocks is.
    let block = pointer(pointer(48));
    let mut counts = vec![0; 65_536];
    file.read_exact_at(&mut counts, block).unwrap();
    let free = counts.chunks(2).position(|count| count == [0, 0]).unwrap() as u64;
    file.write_all_at(&[0, 1], block + 2 * free).unwrap();
    // A check looks no further than to the end of the file.
    file.set_len((free + 1) * 65_536).unwrap();
}

/// It was mended before it was compared.
#[test]
fn an_image_that_is_refused_is_not_changed() {
    let folder = failed(Format::Qcow2);
    leak(&folder);
    let bytes = fs::read(folder.path("copy")).unwrap();
    let at = bytes.windows(4096).position(|piece| piece.iter().all(|byte| *byte == 5)).unwrap() as u64;
    change(&folder, "copy", at);
    let before = fs::read(folder.path("copy")).unwrap();
    let said = refused(&in_place(&folder, Format::Qcow2, ResumeCheck::All, false));
    assert_eq!(said, "region 4 of the target (bytes 4194304 to 5242880) is not what was copied");
    assert!(fs::read(folder.path("copy")).unwrap() == before);
    change(&folder, "copy", at);
    go(&in_place(&folder, Format::Qcow2, ResumeCheck::All, false)).unwrap();
    folder.same(Format::Qcow2);
}

/// Each byte of what was copied is looked at if that is asked for, and nothing is written before.
#[test]
fn a_target_that_was_written_meanwhile_is_refused() {
    let folder = failed(Format::Raw);
    change(&folder, "copy", 4 * MIB - 1);
    let before = fs::read(folder.path("copy")).unwrap();
    let said = refused(&in_place(&folder, Format::Raw, ResumeCheck::All, false));
    assert_eq!(said, "region 3 of the target (bytes 3145728 to 4194304) is not what was copied");
    assert!(fs::read(folder.path("copy")).unwrap() == before);
    // A sample sees what has changed everywhere.
    fs::write(folder.path("copy"), vec![0xee; LEN as usize]).unwrap();
    let said = refused(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false));
    assert!(said.contains("of the target"), "{said}");
    assert_eq!(folder.names(), ["copy", "log"]);
    let place = CheckpointOptions::file(folder.path("log")).restart(true);
    let anew = folder.convert(Format::Raw, &place, false);
    let outcome = go(&anew.target_file(TargetOptions::new().replacement(Replacement::InPlace))).unwrap();
    assert_eq!(outcome.resumed, 0);
    folder.same(Format::Raw);
    assert_eq!(folder.names(), ["copy"]);
}

#[test]
fn another_target_of_the_same_name_is_refused() {
    let folder = failed(Format::Raw);
    fs::copy(folder.path("copy"), folder.path("other")).unwrap();
    fs::rename(folder.path("other"), folder.path("copy")).unwrap();
    let said = refused(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false));
    assert_eq!(said, "the target is another file, block device or export");
    // As a new file it would be another one, too.
    let place = CheckpointOptions::file(folder.path("log"));
    let said = refused(&folder.convert(Format::Raw, &place, false));
    assert!(said.contains("temporary file"), "{said}");
    assert_eq!(folder.names(), ["copy", "log"]);
}

/// What was copied to a new file is compared with the source if that is asked for.
#[test]
fn a_temporary_file_that_was_written_meanwhile_is_refused_if_all_of_it_is_read() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = Folder::new();
        super::resume::kill_one(&folder, format, 0);
        let place = places(folder.0.path())[0].clone();
        let all = folder.convert(format, &place.clone().check(ResumeCheck::All), false);
        let partial = folder.names().into_iter().find(|name| name.ends_with(".partial")).unwrap();
        let bytes = fs::read(folder.path(&partial)).unwrap();
        // The fifth MiB of the source holds fives.
        let at = bytes.windows(4096).position(|piece| piece.iter().all(|byte| *byte == 5)).unwrap() as u64;
        change(&folder, &partial, at);
        let said = refused(&all);
        assert_eq!(said, "region 4 of the target (bytes 4194304 to 5242880) is not what was copied");
        change(&folder, &partial, at);
        assert!(go(&all).unwrap().resumed > 0);
        folder.same(format);
    }
}

/// The checkpoint of `folder` with all regions marked, with the digests of the disk.
fn complete_log(folder: &Folder) {
    let file = FileOptions::new().writable(true).open(folder.path("log")).unwrap();
    let mut log = Checkpoint::open(Arc::new(file)).unwrap();
    let disk = fs::read(folder.path("disk.raw")).unwrap();
    let digests = disk.chunks(MIB as usize).map(|bytes| *block_digest(bytes).first_chunk().unwrap());
    let (digests, all) = (digests.collect::<Vec<_>>(), 0..LEN / MIB);
    log.mark_with(std::slice::from_ref(&all), &mut |region| digests[region as usize]).unwrap();
}

/// A sample of it passed, and nothing was left to copy.
#[test]
fn where_nothing_is_left_to_copy_all_of_it_is_read() {
    let folder = failed(Format::Raw);
    complete_log(&folder);
    // What was left is not there.
    let said = refused(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false));
    assert!(said.contains("of the target"), "{said}");
    fs::write(folder.path("copy"), fs::read(folder.path("disk.raw")).unwrap()).unwrap();
    for at in (0..LEN).step_by(7 * MIB as usize) {
        change(&folder, "copy", at);
        refused(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false));
        change(&folder, "copy", at);
    }
    let outcome = go(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false)).unwrap();
    assert_eq!((outcome.resumed, outcome.copy.copied), (LEN, 0));
    assert_eq!(folder.names(), ["copy"]);
}

/// It led to a target that was in use since, with all of it marked, if its file could not be removed.
#[test]
fn a_copy_in_place_that_is_complete_leaves_no_valid_checkpoint() {
    let folder = failed(Format::Raw);
    let kept = fs::File::open(folder.path("log")).unwrap();
    go(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false)).unwrap();
    let mut left = [0; 9];
    assert_eq!(kept.read_at(&mut left, 0).unwrap(), 8, "{left:?}");
    folder.same(Format::Raw);
}

/// The same checkpoint chose other regions each time, until none of them was one that had changed.
#[test]
fn what_a_sample_has_refused_is_refused_again() {
    let folder = failed(Format::Raw);
    for at in (0..16).step_by(4).map(|mib| mib * MIB) {
        change(&folder, "copy", at);
        let tries = (0..5).map(|_| {
            // It would copy the rest.
            let copy = fs::read(folder.path("copy")).unwrap();
            let log = fs::read(folder.path("log")).unwrap();
            let refused = go(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false)).is_err();
            fs::write(folder.path("log"), log).unwrap();
            fs::File::options()
                .write(true)
                .open(folder.path("copy"))
                .unwrap()
                .write_all_at(&copy, 0)
                .unwrap();
            refused
        });
        let tries: Vec<_> = tries.collect();
        assert!(tries.iter().all(|refused| *refused == tries[0]), "{at}: {tries:?}");
        change(&folder, "copy", at);
    }
}

/// A sample of regions, most of which are zero, missed the others.
#[test]
fn a_target_that_has_become_blank_is_refused() {
    let folder = failed(Format::Raw);
    fs::File::options()
        .write(true)
        .open(folder.path("copy"))
        .unwrap()
        .write_all_at(&vec![0; LEN as usize], 0)
        .unwrap();
    let said = refused(&in_place(&folder, Format::Raw, ResumeCheck::Sample, false));
    assert!(said.contains("of the target"), "{said}");
}

/// It leaves nothing to go on with, and nothing is changed in it.
#[test]
fn an_image_in_place_that_was_finished_is_not_gone_on_with() {
    let folder = failed(Format::Qcow2);
    let kept = fs::read(folder.path("log")).unwrap();
    go(&in_place(&folder, Format::Qcow2, ResumeCheck::Sample, false)).unwrap();
    fs::write(folder.path("log"), kept).unwrap();
    let finished = fs::read(folder.path("copy")).unwrap();
    match go(&in_place(&folder, Format::Qcow2, ResumeCheck::Sample, false)) {
        Err(error @ ConvertError::Image(_)) => {
            assert!(error.to_string().contains("does not hold what the interrupted run"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    complete_log(&folder);
    assert!(go(&in_place(&folder, Format::Qcow2, ResumeCheck::All, false)).is_err());
    assert!(fs::read(folder.path("copy")).unwrap() == finished);
    assert_eq!(folder.names(), ["copy", "log"]);
}

/// Blocks of 1 MiB are read as a whole to be hashed; around a bad sector the copy gets what it asks for.
#[test]
fn a_bad_sector_costs_no_more_with_digests_than_without() {
    let folder = Folder::new();
    fs::write(folder.path("copy"), "old").unwrap();
    let job = MirrorOptions::new().granularity(65_536).on_source_error(OnError::Ignore);
    let salvage = in_place(&folder, Format::Raw, ResumeCheck::Sample, true).mirror(job);
    let outcome = go(&salvage).unwrap();
    let lost: u64 = outcome.copy.given_up.iter().map(|given_up| given_up.range.len()).sum();
    assert!(lost > 0 && lost <= 65_536, "{:?}", outcome.copy.given_up);
    let (disk, copy) = (fs::read(folder.path("disk.raw")).unwrap(), fs::read(folder.path("copy")).unwrap());
    let differ = disk.iter().zip(&copy).filter(|(a, b)| a != b).count() as u64;
    assert!(differ <= lost, "{differ}");
    assert_eq!(folder.names(), ["copy"]);
}

/// What is shared passes by what hashes.
#[test]
fn a_copy_with_digests_shares_no_blocks() {
    let folder = Folder::new();
    fs::write(folder.path("copy"), "old").unwrap();
    let always = in_place(&folder, Format::Raw, ResumeCheck::Sample, false).reflink(Reflink::Always);
    assert!(matches!(go(&always), Err(ConvertError::Start(_))));
    assert_eq!(fs::read(folder.path("copy")).unwrap(), b"old");
    assert_eq!(folder.names(), ["copy"]);
}
