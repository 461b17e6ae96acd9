//! The guest: what it has written, byte for byte, and the export through which it writes.
//!
//! Its requests are aligned to nothing. A discard may leave old bytes or zeros; what the disk reads as after
//! it is what it must read as from then on, whatever is done to the images.

use std::path::Path;

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_nbd::{Client, ClientOptions};

/// The writer of a disk, and what the disk must hold.
pub(crate) struct Guest {
    client: Client,
    bytes: Vec<u8>,
    rng: Rng,
}

impl Guest {
    /// A guest of the export `disk` of the server in `dir`, which holds `bytes`.
    pub(crate) fn new(dir: &Path, bytes: Vec<u8>, seed: u64) -> Self {
        let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd").display());
        let options = ClientOptions::new(uri.parse().unwrap()).writable(true);
        Self { client: options.open().unwrap(), bytes, rng: Rng::new(seed, 8) }
    }

    /// What the disk must hold.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// One request. Returns what it was.
    pub(crate) fn act(&mut self) -> String {
        let unit = self.rng.pick(&[1, 512, 4096, 65_536]);
        let most = if unit == 1 { 5000 } else { (160 << 10) / unit };
        let (units, wanted) = (self.bytes.len() as u64 / unit, self.rng.range(1, most));
        let start = self.rng.below(units) * unit;
        let range = ByteRange::at(start, wanted * unit).intersect(ByteRange::new(0, self.bytes.len() as u64));
        let place = range.start() as usize..range.end() as usize;
        match self.rng.below(8) {
            0..4 => {
                let byte = self.rng.range(1, 255) as u8;
                self.bytes[place.clone()].fill(byte);
                self.client.write_at(&self.bytes[place], start, WriteFlags::NONE).unwrap();
                format!("write {byte} {range:?}")
            }
            4 | 5 => {
                let flags = if self.rng.chance(50) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE };
                self.bytes[place].fill(0);
                self.client.write_zeroes(range, flags).unwrap();
                format!("zero {flags:?} {range:?}")
            }
            _ => {
                self.client.discard(range).unwrap();
                let mut now = vec![0; range.len() as usize];
                self.client.read_at(&mut now, start).unwrap();
                let before = &mut self.bytes[place];
                let wrong = now.iter().zip(&*before).position(|(now, before)| *now != 0 && now != before);
                assert_eq!(wrong, None, "a discard of {range:?} left neither old bytes nor zeros");
                before.copy_from_slice(&now);
                format!("discard {range:?}")
            }
        }
    }

    /// Whether the disk reads as it must; if not, where it does not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut found = vec![0; self.client.len() as usize];
        self.client.read_at(&mut found, 0).map_err(|error| error.to_string())?;
        same(&found, &self.bytes)
    }
}

/// Whether two disks are equal; if not, where they differ.
pub(crate) fn same(found: &[u8], wanted: &[u8]) -> Result<(), String> {
    if found.len() != wanted.len() {
        return Err(format!("{} bytes instead of {}", found.len(), wanted.len()));
    }
    match found.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
        None => Ok(()),
        Some(at) => Err(format!("{:#x} instead of {:#x} at {at:#x}", found[at], wanted[at])),
    }
}
