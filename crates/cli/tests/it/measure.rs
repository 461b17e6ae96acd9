//! `measure` prints the figures of `qemu-img measure`, to the byte.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fmt::Write as _;

use crate::common::{Place, have_qemu};

/// Options of qcow2 images.
const OPTIONS: [&str; 22] = [
    "compat=1.1",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=512",
    "cluster_size=1k",
    "cluster_size=4k",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=8,cluster_size=512",
    "refcount_bits=64",
    "refcount_bits=64,cluster_size=512",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k,refcount_bits=1",
    "lazy_refcounts=on",
    "compression_type=zstd",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full,cluster_size=4k",
    "size=3M",
    "backing_file=b,backing_fmt=raw",
    "data_file=d",
    "data_file=d,data_file_raw=on,cluster_size=4k",
];

fn images(place: &Place) -> [&'static str; 7] {
    place.img("create -q -f qcow2 -o cluster_size=4k @small 10M");
    place.io("small", &["write -q -P 1 4k 100k", "write -q -z 1M 1M", "write -q -P 3 5000k 5k"]);
    place.img("create -q -f qcow2 -b small -F qcow2 @top 12M");
    place.io("top", &["write -q -P 5 0 64k", "write -q -z 4992k 64k", "write -q -P 5 11M 1M"]);
    place.img("convert -c -O qcow2 @small @compressed");
    place.img("convert -O qcow2 -o compat=0.10 @small @old");
    place.img("create -q -f qcow2 @bitmaps 100000000");
    place.io("bitmaps", &["write -q -P 1 50M 3M"]);
    for (name, granularity) in [("one", "512"), ("another-longer-name", "64k"), ("off", "1M")] {
        place.img(&format!("bitmap --add -g {granularity} @bitmaps {name}"));
    }
    place.img("bitmap --disable @bitmaps off");
    place.img("create -q -f raw @raw 5000192");
    place.io("raw", &["write -q -P 1 1M 64k", "write -q -P 1 4999680 512"]);
    std::fs::write(place.path("odd"), [1; 1000]).unwrap();
    // What a mapped cluster lacks in its file QEMU calls data, ours zeros.
    for name in ["small", "top", "old"] {
        let bytes = std::fs::read(place.path(name)).unwrap();
        std::fs::remove_file(place.path(name)).unwrap();
        std::fs::write(place.path(name), bytes).unwrap();
    }
    ["small", "top", "compressed", "old", "bitmaps", "raw", "odd"]
}

#[test]
fn figures_are_those_of_qemu_img() {
    if !have_qemu("figures_are_those_of_qemu_img") {
        return;
    }
    let place = Place::new();
    let mut sources: Vec<String> = images(&place).iter().map(|name| format!("@{name}")).collect();
    sources
        .extend(["0", "1000", "1M", "10G", "8T", "127G", "129G", "1P"].map(|size| format!("--size {size}")));
    let mut differ = String::new();
    let mut compared = 0;
    for source in &sources {
        for output in ["human", "json"] {
            for options in OPTIONS {
                let line = format!("measure --output={output} -O qcow2 -o {options} {source}");
                let (ours, theirs) = (place.ours(&line), place.theirs("qemu-img", &line));
                compared += 1;
                if (ours.code == 0) != (theirs.code == 0) || ours.out != theirs.out {
                    let _ = writeln!(differ, "{line}: {ours:?} {theirs:?}");
                }
            }
            for line in ["measure", "measure -O raw"] {
                let line = format!("{line} --output={output} {source}");
                assert_eq!(place.ours_ok(&line), place.img(&line), "{line}");
            }
        }
    }
    assert!(differ.is_empty(), "{differ}");
    assert_eq!(compared, 2 * OPTIONS.len() * sources.len());
    place.img("snapshot -c s @small");
    place.io("small", &["write -q -P 9 0 256k"]);
    for line in [
        "measure -O qcow2 -f qcow2 @small",
        "measure -O qcow2 -l s @small",
        "measure --output=json -O qcow2 -l snapshot.name=s @small",
        "measure -O raw -l 1 @small",
    ] {
        assert_eq!(place.ours_ok(line), place.img(line), "{line}");
    }
    assert_eq!(place.ours("measure -l none @small").code, 1);
    let line = "measure -O qcow2 --image-opts driver=qcow2,file.filename=@small";
    assert_eq!(place.ours_ok(line), place.img(line));
}

#[test]
fn one_source_or_a_size_is_needed() {
    let place = Place::new();
    for line in [
        "measure",
        "measure --size 1M @raw",
        "measure --size 1M -f raw",
        "measure --size 1M -l s",
        "measure -O vmdk --size 1M",
    ] {
        place.ours_fails(line, 2);
    }
    let said = place.ours_fails("measure -O qcow2 -o cluster_size=3k --size 1G", 2);
    assert!(said.contains("cluster_size"), "{said}");
    assert!(place.ours_ok("measure -O qcow2 -o help").contains("cluster_size"));
}
