//! `info`, `map` and `compare` say what `qemu-img` says, field by field, of every stored image.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::path::Path;

use crate::common::{ours, ours_ok};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Entry, Manifest, folder};
use serde_json::Value;

/// Calls `test` with each stored image, unpacked.
fn each_image(mut test: impl FnMut(&Entry, &Path)) {
    let manifest = Manifest::load(&folder()).unwrap();
    for entry in &manifest.images {
        let dir = scratch().unwrap();
        let path = entry.unpack(&folder(), dir.path()).unwrap();
        // Without holes: QEMU looks for them below clusters that may be preallocated, and splits its map
        // there; ours tells what the image says.
        for file in fs::read_dir(dir.path()).unwrap() {
            let file = file.unwrap().path();
            fs::write(&file, fs::read(&file).unwrap()).unwrap();
        }
        test(entry, &path);
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The same without what other processes change: space on the host.
fn steady(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().filter(|(key, _)| key != "actual-size").map(|(key, v)| (key, steady(v))).collect()
        }
        Value::Array(values) => values.into_iter().map(steady).collect(),
        other => other,
    }
}

#[test]
fn info_has_the_fields_of_qemu_img() {
    let Some(qemu) = Qemu::find("as_qemu_img") else { return };
    let mut described = 0;
    each_image(|entry, path| {
        if entry.content_blake3.is_none() {
            return; // Encrypted: refused.
        }
        described += 1;
        let words = ["info", "--output=json", "-f", &entry.format, path.to_str().unwrap()];
        let theirs = json(&qemu.img_in(path.parent().unwrap(), words).unwrap());
        let ours = json(&ours_ok(words));
        assert_eq!(steady(ours), steady(theirs), "{}", entry.file);
    });
    report(format_args!("info: {described} images described as qemu-img does"));
}

/// The rows of a map, those that go on where the one before ended made one: QEMU cuts at borders of tables
/// and clusters that mean nothing.
fn merged(text: &str) -> Vec<Value> {
    let mut rows: Vec<Value> = Vec::new();
    for row in json(text).as_array().unwrap() {
        let mut row = row.clone();
        if row["length"] == 0 {
            continue; // A disk of no bytes has one such row in QEMU's map.
        }
        if row["present"] == false {
            // QEMU gives the place of unallocated subclusters, where nothing lies.
            row.as_object_mut().unwrap().remove("offset");
        }
        let number = |row: &Value, key: &str| row[key].as_u64();
        if let Some(last) = rows.last_mut() {
            let len = number(last, "length").unwrap();
            let mut next = row.clone();
            next["start"] = last["start"].clone();
            next["length"] = last["length"].clone();
            if let Some(offset) = number(&row, "offset") {
                next["offset"] = offset.wrapping_sub(len).into();
            }
            if next == *last {
                last["length"] = (len + number(&row, "length").unwrap()).into();
                continue;
            }
        }
        rows.push(row);
    }
    rows
}

#[test]
fn map_has_the_rows_of_qemu_img() {
    let Some(qemu) = Qemu::find("as_qemu_img") else { return };
    each_image(|entry, path| {
        if entry.content_blake3.is_none() {
            return;
        }
        for style in ["json", "human"] {
            let style = format!("--output={style}");
            let words = ["map", &style, "-f", &entry.format, path.to_str().unwrap()];
            let theirs = qemu.img_in(path.parent().unwrap(), words);
            match theirs {
                Ok(theirs) if style.ends_with("json") => {
                    assert_eq!(merged(&ours_ok(words)), merged(&theirs), "{}", entry.file);
                }
                Ok(theirs) => {
                    // QEMU prints a data file's name as it stands in the image, ours with the folder it is
                    // in.
                    let folder = format!("{}/", path.parent().unwrap().display());
                    let short = |text: String| text.replace(&folder, "");
                    assert_eq!(short(ours_ok(words)), short(theirs), "{}", entry.file);
                }
                // Compressed clusters have no place that the human table could name.
                Err(_) => assert_eq!(ours(words).code, 1, "{}", entry.file),
            }
        }
    });
}

#[test]
fn compare_has_the_exit_codes_of_qemu_img() {
    let Some(qemu) = Qemu::find("as_qemu_img") else { return };
    let dir = scratch().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let create = |name: &str, size: &str, writes: &[&str]| {
        qemu.img_in(dir.path(), ["create", "-q", "-f", "qcow2", name, size]).unwrap();
        qemu.io("qcow2", &dir.path().join(name), writes).unwrap();
    };
    create("a", "1M", &["write -q -P 1 64k 64k"]);
    create("same", "1M", &["write -q -P 1 64k 64k", "write -q -z 256k 64k"]);
    create("other", "1M", &["write -q -P 1 64k 64k", "write -q -P 2 200k 512"]);
    create("longer", "2M", &["write -q -P 1 64k 64k"]);
    create("tail", "2M", &["write -q -P 1 64k 64k", "write -q -P 3 1100k 512"]);
    for second in ["a", "same", "other", "longer", "tail", "missing"] {
        for strict in [false, true] {
            let (a, b) = (path("a"), path(second));
            let words: Vec<&str> =
                ["compare"].into_iter().chain(strict.then_some("-s")).chain([&*a, &*b]).collect();
            let theirs = qemu.img_output(&words).unwrap();
            let ran = ours(&words);
            assert_eq!(Some(i32::from(ran.code)), theirs.status.code(), "{words:?}: {ran:?}");
            // In strict mode QEMU names the start of the piece it looked at, ours the first byte that
            // differs.
            if ran.code < 2 && !strict {
                assert_eq!(ran.stdout, String::from_utf8_lossy(&theirs.stdout), "{words:?}");
            }
        }
    }
}

/// Images whose clusters are mapped over holes: `map` and a strict comparison beside QEMU's. Everything
/// mapped once counted as data, and such an image was identical to one of stored zeros.
#[test]
fn mapped_holes_are_what_qemu_img_says_they_are() {
    let Some(qemu) = Qemu::find("as_qemu_img") else { return };
    let dir = scratch().unwrap();
    let path = |name: &str| dir.path().join(name);
    let create = |name: &str, options: &str, writes: &[&str]| {
        let words = ["create", "-q", "-f", "qcow2", "-o", options, name, "8M"];
        qemu.img_in(dir.path(), words).unwrap();
        qemu.io("qcow2", &path(name), writes).unwrap();
    };
    let (mapped, v3) = ("preallocation=metadata", "compat=1.1");
    create("mapped", mapped, &["write -q -P 7 1M 64k", "write -q -z 3M 64k"]);
    create("subclusters", "preallocation=metadata,extended_l2=on", &["write -q -P 7 1M 2k"]);
    create("stored", v3, &["write -q -P 0 0 8M", "write -q -P 7 1M 64k", "write -q -z 3M 64k"]);
    create("empty", v3, &["write -q -P 7 1M 64k"]);
    create("flagged", v3, &["write -q -z 0 8M", "write -q -P 7 1M 64k"]);
    qemu.img_in(dir.path(), ["create", "-q", "sparse", "8M"]).unwrap();
    qemu.io("raw", &path("sparse"), &["write -q -P 7 1M 64k"]).unwrap();
    let names = ["mapped", "subclusters", "stored", "empty", "flagged", "sparse"];
    for name in names {
        let file = path(name);
        let words = ["map", "--output=json", file.to_str().unwrap()];
        let theirs = qemu.img_in(dir.path(), words).unwrap();
        assert_eq!(merged(&ours_ok(words)), merged(&theirs), "{name}");
    }
    for (i, a) in names.iter().enumerate() {
        for b in &names[i..] {
            let (a, b) = (path(a), path(b));
            let words = ["compare", "-s", a.to_str().unwrap(), b.to_str().unwrap()];
            let theirs = qemu.img_output(words).unwrap();
            let ran = ours(words);
            assert_eq!(Some(i32::from(ran.code)), theirs.status.code(), "{words:?}: {ran:?}");
        }
    }
    // Extents that are reserved, and an external data file. QEMU does not look for holes there.
    let external = format!("preallocation=metadata,data_file={}", path("data").display());
    for (name, options) in [("reserved", "preallocation=falloc"), ("external", &*external)] {
        create(name, options, &["write -q -P 7 1M 64k"]);
        let file = path(name);
        let rows = merged(&ours_ok(["map", "--output=json", file.to_str().unwrap()]));
        let length = |row: &Value| row["length"].as_u64().unwrap();
        let data: u64 = rows.iter().filter(|row| row["zero"] == false).map(length).sum();
        // QEMU writes a first block to the data file itself.
        assert!((65536..=65536 + 4096).contains(&data), "{name}: {rows:?}");
        assert!(rows.iter().all(|row| row["present"] == true && row["data"] == true), "{name}: {rows:?}");
    }
}
