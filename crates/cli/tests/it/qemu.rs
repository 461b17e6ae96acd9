//! `info`, `map` and `compare` print what `qemu-img` prints, to the byte, on images that `qemu-img` made.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;

use blockmirror_testing::qemu::have;

use crate::common::{Place, have_qemu};
use serde_json::Value;

/// Images of many kinds, by name.
fn images(place: &Place) -> Vec<String> {
    let mut names = Vec::new();
    for compat in ["0.10", "1.1"] {
        for cluster in ["512", "4k", "64k", "2M"] {
            let name = format!("plain-{compat}-{cluster}");
            place.img(&format!("create -q -f qcow2 -o compat={compat},cluster_size={cluster} @{name} 20M"));
            place.io(&name, &["write -P 1 0 300k", "write -P 2 5M 64k", "write -z 9M 3M", "discard 0 64k"]);
            names.push(name);
        }
    }
    for (name, options) in [
        ("subclusters", "extended_l2=on,cluster_size=64k"),
        ("refcounts", "refcount_bits=1,lazy_refcounts=on"),
        ("wide", "refcount_bits=64,compression_type=zstd"),
    ] {
        place.img(&format!("create -q -f qcow2 -o {options} @{name} 20M"));
        place.io(name, &["write -P 1 4k 12k", "write -z 128k 64k", "write -P 3 19M 1M"]);
        names.push(name.to_owned());
    }
    place.img("create -q -f qcow2 -b plain-1.1-64k -F qcow2 @middle 30M");
    place.io("middle", &["write -P 4 2M 1M", "write -z 5M 4k", "write -P 5 25M 64k"]);
    place.img("create -q -f qcow2 -b middle -F qcow2 -o cluster_size=4k @top");
    place.io("top", &["write -P 6 100k 8k", "write -z 2M 128k"]);
    place.img("create -q -f raw @raw 20M");
    place.io("raw", &["write -P 1 1M 64k", "write -P 1 19M 1M"]);
    place.img("convert -O qcow2 -c @plain-1.1-4k @compressed");
    place.img(&format!(
        "create -q -f qcow2 -o data_file={},data_file_raw=on @external 4M",
        place.path("data").display()
    ));
    place.io("external", &["write -P 1 64k 64k", "write -z 256k 64k", "discard 512k 64k"]);
    place.img("create -q -f qcow2 @snapshots 4M");
    place.io("snapshots", &["write -P 1 0 1M"]);
    place.img("snapshot -c one @snapshots");
    place.io("snapshots", &["write -P 2 0 64k"]);
    place.img("snapshot -c two @snapshots");
    place.img("create -q -f qcow2 @bitmaps 4M");
    place.img("bitmap --add -g 32k @bitmaps first");
    place.img("bitmap --add --disable @bitmaps second");
    for name in ["middle", "top", "raw", "compressed", "external", "snapshots", "bitmaps"] {
        names.push(name.to_owned());
    }
    // What a mapped cluster lacks in its file QEMU calls data (but in preallocated images), ours zero.
    for name in names.iter().map(String::as_str).filter(|name| *name != "raw").chain(["data"]) {
        let bytes = fs::read(place.path(name)).unwrap();
        fs::write(place.path("solid"), bytes).unwrap();
        fs::rename(place.path("solid"), place.path(name)).unwrap();
    }
    names
}

fn present_rows(map: &str) -> Vec<Value> {
    let rows: Vec<Value> = serde_json::from_str(map).unwrap();
    rows.into_iter().filter(|row| row["present"] == true).collect()
}

#[test]
fn info_and_map_print_what_qemu_img_prints() {
    if !have_qemu("info_and_map_print_what_qemu_img_prints") {
        return;
    }
    let place = Place::new();
    for name in images(&place) {
        for line in ["info", "info --output=json", "info --backing-chain", "map --output=json", "map"] {
            let line = format!("{line} @{name}");
            let (ours, theirs) = (place.ours(&line), place.theirs("qemu-img", &line));
            assert_eq!(ours.code, theirs.code, "{line}: {ours:?} {theirs:?}");
            // Of what no layer holds, QEMU still says which place a subcluster would have.
            if name == "subclusters" && line.starts_with("map --output=json") {
                assert_eq!(present_rows(&ours.out), present_rows(&theirs.out), "{line}");
                continue;
            }
            assert_eq!(ours.out, theirs.out, "{line}");
        }
    }
}

#[test]
fn a_part_of_a_map_is_clipped_as_qemu_img_clips_it() {
    if !have_qemu("a_part_of_a_map_is_clipped_as_qemu_img_clips_it") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @disk 20M");
    place.io("disk", &["write 1M 1M"]);
    for part in ["-s 512 -l 1M", "-s 1M -l 64k", "-s 19M", "-s 1500k -l 100M"] {
        let line = format!("map --output=json {part} @disk");
        assert_eq!(place.ours_ok(&line), place.img(&line), "{part}");
    }
}

#[test]
fn compare_finds_what_qemu_img_finds() {
    if !have_qemu("compare_finds_what_qemu_img_finds") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @a 4M");
    place.io("a", &["write -P 1 1M 64k"]);
    place.img("convert -O raw @a @same.raw");
    for (name, size, commands) in [
        ("longer", "6M", vec!["write -P 1 1M 64k"]),
        ("tail", "6M", vec!["write -P 1 1M 64k", "write -P 1 5M 512"]),
        ("longer-other", "6M", vec!["write -P 1 1M 32k", "write -P 1 5M 512"]),
        ("other", "4M", vec!["write -P 1 1M 64k", "write -P 2 1090k 1k"]),
        ("zero", "4M", vec!["write -P 1 1M 64k", "write -z 2M 64k"]),
        ("shorter", "1M", vec!["write -P 0 0 4k"]),
    ] {
        place.img(&format!("create -q -f qcow2 @{name} {size}"));
        place.io(name, &commands);
    }
    for other in ["a", "same.raw", "longer", "tail", "longer-other", "other", "zero", "shorter"] {
        for options in ["", "-s ", "-q "] {
            for line in
                [format!("compare {options}-U @a @{other}"), format!("compare {options}-U @{other} @a")]
            {
                let (ours, theirs) = (place.ours(&line), place.theirs("qemu-img", &line));
                assert_eq!(ours.code, theirs.code, "{line}: {ours:?} {theirs:?}");
                // QEMU takes it for a difference, too, that a run ends at the end of one disk and not of the
                // other.
                if !theirs.out.contains("status mismatch") {
                    assert_eq!(ours.out, theirs.out, "{line}");
                }
            }
        }
    }
    assert_eq!(place.ours("compare @a @nothing").code, 2);
    assert_eq!(place.theirs("qemu-img", "compare @a @nothing").code, 2);
}

#[test]
fn create_makes_what_qemu_img_makes() {
    if !have_qemu("create_makes_what_qemu_img_makes") {
        return;
    }
    let place = Place::new();
    for options in [
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,lazy_refcounts=on",
        "extended_l2=on,compression_type=zstd",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,cluster_size=4k",
    ] {
        place.img(&format!("create -q -f qcow2 -o {options} @theirs 5M"));
        place.ours_ok(&format!("create -q -f qcow2 -o {options} @ours 5M"));
        place.img("check @ours");
        let specific = |name: &str| {
            let text = place.img(&format!("info --output=json @{name}"));
            let info: Value = serde_json::from_str(&text).unwrap();
            (info["format-specific"].clone(), info["virtual-size"].clone(), info["cluster-size"].clone())
        };
        assert_eq!(specific("ours"), specific("theirs"), "{options}");
    }
}

/// The file `to` with the bytes of `from`, and holes where 4 KiB of it are zeros.
fn sparse(place: &Place, from: &str, to: &str) {
    use std::os::unix::fs::FileExt;
    let bytes = fs::read(place.path(from)).unwrap();
    let file = fs::File::create(place.path(to)).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (block, at) in bytes.chunks(4096).zip((0..).step_by(4096)) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at).unwrap();
        }
    }
}

/// Under the name `qemu-img`, holes below mapped clusters are zeros in images that were preallocated, and
/// data in others; under our own name they are zeros.
#[test]
fn map_looks_for_holes_as_qemu_img_does() {
    if !have_qemu("map_looks_for_holes_as_qemu_img_does") {
        return;
    }
    let place = Place::new();
    let mut found = Vec::new();
    for (clusters, data) in [(16, false), (64, false), (16, true)] {
        let options = if data { "-o data_file=@data,data_file_raw=on " } else { "" };
        place.img(&format!("create -q -f qcow2 {options}@whole 8M"));
        place.io("whole", &[&format!("write -q -P 1 0 {}k", clusters * 64), "write -q -P 0 64k 32k"]);
        sparse(&place, "whole", "disk");
        place.img("create -q -f qcow2 -b disk -F qcow2 @top");
        for image in ["disk", "top"] {
            let theirs = place.img(&format!("map --output=json @{image}"));
            assert_eq!(place.ours_ok(&format!("qemu-img map --output=json @{image}")), theirs, "{clusters}");
            found.push(theirs.matches("\"zero\": true").count());
        }
        if !data {
            let own = place.ours_ok("map --output=json @disk");
            assert!(own.contains(
                "\"start\": 65536, \"length\": 32768, \"depth\": 0, \"present\": true, \"zero\": true"
            ));
        }
    }
    // A hole and what is not allocated.
    assert_eq!(found[..4], [2, 2, 1, 1]);
}

/// What an NBD server says in another context than that of what it holds.
#[test]
fn map_shows_a_context_of_a_server_as_qemu_img_does() {
    if !have_qemu("map_shows_a_context_of_a_server_as_qemu_img_does") || !have("context", &["qemu-nbd"]) {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @base 4M");
    place.io("base", &["write -q 0 2M"]);
    place.img("create -q -f qcow2 -b base -F qcow2 @top");
    place.img("bitmap --add -g 64k @top b");
    place.io("top", &["write -q 1M 2M"]);
    let pid = place.path("pid");
    let mut server = std::process::Command::new("qemu-nbd");
    server.args(["--fork", "-t", "-r", "-A", "-B", "b", "-f", "qcow2", "-k"]).arg(place.path("sock"));
    let started = server.arg("--pid-file").arg(&pid).arg(place.path("top")).status().unwrap();
    assert!(started.success());
    let server = fs::read_to_string(&pid).unwrap();
    let name = "driver=nbd,server.type=unix,server.path=@sock";
    let mut failed = Vec::new();
    for context in ["qemu:allocation-depth", "qemu:dirty-bitmap:b"] {
        let line = format!("map --output=json --image-opts {name},x-dirty-bitmap={context}");
        let (ours, theirs) = (place.ours(&line), place.theirs("qemu-img", &line));
        if (ours.code, &ours.out) != (0, &theirs.out) {
            failed.push(format!("{context}: {ours:?} {theirs:?}"));
        }
    }
    let said = place.ours(&format!("map --image-opts {name},x-dirty-bitmap=qemu:dirty-bitmap:none"));
    let copied = place.ours(&format!("convert --image-opts {name},x-dirty-bitmap=qemu:dirty-bitmap:b @copy"));
    let _ = std::process::Command::new("kill").arg(server.trim()).status();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(said.code == 1 && said.err.contains("no context"), "{said:?}");
    assert!(copied.code == 1 && copied.err.contains("for map alone"), "{copied:?}");
}

/// Under the name `qemu-img` a new file takes the space that QEMU gives it; zeros of a raw image's last
/// sector go with its block under direct I/O.
#[test]
fn new_files_take_the_space_that_qemu_img_gives_them() {
    use std::os::unix::fs::MetadataExt;
    if !have_qemu("new_files_take_the_space_that_qemu_img_gives_them") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f raw @zeros 1M");
    place.img("create -q -f raw @data 1G");
    place.io_as("raw", "data", &["write -q -P 1 0 64k", "write -q -P 2 600M 64k"]);
    for line in [
        "create -q -f raw @new 1M",
        "create -q -f raw @new 1k",
        "create -q -f qcow2 @new 1G",
        "create -q -f qcow2 -o cluster_size=4k,refcount_bits=1 @new 1G",
        "convert -f raw -O raw @zeros @new",
        "convert -f raw -O qcow2 @zeros @new",
        // Two L2 tables.
        "convert -f raw -O qcow2 @data @new",
    ] {
        let mut blocks = Vec::new();
        for ours in [true, false] {
            let _ = fs::remove_file(place.path("new"));
            let done =
                if ours { place.ours(&format!("qemu-img {line}")) } else { place.theirs("qemu-img", line) };
            assert_eq!(done.code, 0, "{line}: {done:?}");
            blocks.push(fs::metadata(place.path("new")).unwrap().blocks());
        }
        assert_eq!(blocks[0], blocks[1], "{line}");
    }
    let file = fs::OpenOptions::new().write(true).open(place.path("zeros")).unwrap();
    file.set_len((1 << 20) - 1).unwrap();
    place.io_as("raw", "zeros", &["write -q -P 3 960k 65535"]);
    file.set_len((1 << 20) - 1).unwrap();
    for direct in ["on", "off"] {
        let line = "map --output=json --image-opts driver=raw,file.driver=file,file.filename=@zeros";
        let line = format!("{line},cache.direct={direct}");
        assert_eq!(place.ours_ok(&format!("qemu-img {line}")), place.img(&line), "{direct}");
    }
}
