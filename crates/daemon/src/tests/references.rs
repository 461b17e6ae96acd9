//! Files that images name: which of them the daemon opens.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::*;

/// Makes `name` the file `inside` and a link to `outside` in turn while `work` runs.
fn flipping(name: &Path, inside: &Path, outside: &Path, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let spare = name.with_extension("spare");
            while !stop.load(Ordering::Relaxed) {
                for link in [false, true] {
                    let _ = fs::remove_file(&spare);
                    if link { symlink(outside, &spare) } else { fs::hard_link(inside, &spare) }.unwrap();
                    fs::rename(&spare, name).unwrap();
                }
            }
        });
        work();
        stop.store(true, Ordering::Relaxed);
    });
}

/// A link was judged by where its name led, and then opened by its name once more.
#[test]
fn a_link_that_is_flipped_never_leads_out() {
    const TRIES: u32 = 1500;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (folder, file, byte) in [("in", "in/good", 1), ("out", "out/secret", 0x5e)] {
        fs::create_dir(path(folder)).unwrap();
        fs::write(path(file), vec![byte; SIZE as usize]).unwrap();
    }
    fs::hard_link(path("in/good"), path("in/link")).unwrap();
    let mut settings = CreateSettings::default();
    settings.backing_file = Some("link".to_owned());
    settings.backing_format = Some(Format::Raw);
    let spec = CreateSpec::new(Format::Qcow2, SIZE, settings);
    NewImage::create(path("in/top"), &spec).unwrap().persist().unwrap();
    let daemon = Daemon::new(Vec::new());
    flipping(&path("in/link"), &path("in/good"), &path("out/secret"), || {
        let (mut tries, mut opened) = (0, 0);
        // On a busy machine all of the tries may meet the link: one has to meet the file.
        while tries < TRIES || opened == 0 {
            tries += 1;
            let file = json!({"driver": "file", "filename": path("in/top")});
            let options = json!({"driver": "qcow2", "node-name": "n", "file": file, "read-only": true});
            if daemon.services.context.add_node(options.as_object().unwrap()).is_err() {
                continue;
            }
            opened += 1;
            let gone = {
                let mut graph = daemon.services.context.graph.lock();
                let mut byte = [0];
                graph.find("n").unwrap().device.read_at(&mut byte, 0).unwrap();
                assert_eq!(byte[0], 1, "a file outside was read");
                graph.remove("n").unwrap()
            };
            daemon.services.context.close(gone);
        }
    });
}

/// What a chain stands on was overwritten, or the chain became a circle that nothing opens.
#[test]
fn no_command_makes_an_image_stand_on_itself() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("mid.qcow2", 2, Some("base.qcow2"));
    client.image("top.qcow2", 3, Some("mid.qcow2"));
    let all = |client: &Client| {
        ["base.qcow2", "mid.qcow2", "top.qcow2"].map(|name| fs::read(client.path(name)).unwrap())
    };
    let before = all(&client);
    // Without its backing files, so that no lock is on them.
    client.add("top", "top.qcow2", Value::Null);
    let part = |text: String| assert!(text.contains("it is part of the chain of"), "{text}");
    for name in ["base.qcow2", "mid.qcow2"] {
        let path = client.path(name);
        let snapshot = json!({"node-name": "top", "snapshot-file": path, "snapshot-node-name": "s"});
        part(client.refused("blockdev-snapshot-sync", snapshot));
        part(client.refused(
            "drive-mirror",
            json!({"job-id": "m", "device": "top", "target": path, "sync": "none", "format": "qcow2"}),
        ));
        let node = json!({"driver": "file", "filename": path});
        let options = json!({"driver": "qcow2", "file": node, "size": SIZE, "backing-file": client.path("top.qcow2"), "backing-fmt": "qcow2"});
        client.run("blockdev-create", json!({"job-id": "c", "options": options}));
        client.wait_for_status("concluded");
        part(client.run("query-jobs", json!({}))[0]["error"].as_str().unwrap().to_owned());
        client.run("job-dismiss", json!({"id": "c"}));
    }
    client.run("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(all(&client), before);

    client.add("base", "base.qcow2", Value::Null);
    client.add("mid", "mid.qcow2", json!("base"));
    for name in ["mid.qcow2", "./mid.qcow2", "top.qcow2"] {
        part(client.refused(
            "change-backing-file",
            json!({"device": "mid", "image-node-name": "mid", "backing-file": name}),
        ));
    }
    for name in ["base.qcow2", "nowhere/base.qcow2"] {
        client.run(
            "change-backing-file",
            json!({"device": "mid", "image-node-name": "mid", "backing-file": name}),
        );
    }
}
