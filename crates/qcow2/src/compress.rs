//! Compresses one cluster: exactly one cluster in, a shorter stream out, or nothing. Pure; the counterpart of
//! `decompress`. `write/compressed` calls this, each thread with an encoder of its own.
//!
//! Streams are what QEMU's readers accept: raw deflate within a window of 4 KiB, or one zstd frame. A stream
//! that is not shorter than the cluster is none: the cluster is stored plainly.

use std::fmt;

use flate2::{Compress, FlushCompress, Status};
use zstd::zstd_safe::{self, CCtx};

use crate::format::header::Compression;

/// The base-2 logarithm of the window that readers of deflate streams have.
const WINDOW_BITS: u8 = 12;

/// Bytes of output that a cluster of `len` bytes needs at most: stored blocks have headers, and literals may
/// take a little more than a byte.
pub(crate) const fn bound(len: usize) -> usize {
    len + len / 8 + 512
}

/// An encoder with its state, for one thread at a time; made once and used for many clusters.
pub(crate) enum Encoder {
    /// Raw deflate, at the level that is zlib's default.
    Deflate(Box<Compress>),
    /// Zstandard, at its default level.
    Zstd(CCtx<'static>),
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deflate(_) => "Deflate",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl Encoder {
    pub(crate) fn new(compression: Compression) -> Self {
        match compression {
            Compression::Deflate => Self::Deflate(Box::new(deflate())),
            Compression::Zstd => Self::Zstd(CCtx::create()),
        }
    }

    /// Writes the stream of `cluster` to the start of `out`, which has [`bound`] bytes, and returns its
    /// length; `None` if it is not shorter than the cluster, or if the encoder fails: the caller stores the
    /// cluster plainly then.
    pub(crate) fn encode(&mut self, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
        let len = match self {
            Self::Deflate(encoder) => {
                encoder.reset();
                match encoder.compress(cluster, out, FlushCompress::Finish) {
                    // No more than the buffer has.
                    Ok(Status::StreamEnd) => encoder.total_out() as usize,
                    _ => {
                        // A reset does not forget all of a stream that was cut off (zlib-rs 0.6.8): after
                        // some of them the encoder panics.
                        **encoder = deflate();
                        return None;
                    }
                }
            }
            Self::Zstd(encoder) => encoder.compress(out, cluster, zstd_safe::CLEVEL_DEFAULT).ok()?,
        };
        (len < cluster.len()).then_some(len)
    }
}

fn deflate() -> Compress {
    Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decompress::Decoder;

    const BOTH: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

    /// Bytes that compress more or less, by `period` and `noise`.
    fn content(len: usize, period: usize, noise: u32) -> Vec<u8> {
        let mut state = 7u32;
        (0..len)
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let drawn = if (state >> 8) % 100 < noise { (state >> 24) as u8 } else { 0 };
                (at / 3 % period) as u8 ^ drawn
            })
            .collect()
    }

    #[test]
    fn what_is_encoded_comes_out_again_and_noise_does_not_fit() {
        for compression in BOTH {
            let (mut encoder, mut decoder) = (Encoder::new(compression), Decoder::new(compression).unwrap());
            for len in [512, 4096, 65536, 2 << 20] {
                let mut stream = vec![0; bound(len)];
                let text = content(len, 20, 0);
                let used = encoder.encode(&text, &mut stream).unwrap();
                let mut out = vec![0; len];
                decoder.decode(&stream[..used], &mut out).unwrap();
                assert!(out == text, "{compression:?} {len}");
                assert_eq!(encoder.encode(&content(len, 1, 100), &mut stream), None, "{compression:?} {len}");
                // After a cluster that did not fit the encoder begins anew.
                assert_eq!(encoder.encode(&text, &mut stream), Some(used), "{compression:?} {len}");
            }
        }
    }

    /// Streams that were cut off at the end of a short buffer left something in the encoder each time, and
    /// after some of them it panicked.
    #[test]
    fn an_encoder_outlives_any_number_of_streams_that_do_not_fit() {
        let noise = content(4096, 1, 100);
        for compression in BOTH {
            let mut encoder = Encoder::new(compression);
            for len in [4095, bound(4096)] {
                let mut stream = vec![0; len];
                for _ in 0..100 {
                    assert_eq!(encoder.encode(&noise, &mut stream), None, "{compression:?}");
                }
            }
        }
    }

    /// A decoder with the window that QEMU's readers have refuses a distance that is longer.
    #[test]
    fn deflate_stays_within_the_window_of_readers() {
        let len = 65536;
        let noise = content(5000, 1, 100);
        let mut encoder = Encoder::new(Compression::Deflate);
        // How far back the repeats are.
        for (distance, fits) in [(5000, false), (4096, false), (3000, true), (1000, true)] {
            let cluster: Vec<u8> = noise[..distance].iter().copied().cycle().take(len).collect();
            let mut stream = vec![0; bound(len)];
            let Some(used) = encoder.encode(&cluster, &mut stream) else {
                assert!(!fits);
                continue;
            };
            assert!(fits && used < len / 2, "{used}");
            let mut decoder = flate2::Decompress::new_with_window_bits(false, WINDOW_BITS);
            let mut out = Vec::with_capacity(len);
            // In small pieces, so that the decoder keeps to its own window.
            let mut at = 0;
            while out.len() < len {
                let take = 100.min(used - at);
                let before = decoder.total_in();
                decoder
                    .decompress_vec(&stream[at..at + take], &mut out, flate2::FlushDecompress::None)
                    .unwrap();
                at += (decoder.total_in() - before) as usize;
            }
            assert!(out == cluster);
        }
    }

    proptest! {
        #[test]
        fn round_trips(
            zstd in any::<bool>(), bits in 9u32..17, period in 1usize..255, noise in 0u32..100
        ) {
            let compression = if zstd { Compression::Zstd } else { Compression::Deflate };
            let cluster = content(1 << bits, period, noise);
            let mut stream = vec![0; bound(cluster.len())];
            if let Some(used) = Encoder::new(compression).encode(&cluster, &mut stream) {
                // What follows is another stream.
                stream[used..].fill(0xa5);
                let mut out = vec![0; cluster.len()];
                Decoder::new(compression).unwrap().decode(&stream, &mut out).unwrap();
                prop_assert!(out == cluster);
            }
        }
    }
}
