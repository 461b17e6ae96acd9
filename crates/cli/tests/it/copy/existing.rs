//! Existing targets: their format, and errors that say what is left of them.

use std::fs;
use std::process::Command;

use crate::common::{Place, have_qemu};
use crate::copy::source;

fn format(place: &Place, name: &str) -> String {
    let info: serde_json::Value =
        serde_json::from_str(&place.ours_ok(&format!("info --output=json @{name}"))).unwrap();
    info["format"].as_str().unwrap().to_owned()
}

/// `convert -n` wrote raw over a qcow2 image.
#[test]
fn an_existing_target_keeps_its_format() {
    let place = Place::new();
    source(&place);
    for line in [
        "convert -q -n -f raw @source @t",
        "mirror -q -n -f raw @source @t",
        "convert -q -n -f raw --target-image-opts @source file.filename=@t",
        "mirror -q -n -f raw --target-image-opts @source file.filename=@t",
    ] {
        for options in ["-f raw", "-f qcow2", "-f qcow2 -o preallocation=full"] {
            place.ours_ok(&format!("create -q {options} @t 4M"));
            let before = format(&place, "t");
            place.ours_ok(line);
            assert_eq!(format(&place, "t"), before, "{line} {options}");
            let said = place.ours_ok(&format!("compare -f raw -F {before} @source @t"));
            assert_eq!(said, "Images are identical.\n", "{line} {options}");
        }
        // What is recognised and not supported is not taken as raw.
        fs::write(place.path("t"), [b"KDMV".to_vec(), vec![0; (4 << 20) - 4]].concat()).unwrap();
        let said = place.ours_fails(line, 1);
        let want = "it is a vmdk image, which is not supported; -O raw writes to it as raw";
        assert!(said.ends_with(want), "{line}: {said}");
    }
    place.ours_ok("create -q -f qcow2 -o preallocation=full @t 4M");
    place.ours_ok("convert -q -n -f raw -O raw @source @t");
    let bytes = fs::read(place.path("t")).unwrap();
    assert!(bytes[..4 << 20] == fs::read(place.path("source")).unwrap()[..], "as it is asked for");
}

/// The message asked for equal lengths, although a longer target would do.
#[test]
fn a_target_that_is_too_short_is_named_with_its_format() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q @small 2M");
    place.ours_ok("create -q -f qcow2 @small.qcow2 2M");
    for (target, format) in [("small", "raw"), ("small.qcow2", "qcow2")] {
        for command in ["convert", "mirror", "convert --dry-run", "mirror --dry-run"] {
            assert_eq!(
                place.ours_fails(&format!("{command} -n -f raw @source @{target}"), 1),
                format!(
                    "blockmirror: copy: source @source has 4194304 bytes, target @{target} ({format}) has \
                     2097152: it must not be shorter"
                )
            );
        }
    }
}

/// "d.raw is not a plain path": it is one.
#[test]
fn a_relative_name_in_an_export_is_said_to_be_relative() {
    let place = Place::new();
    for (options, name) in
        [("-o data_file=d.raw", "data file \"d.raw\""), ("-b base -F raw", "backing file \"base\"")]
    {
        // Nothing listens there: it is not connected to.
        let line = format!("create -q -f qcow2 {options} nbd://localhost:1/disk 1M");
        let said = place.ours_fails(&line, 1);
        assert!(said.contains(name), "{said}");
        assert!(said.contains("which is relative, and the image has no directory"), "{said}");
    }
    let said = place.ours_fails("create -q -f qcow2 -o data_file=nbd:x @t 1M", 1);
    assert!(said.contains("which is not a plain path"), "{said}");
}

/// The message of the failure did not say that the disk had become longer; the command, given again, made it
/// longer once more.
#[test]
fn a_resize_whose_preallocation_fails_says_what_it_has_done() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    let program = env!("CARGO_BIN_EXE_blockmirror");
    // In units of 512 or 1024 bytes, as the shell has it: 2 or 4 MiB.
    let line = format!("ulimit -f 4096; exec {program} resize --preallocation=full disk +15M");
    let out = Command::new("sh").current_dir(place.path("")).args(["-c", &line]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("; disk has its new size, 16777216 bytes, and 1"), "{said}");
    assert!(said.trim_end().ends_with("MiB of it are not allocated"), "{said}");
    assert!(place.ours_ok("info @disk").contains("(16777216 bytes)"));
}

/// With `-n` a backing file says what the target stands on: what the source's own image holds is copied.
#[test]
fn an_existing_target_gets_what_its_backing_file_does_not_show() {
    if !have_qemu("an_existing_target_gets_what_its_backing_file_does_not_show") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @base 1M");
    place.io("base", &["write -q -P 1 0 512k"]);
    for image in ["source", "ours", "theirs"] {
        place.img(&format!("create -q -f qcow2 -b base -F qcow2 @{image}"));
    }
    place.io("source", &["write -q -P 2 128k 64k", "write -q -z 256k 64k"]);
    let line = "convert -n -O qcow2 -B base -F qcow2 @source";
    place.ours_ok(&format!("qemu-img {line} @ours"));
    place.img(&format!("{line} @theirs"));
    let map = |name: &str| place.img(&format!("map --output=json @{name}"));
    assert_eq!(map("ours"), map("theirs"));
    place.img("compare -q @source @ours");
    place.img("check -q @ours");
    // The same without the format.
    place.img("create -q -f qcow2 -b base -F qcow2 @ours");
    place.ours_ok("convert -q -n -B base @source @ours");
    assert_eq!(map("ours"), map("theirs"));
    let said = place.ours_error("qemu-img convert -n -O qcow2 -o cluster_size=4k @source @ours", 1);
    assert_eq!(said, "qemu-img: -o has no effect when skipping image creation\n");
}
