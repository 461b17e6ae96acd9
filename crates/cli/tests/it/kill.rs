//! SIGKILL at random instants of a copy, and of copies that go on: the target is whole or not there, and
//! little is copied again. `BLOCKMIRROR_KILLS` asks for more of them than the few of a test run (`cargo
//! xtask kill`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use blockmirror_block::testing::Rng;
use serde_json::Value;

use crate::common::{Place, have_qemu};
use crate::process::{shell, signal};

const MIB: u64 = 1 << 20;
const LEN: u64 = 48 * MIB;
const INTERVAL: u64 = 2 * MIB;
/// What a copy writes besides data: records of the checkpoint, metadata of the target.
const BESIDES: u64 = 4 * MIB;

/// A way to copy: the command, and the target's format.
const CELLS: [(&str, &str); 4] =
    [("mirror", "raw"), ("mirror", "qcow2"), ("convert", "raw"), ("convert", "qcow2")];

fn source(place: &Place) {
    let file = fs::File::create(place.path("source")).unwrap();
    file.set_len(LEN).unwrap();
    for mib in (0..LEN / MIB).filter(|mib| mib % 6 != 5) {
        file.write_all_at(&vec![mib as u8 + 1; MIB as usize], mib * MIB).unwrap();
    }
}

fn start(place: &Place, (command, format): (&str, &str)) -> Child {
    let line = format!(
        "{command} -q -f raw -O {format} --buf-size 1M --checkpoint log --checkpoint-interval {INTERVAL} source target"
    );
    shell(place, "exec 2>/dev/null", &line).stdout(Stdio::null()).spawn().unwrap()
}

/// Bytes that a process has written so far.
fn written(child: &Child) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// Starts a copy and kills it after `delay`: what it had written, or `None` if it had ended.
fn killed(place: &Place, cell: (&str, &str), delay: Duration) -> Option<u64> {
    let mut child = start(place, cell);
    std::thread::sleep(delay);
    signal(&child, "STOP");
    let written = written(&child);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() || status.code().is_none(), "{status}");
    status.code().is_none().then_some(written)
}

fn is_the_source(place: &Place, format: &str) {
    place.ours_ok(&format!("compare -q -f raw -F {format} @source @target"));
    if have_qemu("kill") {
        place.img(&format!("compare -q -f raw -F {format} @source @target"));
        if format == "qcow2" {
            place.img("check -q -f qcow2 @target");
        }
    }
}

/// A copy that is killed after `first`, and perhaps while it goes on after `second`; then it goes on to its
/// end.
fn survives(cell: (&str, &str), first: Duration, second: Option<Duration>) {
    let place = Place::new();
    source(&place);
    let mut before = killed(&place, cell, first);
    if let Some(second) = second.filter(|_| before.is_some()) {
        // What both have written is more than what either had to.
        before = killed(&place, cell, second).map(|_| 0);
    }
    if before.is_none() {
        return is_the_source(&place, cell.1);
    }
    if place.path("target").exists() {
        // It was killed between its last step but one, the name, and its end: what has the name is whole.
        return is_the_source(&place, cell.1);
    }
    let (command, format) = cell;
    let line = format!("{command} --output=json -f raw -O {format} --checkpoint @log @source @target");
    let ran = place.ours(&line);
    assert_eq!(ran.code, 0, "{ran:?}");
    let outcome: Value = serde_json::from_str(&ran.out).unwrap();
    let (resumed, copied) = (outcome["resumed"].as_u64().unwrap_or(0), outcome["copied"].as_u64().unwrap());
    assert!(resumed + copied <= LEN, "{outcome}");
    // Of what is resumed a sixth are zeros, which were not written.
    let again = before.unwrap_or(0).saturating_sub(resumed);
    assert!(again <= 2 * INTERVAL + BESIDES, "{cell:?} {first:?}: {before:?} written, {resumed} kept");
    is_the_source(&place, format);
    if resumed > 0 {
        assert_eq!(place.names(), ["source", "target"]);
    }
}

#[test]
fn a_copy_that_is_killed_at_any_instant_goes_on() {
    let kills = std::env::var("BLOCKMIRROR_KILLS").ok().map_or(24, |kills| kills.parse().unwrap());
    let mut rng = Rng::new(1, 0);
    let time = |cell| {
        let (place, began) = (Place::new(), Instant::now());
        source(&place);
        assert!(start(&place, cell).wait().unwrap().success());
        began.elapsed()
    };
    let times = CELLS.map(time);
    for kill in 0..kills {
        let (cell, whole) = (CELLS[kill % CELLS.len()], times[kill % CELLS.len()]);
        let mut within = || whole.mul_f64(rng.below(1000) as f64 / 900.0);
        let (first, second) = (within(), within());
        survives(cell, first, (kill / CELLS.len() % 4 == 3).then_some(second));
    }
}
