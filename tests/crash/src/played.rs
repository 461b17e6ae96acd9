//! A sequence that was played, and the judgement of each crash point of it.

use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ByteRange, Error as BlockError, WriteFlags};
use blockmirror_qcow2::{Header, Qcow2, Repair, repair};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

use crate::checker::{self, Allowed};
use crate::files::PerFile;
use crate::model::{History, Span, possible, reachable};
use crate::op::Op;
use crate::reader::Layers;
use crate::recorder::{Point, Recorder, VisitPoint};
use crate::session::{Session, StepError, read_all};
use crate::start::{Contents, DATA_NAME, DataPlace, Start, pattern};

/// A sequence of operations on a recorded image, with the model's states.
pub(crate) struct Played {
    start: Start,
    recorder: Arc<Recorder>,
    history: History,
    /// Operations that were refused.
    pub(crate) refused: u64,
}

/// What a crash point was found to hold.
pub(crate) struct Survivor {
    files: PerFile<Arc<MemoryStorage>>,
    contents: Vec<u8>,
    /// Whether it had to be repaired first.
    repaired: bool,
}

/// Plays `ops` and a last flush on an image that begins as `start`.
///
/// # Errors
/// What is wrong without any crash.
pub(crate) fn play(start: Start, ops: &[Op]) -> Result<Played, String> {
    let recorder = Recorder::new(&start.make().map_err(|e| format!("create: {e}"))?);
    let clock = || recorder.now();
    let opened = Session::new(start, recorder.storages(), &clock);
    let mut session = opened.map_err(|e| format!("open: {e}"))?;
    for op in ops.iter().copied().chain([Op::Flush]) {
        session.step(op).map_err(|error| match error {
            StepError::Failed(error) => format!("{op:?}: {error}"),
            StepError::Wrong(why) => why,
        })?;
    }
    let refused = session.refused;
    Ok(Played { start, history: session.history(), recorder, refused })
}

impl Played {
    pub(crate) fn new(start: Start, recorder: Arc<Recorder>, history: History) -> Self {
        Self { start, recorder, history, refused: 0 }
    }

    /// Visits every crash point.
    pub(crate) fn visit_points(&self, visit: &mut VisitPoint<'_>) -> Result<(), String> {
        self.recorder.visit_points(visit)
    }

    /// The disk as it was last written.
    pub(crate) fn final_contents(&self) -> &[u8] {
        &self.history.states[self.history.states.len() - 1].contents
    }

    /// Whether an image of this moment may need a repair: it began with damage, and the first repair has not
    /// ended.
    fn may_need_repair(&self, moment: usize) -> bool {
        let is_repaired: fn(&&Span) -> bool = match self.start.contents {
            // Whatever was first opened it for writing.
            Contents::Dirty => |span: &&Span| span.done,
            Contents::Damaged => |span: &&Span| span.done && span.op == Op::Repair,
            _ => return false,
        };
        self.history.spans.iter().find(is_repaired).is_none_or(|span| moment < span.ended)
    }

    fn allowed(&self, moment: usize) -> Allowed {
        // An operation that failed leaves them clear.
        let ends = |span: &Span| if span.done { span.ended } else { usize::MAX };
        let inside =
            |span: &Span| span.op.is_snapshot_operation() && span.begun <= moment && moment < ends(span);
        Allowed { copied_clear: self.history.spans.iter().any(inside) }
    }

    /// Whether the image in `bytes` is marked dirty, as it may be at this moment: the mark may come back with
    /// a crash if taking it off was not flushed.
    fn is_dirty(&self, bytes: &[u8], moment: usize) -> bool {
        let marked = bytes.get(7).is_some_and(|version| *version >= 3) && bytes[79] & 1 != 0;
        let opened = |span: &Span| span.op == Op::OpenDirty && span.begun <= moment;
        marked && (self.start.contents == Contents::Dirty || self.history.spans.iter().any(opened))
    }

    /// Checks what `point` left: sound metadata, and in each sector of the disk something that may be there.
    pub(crate) fn verify(&self, point: Point<'_>) -> Result<Survivor, String> {
        let files = point.files();
        let mut bytes = files.image.to_vec();
        let repaired = self.is_dirty(&bytes, point.moment) || self.may_need_repair(point.moment);
        if repaired {
            // A repair that was cut short can be repeated.
            repair_all(&files.image)?;
            bytes = files.image.to_vec();
        }
        checker::check(&bytes, self.allowed(point.moment))?;
        let backing = files.backing.as_ref().map(|file| file.to_vec());
        let layers = Layers { image: &bytes, data: None, backing: backing.as_deref() };
        self.history.check_snapshots(layers, point.moment)?;
        self.history.check_bitmaps(&bytes, point.moment)?;
        let states = reachable(&self.history.states, point.moment);
        let disk = self.start.open(&files.storages(), false).map_err(|e| format!("open: {e}"))?;
        let contents = read_all(&disk).map_err(|e| e.to_string())?;
        possible(&states, &contents)?;
        if let (DataPlace::Raw, Some(data)) = (self.start.data, &files.data) {
            let mut found = data.to_vec();
            found.resize(contents.len(), 0);
            possible(&states, &found).map_err(|why| format!("the data file: {why}"))?;
        }
        let header = disk.header();
        let name = header.backing.as_ref().map(|backing| backing.name.as_bytes());
        if !states.iter().any(|state| state.backing_name.as_deref() == name) {
            return Err(format!("the header names {:?}", name.map(String::from_utf8_lossy)));
        }
        Ok(Survivor { files, contents, repaired })
    }

    /// Goes on with what a crash left as a guest would, and checks it again.
    pub(crate) fn go_on(&self, survivor: &Survivor) -> Result<(), String> {
        let files = survivor.copies();
        let text = |error: BlockError| format!("going on after the crash: {error}");
        let disk = self.start.open(&files.storages(), true).map_err(text)?;
        let range = ByteRange::at(self.start.base() + self.start.cluster / 2, self.start.cluster * 5);
        let mut range = range.intersect(ByteRange::new(0, survivor.contents.len() as u64));
        if range.is_empty() {
            // The disk is shorter.
            range = ByteRange::default();
        }
        let written = pattern(0xee, range.start(), range.len());
        let recording = recording(&disk).map_err(text)?;
        disk.write_at(&written, range.start(), WriteFlags::NONE).map_err(text)?;
        disk.flush().map_err(text)?;
        // Which stores the bitmaps.
        drop(disk);
        checker::check(&files.image.to_vec(), Allowed { copied_clear: true })?;
        let mut expected = survivor.contents.clone();
        expected[range.start() as usize..range.end() as usize].copy_from_slice(&written);
        // What the crash leaked is found, and nothing else is freed.
        repair_all(&files.image)?;
        let disk = self.start.open(&files.storages(), false).map_err(text)?;
        for name in recording {
            let bits = disk.read_bitmap(&name).map_err(|error| text(error.into()))?;
            if bits.dirty_bytes_in(range.start()..range.end()) < range.len() {
                return Err(format!("the bitmap {name} misses what was written after the crash"));
            }
        }
        let found = read_all(&disk).map_err(text)?;
        if found == expected { Ok(()) } else { Err("a write after the crash went wrong".into()) }
    }

    /// QEMU must find leaks at most, after our repair if one was needed, and read what we read.
    pub(crate) fn judge(&self, qemu: Qemu, point: Point<'_>, survivor: &Survivor) -> Result<(), String> {
        let dir = scratch().map_err(|e| e.to_string())?;
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).map(|()| path).map_err(|e| e.to_string())
        };
        let files = if survivor.repaired { survivor.files.clone() } else { point.files() };
        let path = write("crashed.qcow2", &files.image.to_vec())?;
        if let Some(data) = files.data {
            write(DATA_NAME, &data.to_vec())?;
        }
        let header = Header::read(&*files.image).map_err(|e| e.to_string())?;
        if let (Some(contents), Some(backing)) = (files.backing, &header.backing) {
            write(&backing.name.to_string(), &contents.to_vec())?;
        }
        let checked =
            qemu.img_output_in(dir.path(), ["check", "crashed.qcow2"]).map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
        let mut errors = text.lines().filter(|line| line.starts_with("ERROR"));
        let only_clear =
            errors.all(|line| line.starts_with("ERROR OFLAG_COPIED") && line.ends_with("refcount=1"));
        let forgiven = self.allowed(point.moment).copied_clear && only_clear;
        if !matches!(checked.status.code(), Some(0 | 3)) && !forgiven {
            return Err(format!("qemu-img check: {text}"));
        }
        let raw = dir.path().join("read.raw");
        qemu.to_raw("qcow2", &path, &raw).map_err(|e| e.to_string())?;
        let found = std::fs::read(raw).map_err(|e| e.to_string())?;
        if found == survivor.contents { Ok(()) } else { Err("QEMU reads something else".into()) }
    }
}

impl Survivor {
    /// What the disk reads as.
    pub(crate) fn contents(&self) -> &[u8] {
        &self.contents
    }

    fn copies(&self) -> PerFile<Arc<MemoryStorage>> {
        self.files.map(|file| Arc::new(MemoryStorage::with_contents(&file.to_vec())))
    }
}

/// The names of the bitmaps of `disk` that record.
fn recording(disk: &Qcow2) -> Result<Vec<String>, BlockError> {
    let list = disk.bitmaps()?.into_iter();
    Ok(list.filter(|entry| entry.auto && !entry.in_use).map(|entry| entry.name.to_string()).collect())
}

/// Repairs the image, which must be clean afterwards.
fn repair_all(image: &MemoryStorage) -> Result<(), String> {
    let report = repair(image, Repair::All, &mut ()).map_err(|e| format!("repair: {e}"))?;
    if report.is_clean() { Ok(()) } else { Err(format!("after a repair: {report:?}")) }
}
