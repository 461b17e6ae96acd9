//! The files of an image, recorded, and what a crash could leave of them.
//!
//! Of each file a crash takes any part of what was not flushed to it. Where there are two, the order of the
//! entries in both logs is recorded as well: at each moment the crash points of the one are combined with
//! those of the other.

use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{CrashPoint, Logged, MemoryStorage, RecordingStorage};
use blockmirror_block::{ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags};

use crate::start::ImageFiles;

/// So many states of the one file are combined with each new state of the other.
const PARTNERS: usize = 10;

/// One or two recorded files.
#[derive(Debug)]
pub(crate) struct Recorder {
    files: Vec<RecordingStorage>,
    /// How long the logs were after each entry of either.
    moments: Mutex<Vec<[usize; 2]>>,
}

/// What a crash could leave.
#[derive(Clone, Copy)]
pub(crate) struct Point<'a> {
    /// How many entries both logs had.
    pub(crate) moment: usize,
    image: &'a CrashPoint,
    data: Option<&'a CrashPoint>,
}

impl Point<'_> {
    /// Copies of the files, to open.
    pub(crate) fn files(&self) -> (Arc<MemoryStorage>, Option<Arc<MemoryStorage>>) {
        (Arc::new(self.image.storage()), self.data.map(|data| Arc::new(data.storage())))
    }

    /// What was lost, in words.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("{:?}", self.image);
        if let Some(data) = self.data {
            text += &format!("; data file: {data:?}");
        }
        text
    }
}

/// A visitor of points; an error ends the visit.
pub(crate) type VisitPoint<'a> = dyn FnMut(Point<'_>) -> Result<(), String> + 'a;

impl Recorder {
    /// Files with these contents, durably.
    pub(crate) fn new(contents: &[Vec<u8>]) -> Arc<Self> {
        let files = contents.iter().map(|bytes| RecordingStorage::with_contents(bytes)).collect();
        Arc::new(Self { files, moments: Mutex::new(vec![[0, 0]]) })
    }

    /// The files, as storages to open.
    pub(crate) fn storages(self: &Arc<Self>) -> ImageFiles {
        let side = |which| Arc::new(RecordedFile { recorder: Arc::clone(self), which }) as Arc<dyn Storage>;
        ImageFiles { image: side(0), data: (self.files.len() > 1).then(|| side(1)) }
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
                visit(Point { moment: point.position(), image: &point, data: None })?;
            }
            return Ok(());
        }
        let points = [0, 1].map(|which| FilePoints::new(&self.files[which]));
        let moments = self.moments.lock().clone();
        let mut before = [usize::MAX; 2];
        for (moment, position) in moments.iter().enumerate() {
            let moved = usize::from(before[0] == position[0]);
            before = *position;
            let other = 1 - moved;
            for new in &points[moved].at[position[moved]] {
                for partner in points[other].partners(position[other]) {
                    let (image, data) = if moved == 0 { (new, partner) } else { (partner, new) };
                    visit(Point { moment, image, data: Some(data) })?;
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
