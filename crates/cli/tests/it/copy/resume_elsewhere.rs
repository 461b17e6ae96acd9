//! Copies from and to block devices and exports that are interrupted and gone on with, as the user of the
//! command sees them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use serde_json::Value;

use crate::common::{Place, Ran, have_qemu};
use crate::process::plain_server;
use crate::target_kinds::{Kind, Target};

const MIB: u64 = 1 << 20;
const LEN: u64 = 64 * MIB;
/// Behind the operations that run at once, so that something is done before it is met.
const BAD: u64 = 48 * MIB;
const OPTIONS: &str = "--output=json -f raw --buf-size 1M --checkpoint @log --checkpoint-interval 2M";

/// A file of data, each MiB of its own, and rules by which a sector of it cannot be read.
fn source(place: &Place, name: &str) {
    let file = fs::File::create(place.path(name)).unwrap();
    for mib in 0..LEN / MIB {
        file.write_all_at(&vec![mib as u8 + 1; MIB as usize], mib * MIB).unwrap();
    }
    cannot_read(place, BAD);
}

/// From here on the sector at `offset` cannot be read.
fn cannot_read(place: &Place, offset: u64) {
    let rule = format!("[inject-error]\nevent = \"read_aio\"\nsector = \"{}\"\n", offset / 512);
    fs::write(place.path("rules"), rule).unwrap();
}

/// Copies `source` to `target`, and fails on the way; the line for the user.
fn fails(place: &Place, format: &str, source: &str, target: &str) -> String {
    let ran = place.ours(&format!("convert {OPTIONS} -O {format} blkdebug:@rules:{source} {target}"));
    let said: Value = serde_json::from_str(ran.err.lines().last().unwrap()).unwrap();
    assert_eq!((ran.code, &said["class"]), (1, &"io".into()), "{ran:?}");
    said["message"].as_str().unwrap().to_owned()
}

fn again(place: &Place, format: &str, source: &str, target: &str, more: &str) -> Ran {
    place.ours(&format!("convert {OPTIONS}{more} -O {format} {source} {target}"))
}

fn goes_on(place: &Place, format: &str, source: &str, target: &str) {
    let ran = again(place, format, source, target, "");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("going on with an interrupted copy"), "{ran:?}");
    assert!(ran.err.contains("nothing else may have been written to source or target since"), "{ran:?}");
    let outcome: Value = serde_json::from_str(&ran.out).unwrap();
    let figure = |name: &str| outcome[name].as_u64().unwrap();
    assert!(figure("resumed") >= 24 * MIB && figure("resumed") + figure("copied") == LEN, "{outcome}");
    place.ours_ok(&format!("compare -q -f raw -F {format} {source} {target}"));
    assert!(!place.path("log").exists());
}

#[test]
fn a_copy_to_a_device_or_an_export_is_gone_on_with() {
    for kind in [Kind::Device, Kind::QemuExport, Kind::OurExport] {
        for format in ["raw", "qcow2"] {
            if kind == Kind::QemuExport && !have_qemu("resume") {
                continue;
            }
            let place = Place::new();
            source(&place, "source");
            let Some(target) = Target::new(&place, kind, format, LEN) else { continue };
            let name = &target.name;
            let said = fails(&place, format, "@source", name);
            assert!(said.contains("; the target is incomplete; "), "{said}");
            let kept = format!("bytes are kept in {name}: the same command goes on there");
            assert!(said.ends_with(&kept), "{said}");
            if format == "qcow2" {
                let looked = place.ours_error(&format!("info -f qcow2 {name}"), 1);
                assert!(looked.contains("unfinished") || looked.contains("not complete"), "{looked}");
            }
            goes_on(&place, format, "@source", name);
            if have_qemu("resume") {
                place.img(&format!("compare -q -f raw -F {format} @source {name}"));
            }
        }
    }
}

#[test]
fn a_copy_from_a_device_or_an_export_is_gone_on_with_unless_that_was_written() {
    for kind in [Kind::Device, Kind::OurExport] {
        let place = Place::new();
        source(&place, "target");
        let Some(from) = Target::new(&place, kind, "raw", LEN) else { continue };
        let name = &from.name;
        fails(&place, "qcow2", name, "@copy");
        let write = |byte| {
            let file = if kind == Kind::Device { name.into() } else { place.path("target") };
            let file = fs::File::options().write(true).open(file).unwrap();
            file.write_all_at(&[byte], 5 * MIB).unwrap();
            file.sync_all().unwrap();
        };
        write(0xff);
        let ran = again(&place, "qcow2", name, "@copy", " --resume=verify");
        let what = "region 5 of the source (bytes 5242880 to 6291456) is not what was copied";
        assert!(ran.code == 1 && ran.err.contains(what) && ran.err.contains("--restart"), "{ran:?}");
        write(6);
        goes_on(&place, "qcow2", name, "@copy");
        assert!(place.path("copy").exists());
    }
}

#[test]
fn another_device_or_export_of_the_same_name_is_refused() {
    let place = Place::new();
    source(&place, "source");
    let Some(target) = Target::new(&place, Kind::OurExport, "qcow2", LEN) else { return };
    let name = target.name.clone();
    fails(&place, "qcow2", "@source", &name);
    drop(target);
    // It has another length.
    let Some(_other) = Target::new(&place, Kind::OurExport, "qcow2", 2 * LEN) else { return };
    let ran = again(&place, "qcow2", "@source", &name, "");
    let what = "the target is another file, block device or export";
    assert!(ran.code == 1 && ran.err.contains(what), "{ran:?}");
    let ran = again(&place, "qcow2", "@source", &name, " --restart");
    assert_eq!(ran.code, 0, "{ran:?}");
    place.ours_ok(&format!("compare -q -f raw -F qcow2 @source {name}"));
}

/// A flush that the server does not know makes nothing durable.
#[test]
fn an_export_that_cannot_flush_has_no_checkpoint() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; MIB as usize]).unwrap();
    let writes = plain_server(&place.path("nbd"), MIB, false);
    let line = "convert -f raw --checkpoint @log @source nbd+unix:///?socket=@nbd";
    let said = place.ours_fails(line, 2);
    assert!(said.ends_with("it cannot have a checkpoint: its server has no flush command"), "{said}");
    assert_eq!(writes.load(Ordering::SeqCst), 0);
    assert!(!place.path("log").exists());
}

/// A checkpoint that is not asked for is one of files.
#[test]
fn options_about_a_checkpoint_need_one_that_is_named() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; MIB as usize]).unwrap();
    for target in ["@target", "nbd+unix:///?socket=@nbd"] {
        let said = place.ours_fails(&format!("convert -f raw --resume=verify @source {target}"), 2);
        let want = "--resume: this copy keeps no checkpoint; --checkpoint FILE asks for one";
        assert_eq!(said, format!("blockmirror: {want}"));
    }
    // In place, which only the target's preparation shows.
    let file = fs::File::create(place.path("large")).unwrap();
    file.set_len(10 << 30).unwrap();
    fs::write(place.path("target"), "old").unwrap();
    let ran = place.ours("convert -q -f raw --resume=verify --in-place @large @target");
    assert_eq!(ran.code, 2, "{ran:?}");
    assert_eq!(fs::read(place.path("target")).unwrap(), b"old");
}

/// It was finished, and used since.
#[test]
fn a_copy_that_cannot_be_gone_on_with_says_what_to_do() {
    let place = Place::new();
    source(&place, "source");
    fs::write(place.path("target"), "old").unwrap();
    let line = format!("convert --in-place {OPTIONS} -O qcow2");
    assert_eq!(place.ours(&format!("{line} blkdebug:@rules:@source @target")).code, 1);
    place.ours_ok("convert -q --in-place -f raw -O qcow2 @source @target");
    let ran = place.ours(&format!("{line} @source @target"));
    assert!(ran.code == 1 && ran.err.contains("what was copied stays; --restart begins anew"), "{ran:?}");
    place.ours_ok(&format!("{line} --restart @source @target"));
    place.ours_ok("compare -q -f raw -F qcow2 @source @target");
}

/// What was saved of a failing disk was given up when another of its sectors failed.
#[test]
fn what_was_copied_is_kept_where_the_source_cannot_be_read_any_more() {
    let place = Place::new();
    source(&place, "source");
    fs::write(place.path("target"), "old").unwrap();
    let run = |more| {
        let line = format!("convert --in-place {OPTIONS} -O raw{more} blkdebug:@rules:@source @target");
        place.ours(&line)
    };
    let ran = run("");
    assert!(ran.code == 1 && ran.err.contains("incomplete until the same command has gone on"), "{ran:?}");
    cannot_read(&place, 5 * MIB);
    let ran = run(" --resume=verify");
    assert!(
        ran.code == 1 && ran.err.contains("stays; --salvage goes on without the source there"),
        "{ran:?}"
    );
    let write = |byte| {
        let file = fs::File::options().write(true).open(place.path("target")).unwrap();
        file.write_all_at(&[byte], 5 * MIB).unwrap();
    };
    write(0xff);
    let ran = run(" --salvage --resume=verify");
    assert!(ran.code == 1 && ran.err.contains("region 5 of the target"), "{ran:?}");
    write(6);
    let ran = run(" --salvage --resume=verify");
    assert!(
        ran.code == 0 && ran.err.contains(": 1 of the regions that were copied cannot be read"),
        "{ran:?}"
    );
    assert!(fs::read(place.path("source")).unwrap() == fs::read(place.path("target")).unwrap());
}
