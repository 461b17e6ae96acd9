//! Whole images that are almost right: opened, mapped, read, checked, repaired and written.
//!
//! Beside panics and memory: requests and bytes are bounded by the length of the file; a repair that ends
//! well leaves a clean image, and no byte that could be read before reads differently after.

use std::sync::Arc;

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, ByteRange, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{Header, OpenOptions, Qcow2, Repair, check, repair};
use blockmirror_testing::Outcome;

use super::corpus::{Corpus, Mutant};
use super::counting::{Bound, CountingStorage};
use super::{Heard, Listener};

/// How much of a disk is read, and in which pieces.
const READ: u64 = 1 << 20;
const PIECE: u64 = 4096;
/// Runs of the map that are looked at.
const RUNS: usize = 10_000;

/// Requests and bytes of one use of an image whose file is `len` bytes long: opened, [`READ`] bytes read in
/// pieces, mapped, checked, repaired and written.
fn bound(len: u64) -> Bound {
    let clusters = len.div_ceil(512);
    Bound { requests: 20_000 + 64 * clusters, bytes: (64 << 20) + 64 * len }
}

/// The images.
pub(super) struct ImageListener(Corpus);

impl ImageListener {
    pub(super) fn new() -> Outcome<Self> {
        Ok(Self(Corpus::load()?))
    }
}

impl Listener for ImageListener {
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard> {
        let mut rng = Rng::new(seed, 3);
        let mut heard = Heard::default();
        for _ in 0..count {
            let mutant = self.0.mutant(&mut rng);
            let found = use_image(&mutant).map_err(|why| format!("{}: {why}", mutant.label))?;
            heard.add(found);
        }
        Ok(heard)
    }

    fn left(&self) -> Outcome {
        Ok(())
    }
}

/// Uses one image. An error says what did not hold.
fn use_image(mutant: &Mutant) -> Result<Heard, String> {
    let storage = CountingStorage::new(&mutant.bytes, bound(mutant.bytes.len() as u64));
    let _ = Header::read(&*storage);
    let before = open(&storage, false).map(|disk| read(&disk));
    let mapped = open(&storage, false).is_some_and(|disk| is_mapped(&disk));
    let checked = check(&*storage, &mut ());
    let clean = checked.as_ref().is_ok_and(blockmirror_qcow2::CheckReport::is_clean);
    let repaired = CountingStorage::new(&mutant.bytes, bound(mutant.bytes.len() as u64));
    if let Ok(report) = repair(&*repaired, Repair::All, &mut ())
        && report.is_clean()
    {
        let again = check(&*repaired, &mut ()).map_err(|e| format!("check after the repair: {e}"))?;
        if !again.is_clean() {
            return Err(format!("clean after the repair, and not at the next look: {again:?}"));
        }
        if let Some(before) = &before {
            keeps(before, &repaired)?;
        }
    }
    let written = write(&storage);
    for storage in [&storage, &repaired] {
        if let Some(why) = storage.exceeded() {
            return Err(why);
        }
    }
    if mutant.sound && !(clean && mapped) {
        return Err(format!("a sound image: {checked:?}, mapped: {mapped}"));
    }
    let (done, refused) = if written || before.is_some() { (1, 0) } else { (0, 1) };
    Ok(Heard { honest: u64::from(mutant.sound), done, refused })
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
    written
}
