//! The command on images behind NBD servers: what it prints is what `qemu-img` prints, and what it writes is
//! what QEMU reads.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use crate::common::nbd::{Server, noise};
use crate::common::world::World;
use crate::common::{ours, ours_ok};
use blockmirror_block::testing::{DiskOp, MemoryDisk};
use blockmirror_block::{BlockDevice as _, ByteRange, ExtentKind, Visit};
use blockmirror_nbd::ClientOptions;
use blockmirror_nbd::server::{Export, Listener, ServerOptions};
use blockmirror_testing::qemu::{have, run};
use blockmirror_testing::scratch::scratch;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const TOOLS: [&str; 3] = ["qemu-nbd", "qemu-img", "qemu-io"];

/// The export `disk` of `server`, as both commands spell it.
fn uri(server: &Server) -> String {
    format!("nbd+unix:///disk?socket={}", server.path("socket").display())
}

fn served(format: &str, image: &str, dir: tempfile::TempDir) -> Server {
    Server::qemu(dir, format, image, &["-x", "disk"])
}

/// A raw image of `size` bytes, called `image`, as the export `disk`.
fn raw(size: u64) -> Server {
    let dir = scratch().unwrap();
    fs::File::create(dir.path().join("image")).unwrap().set_len(size).unwrap();
    served("raw", "image", dir)
}

fn img(dir: &Path, line: &str) -> String {
    run("qemu-img", dir, line.split(' ')).unwrap()
}

/// Runs `blockmirror`, which must fail with `code`; what it complained of, in which the socket is `@`.
fn complaint(server: &Server, code: u8, words: &[&str]) -> String {
    let ran = ours(words);
    assert_eq!(ran.code, code, "{words:?}: {ran:?}");
    let here = server.dir.path().to_str().unwrap();
    ran.stderr.trim_end().replace(&uri(server), "@").replace(&format!("{here}/"), "")
}

#[test]
fn info_and_map_say_what_qemu_img_says() {
    if !have("info_and_map_say_what_qemu_img_says", &TOOLS) {
        return;
    }
    for (format, size) in [("raw", "3M"), ("qcow2", "5M")] {
        let dir = scratch().unwrap();
        img(dir.path(), &format!("create -q -f {format} image {size}"));
        let script = ["-f", format, "-c", "write -P 5 1M 64K", "-c", "write -z 2M 128K", "image"];
        run("qemu-io", dir.path(), script).unwrap();
        // The format of the server's image, and then the image as it is, so that we read its format over NBD.
        for served_as in [format, "raw"] {
            let server = served(served_as, "image", scratch_copy(dir.path()));
            let uri = uri(&server);
            for command in ["info", "map"] {
                let theirs = run("qemu-img", Path::new("."), [command, "--output=json", &uri]).unwrap();
                let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
                let ours = ours_ok([command, "--output=json", &uri]);
                assert_eq!(json(&ours), json(&theirs), "{command} {format} as {served_as}");
                if command == "info" || served_as == "raw" {
                    let theirs = run("qemu-img", Path::new("."), [command, &uri]).unwrap();
                    assert_eq!(ours_ok([command, &uri]), theirs, "{command} {format} as {served_as}");
                }
            }
        }
    }
}

fn scratch_copy(from: &Path) -> tempfile::TempDir {
    let dir = scratch().unwrap();
    fs::copy(from.join("image"), dir.path().join("image")).unwrap();
    dir
}

#[test]
fn raw_images_go_there_and_back() {
    if !have("raw_images_go_there_and_back", &TOOLS) {
        return;
    }
    let server = raw(6 * MIB);
    let uri = uri(&server);
    let mut bytes = noise(1, 6 * MIB as usize);
    bytes[2 * MIB as usize..4 * MIB as usize].fill(0);
    fs::write(server.path("source"), &bytes).unwrap();
    let (source, back) = (server.path("source"), server.path("back"));
    let (source, back) = (source.to_str().unwrap(), back.to_str().unwrap());
    ours_ok(["convert", "-q", source, &uri]);
    assert!(fs::read(server.path("image")).unwrap() == bytes);
    assert_eq!(ours_ok(["compare", source, &uri]), "Images are identical.\n");
    ours_ok(["convert", "-q", "-O", "qcow2", &uri, back]);
    assert_eq!(ours_ok(["compare", back, &uri]), "Images are identical.\n");
    let sparse = run("qemu-img", Path::new("."), ["check", "--output=json", back]).unwrap();
    let allocated = serde_json::from_str::<Value>(&sparse).unwrap()["allocated-clusters"].as_u64();
    assert_eq!(allocated, Some(64), "holes of the export stay holes");
    // Into what is there, with a change.
    run("qemu-io", Path::new("."), ["-f", "qcow2", "-c", "write -P 9 1M 1M", back]).unwrap();
    ours_ok(["mirror", "-q", "-n", "-O", "raw", "--connections", "2", back, &uri]);
    let image = fs::read(server.path("image")).unwrap();
    assert!(image[MIB as usize..2 * MIB as usize].iter().all(|b| *b == 9));
    assert!(image[..MIB as usize] == bytes[..MIB as usize]);
}

/// What an export reads as now says nothing of what lies below its image. Zeros are written to it, unless the
/// user says that it shows zeros; a dry run says the same.
#[test]
fn zeros_are_written_to_an_export_unless_it_is_said_to_be_zero() {
    if !have("zeros_are_written_to_an_export_unless_it_is_said_to_be_zero", &TOOLS) {
        return;
    }
    for (mut words, zeroed) in
        [(vec!["--output=json", "-n"], 7 * MIB), (vec!["--output=json", "-n", "--target-is-zero"], 0)]
    {
        let dir = scratch().unwrap();
        fs::write(dir.path().join("base"), vec![0xbb; 8 * MIB as usize]).unwrap();
        img(dir.path(), "create -q -f qcow2 -b base -F raw image");
        let source = fs::File::create(dir.path().join("source")).unwrap();
        source.set_len(8 * MIB).unwrap();
        source.write_all_at(&vec![5; MIB as usize], MIB).unwrap();
        let server = Server::qemu_without_backing(dir, "image", &["-x", "disk"]);
        let (source, uri) = (server.path("source"), uri(&server));
        words.extend([source.to_str().unwrap(), &uri]);
        let report = |words: &[&str]| serde_json::from_str::<Value>(&ours_ok(words)).unwrap();
        let planned = report(&[&["convert", "--dry-run"], &words[..]].concat());
        assert_eq!(
            (&planned["copy"], &planned["zero"]),
            (&Value::from(MIB), &Value::from(zeroed)),
            "{words:?}"
        );
        let done = report(&[&["convert"], &words[..]].concat());
        assert_eq!(
            (&done["copied"], &done["zeroed"]),
            (&Value::from(MIB), &Value::from(zeroed)),
            "{words:?}"
        );
        let mut server = server;
        server.kill();
        // Over the backing file that the export hid.
        let compared =
            run("qemu-img", server.dir.path(), ["compare", "-f", "raw", "-F", "qcow2", "source", "image"]);
        assert_eq!(compared.is_ok(), zeroed > 0, "{compared:?}");
    }
}

/// Clusters that are mapped over holes of the file read as zeros, and an export of such an image says so to
/// every client.
#[test]
fn an_export_says_that_mapped_holes_are_zeros() {
    if !have("an_export_says_that_mapped_holes_are_zeros", &TOOLS) {
        return;
    }
    let dir = scratch().unwrap();
    let dir = dir.path();
    img(dir, "create -q -f qcow2 -o preallocation=metadata image 8M");
    run("qemu-io", dir, ["-f", "qcow2", "-c", "write -q -P 7 1M 64k", "image"]).unwrap();
    let file = dir.join("image").display().to_string();
    let world =
        World::ours(dir, &[format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={file}")]);
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd").display());
    let map = ["map", "--output=json", &uri];
    for text in [run("qemu-img", dir, map).unwrap(), ours_ok(map)] {
        let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
        let data: Vec<_> = rows.iter().filter(|row| row["zero"] == false).collect();
        assert_eq!(data.len(), 1, "{text}");
        assert_eq!(
            (&data[0]["start"], &data[0]["length"]),
            (&Value::from(MIB), &Value::from(65_536)),
            "{text}"
        );
    }
    let client = ClientOptions::new(uri.parse().unwrap()).open().unwrap();
    let mut data = Vec::new();
    client
        .extents(ByteRange::new(0, 8 * MIB), &mut |extent| {
            if extent.kind != ExtentKind::Zero {
                data.push(extent.range);
            }
            Visit::Continue(())
        })
        .unwrap();
    assert_eq!(data, [ByteRange::at(MIB, 65_536)]);
    drop(client);
    let copy = dir.join("copy").display().to_string();
    let done: Value =
        serde_json::from_str(&ours_ok(["convert", "--output=json", "-O", "raw", &uri, &copy])).unwrap();
    assert_eq!(done["copied"], 65_536);
    world.end();
    run("qemu-img", dir, ["compare", "-f", "qcow2", "-F", "raw", "image", "copy"]).unwrap();
}

#[test]
fn qcow2_lives_in_an_export() {
    if !have("qcow2_lives_in_an_export", &TOOLS) {
        return;
    }
    let mut server = raw(8 * MIB);
    let uri = uri(&server);
    // What was there before shows nowhere.
    fs::write(server.path("image"), noise(7, 8 * MIB as usize)).unwrap();
    let mut bytes = vec![0; 20 * MIB as usize];
    bytes[..MIB as usize].copy_from_slice(&noise(2, MIB as usize));
    bytes[19 * MIB as usize..].copy_from_slice(&noise(3, MIB as usize));
    fs::write(server.path("source"), &bytes).unwrap();
    let source = server.path("source");
    let source = source.to_str().unwrap();
    ours_ok(["convert", "-q", "-O", "qcow2", "-o", "cluster_size=4k", source, &uri]);
    assert_eq!(ours_ok(["compare", "-F", "qcow2", source, &uri]), "Images are identical.\n");
    run("qemu-img", Path::new("."), ["compare", "-F", "qcow2", source, &uri]).unwrap();
    let info = ours_ok(["info", "--output=json", &uri]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["format"], &info["cluster-size"]), (&"qcow2".into(), &4096.into()));
    server.kill();
    run("qemu-img", server.dir.path(), ["check", "-f", "qcow2", "image"]).unwrap();
    server.restart();
    // Again, into the image that is there: its format is found over NBD.
    ours_ok(["mirror", "-q", "-n", source, &uri]);
    // More than the export can hold.
    fs::write(server.path("source"), noise(4, 20 * MIB as usize)).unwrap();
    let said = complaint(&server, 1, &["mirror", "-q", "-n", source, &uri]);
    assert!(said.contains("cannot grow past 8388608 bytes"), "{said}");
}

#[test]
fn names_inside_of_images_are_paths() {
    if !have("names_inside_of_images_are_paths", &TOOLS) {
        return;
    }
    let dir = scratch().unwrap();
    img(dir.path(), "create -q -f raw base 1M");
    img(dir.path(), "create -q -f qcow2 -b base -F raw image");
    let server = served("raw", "image", dir);
    let export = uri(&server);
    assert_eq!(
        complaint(&server, 1, &["map", &export]),
        "blockmirror: open: @ names the backing file \"base\", which is relative, and the image has no directory"
    );
    drop(server);

    let dir = scratch().unwrap();
    let base = dir.path().join("base");
    img(dir.path(), "create -q -f raw base 1M");
    img(dir.path(), &format!("create -q -f qcow2 -b {} -F raw image", base.display()));
    let server = served("raw", "image", dir);
    let export = uri(&server);
    let said = complaint(&server, 1, &["map", &export]);
    assert!(said.ends_with("files named in images are not opened"), "{said}");
    let here = server.dir.path().to_str().unwrap();
    ours_ok(["map", "--allow-backing", here, &export]);

    // An image that names an export, which QEMU would connect to.
    let overlay = server.path("overlay");
    let overlay = overlay.to_str().unwrap();
    run(
        "qemu-img",
        Path::new("."),
        ["create", "-q", "-u", "-f", "qcow2", "-b", &export, "-F", "raw", overlay, "1M"],
    )
    .unwrap();
    let said = complaint(&server, 1, &["map", overlay]);
    assert!(said.ends_with("which is not a plain path; only plain paths are opened"), "{said}");
    let target = server.path("target");
    let target = target.to_str().unwrap();
    let words = ["convert", "-O", "qcow2", "-B", &export, "-F", "raw", overlay, target];
    assert!(complaint(&server, 1, &words).contains("not a plain path"));
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    if !have("what_cannot_be_is_refused_in_one_line", &TOOLS) {
        return;
    }
    let server = raw(2 * MIB);
    let export = uri(&server);
    let small = server.path("small");
    fs::write(&small, vec![1; 1 << 20]).unwrap();
    let small = small.to_str().unwrap();
    let large = server.path("large");
    fs::write(&large, vec![1; 3 << 20]).unwrap();
    let large = large.to_str().unwrap();
    let nowhere = format!("nbd+unix:///?socket={}", server.path("nowhere").display());
    let other = export.replace("disk", "other");
    for (words, said) in [
        (
            &["convert", small, &export][..],
            "create: @: it has 2097152 bytes and cannot be resized; the image needs 1048576",
        ),
        (
            &["convert", "-n", large, &export],
            "copy: source large has 3145728 bytes, target @ (raw) has 2097152: it must not be shorter",
        ),
        (&["convert", &export, &export], "copy: @: it is part of the source @"),
        (
            &["info", &other],
            "open: nbd+unix:///other?socket=socket: the server refuses the export: it has none of that name: \
             export 'other' not present",
        ),
        (
            &["info", &nowhere],
            "open: nbd+unix:///?socket=nowhere: cannot connect: No such file or directory (os error 2)",
        ),
        (
            &["info", "nbd+vsock://2/x"],
            "open: nbd+vsock://2/x: nbd+vsock is not supported; nbd, nbds, nbd+unix and nbds+unix are",
        ),
        (&["info", "nbd+unix:///x"], "open: nbd+unix:///x: a Unix domain socket needs socket=PATH"),
        (
            &["info", "nbd:nothing"],
            "open: nbd:nothing: an NBD URI begins with nbd://, nbds://, nbd+unix:// or nbds+unix://",
        ),
    ] {
        assert_eq!(complaint(&server, 1, words), format!("blockmirror: {said}"), "{words:?}");
    }
    assert!(fs::read(server.path("image")).unwrap().iter().all(|b| *b == 0), "nothing was written");
    fs::write(small, vec![1; 2 << 20]).unwrap();
    for more in [&[][..], &["-n"], &["-O", "qcow2"]] {
        let words = ["mirror", "--dry-run", small, &export];
        assert!(ours_ok(words.iter().chain(more)).contains("dry run"));
    }
    assert!(fs::read(server.path("image")).unwrap().iter().all(|b| *b == 0), "a dry run writes nothing");
}

/// QEMU ignores flushes in the mode `unsafe`; a copy that ended well would not be durable.
#[test]
fn every_cache_mode_ends_with_a_flush() {
    let dir = scratch().unwrap();
    let source = dir.path().join("source");
    fs::write(&source, noise(1, 3 * MIB as usize)).unwrap();
    let server = blockmirror_nbd::server::Server::new(ServerOptions::default()).unwrap();
    server.listen(Listener::unix(dir.path().join("socket")).unwrap()).unwrap();
    for format in ["raw", "qcow2"] {
        for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
            let disk = Arc::new(MemoryDisk::new(4 * MIB).logged());
            let name = format!("{format}-{mode}");
            server.add(Export::new(&*name, Arc::clone(&disk) as _).writable(true)).unwrap();
            let target = format!("nbd+unix:///{name}?socket={}", dir.path().join("socket").display());
            if format == "qcow2" {
                ours_ok(["create", "-q", "-f", format, &target, "3M"]);
                disk.take_log();
            }
            let words = ["convert", "-q", "-n", "-m", "1", "-f", "raw", "-O", format, "-t", mode];
            ours_ok(words.iter().copied().chain([source.to_str().unwrap(), &target]));
            let changes: Vec<_> =
                disk.take_log().into_iter().filter(|op| !matches!(op, DiskOp::Read(_))).collect();
            let is_flush = |op: &DiskOp| matches!(op, DiskOp::Flush);
            let writes = changes.iter().filter(|op| matches!(op, DiskOp::Write(..))).count();
            assert!(writes >= 3, "{name}: {changes:?}");
            assert!(changes.last().is_some_and(is_flush), "{name}: {changes:?}");
            // With one operation at a time each write to a raw disk is one write here.
            if format == "raw" && matches!(mode, "writethrough" | "directsync") {
                let mut pairs = changes.windows(2);
                assert!(pairs.all(|pair| is_flush(&pair[0]) || is_flush(&pair[1])), "{name}: {changes:?}");
            }
        }
    }
}

/// QEMU's own spelling of before there were URIs.
#[test]
fn the_older_form_works() {
    if !have("the_older_form_works", &TOOLS) {
        return;
    }
    let server = raw(MIB);
    let older = format!("nbd:unix:{}:exportname=disk", server.path("socket").display());
    let info: Value = serde_json::from_str(&ours_ok(["info", "--output=json", &older])).unwrap();
    assert_eq!(info["virtual-size"], MIB);
}
