//! Files from strangers given to `inspect`: damaged images of qcow2, and what begins like one of another
//! format or holds one. Each gets a verdict, and what is accepted opens, and names no other file.

use std::fs;
use std::path::Path;

use blockmirror_block::testing::Rng;
use blockmirror_image::{Format, ImageInfo, Inspection, OpenOptions, ReferencePolicy};
use blockmirror_testing::Outcome;
use blockmirror_testing::scratch::scratch;
use xtask_fuzz::corpus::Corpus;

use super::spoil::spoil_one;
use super::{Heard, Listener};

/// What files of formats begin with, or have somewhere.
const SIGNS: [(&[u8], u64); 12] = [
    (b"QFI\xfb\0\0\0\x01", 0),
    (b"QED\0", 0),
    (b"KDMV\x01\0\0\0", 0),
    (b"COWD", 0),
    (b"# Disk DescriptorFile\nversion=1\nRW 8 FLAT \"/etc/passwd\" 0\n", 0),
    (b"conectix", 0),
    (b"vhdxfile", 0),
    (b"WithoutFreeSpace", 0),
    (b"LUKS\xba\xbe\0\x01", 0),
    (b"EFI PART", 512),
    (b"\x55\xaa", 510),
    (b"CD001", 32769),
];

/// The images.
pub(super) struct InspectListener(Corpus);

impl InspectListener {
    pub(super) fn new() -> Outcome<Self> {
        Ok(Self(Corpus::load()?))
    }

    /// A file, what it is called, and whether it is an image as it was.
    fn file(&self, rng: &mut Rng) -> (Vec<u8>, String, bool) {
        if rng.chance(70) {
            let mutant = self.0.mutant(rng);
            return (mutant.bytes, mutant.label, mutant.sound);
        }
        let mut bytes = match rng.below(3) {
            0 => self.0.mutant(rng).bytes,
            _ => vec![0; 512 * rng.range(0, 200) as usize],
        };
        let mut label = format!("{} bytes", bytes.len());
        for _ in 0..rng.range(1, 3) {
            let (sign, at) = rng.pick(&SIGNS);
            let mut sign = sign.to_vec();
            if rng.one_in(3) {
                spoil_one(rng, &mut sign);
            }
            let end = at as usize + sign.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[at as usize..end].copy_from_slice(&sign);
            label += &format!("; {:?} at {at}", sign.escape_ascii().to_string());
        }
        (bytes, label, false)
    }
}

/// Whether the file `path` is accepted as an image of `format`; then it is what it seems to be.
fn accepts(path: &Path, format: Option<Format>) -> Outcome<bool> {
    let seen = Inspection::read(path, &OpenOptions::new().format(format))?;
    // It is what a program is given.
    seen.to_json(&[]).to_string();
    if seen.refusals(&[]).next().is_some() {
        return Ok(false);
    }
    let options = OpenOptions::new().format(format).policy(ReferencePolicy::deny());
    let info = ImageInfo::read(path, &options)?;
    if info.backing.is_some()
        || (info.format.as_str(), Some(info.virtual_size)) != (seen.format, seen.virtual_size)
    {
        return Err(format!("accepted as {seen:?}, and is {info:?}").into());
    }
    let image = options.open(path)?;
    match image.device().len() == info.virtual_size {
        true => Ok(true),
        false => Err("its length is another".into()),
    }
}

impl Listener for InspectListener {
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard> {
        let dir = scratch()?;
        let path = dir.path().join("image");
        let mut rng = Rng::new(seed, 5);
        let mut heard = Heard::default();
        for _ in 0..count {
            let (bytes, label, sound) = self.file(&mut rng);
            fs::write(&path, &bytes)?;
            let format = rng.pick(&[None, Some(Format::Qcow2), Some(Format::Raw)]);
            let accepted =
                accepts(&path, format).map_err(|error| format!("{label}, as {format:?}: {error}"))?;
            match accepted {
                true => heard.done += 1,
                false if sound && format != Some(Format::Raw) => {
                    return Err(format!("{label}: it is sound, and refused").into());
                }
                false => heard.refused += 1,
            }
            heard.honest += u64::from(sound && accepted);
        }
        Ok(heard)
    }

    fn left(&self) -> Outcome {
        Ok(())
    }
}
