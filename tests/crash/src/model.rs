//! The model: what the image holds from which moment on, and which snapshots and bitmaps it lists.

mod bitmaps;

pub(crate) use bitmaps::{Bits, TrackedBitmap};

use crate::directory::{be, snapshots};
use crate::op::Op;
use crate::reader::Layers;

/// What a disk writes as a whole.
pub(crate) const SECTOR: usize = 512;

/// What the image holds from some moment on.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// The moment at which the operation began.
    pub(crate) begun: usize,
    /// The moment at which it was answered, if it is durable from then on.
    pub(crate) durable: usize,
    pub(crate) contents: Vec<u8>,
    /// The backing file that the header names.
    pub(crate) backing_name: Option<Vec<u8>>,
}

/// An operation that was done, from moment to moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) op: Op,
    pub(crate) begun: usize,
    pub(crate) ended: usize,
    /// Whether it succeeded.
    pub(crate) done: bool,
}

/// From when to when an image lists something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listing {
    /// It may be listed from the one moment on, and is from the other.
    pub(crate) begun: usize,
    pub(crate) durable: usize,
    /// It may be missing from the one moment on, and is from the other.
    pub(crate) deleting: usize,
    pub(crate) deleted: usize,
}

impl Listing {
    /// Of what is listed from `durable` on, and perhaps from `begun` on.
    pub(crate) fn new(begun: usize, durable: usize) -> Self {
        Self { begun, durable, deleting: usize::MAX, deleted: usize::MAX }
    }

    /// Whether it may be listed after a crash at `moment`.
    pub(crate) fn may_be(&self, moment: usize) -> bool {
        self.begun <= moment && moment < self.deleted
    }

    /// Whether it must be.
    pub(crate) fn must_be(&self, moment: usize) -> bool {
        self.durable <= moment && moment < self.deleting
    }

    /// Whether it is listed now, and stays so.
    pub(crate) fn is_certain(&self) -> bool {
        self.durable != usize::MAX && self.deleting == usize::MAX
    }
}

/// A snapshot that was taken.
#[derive(Clone, Debug)]
pub(crate) struct TakenSnapshot {
    pub(crate) id: Vec<u8>,
    /// What it shows.
    pub(crate) contents: Vec<u8>,
    pub(crate) listing: Listing,
}

/// All that was done to an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) states: Vec<State>,
    pub(crate) spans: Vec<Span>,
    pub(crate) snapshots: Vec<TakenSnapshot>,
    pub(crate) bitmaps: Vec<TrackedBitmap>,
}

impl History {
    /// The snapshots that the image in `layers` lists from the beginning.
    pub(crate) fn list_snapshots(&mut self, layers: Layers<'_>) -> Result<(), String> {
        for (id, contents) in listed(layers)? {
            self.snapshots.push(TakenSnapshot { id, contents, listing: Listing::new(0, 0) });
        }
        Ok(())
    }

    /// Every snapshot that must be listed at `moment` is, none else is, and each shows what it did when it
    /// was taken.
    pub(crate) fn check_snapshots(&self, layers: Layers<'_>, moment: usize) -> Result<(), String> {
        let found = listed(layers)?;
        let name = |id: &[u8]| String::from_utf8_lossy(id).into_owned();
        for (id, contents) in &found {
            let may_be = |taken: &&TakenSnapshot| taken.id == *id && taken.listing.may_be(moment);
            let candidates: Vec<_> = self.snapshots.iter().filter(may_be).collect();
            if candidates.is_empty() {
                return Err(format!("the snapshot {} is listed", name(id)));
            }
            if !candidates.iter().any(|taken| taken.contents == *contents) {
                let taken = &candidates[0].contents;
                let at = (0..contents.len()).find(|at| taken.get(*at) != contents.get(*at));
                return Err(format!("the snapshot {} shows something else, at byte {at:?}", name(id)));
            }
        }
        let mut must_be = self.snapshots.iter().filter(|taken| taken.listing.must_be(moment));
        match must_be.find(|taken| !found.iter().any(|(id, _)| *id == taken.id)) {
            None => Ok(()),
            Some(taken) => Err(format!("the snapshot {} is not listed", name(&taken.id))),
        }
    }
}

/// The identifier of a snapshot, and what it shows.
type Shown = (Vec<u8>, Vec<u8>);

/// All snapshots of an image.
fn listed(layers: Layers<'_>) -> Result<Vec<Shown>, String> {
    let size = be(layers.image, 24, 8)?;
    let mut all = Vec::new();
    for snapshot in snapshots(layers.image)? {
        let size = snapshot.disk_size.unwrap_or(size);
        all.push((snapshot.id, layers.read(snapshot.l1_at, snapshot.l1_len, size)?));
    }
    Ok(all)
}

/// The states that a crash at `moment` may leave parts of.
pub(crate) fn reachable(states: &[State], moment: usize) -> Vec<&State> {
    let durable = states.iter().rposition(|state| state.durable <= moment).unwrap_or(0);
    states[durable..].iter().filter(|state| state.begun <= moment).collect()
}

/// Whether each sector of `found` is what it is in one of `states`, and its length is that of one. After a
/// change of the length that failed, what is written next may come with either length.
pub(crate) fn possible(states: &[&State], found: &[u8]) -> Result<(), String> {
    if !states.iter().any(|state| state.contents.len() == found.len()) {
        return Err(format!("a disk of {} bytes, which no operation made", found.len()));
    }
    for (index, sector) in found.chunks(SECTOR).enumerate() {
        let bytes = index * SECTOR..index * SECTOR + sector.len();
        if !states.iter().any(|state| state.contents.get(bytes.clone()) == Some(sector)) {
            let first = states[0].contents.get(bytes).unwrap_or_default();
            return Err(format!(
                "sector {index} of the disk holds {:02x?}.., none of {} possible states; first {:02x?}..",
                &sector[..8],
                states.len(),
                first.get(..8)
            ));
        }
    }
    Ok(())
}
