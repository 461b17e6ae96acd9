//! Several sources: their disks follow each other, as `qemu-img convert A B TARGET` puts them.

use std::fs;

use serde_json::Value;

use crate::common::{Place, have_qemu};

/// Images whose lengths and formats differ: `a` of 3 bytes, `b` a qcow2 image of 1,000,448, `c` of 1,000,001
/// bytes, an empty one, and an overlay.
fn images(place: &Place) {
    fs::write(place.path("a"), b"abc").unwrap();
    fs::write(place.path("c"), vec![7; 1_000_001]).unwrap();
    fs::write(place.path("none"), b"").unwrap();
    fs::write(place.path("data"), vec![5; 1_000_448]).unwrap();
    place.ours_ok("convert -q -f raw -O qcow2 @data @b");
    place.ours_ok("create -q -f qcow2 -b b -F qcow2 @over");
}

/// The bytes of the disks, each rounded up to sectors.
fn flat(place: &Place, names: &[&str]) -> Vec<u8> {
    let mut all = Vec::new();
    for name in names {
        let name = if matches!(*name, "b" | "over") { "data" } else { name };
        all.extend(fs::read(place.path(name)).unwrap());
        all.resize(all.len().next_multiple_of(512), 0);
    }
    all
}

#[test]
fn several_sources_become_one_disk() {
    let place = Place::new();
    images(&place);
    let theirs = have_qemu("several_sources_become_one_disk");
    for names in [
        &["a", "c"][..],
        &["a", "b", "c"],
        &["c", "none", "a"],
        &["none", "none"],
        &["over", "a", "over", "b", "none"],
    ] {
        let words = names.iter().map(|name| format!("@{name}")).collect::<Vec<_>>().join(" ");
        let whole = flat(&place, names);
        for options in ["-O raw", "-O raw -m 1", "-O raw -T none -t none", "-O raw -S 0"] {
            place.ours_ok(&format!("convert -q {options} {words} @t"));
            assert!(fs::read(place.path("t")).unwrap() == whole, "{names:?}: {options}");
        }
        fs::write(place.path("there"), vec![9; whole.len() + 4096]).unwrap();
        place.ours_ok(&format!("convert -q -n -O raw {words} @there"));
        let there = fs::read(place.path("there")).unwrap();
        assert!(there[..whole.len()] == whole && there[whole.len()..] == [9; 4096], "{names:?}");
        place.ours_ok(&format!("mirror -q -O qcow2 {words} @q"));
        assert_eq!(place.ours_ok("compare -f raw -F qcow2 @t @q"), "Images are identical.\n", "{names:?}");
        if theirs {
            place.img(&format!("convert -O raw {words} @u"));
            assert!(fs::read(place.path("u")).unwrap() == whole, "{names:?}");
            place.img("check -q @q");
        }
    }
}

/// As `qemu-img` takes them: `convert a -O qcow2 t` was refused when several sources came.
#[test]
fn options_stand_anywhere_between_names() {
    let place = Place::new();
    images(&place);
    for (line, names) in [
        ("convert @a -q @t", &["a"][..]),
        ("convert @a @t -q", &["a"]),
        ("convert @a -f raw @c -q @t", &["a", "c"]),
        ("convert -q @a @c -O raw @t", &["a", "c"]),
        ("convert @a -q @c -O raw @none -S 4k @a -m 2 @t -f raw", &["a", "c", "none", "a"]),
        ("convert -q -- @a @c @t", &["a", "c"]),
    ] {
        place.ours_ok(line);
        assert!(fs::read(place.path("t")).unwrap() == flat(&place, names), "{line}");
        fs::remove_file(place.path("t")).unwrap();
    }
}

#[test]
fn what_fits_one_source_only_is_refused() {
    let place = Place::new();
    images(&place);
    for (line, message) in [
        (
            "convert -O qcow2 -B data -F raw @a @c @t",
            "a backing file cannot be combined with several sources",
        ),
        (
            "convert -O qcow2 -o backing_file=data,backing_fmt=raw @a @c @t",
            "a backing file cannot be combined with several sources",
        ),
        ("mirror --sync top @over @a @t", "--sync=top cannot be combined with several sources"),
        ("mirror @a @b @t", "the sources have different formats; give the target's with -O"),
        ("convert @a", "the following required arguments were not provided: <TARGET> (see --help)"),
    ] {
        assert_eq!(place.ours_fails(line, 2), format!("blockmirror: {message}"), "{line}");
    }
    // Any of them may be the target, a layer of one, or shorter than said.
    for line in ["convert @a @c @c", "convert @a @c @a", "convert @a @over @b", "convert -n @c @a @a"] {
        assert!(place.ours_fails(line, 1).contains("it is part of the source @"), "{line}");
    }
    assert!(place.ours_fails("convert @a @nothing @t", 1).contains("open: @nothing: No such file"));
    assert!(place.ours_fails("convert -n @c @a @data", 1).contains("1000960"));
    assert_eq!(place.ours("convert -f qcow2 @b @a @t").code, 1);
    assert_eq!(place.names(), ["a", "b", "c", "data", "none", "over"]);
    assert_eq!(fs::read(place.path("data")).unwrap(), vec![5; 1_000_448]);
}

#[test]
fn several_sources_are_named_in_what_is_printed() {
    let place = Place::new();
    images(&place);
    let json = |line: &str| serde_json::from_str::<Value>(&place.ours_ok(line)).unwrap();
    let plan = json("convert --dry-run --output=json -O qcow2 @a @b @t");
    let done = json("convert --output=json -O qcow2 @a @b @t");
    for out in [&plan, &done] {
        let names: Vec<_> =
            out["sources"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        assert!(names[0].ends_with("/a") && names[1].ends_with("/b") && names.len() == 2, "{out}");
        assert_eq!((&out["len"], out.get("source")), (&Value::from(1_000_960), None), "{out}");
    }
    let said = place.ours_ok("convert -O qcow2 @a @b @t");
    assert!(said.contains("/a + ") && said.contains("/b -> "), "{said}");
    let ran = place.ours("convert -p @a @b @t");
    assert!(ran.code == 0 && ran.err.contains("100.0"), "{ran:?}");
    let named = r#"convert -q json:{"driver":"raw","file.filename":"@a"} json:{"driver":"qcow2","file.filename":"@b"} @t"#;
    place.ours_ok(named);
    assert!(fs::read(place.path("t")).unwrap() == flat(&place, &["a", "b"]));
}
