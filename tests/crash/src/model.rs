//! The model: what the image holds from which moment on.

use crate::op::Op;

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

/// An operation that was done, and when it was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) op: Op,
    pub(crate) ended: usize,
    /// Whether it succeeded.
    pub(crate) done: bool,
}

/// All that was done to an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) states: Vec<State>,
    pub(crate) spans: Vec<Span>,
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
