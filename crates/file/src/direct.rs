//! Direct I/O (`O_DIRECT`) for requests of any alignment.
//!
//! What is aligned in the file goes to the device directly, through an aligned buffer of ours if the caller's
//! is not. The unaligned ends of a write go through the page cache by a second descriptor, so that neither
//! the file's length nor a neighbour's bytes are rewritten. The kernel keeps the two views of a file together
//! as long as they do not write one page at the same time; `order` sees to that.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{AlignedBuf, ByteRange, Error, ErrorKind, RangeLock, Result};
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::Errno;

use crate::io;

/// What goes through one of our buffers at a time.
const BOUNCE: usize = 1024 * 1024;

/// Buffers kept for later; more are made when more threads come, and freed again.
const KEPT_BUFFERS: usize = 4;

/// What direct I/O needs besides the file.
pub(crate) struct Direct {
    /// The same file through the page cache.
    cached: File,
    /// What offsets and lengths must be multiples of; a power of two.
    unit: u64,
    /// The unit of the page cache, at least `unit`.
    page: u64,
    /// Held exclusively, in whole pages, for writes with an unaligned end; shared by the others.
    order: RangeLock,
    buffers: Mutex<Vec<AlignedBuf>>,
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direct").field("unit", &self.unit).finish_non_exhaustive()
    }
}

impl Direct {
    /// For `file`, which was opened with `O_DIRECT`.
    pub(crate) fn new(file: &File, writable: bool) -> Result<Self> {
        let cached = OpenOptions::new()
            .read(true)
            .write(writable)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .map_err(|e| Error::io("open through the page cache", e))?;
        let unit = alignment(file);
        let page = (rustix::param::page_size() as u64).max(unit);
        Ok(Self { cached, unit, page, order: RangeLock::new(), buffers: Mutex::default() })
    }

    /// What offsets and lengths must be multiples of to go straight through.
    pub(crate) fn unit(&self) -> u64 {
        self.unit
    }

    pub(crate) fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.fits(buf, offset) {
            return io::read(file, buf, offset);
        }
        self.with_buffer(|bounce| {
            let mut done = 0;
            while done < buf.len() {
                let at = offset.saturating_add(done as u64);
                let start = at & !(self.unit - 1);
                let skip = (at - start) as usize;
                let take = (buf.len() - done).min(BOUNCE - skip);
                let span = (skip + take).next_multiple_of(self.unit as usize).min(BOUNCE);
                io::read(file, &mut bounce[..span], start)?;
                buf[done..done + take].copy_from_slice(&bounce[skip..skip + take]);
                done += take;
            }
            Ok(())
        })
    }

    /// The caller has checked that the request ends inside the signed range.
    pub(crate) fn write(&self, file: &File, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        let inner = range.align_inward(self.unit);
        if inner == range {
            let _shared = self.order.lock_shared(range)?;
            return self.write_aligned(file, buf, offset);
        }
        let _alone = self.order.lock_exclusive(range.align_outward(self.page))?;
        if inner.is_empty() {
            return io::write(&self.cached, buf, offset);
        }
        let (head, rest) = buf.split_at((inner.start() - range.start()) as usize);
        let (middle, tail) = rest.split_at(inner.len() as usize);
        io::write(&self.cached, head, range.start())?;
        self.write_aligned(file, middle, inner.start())?;
        io::write(&self.cached, tail, inner.end())
    }

    /// Offset and length fit; the memory may not.
    fn write_aligned(&self, file: &File, buf: &[u8], offset: u64) -> Result<()> {
        if self.fits(buf, offset) {
            return io::write(file, buf, offset);
        }
        self.with_buffer(|bounce| {
            for (i, piece) in buf.chunks(BOUNCE).enumerate() {
                let copy = &mut bounce[..piece.len()];
                copy.copy_from_slice(piece);
                io::write(file, copy, offset + (i * BOUNCE) as u64)?;
            }
            Ok(())
        })
    }

    fn fits(&self, buf: &[u8], offset: u64) -> bool {
        let unit = self.unit as usize;
        offset & (self.unit - 1) == 0
            && buf.len().is_multiple_of(unit)
            && buf.as_ptr().addr().is_multiple_of(unit)
    }

    fn with_buffer<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let kept = self.buffers.lock().pop();
        let mut buffer = kept.unwrap_or_default();
        let result = work(buffer.at_least(BOUNCE));
        let mut buffers = self.buffers.lock();
        if buffers.len() < KEPT_BUFFERS {
            buffers.push(buffer);
        }
        result
    }
}

/// What the kernel says direct I/O on `file` must be aligned to; a safe guess where it does not say.
fn alignment(file: &File) -> u64 {
    let said = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .map_or(0, |s| s.stx_dio_offset_align.max(s.stx_dio_mem_align));
    match u64::from(said) {
        unit if unit.is_power_of_two() && unit <= AlignedBuf::ALIGNMENT as u64 => unit.max(512),
        _ => AlignedBuf::ALIGNMENT as u64,
    }
}

/// Why opening failed.
pub(crate) fn explain(e: std::io::Error, direct: bool, operation: &'static str) -> Error {
    if direct && e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
        return Error::new(ErrorKind::Unsupported, operation)
            .because("the filesystem does not do direct I/O")
            .caused_by(e);
    }
    Error::io(operation, e)
}
