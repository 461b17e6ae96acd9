//! Targets that are longer than the source: what lies past the source's end stays as it is.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::Place;
use crate::copy::targets::Loop;

const LONG: usize = 6 << 20;
/// One that ends with a cluster of the target, and one that ends inside of one.
const LENGTHS: [usize; 2] = [4 << 20, (4 << 20) - 1536];

/// Writes `source`, `len` bytes of data, a hole and zeros, and returns it.
fn source(place: &Place, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at / 512 % 255) as u8 + 1).collect();
    bytes[1 << 20..2 << 20].fill(0);
    bytes[len - 70_000..len - 1000].fill(0);
    fs::write(place.path("source"), &bytes).unwrap();
    bytes
}

/// Copies onto `target` with both commands, each of which says in one line what stays.
fn copy_onto(place: &Place, target: &str, len: usize, restore: impl Fn(), check: impl Fn(&str)) {
    for command in ["convert", "mirror"] {
        restore();
        let ran = place.ours(&format!("{command} -q -n -f raw -O raw @source {target}"));
        assert_eq!(ran.code, 0, "{target}: {ran:?}");
        let rest = format!("it is {} bytes longer than the source; they are kept\n", LONG - len);
        assert!(ran.err.contains(&rest) && ran.err.lines().count() == 1, "{target}: {ran:?}");
        check(command);
    }
}

#[test]
fn a_longer_block_device_keeps_its_end() {
    let place = Place::new();
    let old = vec![0xee; LONG];
    fs::write(place.path("disk"), &old).unwrap();
    let Some(device) = Loop::new(&place.path("disk")) else { return };
    for len in LENGTHS {
        let bytes = source(&place, len);
        let restore = || fs::write(&device.0, &old).unwrap();
        copy_onto(&place, &device.0, len, restore, |command| {
            assert!(fs::read(&device.0).unwrap() == [&bytes[..], &old[len..]].concat(), "{command}: {len}");
        });
    }
}

/// A daemon of ours that serves the image `disk` in `place`, killed when dropped.
struct Server(Child);

impl Server {
    fn start(place: &Place, node: &str) -> Self {
        let pidfile = place.path("pid");
        let _ = fs::remove_file(&pidfile);
        let child = Command::new(env!("CARGO_BIN_EXE_blockmirror"))
            .current_dir(place.path(""))
            .args(["daemon", "--blockdev", node, "--nbd-server", "addr.type=unix,addr.path=socket"])
            .args(["--export", "nbd,id=e,node-name=n,name=disk,writable=on"])
            // Written when clients are served: a socket exists a moment before it accepts connections.
            .args(["--pidfile", "pid"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !pidfile.exists() {
            assert!(server.0.try_wait().unwrap().is_none() && Instant::now() < deadline, "no server");
            thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// Ends it as asked: what was written is in the image.
    fn end(mut self) {
        assert!(Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().unwrap().success());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last granule of a source that ends inside of one was to be completed with bytes past its end: the copy
/// failed.
#[test]
fn a_longer_export_keeps_its_end() {
    let place = Place::new();
    let old = vec![0xee; LONG];
    for (format, attached) in [("raw", true), ("qcow2", true), ("qcow2", false)] {
        for len in LENGTHS {
            let bytes = source(&place, len);
            fs::write(place.path("old"), &old).unwrap();
            let file = json!({"driver": "file", "filename": "disk"});
            let mut node = json!({"driver": format, "node-name": "n", "file": file});
            if !attached {
                node["backing"] = Value::Null;
            }
            let node = node.to_string();
            let target = format!("nbd+unix:///disk?socket={}", place.path("socket").display());
            for command in ["convert", "mirror"] {
                match (format, attached) {
                    ("raw", _) => drop(fs::copy(place.path("old"), place.path("disk")).unwrap()),
                    // Nothing of its own: all of it shows through, or would.
                    (_, false) => drop(place.ours_ok("create -q -f qcow2 -b old -F raw @disk")),
                    _ => drop(place.ours_ok("convert -q -f raw -O qcow2 @old @disk")),
                }
                let server = Server::start(&place, &node);
                let ran = place.ours(&format!("{command} -q -n -f raw -O raw @source {target}"));
                assert_eq!(ran.code, 0, "{format} {attached} {len}: {ran:?}");
                let rest = format!("it is {} bytes longer than the source; they are kept\n", LONG - len);
                assert!(ran.err.contains(&rest) && ran.err.lines().count() == 1, "{ran:?}");
                server.end();
                place.ours_ok(&format!("convert -q -f {format} @disk @seen"));
                let seen = fs::read(place.path("seen")).unwrap();
                let what = format!("{command} {format} {attached} {len}");
                assert!(seen[..len] == bytes[..], "{what}: the copy");
                // What hides in the cluster of the last byte is out of a client's sight (LIMITS).
                let from = if attached { len } else { len.next_multiple_of(65536) };
                assert!(seen[from..] == old[from..], "{what}: the rest");
            }
        }
    }
}

/// The old contents went before the first write past the end failed.
#[test]
fn an_export_that_cannot_hold_the_new_image_keeps_its_contents() {
    let place = Place::new();
    let node = json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "disk"}});
    let target = format!("nbd+unix:///disk?socket={}", place.path("socket").display());
    let old = vec![0xee; LONG];
    for (options, size, said) in [
        // The L2 tables and the clusters that they map.
        ("-o preallocation=metadata", "16M", "cannot grow; the image needs"),
        // The L1 table alone.
        ("-o cluster_size=512", "32G", "cannot grow; the image needs"),
        // No server reserves space.
        ("-o preallocation=falloc", "1M", "not supported"),
    ] {
        fs::write(place.path("disk"), &old).unwrap();
        let server = Server::start(&place, &node.to_string());
        let error = place.ours_error(&format!("create -q -f qcow2 {options} {target} {size}"), 1);
        server.end();
        assert!(error.contains(said) && !error.contains("incomplete"), "{options}: {error}");
        assert!(fs::read(place.path("disk")).unwrap() == old, "{options}: {error}");
    }
}
