//! What is found out before a target that is written in place loses what it holds.

use std::fs::{self, File};
use std::path::Path;

use crate::common::Place;
use crate::copy::source;
use crate::copy::targets::Mount;

#[test]
fn a_backing_file_that_cannot_be_opened_is_found_out_before_the_target_goes() {
    let place = Place::new();
    source(&place);
    fs::write(place.path("raw"), vec![1; 1 << 20]).unwrap();
    place.ours_ok("create -q -u -f qcow2 -b nowhere -F raw @hollow 4M");
    let mut tried = 0;
    for (backing, format) in [("missing", "qcow2"), ("raw", "qcow2"), ("hollow", "qcow2"), ("json:{}", "raw")]
    {
        for command in ["convert -O qcow2", "mirror -O qcow2 --sync top"] {
            fs::write(place.path("t"), "old").unwrap();
            let line = format!("{command} --in-place -f raw -B {backing} -F {format} @source @t");
            let ran = place.ours(&line);
            assert_eq!(ran.code, 1, "{line}: {ran:?}");
            assert_eq!(fs::read(place.path("t")).unwrap(), b"old", "{line}: {ran:?}");
            tried += 1;
        }
    }
    assert_eq!(tried, 8);
}

#[test]
fn space_that_is_missing_is_found_out_before_the_target_goes_or_is_given_back() {
    let place = Place::new();
    fs::create_dir(place.path("small")).unwrap();
    let Some(_mount) = Mount::new("-t tmpfs -o size=8M", Path::new("none"), &place.path("small")) else {
        return;
    };
    let target = place.path("small/t");
    File::create(place.path("source")).unwrap().set_len(20 << 20).unwrap();
    for options in ["preallocation=falloc", "preallocation=full"] {
        fs::write(&target, "old").unwrap();
        let ran = place.ours(&format!("convert --in-place -f raw -o {options} @source @small/t"));
        assert!(ran.code == 1 && !ran.err.contains("incomplete"), "{ran:?}");
        assert_eq!(fs::read(&target).unwrap(), b"old", "{options}");
        // It is long already: only writing it shows.
        for (format, left) in [("raw", 0), ("qcow2", 512)] {
            File::create(&target).unwrap().set_len(20 << 20).unwrap();
            let line = format!("convert --in-place -f raw -O {format} -o {options} @source @small/t");
            let ran = place.ours(&line);
            assert!(ran.code == 1 && ran.err.contains("; the target is incomplete"), "{line}: {ran:?}");
            assert_eq!(fs::metadata(&target).unwrap().len(), left, "{line}");
        }
    }
}
