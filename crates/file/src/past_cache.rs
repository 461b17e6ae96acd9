//! Reads past the host's page cache, of a file that is written through it.
//!
//! Asked for by callers that verify what they have written
//! ([`FileStorage::read_past_cache`](crate::FileStorage::read_past_cache)). A second descriptor with
//! `O_DIRECT` reads; the kernel writes dirty pages of a range back before it reads the range so. Some file
//! systems refuse that, and some answer it from the page cache without a word (a journal of data, inline or
//! compressed data): so each flush drops the file's pages all the same, and the next read fetches them anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::{Error, Result};
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use crate::direct::Direct;

/// How reads get past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PastCache {
    /// By `O_DIRECT`: each read is one of the device below. Where the file system serves it from the cache,
    /// as with [`Dropped`](Self::Dropped).
    Direct,
    /// The cached pages of the file are dropped after each flush: a read of what was flushed is one of the
    /// device below, unless the kernel has kept a page.
    Dropped,
}

/// Whether reads go past the page cache, and how.
#[derive(Debug, Default)]
pub(crate) struct ReadsPastCache {
    way: OnceLock<Way>,
    /// The file system has refused a read of the descriptor that it has opened.
    refused: AtomicBool,
}

#[derive(Debug)]
enum Way {
    Direct(File, Direct),
    Dropped,
}

impl ReadsPastCache {
    /// From now on reads of `file`, which is opened anew as `path`, go past the cache.
    pub(crate) fn begin(&self, path: &Path, file: &File) -> Result<PastCache> {
        if self.way.get().is_none() {
            let way = open_direct(path)?;
            drop_pages(file)?;
            self.way.get_or_init(|| way);
        }
        Ok(self.kind())
    }

    fn kind(&self) -> PastCache {
        match self.way.get() {
            Some(Way::Direct(..)) if !self.refused.load(Ordering::Relaxed) => PastCache::Direct,
            _ => PastCache::Dropped,
        }
    }

    /// Fills `buf` if reads go past the cache by a descriptor of their own.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        match self.way.get()? {
            Way::Direct(file, direct) if self.kind() == PastCache::Direct => {
                self.unless_refused(direct.read(file, buf, offset))
            }
            _ => None,
        }
    }

    /// What a direct read has come to; `None` if it was refused for being one: an empty file may have hidden
    /// that.
    fn unless_refused(&self, read: Result<()>) -> Option<Result<()>> {
        let refused = read.as_ref().is_err_and(|error| {
            let cause = error.cause().and_then(|cause| cause.downcast_ref::<io::Error>());
            cause.and_then(io::Error::raw_os_error) == Some(Errno::INVAL.raw_os_error())
        });
        if refused {
            self.refused.store(true, Ordering::Relaxed);
        }
        (!refused).then_some(read)
    }

    /// `file` has been flushed.
    pub(crate) fn flushed(&self, file: &File) -> Result<()> {
        match self.way.get() {
            Some(_) => drop_pages(file),
            None => Ok(()),
        }
    }
}

fn open_direct(path: &Path) -> Result<Way> {
    let flags = (OFlags::DIRECT | OFlags::NOCTTY).bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => return Ok(Way::Dropped),
        Err(e) => return Err(Error::io("open anew", e)),
    };
    let direct = Direct::new(&file, false)?;
    // Some file systems open such a descriptor and refuse its reads.
    match direct.read(&file, &mut [0; 512], 0) {
        Ok(()) => Ok(Way::Direct(file, direct)),
        Err(_) => Ok(Way::Dropped),
    }
}

fn drop_pages(file: &File) -> Result<()> {
    let dropped = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    dropped.map_err(|e| Error::io("drop cached pages", e.into()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use blockmirror_block::Storage;
    use rustix::io::{ReadWriteFlags, preadv2};

    use super::*;
    use crate::FileOptions;

    /// Whether the first bytes of `file` are in the page cache; `None` where the file system does not say.
    fn is_cached(file: &File) -> Option<bool> {
        let mut buf = [0; 512];
        match preadv2(file.as_fd(), &mut [std::io::IoSliceMut::new(&mut buf)], 0, ReadWriteFlags::NOWAIT) {
            Ok(_) => Some(true),
            Err(Errno::AGAIN) => Some(false),
            Err(_) => None,
        }
    }

    /// A read that is answered by the page cache proves nothing about the device below.
    #[test]
    fn a_read_past_the_cache_is_not_answered_by_it() {
        let dir = tempfile::tempdir().unwrap();
        let storage = FileOptions::new().create_new(true).open(dir.path().join("a")).unwrap();
        let bytes = vec![7; 1 << 20];
        storage.write_at(&bytes, 0).unwrap();
        storage.flush().unwrap();
        let cached = File::open(dir.path().join("a")).unwrap();
        if is_cached(&cached) != Some(true) {
            return blockmirror_testing::skip_unsupported(format_args!(
                "reads past the page cache: the file system does not say what is cached"
            ));
        }
        let way = storage.read_past_cache().unwrap();
        // Also where direct reads seem to work: they may be answered by the page cache.
        assert_eq!(is_cached(&cached), Some(false));
        storage.write_at(&bytes, 0).unwrap();
        storage.flush().unwrap();
        assert_eq!(is_cached(&cached), Some(false));
        // The question itself has had the pages read.
        storage.flush().unwrap();
        let mut read = vec![0; 1 << 20];
        storage.read_at(&mut read, 0).unwrap();
        if way == PastCache::Direct {
            assert_eq!(is_cached(&cached), Some(false));
        }
        assert!(read == bytes);
    }

    /// The first read was of an empty file, which any file system answers.
    #[test]
    fn a_direct_read_that_is_refused_goes_through_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, [7; 4096]).unwrap();
        let (file, reads) = (File::open(&path).unwrap(), ReadsPastCache::default());
        let way = reads.begin(&path, &file).unwrap();
        let failed = |errno: Errno| Err(Error::io("read", errno.into()));
        assert!(reads.unless_refused(failed(Errno::IO)).is_some_and(|read| read.is_err()));
        assert_eq!(reads.begin(&path, &file).unwrap(), way);
        assert!(reads.unless_refused(failed(Errno::INVAL)).is_none());
        assert_eq!(reads.begin(&path, &file).unwrap(), PastCache::Dropped);
        assert!(reads.read(&mut [0; 512], 0).is_none());
        reads.flushed(&file).unwrap();
    }

    /// What is not flushed yet is seen too, and so is a file's odd end.
    #[test]
    fn it_reads_what_was_written() {
        for dir in [Path::new("/dev/shm"), &std::env::temp_dir()] {
            let Ok(dir) = tempfile::tempdir_in(dir) else { continue };
            let storage = FileOptions::new().create_new(true).open(dir.path().join("a")).unwrap();
            storage.read_past_cache().unwrap();
            storage.write_at(b"abc", 5000).unwrap();
            let mut read = [1; 10];
            storage.read_at(&mut read, 4998).unwrap();
            assert_eq!(&read, b"\0\0abc\0\0\0\0\0");
            storage.flush().unwrap();
            storage.write_at(b"d", 5001).unwrap();
            storage.read_at(&mut read, 4998).unwrap();
            assert_eq!(&read, b"\0\0adc\0\0\0\0\0");
        }
    }
}
