//! What writers and judge share: the tap, the clock, the gate, and the notes of all writers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange};
use blockmirror_mirror::Tap;

use super::contended::{Contended, Sight};
use super::cut::{Cut, Window};
use super::gate::Gate;
use super::images::Disk;
use super::layout::Layout;
use super::model::Model;
use super::{WRITERS, difference};
use blockmirror_testing::Outcome;

/// Bytes read at once by the judge.
const PIECE: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct World {
    pub(super) tap: Arc<Tap>,
    pub(super) layout: Layout,
    pub(super) gate: Gate,
    pub(super) contended: Contended,
    pub(super) models: [Mutex<Model>; WRITERS],
    /// Writers keep what an operation replaced, however many there are.
    pub(super) recording: AtomicBool,
    /// Guest requests may fail, and are repeated then.
    pub(super) faulty: AtomicBool,
    /// Microseconds that a writer waits after an operation.
    pub(super) pace: AtomicU64,
    pub(super) counts: Counts,
    /// Why a writer has stopped.
    pub(super) failure: Mutex<Option<String>>,
    initial: Vec<u8>,
    clock: AtomicU64,
}

/// What the guest has done.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) operations: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) written: AtomicU64,
    /// The longest that a request has taken, in microseconds.
    pub(super) longest: AtomicU64,
}

impl World {
    pub(super) fn new(tap: Arc<Tap>, layout: Layout, initial: Vec<u8>) -> Self {
        Self {
            tap,
            layout,
            gate: Gate::default(),
            contended: Contended::new(layout.shared, &initial),
            models: std::array::from_fn(|writer| Mutex::new(Model::new(writer, &layout, &initial))),
            recording: AtomicBool::new(false),
            faulty: AtomicBool::new(false),
            pace: AtomicU64::new(0),
            counts: Counts::default(),
            failure: Mutex::new(None),
            initial,
            clock: AtomicU64::new(1),
        }
    }

    /// An instant of its own, later than all before.
    pub(super) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    pub(super) fn wait_a_bit(&self) {
        let pace = self.pace.load(Ordering::Relaxed);
        if pace > 0 {
            std::thread::sleep(Duration::from_micros(pace));
        }
    }

    /// A writer's failure, if one has failed.
    pub(super) fn check_writers(&self) -> Outcome {
        match self.failure.lock().take() {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }

    /// Stops all writers between two operations.
    pub(super) fn quiesce(&self) -> Outcome {
        let closed = self.gate.close();
        self.check_writers()?;
        closed
    }

    /// Whether `device` holds just what was written. All writers have stopped.
    pub(super) fn verify(&self, what: &str, device: &dyn BlockDevice) -> Outcome {
        let found = self.read(what, device)?;
        self.compare(what, &found, &self.expected())?;
        self.judge_shared(what, &found, |_, _| Sight::Must)
    }

    /// Whether `device` holds what the disk held at one instant inside the window. All writers have stopped.
    pub(super) fn verify_cut(&self, what: &str, device: &dyn BlockDevice, window: Window) -> Outcome {
        let found = self.read(what, device)?;
        let mut expected = self.expected();
        let cut = Cut::find(&self.layout, &self.models, &found, &mut expected, window)
            .map_err(|e| format!("{what}: {e}"))?;
        self.compare(what, &found, &expected)?;
        self.judge_shared(what, &found, |writer, n| cut.sight(writer, n))
    }

    /// Whether two disks hold the same, also where several contents are possible.
    pub(super) fn verify_same(&self, what: &str, a: &dyn BlockDevice, b: &dyn BlockDevice) -> Outcome {
        match difference(&self.read(what, a)?, &self.read(what, b)?, 0) {
            Some(difference) => Err(format!("{what}: {difference}").into()),
            None => Ok(()),
        }
    }

    /// Whether `bitmap`, which records since `copy` was made or longer, has all places where `disk` is
    /// another now.
    pub(super) fn verify_bitmap(&self, bitmap: &DirtyBitmap, disk: &Disk, copy: &Disk) -> Outcome {
        let (now, then) = (self.read("the disk", disk.image())?, self.read("its copy", copy.image())?);
        for unit in ByteRange::new(0, self.layout.len).pieces(bitmap.granularity()) {
            let place = unit.start() as usize..unit.end() as usize;
            if bitmap.dirty_bytes_in(unit.start()..unit.end()) == 0
                && let Some(difference) = difference(&now[place.clone()], &then[place], unit.start())
            {
                return Err(format!("the bitmap knows nothing of a change {difference}").into());
            }
        }
        Ok(())
    }

    /// All writers have stopped, and `device` was found to be right: forgets what led there.
    pub(super) fn settle(&self, device: &dyn BlockDevice) -> Outcome {
        self.contended.settle(&self.read("the disk", device)?);
        Ok(())
    }

    fn read(&self, what: &str, device: &dyn BlockDevice) -> Outcome<Vec<u8>> {
        let mut disk = vec![0; self.layout.len as usize];
        for part in ByteRange::new(0, self.layout.len).pieces(PIECE) {
            let piece = &mut disk[part.start() as usize..part.end() as usize];
            device.read_at(piece, part.start()).map_err(|e| format!("{what}: {e}"))?;
        }
        Ok(disk)
    }

    /// The disk by the writers' notes; what all write to is left out.
    fn expected(&self) -> Vec<u8> {
        let mut disk = self.initial.clone();
        for model in &self.models {
            model.lock().lay_over(&mut disk);
        }
        disk
    }

    fn compare(&self, what: &str, found: &[u8], expected: &[u8]) -> Outcome {
        let shared = self.layout.shared;
        for part in [ByteRange::new(0, shared.start()), ByteRange::new(shared.end(), self.layout.len)] {
            let place = part.start() as usize..part.end() as usize;
            if let Some(difference) = difference(&found[place.clone()], &expected[place], part.start()) {
                return Err(format!("{what}: {difference}").into());
            }
        }
        Ok(())
    }

    fn judge_shared(&self, what: &str, found: &[u8], sight: impl Fn(usize, u64) -> Sight) -> Outcome {
        let range = self.contended.range();
        let bytes = &found[range.start() as usize..range.end() as usize];
        match self.contended.judge(range, bytes, |note| sight(note.writer, note.n)) {
            Some(wrong) => Err(format!("{what}: {wrong}").into()),
            None => Ok(()),
        }
    }
}
