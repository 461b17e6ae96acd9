//! Decompresses one cluster: bytes in, exactly one cluster out, or a typed error. Pure. A deflate stream that
//! would yield more is read up to the cluster; zstd frames must end there.
//!
//! Output is bounded by construction: the decoders write into a buffer of one cluster and nothing else.
//! Neither takes memory by what a stream declares (a zstd frame may claim a window of 2 GiB; decoding a frame
//! in one call needs none). `compressed` calls this with the bytes it has fetched.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::bulk;
use zstd::zstd_safe;

use crate::error::{Error, Result};
use crate::format::header::Compression;

/// A decoder with its state, for one thread at a time; made once and used for many clusters.
pub(crate) enum Decoder {
    /// Raw deflate. Writers stay within a window of 4 KiB, but any window is read.
    Deflate(Box<Decompress>),
    /// Zstandard: one or more frames.
    Zstd(bulk::Decompressor<'static>),
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deflate(_) => "Deflate",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl Decoder {
    pub(crate) fn new(compression: Compression) -> Result<Self> {
        Ok(match compression {
            Compression::Deflate => Self::Deflate(Box::new(Decompress::new(false))),
            Compression::Zstd => Self::Zstd(
                bulk::Decompressor::new().map_err(|e| problem(format!("cannot make a zstd decoder: {e}")))?,
            ),
        })
    }

    /// Fills `cluster` from the stream at the start of `stream`; whatever follows it is ignored.
    pub(crate) fn decode(&mut self, stream: &[u8], cluster: &mut [u8]) -> Result<()> {
        match self {
            Self::Deflate(decoder) => inflate(decoder, stream, cluster),
            Self::Zstd(decoder) => unzstd(decoder, stream, cluster),
        }
    }
}

fn inflate(decoder: &mut Decompress, stream: &[u8], cluster: &mut [u8]) -> Result<()> {
    decoder.reset(false);
    let status = decoder.decompress(stream, cluster, FlushDecompress::Finish);
    let got = decoder.total_out();
    match status {
        // A stream that goes on is read up to the cluster, as QEMU does.
        Ok(_) if got == cluster.len() as u64 => Ok(()),
        Ok(Status::StreamEnd) => Err(short(got, cluster)),
        Ok(_) => Err(problem(format!("the deflate stream is cut off after {got} bytes of output"))),
        Err(e) => Err(problem(format!("bad deflate stream after {got} bytes of output: {e}"))),
    }
}

fn unzstd(decoder: &mut bulk::Decompressor<'_>, stream: &[u8], cluster: &mut [u8]) -> Result<()> {
    let (mut rest, mut filled) = (stream, 0);
    while filled < cluster.len() {
        if rest.is_empty() {
            return Err(short(filled as u64, cluster));
        }
        // Frame by frame, because the decoder takes whole frames only and garbage may follow the last one.
        let len = zstd_safe::find_frame_compressed_size(rest)
            .map_err(|code| zstd_problem(filled, zstd_safe::get_error_name(code)))?;
        let Some((frame, after)) = rest.split_at_checked(len).filter(|_| len > 0) else {
            return Err(zstd_problem(filled, "a frame without an end"));
        };
        filled += decoder
            .decompress_to_buffer(frame, &mut cluster[filled..])
            .map_err(|e| zstd_problem(filled, &e.to_string()))?;
        rest = after;
    }
    Ok(())
}

fn problem(problem: String) -> Error {
    Error::Decompress { problem }
}

fn zstd_problem(filled: usize, what: &str) -> Error {
    problem(format!("bad zstd frame after {filled} bytes of output: {what}"))
}

fn short(got: u64, cluster: &[u8]) -> Error {
    problem(format!("the stream ends after {got} bytes, a cluster has {}", cluster.len()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::DeflateEncoder;
    use proptest::prelude::*;

    use super::*;

    fn deflate(data: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn compress(compression: Compression, data: &[u8]) -> Vec<u8> {
        match compression {
            Compression::Deflate => deflate(data),
            Compression::Zstd => zstd::bulk::compress(data, 3).unwrap(),
        }
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 % 251) as u8).collect()
    }

    const BOTH: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

    #[test]
    fn a_cluster_comes_out_whatever_follows_the_stream() {
        for compression in BOTH {
            let mut decoder = Decoder::new(compression).unwrap();
            for len in [512, 65536, 2 << 20] {
                let data = pattern(len);
                let mut stream = compress(compression, &data);
                stream.extend([0xa5; 700]);
                let mut out = vec![0; len];
                decoder.decode(&stream, &mut out).unwrap();
                assert!(out == data, "{compression:?} {len}");
            }
        }
    }

    #[test]
    fn zstd_may_come_in_several_frames() {
        let data = pattern(4096);
        let mut stream = compress(Compression::Zstd, &data[..1000]);
        // A skippable frame holds nothing.
        stream.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9]);
        stream.extend(compress(Compression::Zstd, &data[1000..]));
        stream.extend([0; 512]);
        let mut out = vec![0; 4096];
        Decoder::new(Compression::Zstd).unwrap().decode(&stream, &mut out).unwrap();
        assert_eq!(out, data);
    }

    #[test]
    fn less_than_one_cluster_is_an_error_and_the_decoder_lives_on() {
        for compression in BOTH {
            let mut decoder = Decoder::new(compression).unwrap();
            let data = pattern(4096);
            let good = compress(compression, &data);
            let mut out = vec![0; 4096];
            let longer = [(compress(compression, &pattern(4097)), 4096), (good.clone(), 512)];
            for (stream, size) in &longer {
                let result = decoder.decode(stream, &mut out[..*size]);
                match compression {
                    // QEMU reads it up to the cluster.
                    Compression::Deflate => {
                        result.unwrap();
                        assert_eq!(out[..*size], pattern(4097)[..*size]);
                    }
                    Compression::Zstd => assert!(result.is_err()),
                }
            }
            for bad in [
                compress(compression, &data[..4095]),
                good[..good.len() / 2].to_vec(),
                vec![0xff; 100],
                Vec::new(),
            ] {
                let e = decoder.decode(&bad, &mut out).unwrap_err();
                assert!(matches!(e, Error::Decompress { .. }), "{compression:?}: {e}");
                decoder.decode(&good, &mut out).unwrap();
                assert_eq!(out, data);
            }
        }
    }

    /// A frame that declares the largest window there is must not make the decoder allocate it.
    #[test]
    fn a_declared_window_takes_no_memory() {
        // No content size, window descriptor for 2^31; one raw block of 4096 bytes, the last.
        let mut stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3];
        let block = (4096u32 << 3) | 1;
        stream.extend([(block & 0xff) as u8, (block >> 8 & 0xff) as u8, (block >> 16) as u8]);
        let data = pattern(4096);
        stream.extend(&data);
        let mut out = vec![0; 4096];
        Decoder::new(Compression::Zstd).unwrap().decode(&stream, &mut out).unwrap();
        assert_eq!(out, data);
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_yields_a_cluster(
            zstd in any::<bool>(), at in 0usize..200, flip in 1u8.., cut in 0usize..400
        ) {
            let compression = if zstd { Compression::Zstd } else { Compression::Deflate };
            let mut stream = compress(compression, &pattern(4096));
            let len = stream.len();
            stream[at % len] ^= flip;
            stream.truncate(len - cut.min(len / 2));
            let mut out = vec![0; 4096];
            if let Err(e) = Decoder::new(compression).unwrap().decode(&stream, &mut out) {
                prop_assert!(matches!(e, Error::Decompress { .. }), "{}", e);
            }
        }
    }
}
