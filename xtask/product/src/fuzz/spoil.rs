//! What is done to a conversation: a few small changes, mostly where headers are, in or between its messages.

use blockmirror_block::testing::Rng;

/// Where most headers end.
const HEADER: usize = 40;

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] =
    [0, 1, 0xff, 511, 0x7fff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 32, 1 << 63, u64::MAX];

/// Changes `messages` in one to three places.
pub(super) fn spoil(rng: &mut Rng, messages: &mut Vec<Vec<u8>>) {
    for _ in 0..rng.range(1, 3) {
        if messages.is_empty() {
            messages.push(Vec::new());
        }
        let which = rng.index(messages.len());
        match rng.below(12) {
            0 => drop(messages.remove(which)),
            1 => {
                let twice = messages[which].clone();
                messages.insert(which, twice);
            }
            2 => {
                let other = rng.index(messages.len());
                messages.swap(which, other);
            }
            3 => messages.truncate(which + 1),
            _ => spoil_one(rng, &mut messages[which]),
        }
    }
}

/// Changes one message.
pub(super) fn spoil_one(rng: &mut Rng, bytes: &mut Vec<u8>) {
    let reach = if rng.chance(80) { bytes.len().min(HEADER) } else { bytes.len() };
    let at = rng.index(reach);
    match rng.below(6) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << rng.below(8),
        1 if !bytes.is_empty() => bytes[at] = rng.next() as u8,
        2 => bytes.truncate(at),
        3 => {
            let garbage: Vec<u8> = (0..rng.range(1, 20)).map(|_| rng.next() as u8).collect();
            bytes.splice(at..at, garbage);
        }
        _ => {
            let number = rng.pick(&EDGES).wrapping_add(rng.below(3)).to_be_bytes();
            let width = rng.pick(&[1, 2, 4, 8]);
            let end = (at + width).min(bytes.len());
            bytes[at..end].copy_from_slice(&number[8 - (end - at)..]);
        }
    }
}
