//! `convert -c`, beside `qemu-img convert -c`: the same clusters are stored compressed, QEMU reads them, and
//! what it refuses is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;

use blockmirror_testing::content::{Fill, write_raw};
use serde_json::Value;

use crate::common::{Place, have_qemu};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

/// Data that compresses and that does not, zeros that are written, holes smaller than a cluster, and an end
/// within one.
fn source(place: &Place) {
    let runs = [
        (0, 700 * KIB, Fill::Stamp(1)),
        (MIB, 256 * KIB, Fill::Noise),
        (MIB + 512 * KIB, 512 * KIB, Fill::Zeros),
        (3 * MIB + 4 * KIB, 4 * KIB, Fill::Stamp(2)),
        (3 * MIB + 20 * KIB, 8 * KIB, Fill::Stamp(3)),
        (4 * MIB + 60 * KIB, 8 * KIB, Fill::Stamp(4)),
        (6 * MIB, MIB, Fill::Stamp(5)),
        (8 * MIB, 1536, Fill::Stamp(6)),
    ];
    write_raw(&place.path("raw"), 8 * MIB + 1536, &runs).unwrap();
    place.img("create -q -f qcow2 -o cluster_size=4k @small.qcow2 8M");
    place.io("small.qcow2", &["write -q -P 1 4k 4k", "write -q -P 2 60k 8k", "write -q -P 3 3M 200k"]);
}

/// How many clusters are allocated and how many compressed, of an image that is clean.
fn clusters(place: &Place, name: &str) -> (u64, u64) {
    let report: Value = serde_json::from_str(&place.img(&format!("check --output=json @{name}"))).unwrap();
    let figure = |name: &str| report.get(name).map_or(0, |figure| figure.as_u64().unwrap());
    assert_eq!((figure("leaks"), figure("corruptions")), (0, 0), "{name}: {report}");
    (figure("allocated-clusters"), figure("compressed-clusters"))
}

#[test]
fn the_same_clusters_are_compressed_as_by_qemu_img() {
    if !have_qemu("the_same_clusters_are_compressed_as_by_qemu_img") {
        return;
    }
    let place = Place::new();
    source(&place);
    for from in ["raw", "small.qcow2"] {
        for options in [
            "cluster_size=512",
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=2M",
            "compat=0.10",
            "refcount_bits=1",
            "refcount_bits=64,lazy_refcounts=on",
            "extended_l2=on",
            "compression_type=zstd",
            "compression_type=zstd,cluster_size=4k",
            "compression_type=zstd,cluster_size=2M,extended_l2=on",
        ] {
            for words in ["", " -m 1 -W", " -S 0", " -S 64k", " --speed 200M", " --granularity 4K"] {
                if !words.is_empty() && !options.contains("cluster_size=2M") && options != "compat=0.10" {
                    continue;
                }
                let what = format!("{from} {options}{words}");
                place.ours_ok(&format!("convert -q -c{words} -O qcow2 -o {options} @{from} @ours"));
                place.img(&format!("compare @{from} @ours"));
                let ours = clusters(&place, "ours");
                assert!(ours.1 > 0, "{what}: {ours:?}");
                let theirs_too = !words.contains("--");
                if theirs_too {
                    place.img(&format!("convert -c{words} -O qcow2 -o {options} @{from} @theirs"));
                    assert_eq!(ours, clusters(&place, "theirs"), "{what}");
                    let len = |name: &str| fs::metadata(place.path(name)).unwrap().len();
                    let (ours, theirs) = (len("ours"), len("theirs"));
                    // A cluster more or less, by the order of tables and data.
                    let cluster = if options.contains("2M") { 2 * MIB } else { 64 * KIB };
                    assert!(ours <= theirs + theirs / 20 + cluster, "{what}: {ours} bytes, {theirs}");
                }
            }
        }
    }
}

#[test]
fn an_overlay_gets_its_own_clusters_compressed() {
    if !have_qemu("an_overlay_gets_its_own_clusters_compressed") {
        return;
    }
    let place = Place::new();
    source(&place);
    place.img("create -q -f qcow2 -b small.qcow2 -F qcow2 -o cluster_size=4k @top.qcow2");
    place.io("top.qcow2", &["write -q -P 9 8k 4k", "write -q -z 64k 4k", "write -q -P 8 5M 64k"]);
    place.ours_ok("convert -q -c -O qcow2 -B small.qcow2 -F qcow2 @top.qcow2 @ours.qcow2");
    place.img("compare @top.qcow2 @ours.qcow2");
    // The zeros hide what the backing file has in their cluster.
    assert_eq!(clusters(&place, "ours.qcow2"), (2, 2));
}

#[test]
fn an_existing_image_is_written_compressed_over_what_it_holds() {
    if !have_qemu("an_existing_image_is_written_compressed_over_what_it_holds") {
        return;
    }
    let place = Place::new();
    source(&place);
    place.img("create -q -f qcow2 -o compression_type=zstd @there 9M");
    place.io("there", &["write -q -P 7 0 64k", "write -q -P 7 5M 64k", "write -q -P 7 8448k 64k"]);
    place.ours_ok("convert -q -n -c -O qcow2 @raw @there");
    place.ours_ok("convert -q -O raw @there @back");
    let (raw, back) = (fs::read(place.path("raw")).unwrap(), fs::read(place.path("back")).unwrap());
    assert!(back[..raw.len()] == raw && back[8448 << 10..8512 << 10].iter().all(|byte| *byte == 7));
    let (allocated, compressed) = clusters(&place, "there");
    assert!(compressed > 10 && allocated - compressed <= 6, "{allocated} {compressed}");
    assert_eq!(
        place.ours_fails("convert -q -n -c -O raw @raw @back", 1),
        "blockmirror: open: @back: a raw image holds no compressed data"
    );
    assert!(fs::read(place.path("back")).unwrap() == back);
}

#[test]
fn what_cannot_be_compressed_is_refused_before_anything_is_made() {
    let place = Place::new();
    fs::write(place.path("raw"), [1; 4096]).unwrap();
    for (words, message) in [
        ("", "a raw image holds no compressed data"),
        ("-O raw", "a raw image holds no compressed data"),
        ("-O qcow2 -o data_file=d", "an image with an external data file has no compressed data"),
        ("-O qcow2 -o preallocation=metadata", "compressed data takes no preallocated space"),
        ("-O qcow2 -o preallocation=full", "compressed data takes no preallocated space"),
    ] {
        let line = format!("convert -c {words} @raw @t").replace("  ", " ");
        let said = place.ours_fails(&line, 2);
        assert!(said.ends_with(message), "{line}: {said}");
    }
    assert_eq!(place.names(), ["raw"]);
    place.ours_ok("convert -q -c -O qcow2 -o preallocation=off --dry-run @raw @t");
    assert_eq!(place.names(), ["raw"]);
}
