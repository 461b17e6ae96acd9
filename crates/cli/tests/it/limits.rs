//! `--limits=untrusted`, by the program: what a confined command still does, and what it is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;

use blockmirror_testing::hostile::one_l2_table;
use blockmirror_testing::process::with_default_signals;
use blockmirror_testing::{LoopDevice, skip_unsupported};

use crate::common::{Place, Ran};

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");

/// Runs the program with the words of `line` in the folder of `place`.
fn run(place: &Place, line: &str) -> Ran {
    run_as(OURS, place, line)
}

fn run_as(program: &str, place: &Place, line: &str) -> Ran {
    let output =
        with_default_signals(program).args(line.split(' ')).current_dir(place.path(".")).output().unwrap();
    let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code, out: text(output.stdout), err: text(output.stderr) }
}

fn ok(place: &Place, line: &str) -> String {
    let ran = run(place, line);
    assert_eq!(ran.code, 0, "{line}: {ran:?}");
    ran.out
}

/// A place with images, or `None` where the kernel has no sandbox: then a command says so, and fails.
fn place(test: &str) -> Option<Place> {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 3 << 20]).unwrap();
    ok(&place, "convert -f raw -O qcow2 raw disk");
    let tried = run(&place, "info --limits=untrusted disk");
    if tried.code != 0 && tried.err.contains("no-sandbox") {
        skip_unsupported(format_args!("{test}: {}", tried.err.trim_end()));
        return None;
    }
    Some(place)
}

/// Each command that reads images does inside of the sandbox what it does outside.
#[test]
fn commands_work_inside() {
    let Some(place) = place("commands_work_inside") else { return };
    fs::create_dir(place.path("out")).unwrap();
    fs::create_dir(place.path("bases")).unwrap();
    fs::create_dir(place.path("data")).unwrap();
    ok(&place, "create -q -f qcow2 bases/base 3M");
    for line in [
        "info LIMITS disk",
        "info LIMITS --output=json disk",
        "map LIMITS disk",
        "measure LIMITS -O qcow2 disk",
        "check LIMITS disk",
        "compare LIMITS -F raw disk raw",
        "hash LIMITS disk",
        "inspect LIMITS disk",
    ] {
        let inside = ok(&place, &line.replace("LIMITS", "--limits=untrusted"));
        let outside = ok(&place, &line.replace("LIMITS ", ""));
        assert_eq!(inside, outside, "{line}");
    }
    ok(&place, "bench -q --limits=untrusted -c 10 disk");
    ok(&place, "check --limits=untrusted -r all disk");
    for (line, target) in [
        ("convert --limits=untrusted -O raw disk out/a", "out/a"),
        ("convert --limits=untrusted -c -O qcow2 disk out/b", "out/b"),
        // Over what is there, replaced and in place.
        ("convert --limits=untrusted -O qcow2 disk out/a", "out/a"),
        ("convert --limits=untrusted --in-place -O raw disk out/b", "out/b"),
        ("convert --limits=untrusted -n -O raw disk out/b", "out/b"),
        ("mirror --limits=untrusted --verify=hash disk out/c", "out/c"),
        ("convert --limits=untrusted --checkpoint=out/log --in-place -O raw disk out/b", "out/b"),
        ("mirror --limits=untrusted --checkpoint=out/log --verify=full disk out/d", "out/d"),
        (
            "convert --limits=untrusted -O qcow2 -o backing_file=../bases/base,backing_fmt=qcow2 disk out/f",
            "out/f",
        ),
        ("convert --limits=untrusted -O qcow2 -B ../bases/base -F qcow2 disk out/h", "out/h"),
        ("convert --limits=untrusted -O qcow2 -o data_file=../data/d disk out/g", "out/g"),
        ("dd --limits=untrusted -O qcow2 if=disk of=out/e bs=64K", "out/e"),
    ] {
        ok(&place, line);
        ok(&place, &format!("compare --allow-backing . {target} disk"));
    }
    let names = fs::read_dir(place.path("out")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().contains("partial")));
}

/// What an image names lies beside it, and is opened all the same by a command without limits.
#[test]
fn names_in_images_are_not_followed() {
    let Some(place) = place("names_in_images_are_not_followed") else { return };
    fs::create_dir(place.path("bases")).unwrap();
    ok(&place, "convert -O qcow2 disk bases/base");
    ok(&place, "create -q -f qcow2 -b bases/base -F qcow2 top");
    ok(&place, "create -q -f qcow2 -o data_file=data external 1M");
    ok(&place, "compare top disk");
    for line in [
        "convert --limits=untrusted top copy",
        "hash --limits=untrusted external",
        "map --limits=untrusted top",
    ] {
        let ran = run(&place, line);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(!place.path("copy").exists());
    }
    ok(&place, "compare --limits=untrusted --allow-backing bases top disk");
    let deep = run(&place, "hash --limits=untrusted,depth=1 --allow-backing bases top");
    assert_eq!(deep.code, 1, "{deep:?}");
    assert!(run(&place, "inspect --limits=untrusted --allow=backing_file top").code == 0);
}

/// Under that name plain paths in images are followed everywhere, but not those of strangers.
#[test]
fn names_in_images_are_not_followed_under_the_name_qemu_img() {
    let test = "names_in_images_are_not_followed_under_the_name_qemu_img";
    let Some(place) = place(test) else { return };
    std::os::unix::fs::symlink(OURS, place.path("qemu-img")).unwrap();
    fs::create_dir(place.path("bases")).unwrap();
    ok(&place, "convert -O qcow2 disk bases/base");
    ok(&place, "create -q -f qcow2 -b bases/base -F qcow2 top");
    let program = place.path("qemu-img");
    let img = |line: &str| run_as(program.to_str().unwrap(), &place, line).code;
    assert_eq!(img("convert -O raw top free"), 0);
    for line in ["convert L -O raw top copy", "map L top", "compare L top disk", "info L --backing-chain top"]
    {
        for limits in ["--limits=untrusted", "--limits=untrusted,no-sandbox"] {
            assert_ne!(img(&line.replace('L', limits)), 0, "{line}");
            assert!(!place.path("copy").exists());
        }
        let allowed = "--limits=untrusted --allow-backing bases";
        assert_eq!(img(&line.replace('L', allowed)), 0, "{line}");
        let _ = fs::remove_file(place.path("copy"));
    }
}

/// From inside it cannot be seen, and a file that is replaced would be lost to what has it open.
#[test]
fn a_target_that_is_open_is_not_replaced() {
    let Some(place) = place("a_target_that_is_open_is_not_replaced") else { return };
    fs::write(place.path("target"), vec![1; 3 << 20]).unwrap();
    let held = File::open(place.path("target")).unwrap();
    for line in [
        "convert --limits=untrusted -O raw disk target",
        "mirror --limits=untrusted -O raw disk target",
        "dd --limits=untrusted -O raw if=disk of=target",
    ] {
        let ran = run(&place, line);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.err.contains("has it open; give --in-place"), "{ran:?}");
    }
    let mut first = [0];
    held.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1]);
    ok(&place, "convert --limits=untrusted --in-place -O raw disk target");
    held.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [7], "it is the same file");
    ok(&place, "convert --limits=untrusted -n -O raw disk target");
    drop(held);
    ok(&place, "convert --limits=untrusted -O raw disk target");
    assert_eq!(run(&place, "convert --limits=untrusted --clean -O raw disk target").code, 2);
}

#[test]
fn a_file_below_a_loop_device_that_is_used_is_not_written() {
    let test = "a_file_below_a_loop_device_that_is_used_is_not_written";
    let Some(place) = place(test) else { return };
    fs::copy(place.path("disk"), place.path("target")).unwrap();
    let Some(device) = LoopDevice::on(&place.path("target")) else { return };
    let user = File::open(device.path()).unwrap();
    let before = fs::read(place.path("target")).unwrap();
    for line in [
        "convert LIMITS -O raw disk target",
        "convert LIMITS --in-place -O raw disk target",
        "convert LIMITS -n -O qcow2 disk target",
        "check LIMITS -r all target",
        "bench LIMITS -q -w -c 1 target",
    ] {
        let ran = run(&place, &line.replace("LIMITS", "--limits=untrusted"));
        assert_eq!(ran.code, 1, "{line}: {ran:?}");
        assert!(ran.err.contains("stands on it"), "{line}: {ran:?}");
    }
    assert_eq!(fs::read(place.path("target")).unwrap(), before);
    drop(user);
}

#[test]
fn sizes_over_the_limit_are_refused() {
    let Some(place) = place("sizes_over_the_limit_are_refused") else { return };
    ok(&place, "create -q -f qcow2 large 2T");
    for line in
        ["info L large", "check L large", "convert L large copy", "compare L large large", "map L large"]
    {
        let ran = run(&place, &line.replace('L', "--limits=untrusted,size=1T"));
        assert!((1..=2).contains(&ran.code), "{ran:?}");
        assert!(
            ran.err.contains("its disk has 2199023255552 bytes, more than the limit of 1099511627776"),
            "{ran:?}"
        );
    }
    let ran = run(&place, "inspect --limits=untrusted,size=1T large");
    assert_eq!(ran.code, 4, "{ran:?}");
    ok(&place, "info --limits=untrusted,size=2T large");
}

/// The kernel ends a command that takes more time than it was given; one that copies does what it does at any
/// signal.
#[test]
fn time_ends_a_command() {
    let Some(place) = place("time_ends_a_command") else { return };
    one_l2_table(&place.path("endless")).unwrap();
    let ran = run(&place, "hash --limits=untrusted,size=1P,time=1 endless");
    assert_eq!(ran.code, 128 + 24, "{ran:?}");
    ok(&place, "create -q -f qcow2 -o cluster_size=2M copy 512T");
    let ran = run(&place, "convert --limits=untrusted,size=1P,time=1 -n -O qcow2 endless copy");
    assert_eq!(ran.code, 128 + 24, "{ran:?}");
}

#[test]
fn memory_is_limited() {
    let Some(place) = place("memory_is_limited") else { return };
    // An L1 table of 32 MiB, which is read as a whole.
    let header = fs::read(place.path("disk")).unwrap();
    let file = File::create(place.path("table")).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(&(4u32 << 20).to_be_bytes(), 36).unwrap();
    file.write_all_at(&(16u64 << 20).to_be_bytes(), 40).unwrap();
    file.set_len(64 << 20).unwrap();
    ok(&place, "map --limits=untrusted table");
    let ran = run(&place, "map --limits=untrusted,memory=24M table");
    assert_ne!(ran.code, 0, "{ran:?}");
    ok(&place, "map --limits=untrusted,memory=24M disk");
}

#[test]
fn what_does_not_go_with_it_is_said() {
    let Some(place) = place("what_does_not_go_with_it_is_said") else { return };
    let ran = run(&place, "info --limits=untrusted nbd://localhost/x");
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.err.contains("untrusted,no-sandbox"), "{ran:?}");
    assert_eq!(run(&place, "info --limits=all disk").code, 2);
    ok(&place, "info --limits=untrusted,no-sandbox disk");
    // In a process that is a test's.
    assert!(place.ours_fails("info --limits=untrusted @disk", 1).contains("confines the process"));
    // A symbolic link in the place of the image leads to what it leads to now.
    std::os::unix::fs::symlink("disk", place.path("link")).unwrap();
    ok(&place, "check --limits=untrusted link");
}
