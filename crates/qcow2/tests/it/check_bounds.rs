//! What a check, a repair and an opening cost is bounded by the file, whatever the image says of itself:
//! requests and bytes are counted, memory is limited by the system. Nothing is timed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod shapes;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_block::testing::MemoryStorage;
use blockmirror_file::FileOptions;
use blockmirror_qcow2::{OpenOptions, Repair, check, repair};
use blockmirror_testing::bounds::{Work, check_bound, repair_bound, repaired_len_bound};

use self::shapes::{ALL, SOUND};
use crate::hostile::counted::Counted;

/// Memory of a check or a repair of each image here: as much as it may take at the caps of all directories.
const MEMORY: u64 = 256 << 20;
/// Memory of a test program that does nothing: its data, and the stacks of its threads.
const OF_PROGRAM: u64 = 24 << 20;
/// Shorter files cannot make a check take so much.
const LONG: u64 = 16 << 20;
/// Names the image that [`one_image`] works on, and what it does.
const IMAGE: &str = "BLOCKMIRROR_HOSTILE_IMAGE";
const WORK: &str = "BLOCKMIRROR_HOSTILE_WORK";
/// What it may do.
const CHECK: &str = "check";
const REPAIR: &str = "repair";
const OPEN: &str = "open";

#[test]
fn requests_and_bytes_are_bounded_by_the_file() {
    for shape in ALL {
        let image = shape.make();
        let storage = Counted::over(Arc::new(MemoryStorage::with_contents(&image.0)));
        let report = check(&storage, &mut ()).unwrap();
        assert_eq!(report.is_clean(), shape.name == SOUND, "{}", shape.name);
        let bound = check_bound(image.len(), image.cluster(), shape.entries);
        within(shape.name, "check", storage.work(), bound);

        // What a repair cannot mend, and says so, is bounded too.
        let _ = repair(&storage, Repair::All, &mut ());
        let bound = repair_bound(storage.len().unwrap(), image.cluster(), shape.entries);
        within(shape.name, "repair", storage.work(), bound);
        let (after, most) = (storage.len().unwrap(), repaired_len_bound(image.len()));
        assert!(after <= most, "{}: it grows from {} to {after}", shape.name, image.len());
    }
}

fn within(name: &str, what: &str, work: Work, bound: Work) {
    let is_within = work.requests <= bound.requests && work.bytes <= bound.bytes;
    assert!(is_within, "{what} of {name}: {work:?}, the bound is {bound:?}");
}

#[test]
fn memory_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.qcow2");
    for shape in ALL {
        let image = shape.make();
        if image.len() < LONG {
            continue;
        }
        fs::write(&path, image.0).unwrap();
        // A check and an opening write nothing.
        for what in [CHECK, OPEN, REPAIR] {
            let output = limited(&path, what).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{what} of {}: {}: {text}", shape.name, output.status);
        }
    }
}

/// This program, doing [`one_image`] alone, with no more memory than it may take.
fn limited(path: &Path, what: &str) -> Command {
    let mut command = Command::new("sh");
    let most = (MEMORY + OF_PROGRAM) >> 10;
    command.args(["-c", &format!("ulimit -d {most} && exec \"$0\" \"$@\"")]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "check_bounds::one_image", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(IMAGE, path).env(WORK, what);
    command
}

#[test]
#[ignore = "memory_is_bounded runs it in a process of its own"]
fn one_image() {
    let (Some(path), Ok(what)) = (std::env::var_os(IMAGE), std::env::var(WORK)) else { return };
    let storage = FileOptions::new().writable(true).open(path).unwrap();
    match &*what {
        CHECK => drop(check(&storage, &mut ()).unwrap()),
        REPAIR => drop(repair(&storage, Repair::All, &mut ())),
        // Whether it is refused or not.
        _ => drop(OpenOptions::new().writable(true).open(Arc::new(storage))),
    }
}
