//! `--allow-protocols`: backing files that are no plain files.

use std::fs;

use crate::common::Place;

#[test]
fn backing_files_behind_protocols_are_opened_where_that_is_allowed() {
    let place = Place::new();
    fs::create_dir(place.path("in")).unwrap();
    fs::write(place.path("in/base"), vec![7; 65_536]).unwrap();
    let rules = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nsector = \"8\"\n";
    fs::write(place.path("in/rules"), rules).unwrap();
    fs::write(place.path("rules"), rules).unwrap();
    let make = |name: &str| {
        let _ = fs::remove_file(place.path("in/top"));
        place.ours_ok(&format!("create -q -u -f qcow2 -b {name} -F raw @in/top 64K"));
    };
    for (name, words) in [
        ("null-co://", "not a plain path"),
        ("blkdebug::base", "not a plain path"),
        ("blkdebug:rules:base", "not a plain path"),
    ] {
        make(name);
        for command in [
            "convert @in/top @t",
            "map @in/top",
            "info --backing-chain @in/top",
            "mirror -n @in/base @in/top",
        ] {
            let said = place.ours_fails(command, 1);
            assert!(
                said.contains(words) && said.ends_with("--allow-protocols opens it"),
                "{command}: {said}"
            );
        }
        // The image alone is described all the same.
        place.ours_ok("info @in/top");
        place.ours_ok("info --backing-chain --allow-protocols @in/top");
    }
    // The rules hold: sector 8 cannot be read.
    assert!(place.ours_fails("convert --allow-protocols @in/top @t", 1).contains("nput/output error"));
    make("blkdebug::base");
    place.ours_ok("convert -q --allow-protocols -O raw @in/top @t");
    assert_eq!(fs::read(place.path("t")).unwrap(), vec![7; 65_536]);
    make("null-co://");
    place.ours_ok("convert -q --allow-protocols -O raw @in/top @t");
    assert_eq!(fs::read(place.path("t")).unwrap(), vec![0; 65_536]);
    place.ours_ok("mirror -q --allow-protocols --sync top @in/top @in/copy");
    place.ours_ok("mirror --dry-run --allow-protocols --sync top @in/top @in/copy");
    let said = place.ours_fails("mirror --allow-protocols --sync top @in/top @copy", 1);
    assert!(said.ends_with("name another with -B"), "{said}");
    // Each file is judged, the one with the rules too.
    for name in ["blkdebug:../rules:base", "blkdebug::../rules", "blkdebug:rules:../rules"] {
        make(name);
        let said = place.ours_fails("map --allow-protocols @in/top", 1);
        assert!(said.contains("--allow-backing"), "{name}: {said}");
        place.ours_ok(&format!("map --allow-protocols --allow-backing {} @in/top", place.path("").display()));
    }
    for name in [
        "json:{}",
        "nbd://localhost/x",
        "blkdebug:base",
        "null-co://?size=1",
        "blkdebug:rules:nbd://localhost/x",
        "blkdebug:rules:blkdebug::base",
        "null-co:",
    ] {
        make(name);
        assert!(place.ours_fails("map --allow-protocols @in/top", 1).contains("not a plain path"), "{name}");
    }
    make("blkdebug::top");
    assert!(place.ours_fails("map --allow-protocols @in/top", 1).contains("@in/top"));
}
