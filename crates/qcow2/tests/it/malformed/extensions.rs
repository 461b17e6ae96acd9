//! Header extensions.

use super::row::{Row, Sound};
use crate::raw_image::RawImage;

const BACKING_FORMAT: u32 = 0xe279_2aca;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;

/// Where the first extension begins in a plain image.
const FIRST: usize = 112;

/// The only extension of the image is this one.
fn only(image: &mut RawImage, magic: u32, len: u32, data: &[u8]) {
    let end = FIRST + 8 + data.len().next_multiple_of(8);
    image.0[FIRST..end + 8].fill(0);
    image.0[FIRST..FIRST + 4].copy_from_slice(&magic.to_be_bytes());
    image.0[FIRST + 4..FIRST + 8].copy_from_slice(&len.to_be_bytes());
    image.0[FIRST + 8..FIRST + 8 + data.len()].copy_from_slice(data);
}

/// The only extension is that of bitmaps.
fn bitmaps(image: &mut RawImage, count: u32, reserved: u32, size: u64, offset: u64) {
    let mut data = [count.to_be_bytes(), reserved.to_be_bytes()].concat();
    data.extend(size.to_be_bytes());
    data.extend(offset.to_be_bytes());
    only(image, BITMAPS, 24, &data);
    image.set(88, 1);
}

pub(super) fn rows() -> Vec<Row> {
    let row = |name, change| Row::changed(name, Sound::Plain, change);
    vec![
        row("an extension that leaves the cluster", |image| image.set_len(116, 4096, 4)),
        row("an extension of 4 GiB", |image| image.set_len(116, u64::from(u32::MAX), 4)),
        row("an end of extensions that leaves the cluster", |image| only(image, 0, 4096, &[])),
        row("a file that ends inside an extension", |image| image.0.truncate(200)),
        row("an unknown extension that leaves the cluster", |image| only(image, 0x1234_5678, 4096, &[])),
        row("a backing format of 16 bytes", |image| only(image, BACKING_FORMAT, 16, &[b'f'; 16]))
            .cap("MAX_BACKING_FORMAT"),
        row("a backing format that is no word", |image| only(image, BACKING_FORMAT, 4, b"r w\n")),
        row("an encryption header without a method", |image| only(image, ENCRYPTION, 16, &[0; 16]))
            .limit("encryption, AES and LUKS"),
        row("a bitmaps extension of 23 bytes", |image| only(image, BITMAPS, 23, &[0; 23])),
        row("a bitmaps extension with a reserved field", |image| bitmaps(image, 1, 1, 32, 0x3000)),
        row("a bitmaps extension without bitmaps", |image| bitmaps(image, 0, 0, 32, 0x3000)),
        row("65536 bitmaps", |image| bitmaps(image, 65536, 0, 32, 0x3000)).cap("MAX_BITMAPS"),
        row("a bitmap directory of more than 64 MiB", |image| bitmaps(image, 1, 0, (64 << 20) + 1, 0x3000))
            .cap("MAX_BITMAP_DIRECTORY_BYTES"),
        row("a bitmap directory between clusters", |image| bitmaps(image, 1, 0, 32, 0x3200)),
        row("a bitmap directory in the header", |image| bitmaps(image, 1, 0, 32, 0)),
        row("a bitmap directory past 2^56", |image| bitmaps(image, 1, 0, 32, 1 << 56)).cap("MAX_HOST_OFFSET"),
        row("a bitmap directory past the end of the file", |image| bitmaps(image, 1, 0, 32, 1 << 40)),
    ]
}
