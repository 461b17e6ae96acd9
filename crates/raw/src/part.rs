//! A part of a storage as a storage of its own: the `offset` and `size` of QEMU's raw driver.
//!
//! Used below a [`Raw`](crate::Raw) disk, or below a format whose image begins inside a file. What must hold:
//! nothing outside the part is read, written or counted.

use std::sync::Arc;

use blockmirror_block::{
    ByteRange, Error, ErrorKind, HostRun, Result, Storage, StorageEvent, StorageExtent, StorageInfo, Visit,
    ZeroFlags,
};

use crate::raw::SECTOR;

/// Which bytes of a storage. The default is all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Part {
    /// The first.
    pub offset: u64,
    /// How many; `None` is all from there on, and it may become more.
    pub size: Option<u64>,
}

impl Part {
    /// `size` bytes from `offset` on; all of them without a size.
    pub const fn new(offset: u64, size: Option<u64>) -> Self {
        Self { offset, size }
    }

    /// Whether it is the storage as it is.
    pub fn is_all(self) -> bool {
        self == Self::default()
    }

    /// This part of `whole`, which may be all of it.
    ///
    /// # Errors
    /// As for [`StoragePart::new`].
    pub fn of(self, whole: Arc<dyn Storage>) -> Result<Arc<dyn Storage>> {
        if self.is_all() { Ok(whole) } else { Ok(Arc::new(StoragePart::new(whole, self)?)) }
    }
}

/// The bytes of a storage from an offset on, all of them or a fixed number.
#[derive(Debug)]
pub struct StoragePart {
    whole: Arc<dyn Storage>,
    offset: u64,
    size: Option<u64>,
}

impl StoragePart {
    /// The bytes `part` of `whole`. One of fixed size neither grows nor shrinks.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the size is no multiple of 512, or the part does not lie inside
    /// `whole`, whose length counts as rounded up to 512.
    pub fn new(whole: Arc<dyn Storage>, part: Part) -> Result<Self> {
        let Part { offset, size } = part;
        let refuse =
            |why: String| Err(Error::new(ErrorKind::InvalidInput, "open").in_file(whole.name()).because(why));
        let len = rounded(whole.len()?);
        let Some(there) = len.checked_sub(offset) else {
            return refuse(format!(
                "the offset {offset} lies past the end of the file, which has {len} bytes"
            ));
        };
        match size {
            Some(size) if !size.is_multiple_of(SECTOR) => {
                return refuse(format!("the size {size} is not a multiple of {SECTOR}"));
            }
            Some(size) if size > there => {
                return refuse(format!(
                    "{size} bytes from the offset {offset} on reach past the end of the file, which has {len} bytes"
                ));
            }
            _ => {}
        }
        Ok(Self { whole, offset, size })
    }

    /// Bytes of it that the whole can have at most, so that no position overflows.
    fn limit(&self) -> u64 {
        self.size.unwrap_or(u64::MAX - self.offset)
    }

    /// Where `range` lies in the whole, if all of it is in the part.
    fn outside(&self, range: ByteRange, operation: &'static str) -> Result<ByteRange> {
        if range.end() > self.limit() {
            let kind = if self.size.is_some() { ErrorKind::NoSpace } else { ErrorKind::OutOfBounds };
            return Err(Error::new(kind, operation).in_file(self.name()).at(range.start()).because(format!(
                "{} bytes reach past the end of the part at {}",
                range.len(),
                self.limit()
            )));
        }
        Ok(ByteRange::at(self.offset + range.start(), range.len()))
    }

    fn range(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) => self.outside(ByteRange::new(offset, end), operation),
            None => Err(Error::out_of_bounds(operation, offset, len, self.limit()).in_file(self.name())),
        }
    }
}

/// The last sector of a file counts as whole.
fn rounded(len: u64) -> u64 {
    len.checked_next_multiple_of(SECTOR).unwrap_or(len)
}

impl Storage for StoragePart {
    fn name(&self) -> &str {
        self.whole.name()
    }

    fn len(&self) -> Result<u64> {
        let there = rounded(self.whole.len()?).saturating_sub(self.offset);
        Ok(self.size.unwrap_or(there).min(there))
    }

    fn info(&self) -> StorageInfo {
        let mut info = self.whole.info();
        info.fixed_len |= self.size.is_some();
        // What is aligned here is aligned there as far as the offset is.
        let aligned = 1_u32.checked_shl(self.offset.trailing_zeros()).unwrap_or(u32::MAX);
        info.request_alignment = info.request_alignment.min(aligned);
        info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = self.limit().saturating_sub(offset).min(buf.len() as u64);
        // At most the buffer's length.
        let (there, past) = buf.split_at_mut(inside as usize);
        past.fill(0);
        if there.is_empty() { Ok(()) } else { self.whole.read_at(there, self.offset + offset) }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = self.range(offset, buf.len() as u64, "write")?;
        self.whole.write_at(buf, range.start())
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.whole.write_zeroes(self.outside(range, "write zeroes")?, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.whole.discard(self.outside(range, "discard")?)
    }

    fn announce(&self, event: StorageEvent) {
        self.whole.announce(event);
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.whole.allocate(self.outside(range, "allocate")?)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        match self.size {
            Some(size) if size != len => Err(Error::new(ErrorKind::Unsupported, "set length")
                .in_file(self.name())
                .because(format!("a part of {size} bytes cannot become {len}"))),
            Some(_) => Ok(()),
            None => self.whole.set_len(self.outside(ByteRange::new(0, len), "set length")?.end()),
        }
    }

    fn flush(&self) -> Result<()> {
        self.whole.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        let inside = range.intersect(ByteRange::new(0, self.limit()));
        if inside.is_empty() {
            return Ok(());
        }
        self.whole.extents(self.outside(inside, "map")?, &mut |run| {
            let range = ByteRange::at(run.range.start() - self.offset, run.range.len());
            visit(StorageExtent { range, hole: run.hole })
        })
    }

    fn clone_block(&self, file: &dyn Storage) -> Option<u64> {
        self.whole.clone_block(file).filter(|block| self.offset.is_multiple_of(*block))
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let range = self.range(offset, len, "clone")?;
        self.whole.clone_range(range.start(), run, len)
    }

    fn part_of(&self) -> Option<(&Arc<dyn Storage>, u64)> {
        Some((&self.whole, self.offset))
    }

    fn cancel_in_flight(&self) {
        self.whole.cancel_in_flight();
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        self.whole.allocated_bytes()
    }
}
