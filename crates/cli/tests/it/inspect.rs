//! `inspect`: verdicts, exit codes, images that QEMU makes, and the one file that is opened.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;
use std::process::Command;

use blockmirror_testing::qemu::have;
use serde_json::Value;

use crate::common::{Place, have_qemu};

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");

/// What is said of `name`, without the folder.
fn said(place: &Place, line: &str, code: i32) -> String {
    let ran = place.ours(line);
    assert_eq!((ran.code, &*ran.err), (code, ""), "{line}: {ran:?}");
    ran.out.replace(&format!("{}/", place.path(".").parent().unwrap().display()), "")
}

#[test]
fn a_sound_image_is_accepted() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1G");
    place.ours_ok("bitmap --add @disk b");
    place.ours_ok("snapshot -q -c s @disk");
    let out = said(&place, "inspect -f qcow2 @disk", 0);
    assert!(out.contains("\nformat: qcow2\nvirtual size: 1 GiB (1073741824 bytes)\n"), "{out}");
    assert!(out.ends_with("\nsnapshots: 1\nbitmaps: 1\nverdict: accepted\n"), "{out}");
    fs::write(place.path("raw"), [7; 512]).unwrap();
    assert!(said(&place, "inspect @raw", 0).contains("\nformat: raw\n"));
}

#[test]
fn what_is_found_refuses_unless_it_is_allowed() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @base 1M");
    place.ours_ok("create -q -f qcow2 -b base -F qcow2 @top");
    let out = said(&place, "inspect @top", 4);
    let finding = "refused: backing_file: the header names \"base\" of the format \"qcow2\"";
    assert!(out.ends_with(&format!("{finding}\nverdict: refused (backing_file)\n")), "{out}");
    let out = said(&place, "inspect --allow dirty --allow backing_file @top", 0);
    assert!(out.contains("\nallowed: backing_file: "), "{out}");
    let out = said(&place, "inspect -f raw @top", 4);
    assert!(out.ends_with("\nverdict: refused (format_confusion)\n"), "{out}");
    let out: Value = serde_json::from_str(&said(&place, "inspect --output=json @top", 4)).unwrap();
    assert_eq!((&out["verdict"], &out["findings"][0]["kind"]), (&"refused".into(), &"backing_file".into()));
    let out = said(&place, "inspect --output=json --allow=backing_file @top", 0);
    let out: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&out["verdict"], &out["findings"][0]["allowed"]), (&"accepted".into(), &true.into()));
}

#[test]
fn what_cannot_be_read_is_a_failure() {
    let place = Place::new();
    assert_eq!(place.ours("inspect @missing").code, 1);
    let usage = place.ours("inspect --allow backing @missing");
    assert_eq!(usage.code, 2, "{usage:?}");
    assert!(usage.err.contains("there are backing_file, data_file"), "{usage:?}");
    // Under the other name there is no such command.
    assert_eq!(place.ours("qemu-img inspect @missing").code, 1);
}

/// A name in an image is bytes of a stranger's.
#[test]
fn names_do_not_drive_the_terminal() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    let mut bytes = fs::read(place.path("disk")).unwrap();
    bytes[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 8]);
    bytes[0x2000..0x2008].copy_from_slice(b"a\n\x1b[2J\xffb");
    fs::write(place.path("disk"), bytes).unwrap();
    let out = said(&place, "inspect @disk", 4);
    assert!(out.contains("names \"a\\n\\u{1b}[2J"), "{out:?}");
    assert!(!out.contains('\u{1b}'));
}

#[test]
fn the_formats_of_qemu_are_named() {
    if !have_qemu("the_formats_of_qemu_are_named") {
        return;
    }
    let place = Place::new();
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "qcow"] {
        place.img(&format!("create -q -f {format} @image 4M"));
        let out = said(&place, "inspect @image", 4);
        assert!(out.contains(&format!("\nformat: {format}\n")), "{format}: {out}");
        assert!(out.ends_with("\nverdict: refused (unsupported_format)\n"), "{format}: {out}");
        let out = said(&place, "inspect -f raw @image", 4);
        assert!(out.ends_with("\nverdict: refused (format_confusion)\n"), "{format}: {out}");
        fs::remove_file(place.path("image")).unwrap();
    }
    place.img("create -q -f vmdk -o subformat=monolithicFlat @image 4M");
    assert!(said(&place, "inspect @image", 4).contains("\nformat: vmdk\n"));
    place.img("create -q -f vpc -o subformat=fixed @fixed 4M");
    let out = said(&place, "inspect @fixed", 4);
    assert!(out.contains("\nformat: raw\n"), "QEMU probes raw, other programs vpc: {out}");
}

/// A text that QEMU probes as an image with files of the host's as its extents, whatever its first line is.
#[test]
fn a_descriptor_of_host_files_is_found() {
    let place = Place::new();
    let text = "# any line\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"secret\" 0\n";
    fs::write(place.path("image"), text).unwrap();
    fs::write(place.path("secret"), [7; 4096]).unwrap();
    assert!(said(&place, "inspect @image", 4).ends_with("\nverdict: refused (unsupported_format)\n"));
    assert!(place.ours_fails("convert @image @copy", 1).contains("vmdk"), "nor is it opened");
    if have_qemu("a_descriptor_of_host_files_is_found") {
        assert!(place.img("info @image").contains("file format: vmdk"));
    }
}

/// What is accepted as raw QEMU probes as raw: texts of lines that may begin a description of a vmdk image,
/// and each magic with a byte changed.
#[test]
fn what_is_accepted_is_raw_for_qemu_too() {
    if !have_qemu("what_is_accepted_is_raw_for_qemu_too") {
        return;
    }
    let place = Place::new();
    let lines =
        ["", "  ", "# x", "#", "version=1", " version=1", "version=2\r", "version=11", "version=4", "x"];
    let texts =
        lines.iter().flat_map(|first| lines.map(|second| format!("{first}\n{second}\n").into_bytes()));
    let magics = [&b"QFI\xfb"[..], b"QED\0", b"KDMV", b"COWD", b"conectix", b"vhdxfile", b"LUKS\xba\xbe"];
    let mut files: Vec<_> = texts.collect();
    for magic in magics {
        for at in 0..=magic.len() {
            let mut file = magic.to_vec();
            file.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 0x20);
            file.resize(1 << 16, 0);
            files.push(file);
        }
    }
    let (mut accepted, mut refused) = (0, 0);
    for file in files {
        fs::write(place.path("image"), &file).unwrap();
        if place.ours("inspect @image").code == 4 {
            refused += 1;
            continue;
        }
        accepted += 1;
        let theirs = place.theirs("qemu-img", "info --output=json @image");
        let theirs: Value = serde_json::from_str(&theirs.out).unwrap_or_default();
        assert_eq!(theirs["format"], "raw", "{:?}", String::from_utf8_lossy(&file[..file.len().min(40)]));
    }
    assert!(accepted > 50 && refused > 20, "{accepted} accepted, {refused} refused");
}

/// The names of the files that a run of `line` opens, or tries to, after its program has been loaded; strace
/// writes down the calls.
fn opened(place: &Place, line: &str) -> Vec<String> {
    let log = place.path("strace.log");
    let mut command = Command::new("strace");
    command.args([
        "-f",
        "-qq",
        "-e",
        "trace=open,openat,openat2,open_by_handle_at,creat,connect,execve",
        "-o",
    ]);
    // Where the test runner has the loader look for libraries.
    command.env_remove("LD_LIBRARY_PATH");
    command.arg(&log).arg(OURS).args(line.split(' ')).current_dir(place.path("."));
    command.output().unwrap();
    let text = fs::read_to_string(log).unwrap();
    let calls = text.lines().filter(|call| call.contains('(') && !call.contains("execve("));
    let names = calls.map(|call| call.split('"').nth(1).unwrap_or(call).to_owned());
    // Libraries, and what the runtime and the allocator ask the kernel.
    let of_runtime = |name: &str| {
        [
            "/etc/ld.so",
            "/lib",
            "/usr/lib",
            "/proc/self/maps",
            "/proc/self/status",
            "/proc/self/cgroup",
            "/sys/",
        ]
        .iter()
        .any(|start| name.starts_with(start))
    };
    names.filter(|name| !of_runtime(name)).collect()
}

/// `info` and `inspect` open exactly one file: by its name without reading it, and then what was found.
#[test]
fn one_file_is_opened() {
    if !have("one_file_is_opened", &["strace"]) {
        return;
    }
    let place = Place::new();
    let runs = Command::new("strace").args(["-qq", "-e", "trace=none", OURS, "--version"]).output().unwrap();
    if !runs.status.success() {
        blockmirror_testing::skip_unsupported(format_args!("strace: {runs:?}"));
        return;
    }
    place.ours_ok("create -q -f qcow2 @base 1M");
    place.ours_ok("create -q -f qcow2 -b base -F qcow2 @overlay");
    place.ours_ok("create -q -f qcow2 -o data_file=data @external 1M");
    fs::write(place.path("raw"), [7; 512]).unwrap();
    fs::write(place.path("vmdk"), "# Disk DescriptorFile\nversion=1\nRW 8 FLAT \"raw\" 0\n").unwrap();
    assert!(Path::new(&place.path("data")).exists());
    for image in ["base", "overlay", "external", "raw"] {
        for command in
            ["info", "inspect", "info --output=json", "inspect --allow=backing_file --allow=data_file"]
        {
            let opened = opened(&place, &format!("{command} {image}"));
            assert_eq!(opened.len(), 2, "{command} {image}: {opened:?}");
            assert_eq!(opened[0], image, "{command}");
            assert!(opened[1].starts_with("/proc/self/fd/"), "{command} {image}: {opened:?}");
        }
    }
    assert_eq!(opened(&place, "inspect vmdk").len(), 2);
}

/// With small clusters what a guest has at the beginning of its disk may lie at the same place of the file.
#[test]
fn an_iso_on_the_disk_is_none_of_the_file() {
    use std::os::unix::fs::FileExt;
    let place = Place::new();
    let raw = fs::File::create(place.path("raw")).unwrap();
    raw.set_len(3300 << 20).unwrap();
    raw.write_all_at(b"CD001", 32769).unwrap();
    place.ours_ok("convert -f raw -O qcow2 -o cluster_size=4k @raw @disk");
    let mut there = [0; 5];
    let file = fs::File::options().read(true).write(true).open(place.path("disk")).unwrap();
    file.read_exact_at(&mut there, 32769).unwrap();
    assert_eq!(&there, b"CD001", "the guest's sector lies there");
    let out = said(&place, "inspect @disk", 0);
    assert!(out.contains("\ncontents: iso\n"), "{out}");
    // In the header it is the file's.
    place.ours_ok("convert -f raw -O qcow2 @raw @disk");
    let file = fs::File::options().write(true).open(place.path("disk")).unwrap();
    file.write_all_at(b"CD001", 32769).unwrap();
    let out = said(&place, "inspect @disk", 4);
    assert!(out.contains("the file is qcow2, and has iso like a raw disk"), "{out}");
}
