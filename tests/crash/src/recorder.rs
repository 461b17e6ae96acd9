//! The files of an image, recorded, and what a crash could leave of them.
//!
//! Of each file a crash takes any part of what was not flushed to it. Where there are more than one, the
//! order of the entries in all logs is recorded as well: at each moment the crash points of the one that has
//! a new entry are combined with those of the others.

use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{CrashPoint, Logged, MemoryStorage, RecordingStorage};
use blockmirror_block::{ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags};

use crate::files::{ImageFiles, PerFile};

/// So many states of each of the other files are combined with each new state of the one.
const PARTNERS: usize = 10;

/// Most files of an image.
const FILES: usize = 3;

/// How long the log of each file is.
type Positions = [usize; FILES];

/// The recorded files of an image.
#[derive(Debug)]
pub(crate) struct Recorder {
    files: Vec<RecordingStorage>,
    /// Which of them is what.
    places: PerFile<usize>,
    /// After each entry of any log.
    moments: Mutex<Vec<Positions>>,
}

/// What a crash could leave.
#[derive(Clone, Copy)]
pub(crate) struct Point<'a> {
    /// How many entries all logs had.
    pub(crate) moment: usize,
    files: PerFile<&'a CrashPoint>,
}

impl Point<'_> {
    /// Copies of the files, to open.
    pub(crate) fn files(&self) -> PerFile<Arc<MemoryStorage>> {
        self.files.map(|file| Arc::new(file.storage()))
    }

    /// What was lost, in words.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("{:?}", self.files.image);
        for (name, file) in [("data file", self.files.data), ("backing file", self.files.backing)] {
            if let Some(file) = file {
                text += &format!("; {name}: {file:?}");
            }
        }
        text
    }
}

/// A visitor of points; an error ends the visit.
pub(crate) type VisitPoint<'a> = dyn FnMut(Point<'_>) -> Result<(), String> + 'a;

impl Recorder {
    /// Files with these contents, durably.
    pub(crate) fn new(contents: &PerFile<Vec<u8>>) -> Arc<Self> {
        let files = contents.iter().map(|bytes| RecordingStorage::with_contents(bytes)).collect();
        let mut next = 0..;
        let places = contents.map(|_| next.next().unwrap_or_default());
        Arc::new(Self { files, places, moments: Mutex::new(vec![Positions::default()]) })
    }

    /// The files, as storages to open.
    pub(crate) fn storages(self: &Arc<Self>) -> ImageFiles {
        self.places.map(|which| {
            Arc::new(RecordedFile { recorder: Arc::clone(self), which: *which }) as Arc<dyn Storage>
        })
    }

    /// The present moment.
    pub(crate) fn now(&self) -> usize {
        self.moments.lock().len() - 1
    }

    fn note(&self) {
        let mut moments = self.moments.lock();
        let mut last = moments[moments.len() - 1];
        for (which, file) in self.files.iter().enumerate() {
            while last[which] < file.position() {
                last[which] += 1;
                moments.push(last);
            }
        }
    }

    /// Visits everything that a crash at any moment could have left.
    ///
    /// # Errors
    /// What `visit` returns.
    pub(crate) fn visit_points(&self, visit: &mut VisitPoint<'_>) -> Result<(), String> {
        if self.files.len() == 1 {
            for point in self.files[0].crash_points() {
                let files = PerFile { image: &point, data: None, backing: None };
                visit(Point { moment: point.position(), files })?;
            }
            return Ok(());
        }
        let points: Vec<_> = self.files.iter().map(FilePoints::new).collect();
        let moments = self.moments.lock().clone();
        let mut before = None;
        for (moment, position) in moments.iter().enumerate() {
            let moved = before.and_then(|before: Positions| (0..FILES).find(|i| before[*i] != position[*i]));
            let moved = moved.unwrap_or(0);
            before = Some(*position);
            let partners: Vec<Vec<&CrashPoint>> =
                points.iter().zip(position).map(|(file, position)| file.partners(*position)).collect();
            let others = (0..partners.len()).filter(|which| *which != moved);
            let most = others.map(|which| partners[which].len()).max().unwrap_or(1);
            for new in &points[moved].at[position[moved]] {
                for turn in 0..most {
                    let files = self.places.map(|which| match *which == moved {
                        true => new,
                        false => partners[*which][turn % partners[*which].len()],
                    });
                    visit(Point { moment, files })?;
                }
            }
        }
        Ok(())
    }
}

/// The crash points of one file.
struct FilePoints {
    /// By position in the log.
    at: Vec<Vec<CrashPoint>>,
    /// For each position, the first one of its epoch: nothing after that is durable.
    epoch: Vec<usize>,
}

impl FilePoints {
    fn new(file: &RecordingStorage) -> Self {
        let log = file.log();
        let mut at = vec![Vec::new(); log.len() + 1];
        for point in file.crash_points() {
            at[point.position()].push(point);
        }
        let mut epoch = vec![0; log.len() + 1];
        for (index, entry) in log.iter().enumerate() {
            epoch[index + 1] = if *entry == Logged::Flush { index + 1 } else { epoch[index] };
        }
        Self { at, epoch }
    }

    /// All that the file may be when `position` entries are in its log; some of it, where that is much. All
    /// and nothing of what is not flushed are among them.
    fn partners(&self, position: usize) -> Vec<&CrashPoint> {
        let all: Vec<_> = self.at[self.epoch[position]..=position].iter().flatten().collect();
        if all.len() == 1 {
            return all;
        }
        let mut some: Vec<_> = all.iter().copied().step_by(all.len().div_ceil(PARTNERS)).collect();
        // Nothing is missing in the first of those that are not torn.
        some.extend(self.at[position].iter().find(|point| point.to_string().ends_with("dropped []")));
        some
    }
}

/// One of the files, as a storage.
#[derive(Debug)]
struct RecordedFile {
    recorder: Arc<Recorder>,
    which: usize,
}

impl RecordedFile {
    fn file(&self) -> &RecordingStorage {
        &self.recorder.files[self.which]
    }

    fn noted(&self, result: Result<()>) -> Result<()> {
        self.recorder.note();
        result
    }
}

impl Storage for RecordedFile {
    fn name(&self) -> &str {
        self.file().name()
    }

    fn len(&self) -> Result<u64> {
        self.file().len()
    }

    fn info(&self) -> StorageInfo {
        self.file().info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.noted(self.file().write_at(buf, offset))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.noted(self.file().write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.noted(self.file().discard(range))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.noted(self.file().allocate(range))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.noted(self.file().set_len(len))
    }

    fn flush(&self) -> Result<()> {
        self.noted(self.file().flush())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.file().extents(range, visit)
    }
}
