//! Images that are to be repaired before anything else: made by changing the bytes of sound ones, by offsets
//! that are found without the crate under test.

use blockmirror_block::{Result, Storage};

const OFFSET: usize = 0x00ff_ffff_ffff_fe00;

fn word(image: &[u8], at: usize) -> usize {
    image[at..at + 8].iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte)) as usize
}

/// Sets `bits` bits to zero that are refcount `index` of the block at `block`.
fn clear_refcount(image: &mut [u8], block: usize, bits: usize, index: usize) {
    let at = block + index * bits / 8;
    if bits >= 8 {
        image[at..at + bits / 8].fill(0);
    } else {
        image[at] &= !(((1 << bits) - 1) << (index * bits % 8));
    }
}

/// The first refcount block, the width of a refcount in bits, and the first cluster behind those that it
/// counts and the file has.
fn first_block(image: &[u8]) -> (usize, usize, usize) {
    let block = word(image, word(image, 48));
    let (bits, cluster) = (1_usize << image[99], 1_usize << image[23]);
    (block, bits, (image.len() / cluster).min(cluster * 8 / bits))
}

/// Marks the image dirty and makes its refcounts lag behind: what was written last is not counted.
pub(crate) fn make_dirty(image: &mut [u8]) {
    // The low byte of the incompatible features.
    image[79] |= 1;
    let (block, bits, last) = first_block(image);
    (last - 3..last).for_each(|index| clear_refcount(image, block, bits, index));
}

/// Does the same to a whole image, as a writer with lazy refcounts that is killed: never do refcounts lag
/// behind without the mark.
pub(crate) fn lag_behind(storage: &dyn Storage) -> Result<()> {
    let mut image = vec![0; storage.len()? as usize];
    storage.read_at(&mut image, 0)?;
    let before = image.clone();
    make_dirty(&mut image);
    storage.write_at(&image[72..80], 72)?;
    storage.flush()?;
    let differs = |at: &usize| image[*at] != before[*at];
    let ends = ((80..image.len()).find(differs), (80..image.len()).rfind(differs));
    if let (Some(first), Some(last)) = ends {
        storage.write_at(&image[first..=last], first as u64)?;
    }
    storage.flush()
}

/// Damages refcounts, a COPIED flag and the refcount table, all of which a repair can make anew.
pub(crate) fn damage(image: &mut [u8]) {
    let (block, bits, last) = first_block(image);
    clear_refcount(image, block, bits, last - 1);
    let l1 = word(image, 40);
    image[word(image, l1) & OFFSET] &= 0x7f;
    // Where clusters are small it counts nothing that lies behind the second block.
    let table = word(image, 48);
    let entry = if word(image, table + 8) == 0 { table } else { table + 8 };
    image[entry + 7] |= 1;
}
