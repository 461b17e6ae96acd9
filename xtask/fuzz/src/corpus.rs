//! Images from `testdata/`, and what is changed in them: fields by what they mean, or any bytes.

use std::fs;

use blockmirror_block::testing::Rng;
use blockmirror_testing::Outcome;
use blockmirror_testing::mutate::{Mutation, mutations};
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Manifest, folder};

/// Images that stand for themselves: without layers, data inside. Of each feature the smallest.
const NAMES: [&str; 12] = [
    "v2-512-plain.qcow2",
    "v3-512-plain.qcow2",
    "v3-512-refcount1.qcow2",
    "v3-512-refcount64.qcow2",
    "v3-512-lazy.qcow2",
    "v2-512-deflate.qcow2",
    "v3-512-zstd.qcow2",
    "v3-4k-deflate.qcow2",
    "v3-4k-zstd.qcow2",
    "v3-4k-snapshot.qcow2",
    "v3-4k-bitmap.qcow2",
    "v3-64k-extended_l2_deflate.qcow2",
];

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 8] = [0, 1, 511, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];

#[derive(Debug)]
struct SoundImage {
    name: &'static str,
    bytes: Vec<u8>,
    mutations: Vec<Mutation>,
}

/// The images.
#[derive(Debug)]
pub struct Corpus(Vec<SoundImage>);

/// A damaged image.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// The file.
    pub bytes: Vec<u8>,
    /// What was done to which image.
    pub label: String,
    /// Whether nothing was changed.
    pub sound: bool,
    /// The image that it was, by number.
    image: usize,
}

impl Corpus {
    /// Unpacks the images.
    ///
    /// # Errors
    /// One is missing, or is not what it was.
    pub fn load() -> Outcome<Self> {
        let manifest = Manifest::load(&folder())?;
        let dir = scratch()?;
        let mut images = Vec::new();
        for name in NAMES {
            let path = manifest.entry(name)?.unpack(&folder(), dir.path())?;
            let bytes = fs::read(&path)?;
            let mutations = mutations(&bytes);
            images.push(SoundImage { name, bytes, mutations });
        }
        Ok(Self(images))
    }

    /// The bytes of each image.
    pub fn images(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|image| &*image.bytes)
    }

    /// An image with up to four changes; now and then with none.
    pub fn mutant(&self, rng: &mut Rng) -> Mutant {
        let index = rng.index(self.0.len());
        let image = &self.0[index];
        let sound =
            Mutant { bytes: image.bytes.clone(), label: image.name.to_owned(), sound: true, image: index };
        if rng.one_in(50) { sound } else { self.change(sound, rng) }
    }

    /// `mutant` with up to four more changes.
    pub fn change(&self, mut mutant: Mutant, rng: &mut Rng) -> Mutant {
        let mutations = &self.0[mutant.image].mutations;
        mutant.sound = false;
        for _ in 0..rng.range(1, 4) {
            let label = match rng.below(10) {
                0 => change_bytes(rng, &mut mutant.bytes),
                1 => copy_word(rng, &mut mutant.bytes),
                2 if rng.one_in(3) => cut(rng, &mut mutant.bytes),
                _ => {
                    let Mutation { label, offset, new, .. } = &mutations[rng.index(mutations.len())];
                    if let Some(field) = mutant.bytes.get_mut(*offset..offset + new.len()) {
                        field.copy_from_slice(new);
                    }
                    label.clone()
                }
            };
            mutant.label += &format!("; {label}");
        }
        mutant
    }
}

/// Metadata lies in the first clusters of small images.
fn place(rng: &mut Rng, bytes: &[u8]) -> usize {
    let reach = if rng.chance(70) { bytes.len().min(64 << 10) } else { bytes.len() };
    rng.index(reach.saturating_sub(8)) / 8 * 8
}

fn change_bytes(rng: &mut Rng, bytes: &mut [u8]) -> String {
    let at = place(rng, bytes);
    let word = if rng.chance(50) { rng.pick(&EDGES).wrapping_add(rng.below(3)) } else { rng.next() };
    set_word(bytes, at, word);
    format!("{word:#x} at {at:#x}")
}

/// One entry becomes what another is.
fn copy_word(rng: &mut Rng, bytes: &mut [u8]) -> String {
    let (from, to) = (place(rng, bytes), place(rng, bytes));
    let word =
        bytes.get(from..from + 8).unwrap_or_default().iter().fold(0, |word, b| word << 8 | u64::from(*b));
    set_word(bytes, to, word);
    format!("the word at {from:#x} at {to:#x}")
}

fn set_word(bytes: &mut [u8], at: usize, word: u64) {
    if let Some(field) = bytes.get_mut(at..at + 8) {
        field.copy_from_slice(&word.to_be_bytes());
    }
}

fn cut(rng: &mut Rng, bytes: &mut Vec<u8>) -> String {
    let len = rng.index(bytes.len());
    bytes.truncate(len);
    format!("cut at {len:#x}")
}
