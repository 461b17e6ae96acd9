//! What a guest reads of an image, by way of any of its L1 tables; read without the crate under test.

use std::io::Read as _;

use flate2::read::DeflateDecoder;

use crate::directory::be;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;

/// The bytes of all files.
#[derive(Clone, Copy)]
pub(crate) struct Layers<'a> {
    pub(crate) image: &'a [u8],
    pub(crate) data: Option<&'a [u8]>,
    pub(crate) backing: Option<&'a [u8]>,
}

impl Layers<'_> {
    /// `size` bytes of the disk that the L1 table of `entries` at `l1` maps.
    pub(crate) fn read(&self, l1: u64, entries: u64, size: u64) -> Result<Vec<u8>, String> {
        let cluster = 1_u64 << be(self.image, 20, 4)?;
        let v3 = be(self.image, 4, 4)? >= 3;
        let extended = v3 && be(self.image, 72, 8)? & 0x10 != 0;
        let entry_size = if extended { 16 } else { 8 };
        let per_table = cluster / entry_size;
        let mut disk = self.below(0, size);
        for guest in 0..size.div_ceil(cluster) {
            let index = guest / per_table;
            let table = if index < entries { be(self.image, l1 + index * 8, 8)? & OFFSET } else { 0 };
            if table == 0 {
                continue;
            }
            let at = table + guest % per_table * entry_size;
            let entry = be(self.image, at, 8)?;
            let bits = if extended { Some(be(self.image, at + 8, 8)?) } else { None };
            let place = guest * cluster..(guest * cluster + cluster).min(size);
            let slot = &mut disk[place.start as usize..place.end as usize];
            self.read_cluster(entry, bits, cluster, slot)?;
        }
        Ok(disk)
    }

    fn below(&self, at: u64, len: u64) -> Vec<u8> {
        bytes_at(self.backing.unwrap_or_default(), at, len)
    }

    /// Replaces what an L2 entry maps.
    fn read_cluster(
        &self,
        entry: u64,
        bits: Option<u64>,
        cluster: u64,
        slot: &mut [u8],
    ) -> Result<(), String> {
        if entry & COMPRESSED != 0 {
            let shift = 62 - (cluster.trailing_zeros() - 8);
            let (from, sectors) = (entry & ((1 << shift) - 1), (entry & (COMPRESSED - 1)) >> shift);
            let end = from / 512 * 512 + (sectors + 1) * 512;
            let stream = bytes_at(self.image, from, end - from);
            let mut whole = vec![0; cluster as usize];
            let read = DeflateDecoder::new(&*stream).read_exact(&mut whole);
            read.map_err(|e| format!("compressed cluster {entry:#x}: {e}"))?;
            slot.copy_from_slice(&whole[..slot.len()]);
            return Ok(());
        }
        let host = entry & OFFSET;
        let allocated = host != 0 || (self.data.is_some() && entry & COPIED != 0);
        let file = self.data.unwrap_or(self.image);
        let Some(bits) = bits else {
            if entry & 1 != 0 {
                slot.fill(0);
            } else if allocated {
                slot.copy_from_slice(&bytes_at(file, host, slot.len() as u64));
            }
            return Ok(());
        };
        let unit = cluster as usize / 32;
        for (index, part) in slot.chunks_mut(unit).enumerate() {
            if bits >> (32 + index) & 1 != 0 {
                part.fill(0);
            } else if bits >> index & 1 != 0 {
                part.copy_from_slice(&bytes_at(file, host + (index * unit) as u64, part.len() as u64));
            }
        }
        Ok(())
    }
}

/// `len` bytes of `file` at `at`, with zeros past its end.
fn bytes_at(file: &[u8], at: u64, len: u64) -> Vec<u8> {
    let start = (at as usize).min(file.len());
    let end = ((at + len) as usize).min(file.len());
    let mut bytes = file[start..end].to_vec();
    bytes.resize(len as usize, 0);
    bytes
}
