//! `blockmirror ctl SOCKET mirror`: targets of each kind, the ends of the job, and what stays of it, against
//! our daemon and QEMU's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;

use blockmirror_testing::content::{Fill, write_raw};
use serde_json::{Value, json};

use crate::common::ours_ok;
use crate::ctl::{SIZE, World};

/// Our daemon, and QEMU's where it is installed.
fn worlds() -> impl Iterator<Item = World> {
    [Some(World::ours()), World::qemu()].into_iter().flatten()
}

impl World {
    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// What `ctl` said of files in the directory, without the directory, and its exit code.
    pub(crate) fn output_of(&self, line: &str) -> String {
        let here = self.path("");
        let words: Vec<_> = line.split(' ').map(|word| word.replace('@', &here)).collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let said = self.said(&words).replace(&here, "@");
        said.replace("ctl @a ", "ctl SOCKET ").replace("blockmirror: ", "")
    }

    /// The names of nodes that have one.
    pub(crate) fn node_names(&mut self) -> Vec<String> {
        let nodes = self.must("query-named-block-nodes", json!({"flat": true}));
        let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
        let mut names: Vec<_> = nodes.as_array().unwrap().iter().map(name).collect();
        names.retain(|name| !name.starts_with('#'));
        names.sort();
        names
    }

    /// Whether the image `name` shows what the file of `disk` has.
    fn is_equal(&self, name: &str) -> bool {
        let (disk, image) = (self.path("disk"), self.path(name));
        let said = ours_ok(["compare", "-U", "-f", "raw", "--allow-backing", "/", &disk, &image]);
        said == "Images are identical.\n"
    }
}

#[test]
fn a_new_file_that_the_users_move_to() {
    for mut world in worlds() {
        assert_eq!(
            world.output_of("mirror disk @new.qcow2 --pivot"),
            "mirror0: ready: disk -> @new.qcow2 (qcow2, created)\n\
             mirror0: completed; users of the source are on the target\n[0]"
        );
        assert!(world.is_equal("new.qcow2"));
        assert_eq!(world.node_names(), ["copy", "ctl.mirror0", "ctl.mirror0.file", "disk"]);
        // The names of the first are taken: the disk is under them.
        assert_eq!(
            world.output_of("mirror ctl.mirror0 @again.raw --keep-source"),
            "mirror1: ready: ctl.mirror0 -> @again.raw (raw, created)\n\
             mirror1: completed; the target is a copy, its users stay on the source\n[0]"
        );
        assert_eq!(fs::read(world.path("again.raw")).unwrap(), fs::read(world.path("disk")).unwrap());
    }
    let mut world = World::ours();
    world.output_of("mirror disk @new.qcow2 --pivot");
    assert_eq!(world.exported(), "ctl.mirror0");
    let refused = world.output_of("close ctl.mirror0");
    assert!(refused.starts_with("ctl.mirror0: ") && refused.contains("is in use by export"), "{refused}");
    // What the users have left is closed, with the file below it.
    assert_eq!(world.output_of("close disk"), "[0]");
    assert_eq!(
        world.output_of("close disk"),
        "no node 'disk': there is ctl.mirror0, ctl.mirror0.file, copy\n[1]"
    );
    world.output_of("mirror ctl.mirror0 @third.qcow2 --pivot");
    assert_eq!(world.output_of("close ctl.mirror0"), "[0]");
    assert_eq!(world.node_names(), ["copy", "ctl.mirror1", "ctl.mirror1.file"]);
}

#[test]
fn a_copy_is_closed() {
    for mut world in worlds() {
        assert_eq!(
            world.output_of("mirror disk @copy.raw --keep-source --job-id backup --granularity 64K"),
            "backup: ready: disk -> @copy.raw (raw, created)\n\
             backup: completed; the target is a copy, its users stay on the source\n[0]"
        );
        assert_eq!(world.node_names(), ["copy", "disk"]);
        assert!(fs::read(world.path("copy.raw")).unwrap() == fs::read(world.path("disk")).unwrap());
    }
}

/// A mirror that was started for others to end: the commands that it prints end it, and close its target.
#[test]
fn a_mirror_that_is_left_ready() {
    for mut world in worlds() {
        let ends = [
            "  blockmirror ctl SOCKET complete mirror0                users of the source switch to the target",
            "  blockmirror ctl SOCKET complete --keep-source mirror0  the target is a copy of that point in time",
            "  blockmirror ctl SOCKET abort mirror0                   the target is unusable",
            "[0]",
        ]
        .join("\n");
        let want =
            format!("mirror0: ready: disk -> @a.qcow2 (qcow2, created)\nmirror0: end it by one of\n{ends}");
        assert_eq!(world.output_of("mirror disk @a.qcow2 --wait"), want);
        assert_eq!(world.node_names(), ["copy", "ctl.mirror0", "ctl.mirror0.file", "disk"]);
        assert_eq!(
            world.output_of("complete --keep-source mirror0"),
            "mirror0: completed; the target is a copy, its users stay on the source\n[0]"
        );
        assert_eq!(world.node_names(), ["copy", "disk"]);
        assert!(world.is_equal("a.qcow2"));

        let want = format!(
            "mirror0: started: disk -> @bb (qcow2, created)\n  blockmirror ctl SOCKET watch mirror0\n\
             mirror0: when it is ready, end it by one of\n{ends}"
        );
        assert_eq!(world.output_of("mirror disk @bb -O qcow2 --speed 1"), want);
        assert_eq!(world.output_of("abort"), "mirror0: aborted; the target is of no use\n[0]");
        assert_eq!(world.node_names(), ["copy", "disk"]);
    }
}

#[test]
fn targets_that_exist() {
    for mut world in worlds() {
        // A node is not closed: `mirror` has not opened it.
        assert_eq!(
            world.output_of("mirror disk copy --keep-source"),
            "mirror0: ready: disk -> node copy\n\
             mirror0: completed; the target is a copy, its users stay on the source\n[0]"
        );
        assert_eq!(world.node_names(), ["copy", "disk"]);
        assert!(fs::read(world.path("copy")).unwrap() == fs::read(world.path("disk")).unwrap());

        write_raw(&world.dir.path().join("old.img"), SIZE, &[(0, 1 << 20, Fill::Noise)]).unwrap();
        let ready = "mirror0: ready: disk -> @old.img (raw)\n\
                     mirror0: completed; the target is a copy, its users stay on the source\n\
                     note: @old.img: it exists, and is overwritten\n[0]";
        assert_eq!(world.output_of("mirror disk @old.img --keep-source"), ready);
        assert!(fs::read(world.path("old.img")).unwrap() == fs::read(world.path("disk")).unwrap());
    }
}

/// What is refused leaves no node, and no file but those that were there.
#[test]
fn targets_that_are_refused() {
    for mut world in worlds() {
        write_raw(&world.dir.path().join("old"), SIZE, &[]).unwrap();
        write_raw(&world.dir.path().join("short.raw"), SIZE / 2, &[]).unwrap();
        let before = fs::read_dir(world.dir.path()).unwrap().count();
        for (line, want) in [
            ("mirror nodisk @x.raw", "no node 'nodisk': there is copy, disk\n[1]"),
            ("mirror disk nothing", "no node 'nothing'; a file of that name is written ./nothing\n[1]"),
            ("mirror disk copy -O raw", "copy is a node, which has a format already (-O)\n[2]"),
            ("mirror disk @old", "@old: it exists, and its name does not say its format; -O does\n[2]"),
            ("mirror disk no.node", "no node 'no.node'; a file of that name is written ./no.node\n[1]"),
            (
                "mirror disk json:@x.raw",
                "no node 'json:@x.raw'; a file of that name is written ./json:@x.raw\n[1]",
            ),
            ("mirror disk @x.raw --speed 9E", "--speed: the speed is too large\n[2]"),
            (
                "mirror disk @x.raw --job-id 1",
                "--job-id: '1': an id begins with a letter, and has letters, digits, -, . and _\n[2]",
            ),
            (
                "mirror disk @x.raw --reconnect-delay 5",
                "--reconnect-delay: '@x.raw' is no export of a server\n[2]",
            ),
            ("mirror disk nbds://host/x", "nbds://host/x: with TLS it needs ?tls-certificates=DIR\n[2]"),
        ] {
            assert_eq!(world.output_of(line), want, "{line}");
        }
        assert_eq!(
            world.output_of("mirror disk @short.raw"),
            format!(
                "@short.raw: it has {} bytes, and disk has {SIZE}: a mirror needs a target of the same length\n[1]",
                SIZE / 2
            )
        );
        for target in ["@no/x.raw", "nbd+unix:///x?socket=@nothing", "@disk -O raw"] {
            let line = format!("mirror disk {target} --wait");
            let output = world.output_of(&line);
            assert!(output.ends_with("\n[1]"), "{line}: {output}");
        }
        assert_eq!(world.node_names(), ["copy", "disk"]);
        let output = world.output_of("mirror disk @new.raw --granularity 3");
        assert!(output.starts_with("note: @new.raw: it was created, and stays\n"), "{output}");
        assert!(output.ends_with("\n[1]"), "{output}");
        assert_eq!(world.node_names(), ["copy", "disk"]);
        assert_eq!(fs::read_dir(world.dir.path()).unwrap().count(), before + 1);
        assert_eq!(world.must("query-jobs", json!({})), json!([]));
    }
}

/// The export of another daemon; both ends of the connection are ours or QEMU's.
#[test]
fn an_export_of_another_server() {
    for mut world in worlds() {
        let mut other = World::ours();
        write_raw(&other.dir.path().join("disk"), SIZE, &[]).unwrap();
        let export = json!({"type": "nbd", "id": "c", "node-name": "copy", "name": "c", "writable": true});
        other.must("block-export-add", export);
        let uri = format!("nbd+unix:///c?socket={}", other.path("nbd"));
        assert_eq!(
            world
                .output_of(&format!("mirror disk {uri} --keep-source --reconnect-delay 60"))
                .replace(&other.path(""), "@"),
            "mirror0: ready: disk -> nbd+unix:///c?socket=@nbd (raw)\n\
             mirror0: completed; the target is a copy, its users stay on the source\n[0]"
        );
        assert_eq!(world.node_names(), ["copy", "disk"]);
        assert!(fs::read(other.path("copy")).unwrap() == fs::read(world.path("disk")).unwrap());
    }
}

/// The target gets the backing file of the source.
#[test]
fn the_top_image_alone() {
    for mut world in worlds() {
        let (base, top) = (world.path("base.qcow2"), world.path("top.qcow2"));
        ours_ok(["create", "-q", "-f", "qcow2", &base, "1M"]);
        ours_ok(["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
        ours_ok(["bench", "-q", "-w", "--pattern", "7", "-c", "1", "-s", "64k", "-f", "qcow2", &base]);
        ours_ok([
            "bench",
            "-q",
            "-w",
            "--pattern",
            "9",
            "-c",
            "1",
            "-s",
            "64k",
            "-o",
            "128k",
            "-f",
            "qcow2",
            &top,
        ]);
        let file = json!({"driver": "file", "filename": top});
        world.must("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
        assert_eq!(
            world.output_of("mirror top @raw.raw --sync top"),
            "@raw.raw: with --sync top the target has a backing file, as a raw image cannot\n[2]"
        );
        // What exists lacks what lies below the source.
        for target in ["@old.raw", "copy", "nbd+unix:///x?socket=@nbd"] {
            write_raw(&world.dir.path().join("old.raw"), 1 << 20, &[]).unwrap();
            assert_eq!(
                world.output_of(&format!("mirror top {target} --sync top --pivot")),
                format!(
                    "{target}: with --sync top the target has to be a new file, on the source's backing file\n[2]"
                )
            );
        }
        assert_eq!(world.must("query-jobs", json!({})), json!([]));
        assert_eq!(world.node_names(), ["copy", "disk", "top"]);
        assert_eq!(
            world.output_of("mirror top @new.qcow2 --sync top --keep-source"),
            "mirror0: ready: top -> @new.qcow2 (qcow2, created)\n\
             mirror0: completed; the target is a copy, its users stay on the source\n[0]"
        );
        let new = world.path("new.qcow2");
        let info: Value = serde_json::from_str(&ours_ok(["info", "--output=json", &new])).unwrap();
        assert_eq!(
            (&info["backing-filename"], &info["backing-filename-format"]),
            (&json!(base), &json!("qcow2"))
        );
        assert_eq!(ours_ok(["compare", "-U", &top, &new]), "Images are identical.\n");
        // What lies in the base was not copied.
        let map = ours_ok(["map", "-U", &new]);
        assert!(map.lines().any(|line| line.ends_with(&base)), "{map}");
    }
}

/// Nodes of others stay, whatever they are called, and jobs that were left do not keep new ones back.
#[test]
fn what_others_have_stays() {
    for mut world in worlds() {
        for name in ["m.file", "m.target"] {
            world.must("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": SIZE}));
        }
        let mirror = json!({"job-id": "m", "device": "disk", "target": "copy", "sync": "full", "speed": 1});
        world.must("blockdev-mirror", mirror);
        assert_eq!(world.output_of("abort m"), "m: aborted; the target is of no use\n[0]");
        assert_eq!(world.node_names(), ["copy", "disk", "m.file", "m.target"]);

        let options = json!({"driver": "file", "filename": world.path("left"), "size": 512});
        world.must("blockdev-create", json!({"job-id": "ctl.mirror0.create", "options": options}));
        let output = world.output_of("mirror disk @new.raw --keep-source");
        assert!(output.starts_with("mirror1: ready: "), "{output}");
        let output = world.output_of("mirror disk @new2.raw --job-id mirror0");
        assert!(output.starts_with("--job-id: 'mirror0': ") && output.ends_with("\n[2]"), "{output}");
    }
}
