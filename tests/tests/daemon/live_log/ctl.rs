//! `ctl mirror --log`: the line that it prints goes on after the daemon was killed.

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_nbd::ClientOptions;
use blockmirror_testing::scratch::scratch;

use super::daemon::{Daemon, export_args};
use super::disks::{self, BLOCK, Known, MIB, block, check, found, place};
use crate::common::{Ran, ours};

/// Runs a line that `ctl` has printed, or one like it.
fn run(line: &str) -> Ran {
    ours(line.split(' ').skip(1))
}

#[test]
fn the_line_that_is_printed_goes_on_with_the_mirror() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    disks::create(dir, "qcow2");
    std::fs::remove_file(dir.join("t")).unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    let (qmp, target, log) = (at("qmp"), at("t"), at("log"));
    let mut daemon = Daemon::of_source(dir, "qcow2");
    let line = format!("blockmirror ctl {qmp} mirror s {target} --log {log} --wait");
    let ran = run(&line);
    assert_eq!(ran.code, 0, "{ran:?}");
    let again = ran.stderr.lines().chain(ran.stdout.lines());
    let again = again.map(str::trim).find(|line| line.starts_with("blockmirror ctl")).unwrap().to_owned();
    let want = format!(
        "blockmirror ctl {qmp} mirror s {target} --target-format qcow2 --job-id mirror0 --log {log} --wait"
    );
    assert_eq!(again, want);
    daemon.must("block-export-add", export_args());
    let uri = format!("nbd+unix:///disk?socket={}", at("nbd"));
    let client = ClientOptions::new(uri.parse().unwrap()).writable(true).open().unwrap();
    let (mut rng, mut known) = (Rng::new(1, 1), Known::new());
    for _ in 0..20 {
        let number = place(&mut rng, 4);
        let version = known.send(number);
        client.write_at(&block(number, version), number * BLOCK, WriteFlags::NONE).unwrap();
        known.acknowledged[number as usize] = version;
    }
    client.flush().unwrap();
    known.flushed.clone_from(&known.acknowledged);
    daemon.kill();
    let (bytes, regions) = found(dir).unwrap();
    assert_eq!((bytes, regions), (known.regions.len() as u64 * MIB, known.regions.clone()));
    let mut daemon = Daemon::of_source(dir, "qcow2");
    let ran = run(&again.replace("--wait", "--keep-source"));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.stderr.contains("it exists, and is overwritten; if a mirror has had the log before"),
        "{ran:?}"
    );
    // It has ended with its job.
    let ran = run(&again);
    assert!(ran.code == 1 && ran.stderr.contains("it has ended with its job"), "{ran:?}");
    let ran = run(&format!("{again} --sync top"));
    assert_eq!(ran.code, 2, "{ran:?}");
    daemon.must("quit", serde_json::json!({}));
    daemon.child.wait().unwrap();
    check(dir, "qcow2", &known);
}
