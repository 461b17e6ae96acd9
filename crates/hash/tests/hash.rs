//! Hashes of disks in memory, against the definition.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]
#![allow(clippy::little_endian_bytes, reason = "the hash begins with the length in this order")]

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockmirror_block::cancel::{self, CancelSource};
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, ExtentKind, Geometry, Result, Visit, WriteFlags,
    ZeroFlags,
};
use blockmirror_hash::{BLOCK, CONTEXT, ContentHash, DiskHash, HashOptions};
use proptest::prelude::*;

fn all(_: u64) -> Visit {
    Visit::Continue(())
}

fn options(threads: usize) -> HashOptions {
    HashOptions::new().threads(NonZeroUsize::new(threads).unwrap())
}

fn hash(disk: &dyn BlockDevice, threads: usize) -> DiskHash {
    DiskHash::of(disk, &options(threads), &mut all).unwrap().unwrap()
}

/// The definition, without threads and extents.
fn defined(bytes: &[u8]) -> DiskHash {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    for block in bytes.chunks(BLOCK as usize) {
        let is_zero = block.iter().all(|byte| *byte == 0);
        let digest = blake3::hash(block);
        hasher.update(if is_zero { &[0; 32] } else { digest.as_bytes() });
    }
    format!("bm1:{}", hasher.finalize().to_hex()).parse().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_hash_is_that_of_the_definition(
        len in (1_u64..12_000).prop_map(|sectors| sectors * 512),
        writes in prop::collection::vec((0_u64..12_000, 1_u64..3000, any::<u8>()), 0..8),
        threads in 1_usize..5,
    ) {
        let disk = MemoryDisk::new(len);
        for (at, count, byte) in writes {
            let range = ByteRange::at(at * 512, count * 512);
            let range = ByteRange::new(range.start().min(len), range.end().min(len));
            disk.write_at(&vec![byte; range.len() as usize], range.start(), WriteFlags::NONE).unwrap();
        }
        let mut bytes = vec![0; len as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        prop_assert_eq!(hash(&disk, threads), defined(&bytes));
        let content = ContentHash::of(&disk, &mut all).unwrap().unwrap();
        prop_assert_eq!(content.to_string(), blake3::hash(&bytes).to_hex().to_string());
    }
}

/// The figures of docs/hash.md.
#[test]
fn known_hashes() {
    let empty = MemoryDisk::new(0);
    let disk = MemoryDisk::new((1 << 20) + 512);
    disk.write_at(b"blockmirror", 1 << 20, WriteFlags::NONE).unwrap();
    let hashes = [hash(&empty, 1), DiskHash::of_zeros(1 << 43), hash(&disk, 2)].map(|hash| hash.to_string());
    let known = [
        "bm1:343045bf3738e3813bd0fabe1850801092388ce4ff70074e98d47a229ecf08d3",
        "bm1:99bea89584ce4afcd390b073a7badf45dba24ee8324a5329dfa7860fd5a5ba34",
        "bm1:0bcda0d25a2111dc9097e9a5736d090a17597396fac3cf2e1bd20478c837e5a6",
    ];
    assert_eq!(hashes, known);
}

#[test]
fn zeros_that_are_written_and_those_that_are_not_are_the_same() {
    let disk = MemoryDisk::new(5 * BLOCK + 512);
    assert_eq!(hash(&disk, 3), DiskHash::of_zeros(disk.len()));
    disk.write_at(&[0; 4096], BLOCK - 512, WriteFlags::NONE).unwrap();
    assert_eq!(hash(&disk, 3), DiskHash::of_zeros(disk.len()));
    assert_ne!(DiskHash::of_zeros(disk.len()), DiskHash::of_zeros(disk.len() - 512), "the length counts");
}

#[test]
fn other_text_is_refused() {
    let hash = DiskHash::of_zeros(0).to_string();
    assert_eq!(hash.parse::<DiskHash>().unwrap().to_string(), hash);
    for text in [&hash[4..], &hash[..67], "bm2:", "", &format!("{hash}0")] {
        let error = text.parse::<DiskHash>().unwrap_err().to_string();
        assert_eq!(error, format!("not a hash: {text:?} is not `bm1:` and 64 hexadecimal digits"));
    }
}

/// What a disk does at its reads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reads {
    Fail,
    Panic,
    /// They hang until the caller is cancelled.
    Hang,
    /// There are none: all is zero.
    Zero,
}

/// A disk that counts its reads, the first 20 of which are good unless they hang.
#[derive(Debug)]
struct Bad {
    reads: AtomicUsize,
    does: Reads,
}

impl BlockDevice for Bad {
    fn len(&self) -> u64 {
        1 << 60
    }

    fn name(&self) -> &str {
        "bad"
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn read_at(&self, _: &mut [u8], offset: u64) -> Result<()> {
        if self.does == Reads::Hang {
            let (mutex, never) = (Mutex::new(()), Condvar::new());
            let mut guard = mutex.lock();
            while !cancel::is_cancelled() {
                guard = cancel::wait(&never, guard, None);
            }
            return Err(Error::new(ErrorKind::Cancelled, "read"));
        }
        if self.reads.fetch_add(1, Ordering::Relaxed) < 20 {
            return Ok(());
        }
        assert!(self.does != Reads::Panic, "as it should");
        Err(Error::new(ErrorKind::Io, "read").in_file(self.name()).at(offset))
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
        unreachable!("nothing is written")
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        unreachable!("nothing is written")
    }

    fn discard(&self, _: ByteRange) -> Result<()> {
        unreachable!("nothing is written")
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let kind = if self.does == Reads::Zero { ExtentKind::Unallocated } else { ExtentKind::Data };
        let _ = visit(Extent::new(range, kind));
        Ok(())
    }
}

fn bad(does: Reads) -> Bad {
    Bad { reads: AtomicUsize::new(0), does }
}

#[test]
fn a_read_that_fails_ends_all_threads() {
    let disk = bad(Reads::Fail);
    let error = DiskHash::of(&disk, &options(4), &mut all).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(disk.reads.into_inner() <= 20 + 4);
    assert_eq!(ContentHash::of(&bad(Reads::Fail), &mut all).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
#[should_panic(expected = "a scoped thread panicked")]
fn a_device_that_panics_ends_all_threads() {
    let _ = DiskHash::of(&bad(Reads::Panic), &options(4), &mut all);
}

/// The disk has 2^40 blocks: only an end of the threads ends the test.
#[test]
#[should_panic(expected = "as it should")]
fn progress_that_panics_ends_all_threads() {
    let _ = DiskHash::of(&bad(Reads::Zero), &options(4), &mut |_| panic!("as it should"));
}

#[test]
fn progress_stops_it() {
    let stop = &mut |_: u64| Visit::Break(());
    assert_eq!(DiskHash::of(&MemoryDisk::new(1 << 20), &options(1), stop).unwrap(), None);
    assert_eq!(ContentHash::of(&MemoryDisk::new(1 << 20), stop).unwrap(), None);
    for does in [Reads::Hang, Reads::Zero] {
        assert_eq!(DiskHash::of(&bad(does), &options(4), stop).unwrap(), None, "{does:?}");
    }
}

#[test]
fn a_caller_that_is_cancelled_does_not_wait_for_reads() {
    let source = CancelSource::new();
    let _scope = source.enter();
    let error = DiskHash::of(&bad(Reads::Hang), &options(4), &mut |_| {
        source.cancel();
        Visit::Continue(())
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Cancelled);
}
