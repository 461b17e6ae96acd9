//! Compressed data, data files and backing names that are not there.

use super::row::{CLUSTER, Row, Sound};
use crate::raw_image::OFFSET;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::changed("a deflate stream of noise", Sound::Deflate, |image| {
            let host = image.get(image.l2_at(1)) & OFFSET;
            image.0[host as usize..][..512].fill(0xff);
        }),
        Row::changed("a deflate stream that ends before its cluster", Sound::Deflate, |image| {
            let host = (image.get(image.l2_at(1)) & OFFSET) as usize;
            // A last block that stores nothing.
            image.0[host..host + 5].copy_from_slice(&[1, 0, 0, 0xff, 0xff]);
        }),
        Row::changed("a zstd frame of noise", Sound::Zstd, |image| {
            let host = image.get(image.l2_at(1)) & OFFSET;
            image.0[host as usize..][..512].fill(0xff);
        }),
        Row::changed("a compressed run past the end of the file", Sound::Deflate, |image| {
            image.set_compressed(1, 1 << 40, 3);
        }),
        Row::changed("a compressed run at the end of the file", Sound::Deflate, |image| {
            let end = image.append(1);
            image.0.truncate(end as usize);
            image.set_compressed(1, end, 0);
        }),
        Row::changed("a compressed cluster with COPIED", Sound::Deflate, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| entry | 1 << 63);
        }),
        Row::changed("a compressed cluster in the L1 table", Sound::Deflate, |image| {
            let l1 = image.get(40);
            image.set_compressed(1, l1, 0);
        }),
        // Half of the last cluster is there.
        Row::changed("a file that was cut short", Sound::Plain, |image| {
            let len = image.0.len() - 2 * CLUSTER as usize;
            image.0.truncate(len);
        })
        .limit("data in a cluster that begins past the end of a file that was cut short"),
        Row::changed("a data file name with a NUL byte", Sound::DataFile, |image| {
            // The type of its extension.
            let at = image.0.windows(4).position(|four| four == b"DATA").unwrap();
            image.0[at + 8] = 0;
        }),
    ]
}
