//! Refcount entries inside a refcount block, for every width from 1 to 64 bits. Pure.

use byteorder::{BigEndian, ByteOrder};

/// The width of an image's refcounts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// From `refcount_order`; `None` above 6.
    pub const fn from_order(order: u32) -> Option<Self> {
        if order > 6 { None } else { Some(Self { order }) }
    }

    /// Width in bits.
    pub const fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest count that can be said.
    pub const fn max(self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << self.bits()) - 1 }
    }

    /// Entries in `bytes` bytes.
    pub const fn entries(self, bytes: u64) -> u64 {
        (bytes * 8) >> self.order
    }

    /// Entry `index` of a block, or of a slice of one.
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        match self.order {
            3 => u64::from(block[index]),
            4 => u64::from(BigEndian::read_u16(&block[index * 2..])),
            5 => u64::from(BigEndian::read_u32(&block[index * 4..])),
            6 => BigEndian::read_u64(&block[index * 8..]),
            // BackingLayer a byte, the least significant bits come first.
            order => {
                let per_byte = 8 >> order;
                let shift = (index % per_byte) << order;
                u64::from(block[index / per_byte] >> shift) & self.max()
            }
        }
    }

    /// Sets entry `index`. `value` is at most [`max`](Self::max); callers check.
    pub fn set(self, block: &mut [u8], index: usize, value: u64) {
        debug_assert!(value <= self.max());
        // The casts below drop bits that the width cannot hold; the check above says there are none.
        match self.order {
            3 => block[index] = value as u8,
            4 => BigEndian::write_u16(&mut block[index * 2..], value as u16),
            5 => BigEndian::write_u32(&mut block[index * 4..], value as u32),
            6 => BigEndian::write_u64(&mut block[index * 8..], value),
            order => {
                let per_byte = 8 >> order;
                let shift = (index % per_byte) << order;
                let byte = &mut block[index / per_byte];
                *byte = *byte & !((self.max() as u8) << shift) | (value as u8) << shift;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let w = RefcountWidth::from_order(order).unwrap();
            let mut block = vec![0u8; 64];
            let n = w.entries(64) as usize;
            for i in 0..n {
                w.set(&mut block, i, (i as u64 * 7 + 1) & w.max());
            }
            for i in 0..n {
                assert_eq!(w.get(&block, i), (i as u64 * 7 + 1) & w.max(), "width {} entry {i}", w.bits());
            }
            w.set(&mut block, 1, w.max());
            w.set(&mut block, 1, 0);
            assert_eq!(w.get(&block, 0), 1 & w.max());
        }
        assert!(RefcountWidth::from_order(7).is_none());
    }

    #[test]
    fn below_a_byte_the_low_bits_come_first() {
        let mut block = [0u8; 1];
        RefcountWidth::from_order(0).unwrap().set(&mut block, 0, 1);
        assert_eq!(block, [1]);
        RefcountWidth::from_order(1).unwrap().set(&mut block, 3, 2);
        assert_eq!(block, [0x81]);
    }
}
