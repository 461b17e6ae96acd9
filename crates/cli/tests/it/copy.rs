//! `mirror` and `convert` from end to end: what they make, what they say, and what they leave when they
//! refuse.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod aliases;
mod before;
mod bitmaps;
mod cache;
mod damaged;
mod data_files;
mod existing;
mod longer;
mod no_clobber;
mod no_sync;
mod parts;
mod protocols;
mod reflink;
mod resume;
mod resume_elsewhere;
mod shared;
mod sources;
mod space;
mod targets;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::Place;
use blockmirror_testing::hostile;
use serde_json::Value;

/// Four megabytes with data at the start, in the middle and at the end.
fn source(place: &Place) {
    let mut bytes = vec![0; 4 << 20];
    for (at, byte) in [(0, 1), (1 << 20, 2), ((4 << 20) - 512, 3)] {
        bytes[at..at + 512].fill(byte);
    }
    fs::write(place.path("source"), bytes).unwrap();
}

#[test]
fn a_copy_of_a_copy_is_the_source() {
    let place = Place::new();
    source(&place);
    place.ours_ok("convert -f raw -O qcow2 @source @a.qcow2");
    let said = place.ours_ok("mirror @a.qcow2 @b.qcow2");
    assert!(said.starts_with("granularity: 64 KiB (the target's cluster size)\n"), "{said}");
    assert!(said.lines().last().unwrap().contains("4 MiB"), "{said}");
    place.ours_ok("convert -q @b.qcow2 @c.raw");
    assert_eq!(fs::read(place.path("c.raw")).unwrap(), fs::read(place.path("source")).unwrap());
    assert_eq!(place.names(), ["a.qcow2", "b.qcow2", "c.raw", "source"]);
    assert_eq!(place.ours_ok("compare @b.qcow2 @c.raw"), "Images are identical.\n");
}

#[test]
fn mirror_keeps_the_format_and_convert_makes_raw() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @source 1M");
    place.ours_ok("mirror -q @source @mirrored");
    place.ours_ok("convert -q @source @converted");
    let format = |name: &str| {
        let info: Value =
            serde_json::from_str(&place.ours_ok(&format!("info --output=json @{name}"))).unwrap();
        info["format"].as_str().unwrap().to_owned()
    };
    assert_eq!((format("mirrored"), format("converted")), ("qcow2".into(), "raw".into()));
}

#[test]
fn what_is_wrong_is_said_in_one_line_and_leaves_no_file() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q -f qcow2 @small 1M");
    for (line, code, message) in [
        (
            "mirror --granularity 511 @source @t",
            2,
            "granularity 511: must be between 512 and 67108864 (64 MiB)",
        ),
        ("mirror --granularity 3000 @source @t", 2, "granularity 3000: must be a power of two"),
        (
            "mirror --speed -1 @source @t",
            2,
            "--speed: \"-1\" is not a size: expected a number with an optional unit K, M, G, T, P or E (powers of 1024)",
        ),
        (
            "mirror -O vmdk @source @t",
            2,
            "--target-format: unknown format \"vmdk\": raw and qcow2 are supported",
        ),
        (
            "mirror -O qcow2 -o cluster=1 @source @t",
            2,
            "-o: option \"cluster\": qcow2 has no such option; it has backing_file, backing_fmt, cluster_size, compat, compression_type, data_file, data_file_raw, extended_l2, lazy_refcounts, preallocation, refcount_bits, size, extent_size_hint; did you mean cluster_size?",
        ),
        (
            "mirror -O qcow2 -o compat=0.10,lazy_refcounts=on @source @t",
            2,
            "create qcow2 image: @t: option lazy_refcounts: it needs compat=1.1, not 0.10",
        ),
        (
            "convert -O qcow2 -B base @source @t",
            2,
            "create: @t: the backing file's format is missing; give it with -F",
        ),
        ("mirror -O raw -B base -F raw @source @t", 2, "create: @t: a raw image cannot have a backing file"),
        (
            "mirror --on-target-error=stop @source @t",
            2,
            "--on-target-error=stop: a paused copy needs a terminal to be resumed from, and there is none",
        ),
        (
            "mirror --on-source-error=enospc @source @t",
            2,
            "--on-source-error=enospc: a paused copy needs a terminal to be resumed from, and there is none",
        ),
        ("mirror -m 0 @source @t", 2, "--parallel: 0 is not in 1..=256"),
        ("mirror @source", 2, "the following required arguments were not provided: <TARGET> (see --help)"),
        ("mirror @nothing @t", 1, "open: @nothing: No such file or directory (os error 2)"),
        ("mirror @source @source", 1, "copy: @source: it is part of the source @source"),
        ("mirror @source @none/t", 1, "look up directory: @none: No such file or directory (os error 2)"),
        (
            "mirror -n @source @small",
            1,
            "copy: source @source has 4194304 bytes, target @small (qcow2) has 1048576: it must not be shorter",
        ),
        ("mirror -n @source @t", 1, "open: @t: No such file or directory (os error 2)"),
    ] {
        assert_eq!(place.ours_fails(line, code), format!("blockmirror: {message}"), "{line}");
        assert_eq!(place.names(), ["small", "source"], "{line}");
    }
}

#[test]
fn a_dry_run_makes_nothing_and_knows_the_granularity() {
    let place = Place::new();
    source(&place);
    for (options, granularity) in [
        ("-O raw", 65536),
        ("-O qcow2 -o cluster_size=512", 4096),
        ("-O qcow2 -o cluster_size=16K,extended_l2=on", 16384),
        ("-O qcow2 -o cluster_size=2M", 65536),
        ("-O qcow2 --granularity 1M", 1 << 20),
    ] {
        let out = place.ours_ok(&format!("mirror --dry-run --output=json {options} @source @target"));
        let plan: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(plan["granularity"], granularity, "{options}");
        assert_eq!(plan["len"], 4 << 20);
        assert_eq!(place.names(), ["source"]);
    }
}

#[test]
fn an_existing_target_keeps_its_layout_and_loses_its_bytes() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q -f qcow2 -o cluster_size=4K @target 4M");
    fs::write(place.path("full"), vec![0x2a; 4 << 20]).unwrap();
    place.ours_ok("mirror -q -n @full @target");
    let said = place.ours_ok("mirror -n @source @target");
    assert!(said.starts_with("granularity: 4 KiB"), "{said}");
    assert_eq!(place.ours_ok("compare @source @target"), "Images are identical.\n");
    place.ours_ok("mirror -q -n -O raw @source @full");
    assert_eq!(fs::read(place.path("full")).unwrap(), fs::read(place.path("source")).unwrap());
}

#[test]
fn top_copies_what_the_top_image_holds() {
    let place = Place::new();
    fs::create_dir(place.path("else")).unwrap();
    source(&place);
    place.ours_ok("create -q -f qcow2 -b source -F raw @top");
    fs::write(place.path("patch"), vec![9; 4 << 20]).unwrap();
    for (line, backing) in [
        ("mirror -q --sync top @top @copy", "source"),
        ("convert -q -O qcow2 -B source -F raw @top @copy", "source"),
        ("mirror -q --sync=top @top @else/copy", "/source"),
    ] {
        place.ours_ok(line);
        let name = line.rsplit('@').next().unwrap();
        let out = place.ours_ok(&format!("info --output=json @{name}"));
        let info: Value = serde_json::from_str(&out).unwrap();
        assert!(info["backing-filename"].as_str().unwrap().ends_with(backing), "{line}: {out}");
        let allow = format!("--allow-backing {}", place.path("").display());
        assert_eq!(place.ours_ok(&format!("compare {allow} @{name} @source")), "Images are identical.\n");
        let map = place.ours_ok(&format!("map {allow} --output=json @{name}"));
        assert!(!map.contains("\"depth\": 0"), "nothing was in the top image: {map}");
        fs::remove_file(place.path(name)).unwrap();
    }
}

#[test]
fn a_file_outside_is_not_opened_and_the_way_to_allow_it_is_named() {
    let place = Place::new();
    fs::create_dir(place.path("else")).unwrap();
    source(&place);
    place.ours_ok("create -q -f qcow2 -b ../source -F raw @else/top");
    let message = place.ours_fails("convert @else/top @t", 1);
    let hint = message.split("to allow it: ").nth(1).unwrap();
    assert_eq!(hint, "--allow-backing @");
    place.ours_ok("convert -q --allow-backing @ @else/top @t");
    assert_eq!(fs::read(place.path("t")).unwrap(), fs::read(place.path("source")).unwrap());
    // Named by the user, it is allowed.
    assert_eq!(place.ours_ok("compare @else/top @source"), "Images are identical.\n");
}

#[test]
fn results_and_progress_are_there_for_machines() {
    let place = Place::new();
    source(&place);
    let ran = place.ours("mirror --output=json --progress=json -O qcow2 @source @target");
    assert_eq!(ran.code, 0, "{ran:?}");
    let result: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(result["granularity"], 65536);
    assert_eq!(result["granularity-reason"]["kind"], "target-cluster");
    let bytes: u64 =
        ["copied", "zeroed", "skipped", "shared"].iter().map(|key| result[key].as_u64().unwrap()).sum();
    assert_eq!(bytes, 4 << 20);
    let last: Value = serde_json::from_str(ran.err.lines().last().unwrap()).unwrap();
    assert_eq!((&last["done"], &last["total"]), (&Value::from(4 << 20), &Value::from(4 << 20)));
    let differ = place.ours("compare --output=json @source @target");
    let result: Value = serde_json::from_str(&differ.out).unwrap();
    assert_eq!((differ.code, &result["identical"]), (0, &Value::from(true)));
}

#[test]
fn help_is_printed_and_lists_options() {
    let place = Place::new();
    for command in ["", "mirror ", "convert ", "create ", "info ", "map ", "compare "] {
        let help = place.ours_ok(&format!("{command}--help"));
        assert!(help.contains("Usage: blockmirror"), "{help}");
    }
    assert!(place.ours_ok("create -f qcow2 -o help").contains("cluster_size=SIZE"));
    assert!(place.ours_ok("mirror -O qcow2 -o help @x @y").contains("refcount_bits="));
}

/// The zeros of the source were once written into the new target, which gave back what had just been
/// preallocated.
#[test]
fn a_preallocated_target_stays_preallocated() {
    let place = Place::new();
    source(&place);
    let allocated = |name: &str| fs::metadata(place.path(name)).unwrap().blocks() * 512;
    for options in ["-O raw -o preallocation=falloc", "-O raw -o preallocation=full"] {
        place.ours_ok(&format!("convert -q {options} @source @t"));
        assert!(allocated("t") >= 4 << 20, "{options}");
    }
    for preallocation in ["metadata", "falloc", "full"] {
        let options = format!("-O qcow2 -o preallocation={preallocation}");
        place.ours_ok(&format!("create -q -f qcow2 -o preallocation={preallocation} @empty 4M"));
        let plan: Value = serde_json::from_str(
            &place.ours_ok(&format!("convert --dry-run --output=json {options} @source @t")),
        )
        .unwrap();
        let done: Value =
            serde_json::from_str(&place.ours_ok(&format!("convert --output=json -S 0 {options} @source @t")))
                .unwrap();
        assert!(allocated("t") >= allocated("empty"), "{options}");
        assert_eq!((&done["zeroed"], &plan["zero"]), (&Value::from(0), &Value::from(0)), "{options}");
        assert_eq!(place.ours_ok("compare @source @t"), "Images are identical.\n");
    }
}

/// A plan once took every new target for empty, also one through which a backing file shows.
#[test]
fn a_dry_run_knows_what_shows_through_the_target() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q -f qcow2 -b source -F raw @overlay");
    place.ours_ok("create -q -f raw @blank 4M");
    fs::write(place.path("short"), vec![7; 1 << 20]).unwrap();
    for backing in ["source", "blank", "short"] {
        for source in ["@overlay", "@blank"] {
            let line = format!("mirror --output=json -S 0 -O qcow2 -B {backing} -F raw {source} @t");
            let plan: Value = serde_json::from_str(&place.ours_ok(&format!("{line} --dry-run"))).unwrap();
            let done: Value = serde_json::from_str(&place.ours_ok(&line)).unwrap();
            let planned = [&plan["copy"], &plan["zero"], &plan["skip"]];
            assert_eq!(planned, [&done["copied"], &done["zeroed"], &done["skipped"]], "{line}");
        }
    }
    fs::create_dir(place.path("dir")).unwrap();
    for (line, message) in [
        (
            "mirror --dry-run -f raw @source @dir",
            "open: @dir: it is a directory; only regular files and block devices hold images",
        ),
        (
            "mirror --dry-run -O qcow2 -B nbd:x -F raw @blank @t2",
            "open: @t2 names the backing file \"nbd:x\", which is not a plain path; only plain paths are opened",
        ),
    ] {
        let said = place.ours_fails(line, 1);
        assert_eq!(said, format!("blockmirror: {message}"));
        assert_eq!(place.ours_fails(&line.replace("--dry-run ", ""), 1), said);
    }
}

/// With `-U` nothing locks the source, and a target whose data file was the source was once written into it.
#[test]
fn a_data_file_of_the_target_is_no_file_of_the_source() {
    let place = Place::new();
    source(&place);
    fs::copy(place.path("source"), place.path("kept")).unwrap();
    place.ours_ok("create -q -f qcow2 -b source -F raw @overlay");
    place.ours_ok("create -q -f qcow2 -o data_file=new @t 4M");
    fs::remove_file(place.path("new")).unwrap();
    fs::hard_link(place.path("source"), place.path("new")).unwrap();
    for (line, file) in [
        ("-O qcow2 -o data_file=source @source @t2", "source"),
        ("-O qcow2 -o data_file=new @overlay @t2", "new"),
        ("-O qcow2 -o data_file=overlay @overlay @t2", "overlay"),
        ("-O qcow2 -n @source @t", "t"),
        ("-O qcow2 -n @overlay @t", "t"),
    ] {
        let source = if line.contains(" @source") { "source" } else { "overlay" };
        let want = format!("blockmirror: copy: @{file}: it is part of the source @{source}");
        for dry in ["", "--dry-run "] {
            assert_eq!(place.ours_fails(&format!("mirror -U {dry}{line}"), 1), want, "{line}");
        }
    }
    assert_eq!(fs::read(place.path("source")).unwrap(), fs::read(place.path("kept")).unwrap());
}

/// A signal once ended `create` where it stood and left what it had written under a temporary name.
#[test]
fn an_interrupted_create_leaves_nothing() {
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_blockmirror"))
        .args(["create", "-q", "-o", "preallocation=full", place.path("disk").to_str().unwrap(), "256M"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while place.names().is_empty() && child.try_wait().unwrap().is_none() {
        thread::yield_now();
    }
    // That fails if the image was complete by then.
    let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    let output = child.wait_with_output().unwrap();
    match output.status.code() {
        Some(0) => assert_eq!(place.names(), ["disk"]),
        code => assert_eq!((code, place.names()), (Some(130), vec![]), "{output:?}"),
    }
}

/// `-n` once took the word of whatever a guest had left on its raw volume: a header with a data file, by
/// which the copy went into another volume of the same folder.
#[test]
fn a_target_that_is_only_taken_for_qcow2_does_not_say_where_data_goes() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q -f qcow2 -o data_file=other @volume 4M");
    fs::write(place.path("other"), vec![7; 4 << 20]).unwrap();
    assert_eq!(
        place.ours_fails("mirror -n @source @volume", 1),
        "blockmirror: open: @volume names the data file \"other\", which is not written to unless the \
         format of the image is given; give it with -O"
    );
    assert!(fs::read(place.path("other")).unwrap().iter().all(|byte| *byte == 7));
    place.ours_ok("mirror -q -n -O qcow2 @source @volume");
    assert_eq!(place.ours_ok("compare @source @volume"), "Images are identical.\n");
}

/// A target's data file was also looked for in the source's folder, which is nothing to it.
#[test]
fn a_hostile_target_does_not_reach_the_folder_of_the_source() {
    let place = Place::new();
    for folder in ["src", "in"] {
        fs::create_dir(place.path(folder)).unwrap();
    }
    fs::write(place.path("src/source"), vec![1; 1 << 20]).unwrap();
    place.ours_ok("create -q -f qcow2 -o data_file=../src/victim @in/x 1M");
    let victim = vec![7; 1 << 20];
    fs::write(place.path("src/victim"), &victim).unwrap();
    let outside = "which lies in @src, outside the directories that images may refer to; to allow it: --allow-backing @src";
    for command in
        ["convert -n -f raw -O qcow2", "mirror -n -f raw -O qcow2", "mirror --dry-run -n -f raw -O qcow2"]
    {
        let said = place.ours_fails(&format!("{command} @src/source @in/x"), 1);
        assert!(said.ends_with(outside), "{said}");
    }
    // A new target that stands on a file named by the caller: what that one names is judged by its own
    // folder.
    place.ours_ok("create -q -u -f qcow2 -b ../src/victim -F raw @in/below 1M");
    let said = place.ours_fails("convert -f raw -O qcow2 -B @in/below -F qcow2 @src/source @src/new", 1);
    assert!(said.ends_with(outside), "{said}");
    assert_eq!(fs::read(place.path("src/victim")).unwrap(), victim);
    place.ours_ok("convert -q -n -f raw -O qcow2 --allow-backing @src @src/source @in/x");
    assert_eq!(fs::read(place.path("src/victim")).unwrap(), vec![1; 1 << 20]);
}

#[test]
fn the_environment_allows_directories() {
    let place = Place::new();
    for folder in ["images", "bases", "more"] {
        fs::create_dir(place.path(folder)).unwrap();
    }
    place.ours_ok("create -q @bases/base 1M");
    place.ours_ok("create -q -f qcow2 -b ../bases/base -F raw @images/top");
    let run = |directories: &str, arguments: &[&str]| {
        let directories = directories.replace('@', &format!("{}/", place.path("").display()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockmirror"));
        command.env("BLOCKMIRROR_ALLOW_BACKING", directories).args(arguments);
        let output = command.arg(place.path("images/top")).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run("@more", &["map"]);
    assert!(code == Some(1) && said.contains("the directories that images may refer to"), "{said}");
    for directories in ["@bases", "@missing:@bases", ":@more:@bases:"] {
        assert_eq!(run(directories, &["map"]), (Some(0), String::new()), "{directories}");
    }
    assert_eq!(run("@bases", &["info", "--backing-chain"]).0, Some(0));
    let (code, said) = run("bases", &["map"]);
    assert!(code == Some(2) && said.contains("BLOCKMIRROR_ALLOW_BACKING"), "{said}");
    // With the option wrong, too, the exit code is that of the option.
    let (code, said) = run("bases", &["map", "--allow-backing", "/missing"]);
    assert!(code == Some(1) && said.contains("/missing"), "{said}");
    // A permission that lasts is not one to write.
    fs::write(place.path("bases/base"), vec![7; 1 << 20]).unwrap();
    place.ours_ok("create -q -f qcow2 -o data_file=../bases/data @images/top 1M");
    fs::rename(place.path("bases/base"), place.path("bases/data")).unwrap();
    assert_eq!(run("@bases", &["map"]), (Some(0), String::new()));
    fs::write(place.path("source"), vec![1; 1 << 20]).unwrap();
    let source = place.path("source");
    for arguments in [
        &["convert", "-n", "-f", "raw", "-O", "qcow2", source.to_str().unwrap()][..],
        &["mirror", "-n", "-f", "raw", "-O", "qcow2", source.to_str().unwrap()],
    ] {
        let (code, said) = run("@bases", arguments);
        assert!(
            code == Some(1) && said.contains("the directories that images may refer to"),
            "{arguments:?}: {said}"
        );
        assert!(fs::read(place.path("bases/data")).unwrap() == vec![7; 1 << 20], "{arguments:?}");
    }
    let bases = place.path("bases");
    let allow = ["convert", "-q", "-n", "-f", "raw", "-O", "qcow2", "--allow-backing"];
    let (code, said) = run("", &[&allow[..], &[bases.to_str().unwrap(), source.to_str().unwrap()]].concat());
    assert_eq!(code, Some(0), "{said}");
    assert!(fs::read(place.path("bases/data")).unwrap() == vec![1; 1 << 20]);
}

#[test]
fn images_are_named_as_in_qemu_img() {
    let place = Place::new();
    source(&place);
    place.ours_ok("convert -q -f raw -O qcow2 file:@source @a.qcow2");
    for line in [
        "compare file:@source @a.qcow2",
        r#"compare json:{"driver":"raw","file":{"driver":"file","filename":"@source"}} json:{"file.filename":"@a.qcow2"}"#,
        "compare --image-opts driver=raw,file.filename=@source driver=qcow2,file.driver=file,file.filename=@a.qcow2",
    ] {
        assert_eq!(place.ours_ok(line), "Images are identical.\n", "{line}");
    }
    place.ours_ok("create -q file:@b 4M");
    place.ours_ok("convert -q -n -f raw --target-image-opts @source driver=raw,file.filename=@b");
    assert_eq!(fs::read(place.path("b")).unwrap(), fs::read(place.path("source")).unwrap());
    for (line, word) in [
        ("map -f raw --image-opts driver=raw,file.filename=@b", "-f"),
        ("map --image-opts driver=qcow2,file.filename=@b,offset=512", "\"offset\""),
        (r#"info json:{"driver":"qcow2","file":"node"}"#, "\"file\""),
        ("create json:{} 1M", "needs a path"),
    ] {
        let said = place.ours_fails(line, 2);
        assert!(said.contains(word), "{said}");
    }
    // Never out of an image.
    place.ours_ok(r#"create -q -u -f qcow2 -b file:source -F raw @c 4M"#);
    assert_eq!(place.ours_ok("compare @source @c"), "Images are identical.\n");
    if std::process::Command::new("qemu-img").arg("--version").output().is_ok() {
        place.img(r#"create -q -u -f qcow2 -b json:{"driver":"raw","file.filename":"@source"} -F raw @d 4M"#);
        assert!(place.ours_fails("map @d", 1).contains("not a plain path"));
    }
}

#[test]
fn locks_can_be_left_out() {
    let place = Place::new();
    source(&place);
    let options = blockmirror_image::OpenOptions::new().format(blockmirror_image::Format::Raw).writable(true);
    let held = options.open(place.path("source")).unwrap();
    place.ours_fails("convert -q -f raw @source @a", 1);
    place.ours_ok("info -f raw @source");
    place.ours_ok("convert -q -f raw -U @source @a");
    place.ours_ok("convert -q -f raw --lock off @source @b");
    assert_eq!(fs::read(place.path("a")).unwrap(), fs::read(place.path("b")).unwrap());
    place.ours_fails("convert -q -f raw -n @b @source", 1);
    place.ours_ok("convert -q -f raw -n --lock off @b @source");
    place.ours_fails("resize -q -f raw @source 8M", 1);
    place.ours_ok("resize -q -f raw --lock off @source 8M");
    place.ours_fails("create -q @source 1M", 1);
    place.ours_ok("create -q --lock off @source 1M");
    drop(held);
}

/// `-o backing_file` once copied the whole chain, and what was written below the target's backing file with
/// it.
#[test]
fn a_backing_file_among_the_options_is_one() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q -f qcow2 -b source -F raw @overlay");
    let options =
        ["-B source -F raw", "-o backing_file=source,backing_fmt=raw", "-o backing_file=source -F raw"];
    for options in options {
        let done: Value = serde_json::from_str(
            &place.ours_ok(&format!("convert --output=json -O qcow2 {options} @overlay @t")),
        )
        .unwrap();
        assert_eq!((&done["copied"], &done["zeroed"]), (&Value::from(0), &Value::from(0)), "{options}");
        let all = place.ours_ok(&format!("convert --output=json --sync full -O qcow2 {options} @overlay @t"));
        assert_ne!(serde_json::from_str::<Value>(&all).unwrap()["copied"], Value::from(0), "{options}");
        assert_eq!(place.ours_ok("compare @source @t"), "Images are identical.\n");
    }
    assert_eq!(place.ours("convert -n -O qcow2 -F raw @overlay @t").code, 2);
}

/// `-S 0` once left holes where the map of the source has them.
#[test]
fn without_a_search_for_zeros_the_target_is_allocated_in_full() {
    let place = Place::new();
    place.ours_ok("create -q @source 4M");
    fs::write(place.path("there"), vec![7; 4 << 20]).unwrap();
    for line in ["-O raw @source @t", "-O qcow2 @source @t", "-n -O raw @source @there"] {
        let done: Value =
            serde_json::from_str(&place.ours_ok(&format!("convert --output=json -S 0 -f raw {line}")))
                .unwrap();
        assert_eq!(done["copied"], Value::from(4 << 20), "{line}");
        let target = place.path(line.rsplit('@').next().unwrap());
        assert!(fs::metadata(&target).unwrap().blocks() * 512 >= 4 << 20, "{line}");
        let map = place.ours_ok(&format!("map --output=json {}", target.display()));
        let full = |row: &str| row.contains("\"zero\": false, \"data\": true");
        assert!(map.lines().all(full), "{line}: {map}");
    }
    place.ours_ok("convert -q -S 4k -f raw @source @t");
    assert_eq!(fs::metadata(place.path("t")).unwrap().blocks(), 0);
    for bad in ["100", "17M", "-1"] {
        assert_eq!(place.ours(&format!("convert -S {bad} -f raw @source @t")).code, 2, "{bad}");
    }
    assert_eq!(place.ours("convert -C -S 4k -f raw @source @t").code, 2);
    place.ours_ok("convert -q -C -r 1G -f raw @source @t");
}

/// Runs `blockmirror`, sends SIGTERM as soon as it watches for it, and returns its exit code. (SIGINT may be
/// ignored where the tests run in the background.)
fn interrupted(place: &Place, words: &[&str]) -> Option<i32> {
    let words = words.iter().map(|word| match word.strip_prefix('@') {
        Some(name) => place.path(name).into_os_string(),
        None => word.into(),
    });
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_blockmirror")).args(words).stderr(Stdio::null()).spawn().unwrap();
    let watches = |id: u32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).map(str::trim);
        caught.is_some_and(|mask| u64::from_str_radix(mask, 16).unwrap() & 1 << 14 != 0)
    };
    while !watches(child.id()) && child.try_wait().unwrap().is_none() {
        thread::yield_now();
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    // To find out what the image says takes minutes.
    let hang = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > hang {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the signal was ignored");
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.wait().unwrap().code()
}

/// Asking such an image what lies where took minutes, in which nothing was shown and a signal was ignored.
#[test]
#[allow(clippy::panic, reason = "a signal that is ignored is the finding")]
fn a_signal_ends_the_look_at_an_image_that_shares_one_table() {
    let place = Place::new();
    for name in ["hostile", "other"] {
        hostile::one_l2_table(&place.path(name)).unwrap();
    }
    assert_eq!(interrupted(&place, &["convert", "-q", "-O", "qcow2", "@hostile", "@target"]), Some(143));
    assert_eq!(interrupted(&place, &["compare", "-q", "@hostile", "@other"]), Some(143));
    assert_eq!(place.names(), ["hostile", "other"]);
    let line = place.ours_fails("convert -n -O qcow2 @other @hostile", 1);
    assert!(line.contains("L2 table") && line.contains("overlap"), "{line}");
}
