//! Whole images that are almost right: opened, mapped, read, checked, repaired and written.
//!
//! Beside panics: requests and bytes are bounded by the length of the file, those of a check and a repair as
//! the two say; memory is bounded; a repair that ends well leaves a clean image that opens for writing, and
//! no byte that could be read before reads differently after; an image that is clean has no corruption once
//! it was written.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{
    BitmapOptions, CheckObserver, CheckReport, Finding, Header, NewSnapshot, OpenOptions, Qcow2, Repair,
    Severity, SnapshotRef, check, repair,
};
use blockmirror_testing::Outcome;
use blockmirror_testing::bounds::{Work, check_bound, repair_bound};
use xtask_fuzz::corpus::{Corpus, Mutant};

use crate::counting::CountingStorage;
use crate::pool::Pool;
use crate::run::{Target, Verdict};
use crate::{edges, heap};

/// How much of a disk is read, and in which pieces.
const READ: u64 = 1 << 20;
const PIECE: u64 = 4096;
/// Runs of the map that are looked at.
const RUNS: usize = 10_000;
/// Bytes that an image may have allocated at once.
const MEMORY: u64 = 256 << 20;
/// Bytes of the shortest entry of a snapshot table or a bitmap directory.
const SHORTEST_ENTRY: u64 = 32;

/// Most that one use of an image costs whose file is `len` bytes long: opened, [`READ`] bytes read in pieces,
/// mapped, checked and written.
fn bound(len: u64) -> Work {
    let clusters = len.div_ceil(512);
    Work { requests: 30_000 + 96 * clusters, bytes: (96 << 20) + 96 * len }
}

/// The images of one thread.
pub(crate) struct Images<'a> {
    corpus: &'a Corpus,
    pool: Pool<Mutant>,
}

impl<'a> Images<'a> {
    pub(crate) fn new(corpus: &'a Corpus) -> Self {
        Self { corpus, pool: Pool::new() }
    }
}

impl Target for Images<'_> {
    fn run(&mut self, rng: &mut Rng) -> Outcome<Verdict> {
        let mutant = match self.pool.pick(rng) {
            Some(kept) if rng.chance(75) => self.corpus.change(kept.clone(), rng),
            _ => self.corpus.mutant(rng),
        };
        edges::clear();
        let (used, peak) = heap::peak_of(|| {
            let use_it = || use_image(&mutant);
            std::panic::catch_unwind(use_it).unwrap_or_else(|_| Err("a panic".into()))
        });
        let used = match used {
            Ok(_) if peak > MEMORY => Err(format!("{} MiB of memory", peak >> 20)),
            used => used,
        };
        let verdict = used.map_err(|why| {
            let saved = crate::run::save(&mutant.bytes, "qcow2");
            format!("{}: {why}; the image is {saved}", mutant.label)
        })?;
        if self.pool.is_new() {
            let len = mutant.bytes.len() + mutant.label.len();
            self.pool.keep(mutant, len, rng);
        }
        Ok(verdict)
    }

    fn reached(&self) -> (usize, usize) {
        (self.pool.edges(), self.pool.len())
    }
}

/// Uses one image. An error says what did not hold.
fn use_image(mutant: &Mutant) -> Result<Verdict, String> {
    let len = mutant.bytes.len() as u64;
    let storage = CountingStorage::new(&mutant.bytes, bound(len));
    let header = Header::read(&*storage).ok();
    let before = open(&storage, false).map(|disk| read(&disk));
    let mapped = open(&storage, false).is_some_and(|disk| is_mapped(&disk));

    let cluster = header.as_ref().map_or(512, Header::cluster_size);
    let entries = len / SHORTEST_ENTRY;
    let counted = storage.counted();
    let checked = check(&*storage, &mut ());
    within("the check", storage.counted(), counted, check_bound(len, cluster, entries))?;
    let clean = checked.as_ref().is_ok_and(CheckReport::is_clean);

    let repaired = CountingStorage::new(&mutant.bytes, repair_bound(4 * len + (64 << 10), 512, entries));
    let report = repair(&*repaired, Repair::All, &mut ());
    let new_len = repaired.len().unwrap_or(0);
    within("the repair", repaired.counted(), Work::default(), repair_bound(new_len, cluster, entries))?;
    if report.is_ok_and(|report| report.is_clean()) {
        is_mended(&repaired, before.as_deref())?;
    }
    let written = write(&storage);
    if let Some(why) = storage.exceeded() {
        return Err(why);
    }
    if clean {
        is_sound(&storage)?;
    }
    if mutant.sound && !(clean && mapped) {
        return Err(format!("a sound image: {checked:?}, mapped: {mapped}"));
    }
    Ok(Verdict { honest: mutant.sound, accepted: written || before.is_some() })
}

fn within(what: &str, after: Work, before: Work, bound: Work) -> Result<(), String> {
    let (requests, bytes) = (after.requests - before.requests, after.bytes - before.bytes);
    if requests <= bound.requests && bytes <= bound.bytes {
        return Ok(());
    }
    Err(format!("{what}: {requests} requests, {bytes} bytes; the bound is {bound:?}"))
}

/// A repair that has left a clean image: it is clean at the next look too, and has what could be read
/// `before`.
fn is_mended(repaired: &Arc<CountingStorage>, before: Option<&[Option<Vec<u8>>]>) -> Result<(), String> {
    // With a bound of its own: what the repair has used of its bound is not the next one's.
    let len = repaired.len().unwrap_or(0);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    repaired.read_at(&mut bytes, 0).map_err(|e| format!("after the repair: {e}"))?;
    let again = CountingStorage::new(&bytes, bound(len));
    let report = check(&*again, &mut ()).map_err(|e| format!("check after the repair: {e}"))?;
    if !report.is_clean() {
        return Err(format!("clean after the repair, and not at the next look: {report:?}"));
    }
    before.map_or(Ok(()), |before| keeps(before, &again))?;
    opens_for_writing(&again)
}

/// An image that was clean before it was written: leaks may be left, and bitmaps in use.
fn is_sound(storage: &Arc<CountingStorage>) -> Result<(), String> {
    let mut findings = Findings::default();
    match check(&**storage, &mut findings) {
        Ok(report) if report.corruptions + report.check_errors == 0 => Ok(()),
        Ok(_) => Err(format!("clean, and not once it was written: {:?}", findings.0)),
        Err(error) => Err(format!("clean, and once it was written: {error}")),
    }
}

/// The first findings that are no leaks.
#[derive(Default)]
struct Findings(Vec<String>);

impl CheckObserver for Findings {
    fn found(&mut self, finding: &Finding, _times: u64) {
        if finding.severity() != Severity::Leak && self.0.len() < 4 {
            self.0.push(finding.to_string());
        }
    }
}

/// An image that is clean after a repair opens for writing, unless it is one that LIMITS.md says is refused.
fn opens_for_writing(storage: &Arc<CountingStorage>) -> Result<(), String> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    let Err(error) = OpenOptions::new().writable(true).open(storage) else { return Ok(()) };
    match error.kind() {
        // A data file that is not there; snapshots with refcounts of one bit; a file that was cut short.
        ErrorKind::InvalidInput | ErrorKind::ReadOnly | ErrorKind::CutShort => Ok(()),
        // Two tables in one cluster, each counted.
        ErrorKind::Corrupt if error.to_string().contains("overlaps other metadata") => Ok(()),
        _ => Err(format!("clean after the repair, and not opened for writing: {error}")),
    }
}

fn open(storage: &Arc<CountingStorage>, writable: bool) -> Option<Qcow2> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    OpenOptions::new().writable(writable).cache_bytes(1 << 20).open(storage).ok()
}

/// The first pieces of the disk, as far as they can be read.
fn read(disk: &Qcow2) -> Vec<Option<Vec<u8>>> {
    let end = disk.len().min(READ);
    let piece = |at: u64| {
        let mut bytes = vec![0; PIECE.min(end - at) as usize];
        disk.read_at(&mut bytes, at).ok().map(|()| bytes)
    };
    (0..end).step_by(PIECE as usize).map(piece).collect()
}

fn is_mapped(disk: &Qcow2) -> bool {
    let mut runs = 0;
    let visited = disk.extents(ByteRange::new(0, disk.len()), &mut |_| {
        runs += 1;
        if runs < RUNS { Visit::Continue(()) } else { Visit::Break(()) }
    });
    visited.is_ok()
}

/// What could be read before the repair reads the same.
fn keeps(before: &[Option<Vec<u8>>], repaired: &Arc<CountingStorage>) -> Result<(), String> {
    let Some(disk) = open(repaired, false) else { return Err("clean after the repair, not opened".into()) };
    for (index, (before, after)) in before.iter().zip(read(&disk)).enumerate() {
        if let Some(before) = before
            && after.as_ref() != Some(before)
        {
            let how = if after.is_some() { "reads differently" } else { "cannot be read" };
            return Err(format!("the {PIECE} bytes at {:#x}: {how} after the repair", index as u64 * PIECE));
        }
    }
    Ok(())
}

/// What changes more than the mapping: snapshots, compressed clusters, bitmaps, the length of the disk.
fn change(disk: &Qcow2) {
    let cluster = disk.header().cluster_size();
    let new = NewSnapshot::new("fuzz").id("fuzz").date(Duration::ZERO);
    let taken = SnapshotRef::Id("fuzz".into());
    if disk.create_snapshot(&new).is_ok() {
        let _ = disk.write_at(&[0xa5; 700], 5000, WriteFlags::NONE);
        let _ = disk.flush();
        let _ = disk.apply_snapshot(&taken);
        let _ = disk.delete_snapshot(&taken);
    }
    // At most 2 MiB.
    let _ = disk.write_compressed(&vec![7; cluster as usize], cluster);
    let _ = disk.add_bitmap("fuzz", &BitmapOptions::new());
    let _ = disk.write_at(&[0x77; 700], 70_000, WriteFlags::NONE);
    let _ = disk.resize(disk.len().saturating_add(70_144) / 512 * 512, false);
    let _ = disk.resize(disk.len() / 2 / 512 * 512, true);
    let _ = disk.store_bitmaps();
    let _ = disk.flush();
}

/// Writes here and there; whether that works is the image's business.
fn write(storage: &Arc<CountingStorage>) -> bool {
    let Some(disk) = open(storage, true) else { return false };
    let mut written = true;
    for offset in [0, 5000, 40_000, disk.len() / 2] {
        written &= disk.write_at(&[0x5a; 700], offset, WriteFlags::NONE).is_ok();
    }
    let range = ByteRange::at(20_000, 10_000).intersect(ByteRange::new(0, disk.len()));
    let _ = disk.write_zeroes(range, ZeroFlags::MAY_UNMAP);
    let _ = disk.discard(range);
    let _ = disk.flush();
    change(&disk);
    written
}
