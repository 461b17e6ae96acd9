//! `--allow-protocols`: backing files that are no plain files.

use std::fs;

use crate::common::{Place, have_qemu};

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

/// What a person types is no request of an image: it needs no option.
#[test]
fn protocols_that_are_typed_are_opened() {
    let place = Place::new();
    let len = 256 << 10;
    fs::write(place.path("raw"), vec![7; len]).unwrap();
    fs::write(place.path("rules"), "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n").unwrap();
    place.ours_ok("convert -q -f raw -O qcow2 @raw @disk");

    place.ours_ok(r#"convert -q -O raw json:{"driver":"null-co","size":65536,"read-zeroes":true} @zeros"#);
    assert_eq!(fs::read(place.path("zeros")).unwrap(), vec![0; 65_536]);
    assert!(place.ours_ok("info --output=json null-co://").contains("\"virtual-size\": 1073741824"));

    for name in
        ["blkdebug:@rules:@raw", r#"json:{"driver":"blkdebug","config":"@rules","image.filename":"@raw"}"#]
    {
        assert!(place.ours_fails(&format!("convert {name} @t"), 1).contains("nput/output error"), "{name}");
    }
    place.ours_ok("convert -q -f raw blkdebug::@raw @t");
    assert_eq!(fs::read(place.path("t")).unwrap(), vec![7; len]);
    let said = place.ours_fails("convert blkdebug:@none:@raw @t", 1);
    assert!(said.contains("blkdebug config file"), "{said}");

    // Over a format: the map shows where bytes lie, and the rules count.
    let over = "--image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=@disk";
    assert_eq!(place.ours_ok(&format!("map {over},align=4k")), place.ours_ok("map @disk"));
    let rule = "inject-error.0.event=none,inject-error.0.iotype=block-status,inject-error.0.sector=9";
    assert!(place.ours_fails(&format!("map {over},{rule}"), 1).contains("nput/output error"));

    assert!(place.ours_fails("create -f raw blkdebug::@new 1M", 2).contains("needs a path"));
    assert!(place.ours_fails("convert -f raw @raw null-co://", 2).contains("needs a path"));
    assert!(place.ours_fails("info blkdebug:@raw", 1).contains("blkdebug:"));
}

/// Without the backing file that its header names, by the options of its name.
#[test]
fn an_image_reads_without_its_backing_file_if_its_name_says_so() {
    let place = Place::new();
    fs::write(place.path("base"), vec![7; 65_536]).unwrap();
    place.ours_ok("create -q -f qcow2 -b base -F raw @top 64K");
    let name = r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"@top"}}"#;
    let rows = place.ours_ok(&format!("map --output=json {name}"));
    assert!(rows.contains("\"depth\": 0, \"present\": false, \"zero\": true"), "{rows}");
    fs::remove_file(place.path("base")).unwrap();
    place.ours_ok(&format!("convert -q -O raw {name} @t"));
    assert_eq!(fs::read(place.path("t")).unwrap(), vec![0; 65_536]);
    // Who writes does not know what will show there.
    assert!(place.ours_fails(&format!("resize {name} 128K"), 1).contains("backing file is not open"));
}

/// What an image stands on by the options of its name, and not by its header, as `qemu-img` opens it.
#[test]
fn an_image_stands_on_what_its_name_says() {
    let place = Place::new();
    fs::write(place.path("base"), vec![7; 65_536]).unwrap();
    fs::write(place.path("other"), vec![8; 65_536]).unwrap();
    place.ours_ok("create -q -f qcow2 -b base -F raw @middle 64K");
    place.ours_ok("create -q -f qcow2 -b base -F raw @top 64K");
    let file = |name: &str| format!(r#""file":{{"driver":"file","filename":"@{name}"}}"#);
    let other = format!(r#"{{"driver":"raw",{}}}"#, file("other"));
    let middle = format!(r#"{{"driver":"qcow2","backing":{other},{}}}"#, file("middle"));
    let by_header = format!(r#"{{"driver":"qcow2",{}}}"#, file("middle"));
    let options =
        "--image-opts driver=qcow2,file.filename=@top,backing.driver=raw,backing.file.filename=@other";
    for (name, byte) in [
        (format!(r#"json:{{"driver":"qcow2","backing":{other},{}}}"#, file("top")), 8),
        (format!(r#"json:{{"driver":"qcow2","backing":{middle},{}}}"#, file("top")), 8),
        (format!(r#"json:{{"driver":"qcow2","backing":{by_header},{}}}"#, file("top")), 7),
        (options.to_owned(), 8),
    ] {
        let line = format!("convert -O raw {name} @t");
        place.ours_ok(&line.replace("convert", "convert -q"));
        assert_eq!(fs::read(place.path("t")).unwrap(), vec![byte; 65_536], "{name}");
        if have_qemu("an_image_stands_on_what_its_name_says") {
            place.img(&line);
            assert_eq!(fs::read(place.path("t")).unwrap(), vec![byte; 65_536], "{name}");
        }
    }
    let itself = format!(r#"json:{{"driver":"qcow2","backing":{{"driver":"qcow2",{0}}},{0}}}"#, file("top"));
    assert!(place.ours_fails(&format!("convert {itself} @t"), 1).contains("top"));
    let raw = format!(r#"json:{{"driver":"raw","backing":{other},{}}}"#, file("base"));
    assert!(place.ours_fails(&format!("convert {raw} @t"), 2).contains("backing"));
    let said = place.ours_fails(&options.replacen("--image-opts", "commit --image-opts", 1), 1);
    assert!(said.contains("not supported"), "{said}");
}
