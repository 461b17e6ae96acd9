//! The refcount table and its blocks.

use blockmirror_block::Storage;
use blockmirror_block::testing::MemoryStorage;

use super::row::{Row, Sound};
use crate::raw_image::{OFFSET, RawImage};

/// Changes the first entry of the refcount table.
fn entry(image: &mut RawImage, to: impl FnOnce(u64) -> u64) {
    let at = image.refcount_table();
    image.change(at, to);
}

pub(super) fn rows() -> Vec<Row> {
    let row = |name, change| Row::changed(name, Sound::Plain, change);
    vec![
        row("a refcount block between clusters", |image| entry(image, |block| block + 512)),
        row("a refcount table entry with reserved bits", |image| entry(image, |block| block | 3)),
        row("a refcount block past the end of the file", |image| entry(image, |_| 1 << 40)),
        row("a refcount block past 2^56", |image| entry(image, |_| 1 << 56)).cap("MAX_HOST_OFFSET"),
        row("a refcount block past 2^63", |image| entry(image, |_| 1 << 63 | 1 << 20)),
        row("one refcount block twice", |image| {
            let (at, block) = (image.refcount_table() + 8, image.get(image.refcount_table()));
            image.set(at, block);
        })
        .limit("two tables in one cluster"),
        row("a refcount block in the refcount table", |image| {
            let table = image.refcount_table();
            entry(image, |_| table);
        })
        .limit("two tables in one cluster"),
        row("a refcount block in the L1 table", |image| {
            let l1 = image.get(40);
            entry(image, |_| l1);
        })
        .limit("two tables in one cluster"),
        row("no refcount block", |image| entry(image, |_| 0)),
        row("a refcount that is too high", |image| {
            let host = image.get(image.l2_at(1)) & OFFSET;
            let block = image.get(image.refcount_table());
            image.set_len(block + host / image.cluster() * 2, 2, 2);
        }),
        row("a refcount of a cluster past the end of the file", |image| {
            let block = image.get(image.refcount_table());
            image.set_len(block + 1000 * 2, 1, 2);
        }),
        row("a refcount of a cluster that nothing uses", |image| {
            let cluster = image.append(1) / image.cluster();
            let block = image.get(image.refcount_table());
            image.set_len(block + cluster * 2, 1, 2);
        }),
        Row::sparse("a file of 2^31 clusters", || {
            let image = Sound::Small.make();
            let storage = MemoryStorage::with_contents(&image.0);
            storage.set_len(512 << 31).unwrap();
            storage
        })
        .cap("MAX_FILE_CLUSTERS"),
    ]
}
