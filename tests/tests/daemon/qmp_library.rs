//! The client library from PyPI drives a whole mirror on our daemon, through READY and the pivot, and gives
//! another one up.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use blockmirror_daemon::{Daemon, Startup};
use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::qemu::python;
use blockmirror_testing::scratch::scratch;

const SIZE: u64 = 4 << 20;

#[test]
fn a_whole_mirror_by_the_library() {
    let Some(python) = python("a_whole_mirror_by_the_library") else { return };
    let dir = scratch().unwrap();
    let path = |name: &str| dir.path().join(name);
    write_raw(&path("disk"), SIZE, &[(0, SIZE, Fill::Noise)]).unwrap();
    write_raw(&path("copy"), SIZE, &[]).unwrap();
    let node = |name: &str| {
        format!("driver=raw,node-name={name},file.driver=file,file.filename={}", path(name).display())
    };
    let mut startup = Startup::default();
    startup.blockdevs = vec![node("disk"), node("copy")];
    startup.nbd_server = Some(format!("addr.type=unix,addr.path={}", path("nbd").display()));
    startup.exports = vec!["nbd,id=e,node-name=disk,writable=on".into()];
    startup.chardevs = vec![format!("socket,id=c,path={},server=on,wait=off", path("qmp").display())];
    startup.monitors = vec!["chardev=c".into()];
    let daemon = Daemon::new(Vec::new());
    startup.apply(&daemon).unwrap();
    let runs = Arc::clone(&daemon);
    let running = thread::spawn(move || runs.run());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("qmp_mirror.py");
    let output = Command::new(python).arg(script).arg(path("qmp")).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    insta::assert_snapshot!(printed, @r#"
    refused {"class": "GenericError", "desc": "Parameter 'granularity' expects a power of 2"}
    BLOCK_JOB_READY {"device": "m", "len": 4194304, "offset": 4194304, "speed": 0, "type": "mirror"}
    exported before [{"id": "e", "node-name": "disk", "shutting-down": false, "type": "nbd"}]
    BLOCK_JOB_COMPLETED {"device": "m", "len": 4194304, "offset": 4194304, "speed": 0, "type": "mirror"}
    exported after [{"id": "e", "node-name": "copy", "shutting-down": false, "type": "nbd"}]
    given up ["created", "running", "aborting", "concluded", "null"]
    "#);
    assert!(output.status.success());
    daemon.quit();
    running.join().unwrap();
    assert!(fs::read(path("disk")).unwrap() == fs::read(path("copy")).unwrap());
}
