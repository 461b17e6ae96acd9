//! Files that images name: which of them the daemon opens.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::*;
use crate::graph::close;

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
    let mut opened = 0;
    flipping(&path("in/link"), &path("in/good"), &path("out/secret"), || {
        for _ in 0..TRIES {
            let file = json!({"driver": "file", "filename": path("in/top")});
            let options = json!({"driver": "qcow2", "node-name": "n", "file": file, "read-only": true});
            if daemon.add_node(options.as_object().unwrap()).is_err() {
                continue;
            }
            opened += 1;
            let gone = {
                let mut graph = daemon.graph.lock();
                let mut byte = [0];
                graph.find("n").unwrap().device.read_at(&mut byte, 0).unwrap();
                assert_eq!(byte[0], 1, "a file outside was read");
                graph.undo("n")
            };
            close(gone);
        }
    });
    assert!(opened > 0);
}
