//! An open host file or block device.
//!
//! Nothing here is locked while a visitor or another storage is called, except `growth`, shared, during a
//! clone from another storage that makes the file longer.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    ByteRange, Error, ErrorKind, HostRun, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags,
};
use blockmirror_image_lock::{ImageLock, Permissions};
use rustix::fs::{Advice, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::direct::Direct;
use crate::flushes::Flushes;
use crate::growth::Growth;
use crate::id::{FileId, FileKind, kind_of};
use crate::long_write_gate::LongWriteGate;
use crate::past_cache::{PastCache, ReadsPastCache};
use crate::zeroes::Outcome;
use crate::{claim, direct, holes, io, reflink, zeroes};

/// A host file or block device as a storage. Made by [`FileOptions::open`](crate::FileOptions::open).
#[derive(Debug)]
pub struct FileStorage {
    opened: Descriptor,
    /// The same file opened in other modes, by [`OpenMode`], where that was asked for later. They hold no
    /// lock: `opened` does.
    others: [OnceLock<Descriptor>; 4],
    /// The [`OpenMode`] that is used at present.
    mode: AtomicUsize,
    /// Whether writes are accepted at present.
    writable: AtomicBool,
    name: Arc<str>,
    kind: FileKind,
    id: FileId,
    lock: Mutex<Option<ImageLock>>,
    /// A block device that was claimed after it had been opened. Leaf lock.
    claim: Mutex<Option<Arc<File>>>,
    flushes: Flushes,
    growth: Growth,
    long_writes: LongWriteGate,
    reads: ReadsPastCache,
}

/// How a file is open, as a number below 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OpenMode {
    writable: bool,
    direct: bool,
}

impl OpenMode {
    fn of(descriptor: &Descriptor) -> Self {
        Self { writable: descriptor.info.writable, direct: descriptor.direct.is_some() }
    }

    fn number(self) -> usize {
        usize::from(self.writable) | usize::from(self.direct) << 1
    }
}

/// An open file description and what it can do.
#[derive(Debug)]
struct Descriptor {
    file: File,
    /// `Some` if `file` was opened for direct I/O.
    direct: Option<Direct>,
    info: StorageInfo,
}

impl Descriptor {
    fn new(file: File, direct: Option<Direct>, kind: FileKind, writable: bool) -> Self {
        let mut info = facts(&file, kind, writable);
        if let Some(direct) = &direct {
            info.request_alignment = info.request_alignment.max(direct.unit() as u32);
        }
        Self { file, direct, info }
    }
}

/// The facts about `file` that do not change while it is open.
fn facts(file: &File, kind: FileKind, writable: bool) -> StorageInfo {
    let mut info = StorageInfo::plain();
    info.writable = writable;
    match kind {
        FileKind::Regular => {
            let punches = writable && zeroes::can_punch(file);
            info.cheap_zero = punches;
            info.discards = punches;
        }
        FileKind::Block => {
            info.fixed_len = true;
            info.zero_init = false;
            info.discards = writable;
            info.request_alignment =
                rustix::fs::ioctl_blksszget(file).ok().filter(|size| size.is_power_of_two()).unwrap_or(512);
        }
    }
    info
}

/// What zero-filling without help from the kernel writes at a time.
static ZEROS: [u8; 256 * 1024] = [0; 256 * 1024];

impl FileStorage {
    pub(crate) fn assemble(
        file: File,
        name: Arc<str>,
        writable: bool,
        lock: Option<ImageLock>,
        direct: Option<Direct>,
    ) -> Result<Self> {
        let meta = file.metadata().map_err(|e| Error::io("open", e))?;
        let kind = kind_of(&meta)?;
        let id = FileId::from_metadata(&meta, kind);
        let len = length(&file, kind)?;
        let opened = Descriptor::new(file, direct, kind, writable);
        Ok(Self {
            mode: AtomicUsize::new(OpenMode::of(&opened).number()),
            opened,
            others: Default::default(),
            writable: AtomicBool::new(writable),
            name,
            kind,
            id,
            lock: Mutex::new(lock),
            claim: Mutex::new(None),
            flushes: Flushes::default(),
            growth: Growth::new(len),
            long_writes: LongWriteGate::default(),
            reads: ReadsPastCache::default(),
        })
    }

    pub(crate) fn with_flushes(mut self, flushes: Flushes) -> Self {
        self.flushes = flushes;
        self
    }

    /// Whether flushes make anything durable.
    pub(crate) fn syncs(&self) -> bool {
        !self.flushes.are_off()
    }

    /// Makes the open file writable or read-only; the image lock changes with it. No other thread may call
    /// this at the same time, and an earlier [`info`](Storage::info) is out of date.
    ///
    /// # Errors
    /// The file cannot be opened for writing, cannot be flushed, or is [locked](ErrorKind::Locked) by another
    /// user. Nothing has changed then.
    pub fn set_writable(&self, writable: bool) -> Result<()> {
        if writable == self.info().writable {
            return Ok(());
        }
        let mode = OpenMode::of(self.descriptor());
        self.named(if writable { self.open_in(OpenMode { writable, ..mode }) } else { self.flush() })?;
        let mut lock = self.lock.lock();
        if let Some(held) = *lock {
            let wanted = if writable { Permissions::READ_WRITE } else { Permissions::READ };
            let path = Path::new(&*self.name);
            *lock =
                Some(self.named(
                    held.change(&self.opened.file, path, wanted, held.unshared()).map_err(Error::from),
                )?);
        }
        self.writable.store(writable, Ordering::Release);
        Ok(())
    }

    /// Goes past the host's page cache from now on, or through it. No other thread may call this at the same
    /// time, or write.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the filesystem does not do direct I/O; the file cannot be flushed.
    /// Nothing has changed then.
    pub fn set_direct(&self, direct: bool) -> Result<()> {
        let mode = OpenMode::of(self.descriptor());
        if mode.direct == direct {
            return Ok(());
        }
        self.named(self.flush().and_then(|()| self.open_in(OpenMode { direct, ..mode })))
    }

    /// From now on reads show what the device below holds of everything that was flushed, not what the page
    /// cache does. Writes go on as before.
    ///
    /// # Errors
    /// The file cannot be opened once more, or its pages cannot be dropped.
    pub fn read_past_cache(&self) -> Result<PastCache> {
        self.named(self.reads.begin(&self.reopened(), self.file()))
    }

    /// Gives the file up although others may hold the storage for a while: what was written becomes durable,
    /// later writes are refused, and the image lock goes.
    ///
    /// # Errors
    /// It cannot be flushed. It is given up all the same.
    pub fn close(&self) -> Result<()> {
        let flushed = self.flush();
        self.writable.store(false, Ordering::Release);
        if let Some(lock) = self.lock.lock().take() {
            lock.release(&self.opened.file);
        }
        flushed
    }

    /// Whether a flush has failed: none succeeds any more, until [`recover`](Self::recover).
    pub fn has_lost_writes(&self) -> bool {
        self.flushes.has_failed()
    }

    /// Takes the file up again after a failed flush. The kernel may have given up what it could not write,
    /// and then shows it for as long as it keeps the page: such pages are dropped, so that reads show what is
    /// on disk.
    ///
    /// The caller writes again whatever no good flush has covered, and excludes other users of the file
    /// meanwhile.
    ///
    /// # Errors
    /// The pages cannot be dropped.
    pub fn recover(&self) -> Result<()> {
        let dropped = rustix::fs::fadvise(self.file(), 0, None, Advice::DontNeed);
        self.named(dropped.map_err(|e| Error::io("drop cached pages", e.into())))?;
        self.flushes.reset();
        Ok(())
    }

    /// Claims a block device that was opened without [`FileOptions::claim`](crate::FileOptions::claim), until
    /// [`unclaim`](Self::unclaim). Without effect on a regular file.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if it is mounted or claimed already, by this process too.
    pub fn claim(&self) -> Result<()> {
        self.named(claim::check_loops(self.id))?;
        if self.kind != FileKind::Block {
            return Ok(());
        }
        let flags = (OFlags::EXCL | OFlags::NOCTTY).bits().cast_signed();
        let path = self.reopened();
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
        let file = self.named(file.map_err(|e| match e.raw_os_error() {
            Some(errno) if errno == Errno::BUSY.raw_os_error() => claim::refused(&path, e),
            _ => Error::io("claim", e),
        }))?;
        *self.claim.lock() = Some(Arc::new(file));
        Ok(())
    }

    /// Gives up what [`claim`](Self::claim) has claimed.
    pub fn unclaim(&self) {
        *self.claim.lock() = None;
    }

    /// Runs a `fallocate` through the descriptor that holds the claim of a block device: through another the
    /// kernel refuses it.
    fn allocating<T>(&self, call: impl FnOnce(&File) -> T) -> T {
        if self.kind == FileKind::Regular {
            return call(self.file());
        }
        let claim = self.claim.lock().clone();
        match &claim {
            Some(claim) => call(claim),
            None if self.opened.info.writable => call(&self.opened.file),
            None => call(self.file()),
        }
    }

    /// The open file by a path: whatever its name leads to by now, it is the same one.
    fn reopened(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.opened.file.as_raw_fd()).into()
    }

    /// Uses the file in `mode` from now on.
    fn open_in(&self, mode: OpenMode) -> Result<()> {
        let slot = &self.others[mode.number()];
        if mode != OpenMode::of(&self.opened) && slot.get().is_none() {
            let flags = if mode.direct { OFlags::DIRECT } else { OFlags::empty() } | OFlags::NOCTTY;
            let mut options = OpenOptions::new();
            options.read(true).write(mode.writable).custom_flags(flags.bits().cast_signed());
            let file =
                options.open(self.reopened()).map_err(|e| direct::explain(e, mode.direct, "open anew"))?;
            let direct = mode.direct.then(|| Direct::new(&file, mode.writable)).transpose()?;
            // No other thread sets it meanwhile.
            let _ = slot.set(Descriptor::new(file, direct, self.kind, mode.writable));
        }
        self.mode.store(mode.number(), Ordering::Release);
        Ok(())
    }

    fn descriptor(&self) -> &Descriptor {
        // In its first mode there is no other descriptor.
        self.others[self.mode.load(Ordering::Acquire)].get().unwrap_or(&self.opened)
    }

    fn direct(&self) -> Option<&Direct> {
        self.descriptor().direct.as_ref()
    }

    /// Which file this is: for finding out whether two names lead to one image.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// The image lock it holds for as long as it is open; `None` if it was opened without.
    pub fn lock(&self) -> Option<ImageLock> {
        *self.lock.lock()
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.kind == FileKind::Block
    }

    pub(crate) fn file(&self) -> &File {
        &self.descriptor().file
    }

    /// Makes everything written, and the file's attributes, durable.
    pub(crate) fn sync_all(&self) -> Result<()> {
        if !self.syncs() {
            return Ok(());
        }
        // Attributes by a call of our own: a flush may be answered by another thread's, which leaves them
        // out.
        self.named(
            self.flushes
                .flush(self.file())
                .and_then(|()| self.file().sync_all().map_err(|e| Error::io("flush", e))),
        )
    }

    fn length(&self) -> Result<u64> {
        length(self.file(), self.kind)
    }

    fn writable(&self, operation: &'static str) -> Result<()> {
        if self.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, operation).because("the file is open for reading only"))
    }

    fn write_range(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        self.writable(operation)?;
        match offset.checked_add(len) {
            Some(end) if end <= io::MAX_OFFSET => Ok(ByteRange::new(offset, end)),
            _ => Err(Error::out_of_bounds(operation, offset, len, io::MAX_OFFSET)),
        }
    }

    fn read_bytes(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if let Some(read) = self.reads.read(buf, offset) {
            return read;
        }
        match self.direct() {
            None => io::read(self.file(), buf, offset),
            Some(direct) => direct.read(self.file(), buf, offset),
        }
    }

    fn write_bytes(&self, buf: &[u8], offset: u64) -> Result<()> {
        match self.direct() {
            None if self.kind == FileKind::Regular => {
                self.long_writes.write(buf, |piece, at| io::write(self.file(), piece, offset + at as u64))
            }
            None => io::write(self.file(), buf, offset),
            Some(direct) => direct.write(self.file(), buf, offset),
        }
    }

    fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        for piece in range.pieces(ZEROS.len() as u64) {
            self.write_bytes(&ZEROS[..piece.len() as usize], piece.start())?;
        }
        Ok(())
    }

    /// Runs `write`, which fills `range` and may let a file grow up to its end.
    fn growing(&self, range: ByteRange, write: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.descriptor().info.fixed_len { write() } else { self.growth.while_writing(range, write) }
    }

    /// Zeroes `range`, all of it below the end of the file.
    fn zero_inside(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let inner = range.align_inward(self.zero_unit());
        let outcome = if inner.is_empty() {
            Outcome::Unsupported
        } else if flags.contains(ZeroFlags::MAY_UNMAP) {
            match self.allocating(|file| zeroes::punch(file, inner, "write zeroes"))? {
                Outcome::Done => Outcome::Done,
                Outcome::Unsupported => self.allocating(|file| zeroes::zero_range(file, inner))?,
            }
        } else {
            self.zero_keeping_space(inner)?
        };
        match outcome {
            Outcome::Done => {
                self.write_zero_bytes(ByteRange::new(range.start(), inner.start()))?;
                self.write_zero_bytes(ByteRange::new(inner.end(), range.end()))
            }
            Outcome::Unsupported if flags.contains(ZeroFlags::NO_FALLBACK) => {
                Err(Error::new(ErrorKind::Unsupported, "write zeroes").at(range.start()))
            }
            Outcome::Unsupported => self.write_zero_bytes(range),
        }
    }

    /// What `fallocate` needs its ranges aligned to: files take any, devices whole blocks.
    fn zero_unit(&self) -> u64 {
        match self.kind {
            FileKind::Regular => 1,
            FileKind::Block => u64::from(self.descriptor().info.request_alignment),
        }
    }

    fn zero_keeping_space(&self, range: ByteRange) -> Result<Outcome> {
        if self.allocating(|file| zeroes::zero_range(file, range))? == Outcome::Done {
            return Ok(Outcome::Done);
        }
        // A filesystem without ZERO_RANGE (tmpfs) may still punch and allocate. Should the second step fail,
        // the range reads as zeros all the same.
        if self.kind == FileKind::Block
            || zeroes::punch(self.file(), range, "write zeroes")? == Outcome::Unsupported
        {
            return Ok(Outcome::Unsupported);
        }
        zeroes::allocate(self.file(), range)?;
        Ok(Outcome::Done)
    }

    fn named<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| e.or_in_file(&self.name))
    }
}

fn length(file: &File, kind: FileKind) -> Result<u64> {
    match kind {
        FileKind::Regular => file.metadata().map(|m| m.len()).map_err(|e| Error::io("get length", e)),
        FileKind::Block => {
            rustix::fs::seek(file, SeekFrom::End(0)).map_err(|e| Error::io("get length", e.into()))
        }
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.get_mut() {
            lock.release(&self.opened.file);
        }
    }
}

impl Storage for FileStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        self.named(self.length())
    }

    fn info(&self) -> StorageInfo {
        let mut info = self.descriptor().info;
        info.writable &= self.writable.load(Ordering::Acquire);
        info.can_flush &= self.syncs();
        info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.named(self.read_bytes(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.named(
            self.write_range(offset, buf.len() as u64, "write")
                .and_then(|range| self.growing(range, || self.write_bytes(buf, offset))),
        )
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.named(self.write_range(range.start(), range.len(), "write zeroes").and_then(|range| {
            if range.is_empty() {
                return Ok(());
            }
            let len = self.length()?;
            if self.descriptor().info.fixed_len && range.end() > len {
                return Err(Error::new(ErrorKind::NoSpace, "write zeroes")
                    .at(range.start())
                    .because(format!("{} bytes reach past the end at {len}", range.len())));
            }
            let inside = range.intersect(ByteRange::new(0, len));
            if !inside.is_empty() {
                self.zero_inside(inside, flags)?;
            }
            // Past the end nothing is stored: a longer file is zeros already.
            if range.end() > len {
                self.growth.grow_to(self.file(), range.end(), "write zeroes")?;
            }
            if flags.contains(ZeroFlags::FUA) {
                self.flushes.flush(self.file())?;
            }
            Ok(())
        }))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.named(self.writable("discard").and_then(|()| {
            let inside = range.intersect(ByteRange::new(0, self.length()?));
            let inner = inside.align_inward(self.zero_unit());
            self.allocating(|file| zeroes::punch(file, inner, "discard")).map(|_| ())
        }))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.named(self.write_range(range.start(), range.len(), "allocate").and_then(|range| {
            let unsupported = || Error::new(ErrorKind::Unsupported, "allocate").at(range.start());
            if self.descriptor().info.fixed_len {
                return Err(unsupported());
            }
            self.growing(range, || match zeroes::allocate(self.file(), range)? {
                Outcome::Done => Ok(()),
                Outcome::Unsupported => Err(unsupported()),
            })
        }))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.named(self.write_range(0, len, "set length").and_then(|_| {
            if self.descriptor().info.fixed_len {
                return match self.length()? {
                    present if present == len => Ok(()),
                    present => Err(Error::new(ErrorKind::Unsupported, "set length")
                        .because(format!("a block device of {present} bytes cannot become {len}"))),
                };
            }
            self.growth.set_len(self.file(), len)
        }))
    }

    fn flush(&self) -> Result<()> {
        if !self.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        self.named(self.flushes.flush(self.file()).and_then(|()| self.reads.flushed(self.file())))
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.named(self.length().and_then(|len| {
            let range = range.intersect(ByteRange::new(0, len));
            if range.is_empty() {
                return Ok(());
            }
            match self.kind {
                FileKind::Regular => holes::visit(self.file(), range, visit),
                FileKind::Block => {
                    let _ = visit(StorageExtent { range, hole: false });
                    Ok(())
                }
            }
        }))
    }

    fn clone_block(&self, file: &dyn Storage) -> Option<u64> {
        let can = self.kind == FileKind::Regular && self.writable("clone").is_ok();
        if can { reflink::block(self.file(), file) } else { None }
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let mut calls = 0;
        self.named(self.write_range(offset, len, "clone").and_then(|range| {
            self.growing(range, || {
                calls = reflink::clone(self.file(), offset, run, len)?;
                Ok(())
            })
        }))?;
        Ok(calls)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file().as_fd())
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        let meta = self.named(self.file().metadata().map_err(|e| Error::io("get allocated size", e)))?;
        Ok(Some(meta.blocks().saturating_mul(512)))
    }
}
