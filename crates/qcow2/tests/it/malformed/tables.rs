//! L1 and L2 tables.

use super::row::{Row, Sound};
use crate::raw_image::{COPIED, OFFSET};

const OVERLAP: &str = "an entry that maps a cluster of metadata";
const UNCOUNTED: &str = "a mapped cluster, or an L2 table, whose refcount is 0";
const ONE_CLUSTER: &str = "two tables in one cluster";

pub(super) fn rows() -> Vec<Row> {
    [l1(), l2(), subclusters(), metadata()].into_iter().flatten().collect()
}

fn l1() -> Vec<Row> {
    let first = |name, sound, change: fn(&mut _)| Row::changed(name, sound, change);
    vec![
        first("an L1 entry between clusters", Sound::Plain, |image| {
            let at = image.l1_at(0);
            image.change(at, |entry| entry + 512);
        }),
        first("an L1 entry with reserved bits", Sound::Plain, |image| {
            let at = image.l1_at(0);
            image.change(at, |entry| entry | 1 << 57);
        }),
        first("an L2 table past the end of the file", Sound::Plain, |image| {
            let at = image.l1_at(0);
            image.set(at, 1 << 40 | COPIED);
        }),
        first("two L1 entries with one L2 table", Sound::Small, |image| {
            let (at, other) = (image.l1_at(1), image.get(image.l1_at(0)));
            image.set(at, other);
        })
        .limit(ONE_CLUSTER),
        first("two L1 entries with one L2 table, as it is counted", Sound::Small, |image| {
            let (at, other) = (image.l1_at(1), image.get(image.l1_at(0)) & OFFSET);
            image.set(at, other);
            image.set_refcount(other / image.cluster(), 2);
        })
        .limit(ONE_CLUSTER),
        first("an L2 table in the L1 table", Sound::Plain, |image| {
            let (at, l1) = (image.l1_at(0), image.get(40));
            image.set(at, l1 | COPIED);
        })
        .limit(ONE_CLUSTER),
        first("an L2 table in the L1 table, as it is counted", Sound::Plain, |image| {
            let (at, l1) = (image.l1_at(0), image.get(40));
            image.set(at, l1);
            // Its first entry is also that of the L2 table.
            image.set_refcount(l1 / image.cluster(), 3);
        })
        .limit(ONE_CLUSTER),
        first("an L2 table of which the file has a part", Sound::Plain, |image| {
            let at = image.l1_at(0);
            let copy = image.append_copy(image.get(at) & OFFSET, image.cluster());
            image.set(at, copy | COPIED);
            image.set_refcount(copy / image.cluster(), 1);
            image.0.truncate(copy as usize + 100);
        })
        .limit("an L2 table of which the file has only a part"),
        first("an L1 entry that is not COPIED, of a table of its own", Sound::Plain, |image| {
            let at = image.l1_at(0);
            image.change(at, |entry| entry & !COPIED);
        }),
        first("an L2 table whose refcount is 0", Sound::Plain, |image| {
            let table = image.get(image.l1_at(0)) & OFFSET;
            let block = image.get(image.refcount_table());
            image.set_len(block + table / image.cluster() * 2, 0, 2);
        })
        .limit(UNCOUNTED),
    ]
}

fn l2() -> Vec<Row> {
    vec![
        Row::changed("an L2 entry between clusters", Sound::Plain, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| entry + 512);
        }),
        Row::changed("a zero cluster between clusters", Sound::Plain, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| (entry + 512) | 1);
        }),
        Row::changed("an L2 entry with reserved bits", Sound::Plain, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| entry | 1 << 57 | 1 << 4);
        }),
        Row::changed("an L2 entry past the end of the file", Sound::Plain, |image| {
            let at = image.l2_at(1);
            image.set(at, 1 << 40 | COPIED);
        })
        .limit("data in a cluster that begins past the end of a file that was cut short"),
        Row::changed("an L2 entry past the end of all files", Sound::Plain, |image| {
            let at = image.l2_at(1);
            image.set(at, OFFSET & !0xfff | COPIED);
        }),
        Row::changed("two L2 entries with one cluster", Sound::Plain, |image| {
            let (at, other) = (image.l2_at(1), image.get(image.l2_at(2)));
            image.set(at, other);
        }),
        Row::changed("two L2 entries with one cluster, and refcounts of one bit", Sound::OneBit, |image| {
            let (at, other) = (image.l2_at(4), image.get(image.l2_at(5)));
            image.set(at, other);
        }),
        Row::changed("an L2 entry that is not COPIED, of a cluster of its own", Sound::Plain, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| entry & !COPIED);
        }),
        Row::changed("a zero flag in version 2", Sound::Version2, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| entry | 1);
        }),
        Row::changed("a compressed cluster with a data file", Sound::DataFile, |image| {
            let at = image.l2_at(1);
            image.set(at, 1 << 62 | 0x1000);
        }),
        Row::changed("a cluster in another place of the data file", Sound::DataFile, |image| {
            let at = image.l2_at(1);
            image.change(at, |entry| entry + 0x1000);
        }),
    ]
}

fn subclusters() -> Vec<Row> {
    vec![
        Row::changed("a subcluster that is allocated and zero", Sound::Subclusters, |image| {
            let at = image.l2_at(1) + 8;
            image.set(at, 1 << 32 | 1);
        }),
        Row::changed("subclusters without a cluster", Sound::Subclusters, |image| {
            let at = image.l2_at(1);
            image.set(at, 0);
            image.set(at + 8, 0xff);
        }),
        Row::changed("a compressed cluster with subclusters", Sound::Subclusters, |image| {
            image.compress(1);
            let at = image.l2_at(1) + 8;
            image.set(at, 1);
        }),
    ]
}

/// Guest clusters that are mapped to metadata.
fn metadata() -> Vec<Row> {
    let mapped = |name, change: fn(&mut _)| Row::changed(name, Sound::Plain, change).limit(OVERLAP);
    vec![
        mapped("a guest cluster in the L1 table", |image| {
            let (at, host) = (image.l2_at(1), image.get(40));
            image.set(at, host | COPIED);
        }),
        mapped("a guest cluster in an L2 table", |image| {
            let (at, host) = (image.l2_at(1), image.get(image.l1_at(0)));
            image.set(at, host);
        }),
        mapped("a guest cluster in the refcount table", |image| {
            let (at, host) = (image.l2_at(1), image.refcount_table());
            image.set(at, host | COPIED);
        }),
        mapped("a guest cluster in a refcount block", |image| {
            let (at, host) = (image.l2_at(1), image.get(image.refcount_table()));
            image.set(at, host | COPIED);
        }),
        Row::changed("a guest cluster in the snapshot table", Sound::Snapshot, |image| {
            let (at, host) = (image.l2_at(1), image.get(64));
            image.set(at, host | COPIED);
        })
        .limit(OVERLAP),
        Row::changed("a guest cluster whose refcount is 0", Sound::Plain, |image| {
            let host = image.get(image.l2_at(1)) & OFFSET;
            let block = image.get(image.refcount_table());
            image.set_len(block + host / image.cluster() * 2, 0, 2);
        })
        .limit(UNCOUNTED),
    ]
}
