//! SIGKILL at random instants of a copy, and of copies that go on: the target is whole or is seen not to be,
//! and little is copied again. `BLOCKMIRROR_KILLS` asks for more of them than the few of a test run, and
//! `BLOCKMIRROR_KILL_SEED` for other ones (`cargo xtask kill`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use blockmirror_block::testing::Rng;
use serde_json::Value;

use crate::common::{Place, have_qemu};
use crate::process::{shell, signal};
use crate::target_kinds::{Kind, Target};

const MIB: u64 = 1 << 20;
const LEN: u64 = 48 * MIB;
const INTERVAL: u64 = 2 * MIB;
/// What a copy writes besides data: records of the checkpoint, metadata of the target, requests to a server,
/// and for a device and an export a region of zeros now and then.
const BESIDES: u64 = 4 * MIB;

/// A way to copy: the command, the target's format, and what it is.
#[derive(Clone, Copy, Debug)]
struct Cell {
    command: &'static str,
    format: &'static str,
    kind: Kind,
}

/// All twelve. Of servers there are QEMU's and ours, one for each command.
fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for (command, server) in [("mirror", Kind::QemuExport), ("convert", Kind::OurExport)] {
        for format in ["raw", "qcow2"] {
            cells.extend([Kind::File, Kind::Device, server].map(|kind| Cell { command, format, kind }));
        }
    }
    cells
}

/// A source, and a target to copy it to.
struct Copy {
    cell: Cell,
    place: Place,
    target: Target,
}

impl Copy {
    /// `None` if the machine has no such target.
    fn new(cell: Cell) -> Option<Self> {
        if cell.kind == Kind::QemuExport && !have_qemu("kill") {
            return None;
        }
        let place = Place::new();
        let file = fs::File::create(place.path("source")).unwrap();
        file.set_len(LEN).unwrap();
        for mib in (0..LEN / MIB).filter(|mib| mib % 6 != 5) {
            file.write_all_at(&vec![mib as u8 + 1; MIB as usize], mib * MIB).unwrap();
        }
        let target = Target::new(&place, cell.kind, cell.format, LEN)?;
        Some(Self { cell, place, target })
    }

    fn start(&self) -> Child {
        let Cell { command, format, .. } = self.cell;
        let line = format!(
            "{command} -q -f raw -O {format} --buf-size 1M --checkpoint log --checkpoint-interval {INTERVAL} \
             source {}",
            self.target.name
        );
        shell(&self.place, "exec 2>said", &line).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Starts a copy and kills it after `delay`: what it had written, or `None` if it had ended.
    fn killed(&self, delay: Duration) -> Option<u64> {
        let mut child = self.start();
        std::thread::sleep(delay);
        signal(&child, "STOP");
        let written = written(&child);
        child.kill().unwrap();
        let status = child.wait().unwrap();
        let said = fs::read_to_string(self.place.path("said")).unwrap_or_default();
        assert!(status.success() || status.code().is_none(), "{:?}: {status}: {said}", self.cell);
        // It may have been killed before it was there.
        let _ = fs::remove_file(self.place.path("said"));
        self.target.wait_for_the_server();
        status.code().is_none().then_some(written)
    }

    fn is_the_source(&self) {
        let (place, target, format) = (&self.place, &self.target.name, self.cell.format);
        place.ours_ok(&format!("compare -q -f raw -F {format} @source {target}"));
        if have_qemu("kill") {
            place.img(&format!("compare -q -f raw -F {format} @source {target}"));
            if format == "qcow2" {
                place.img(&format!("check -q -f qcow2 {target}"));
            }
        }
    }

    /// Whether the target, of a copy that was killed, looks finished: then it is, but for raw devices and
    /// exports, which have no looks.
    fn looks_finished(&self) -> bool {
        let looks = match (self.cell.kind, self.cell.format) {
            (Kind::File, _) => self.place.path("target").exists(),
            (_, "raw") => false,
            _ => self.place.ours(&format!("info -f qcow2 {}", self.target.name)).code == 0,
        };
        if looks {
            self.is_the_source();
        }
        looks
    }
}

/// Bytes that a process has written so far.
fn written(child: &Child) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// Whether the checkpoint has a header: its length, and what begins one, come first.
fn has_begun(log: &Path) -> bool {
    let log = fs::read(log).unwrap_or_default();
    [8, 4096 + 8].iter().any(|version| log.get(*version..version + 4).is_some_and(|bytes| bytes != [0; 4]))
}

/// A copy that is killed after `first`, and perhaps while it goes on after `second`; then it goes on to its
/// end.
fn survives(cell: Cell, first: Duration, second: Option<Duration>) {
    let Some(copy) = Copy::new(cell) else { return };
    let log = || fs::metadata(copy.place.path("log")).map_or(0, |meta| meta.len());
    let mut before = copy.killed(first);
    // Without one its temporary file is left behind.
    let has_log = has_begun(&copy.place.path("log"));
    if let Some(second) = second.filter(|_| before.is_some()) {
        // What both have written is more than what either had to.
        before = copy.killed(second).map(|_| 0);
    }
    if before.is_none() {
        return copy.is_the_source();
    }
    // It may have been killed between its last step but one and its end. A file has its name then, and there
    // is nothing to go on with.
    if copy.looks_finished() && cell.kind == Kind::File {
        return;
    }
    // In place the checkpoint goes just before the end.
    if cell.kind != Kind::File && log() < 4096 && before.is_some_and(|written| written > BESIDES) {
        if cell.format == "raw" {
            copy.is_the_source();
        }
        before = None;
    }
    let Cell { command, format, .. } = cell;
    let line =
        format!("{command} --output=json -f raw -O {format} --checkpoint @log @source {}", copy.target.name);
    let ran = copy.place.ours(&line);
    assert_eq!(ran.code, 0, "{cell:?}: {ran:?}");
    let outcome: Value = serde_json::from_str(&ran.out).unwrap();
    let (resumed, copied) = (outcome["resumed"].as_u64().unwrap_or(0), outcome["copied"].as_u64().unwrap());
    assert!(resumed + copied <= LEN, "{outcome}");
    // Of what is resumed a sixth are zeros, which were not written.
    let again = before.unwrap_or(0).saturating_sub(resumed);
    assert!(again <= 2 * INTERVAL + BESIDES, "{cell:?} {first:?}: {before:?} written, {resumed} kept");
    copy.is_the_source();
    assert!(!copy.place.path("log").exists(), "{cell:?}");
    if resumed > 0 && has_log && cell.kind == Kind::File {
        assert_eq!(copy.place.names(), ["source", "target"]);
    }
}

#[test]
fn a_copy_that_is_killed_at_any_instant_goes_on() {
    let number = |name, default| std::env::var(name).ok().map_or(default, |text| text.parse().unwrap());
    let kills = number("BLOCKMIRROR_KILLS", 24) as usize;
    let (mut rng, cells) = (Rng::new(number("BLOCKMIRROR_KILL_SEED", 1), 0), cells());
    let time = |cell: &Cell| {
        let Some(copy) = Copy::new(*cell) else { return Duration::ZERO };
        let began = Instant::now();
        assert!(copy.start().wait().unwrap().success(), "{cell:?}");
        began.elapsed()
    };
    let times: Vec<_> = cells.iter().map(time).collect();
    for kill in 0..kills {
        let (cell, whole) = (cells[kill % cells.len()], times[kill % cells.len()]);
        let mut within = || whole.mul_f64(rng.below(1000) as f64 / 900.0);
        let (first, second) = (within(), within());
        survives(cell, first, (kill / cells.len() % 4 == 1).then_some(second));
    }
    println!("{kills} instants, {} or more in each of {} cells", kills / cells.len(), cells.len());
}
