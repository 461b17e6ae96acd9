//! The fixed fields of the header.

use super::row::{Row, Sound};

const OTHER_VERSIONS: &str = "other versions";
const ENCRYPTION: &str = "encryption, AES and LUKS";

pub(super) fn rows() -> Vec<Row> {
    [identity(), features(), places()].into_iter().flatten().collect()
}

/// What says which format it is.
fn identity() -> Vec<Row> {
    let cut = |name, change| Row::changed(name, Sound::Plain, change);
    vec![
        cut("an empty file", |image| image.0.clear()),
        cut("a file of three bytes", |image| image.0.truncate(3)),
        Row::number("another magic number", &[(0, 4, 0x5146_4900)]).cap("MAGIC"),
        cut("a file of 71 bytes", |image| image.0.truncate(71)),
        cut("a file of 103 bytes", |image| image.0.truncate(103)),
        Row::number("version 1", &[(4, 4, 1)]).limit(OTHER_VERSIONS),
        Row::number("version 4", &[(4, 4, 4)]).limit(OTHER_VERSIONS),
        Row::number("a copy in place that was interrupted", &[(4, 4, 0xffff_fffe)]).cap("VERSION_UNFINISHED"),
        Row::number("clusters of 256 bytes", &[(20, 4, 8)]),
        Row::number("clusters of 4 MiB", &[(20, 4, 22)]),
        Row::number("clusters of 2^(2^32-1) bytes", &[(20, 4, 0xffff_ffff)]),
        Row::number("encrypted with AES", &[(32, 4, 1)]).limit(ENCRYPTION),
        Row::number("encrypted with LUKS", &[(32, 4, 2)]).limit(ENCRYPTION),
        Row::number("encrypted with something", &[(32, 4, 3)]).limit(ENCRYPTION),
        Row::number("a header of 0 bytes", &[(100, 4, 0)]),
        Row::number("a header of 96 bytes", &[(100, 4, 96)]),
        Row::number("a header of 105 bytes", &[(100, 4, 105)]),
        Row::number("a header that is longer than a cluster", &[(100, 4, 4104)]),
    ]
}

fn features() -> Vec<Row> {
    const UNKNOWN: &str = "unknown incompatible feature";
    vec![
        Row::number("an unknown incompatible feature", &[(72, 8, 1 << 5)]).limit(UNKNOWN),
        // The first row of the table of feature names.
        Row::number(
            "an unknown incompatible feature that the image names",
            &[(72, 8, 1 << 63), (120, 4, 0x003f_6d79), (124, 8, 0)],
        )
        .limit(UNKNOWN),
        Row::number("marked corrupt", &[(72, 8, 2)]).limit("corrupt bit set"),
        // The L1 table points between clusters, so that a repair does not know what lies there.
        Row::changed("marked dirty, and more is wrong than a repair can mend", Sound::Plain, |image| {
            image.set(72, 1);
            let at = image.l1_at(0);
            image.change(at, |entry| entry + 512);
        })
        .limit("dirty bit set"),
        Row::number("zstd without its feature bit", &[(104, 1, 1)]),
        Row::number("the feature bit of another compression without one", &[(72, 8, 1 << 3)]),
        Row::number("an unknown compression", &[(72, 8, 1 << 3), (104, 1, 2)]),
        Row::number("a raw data file without a data file", &[(88, 8, 2)]),
        Row::number("subclusters in clusters of 4 KiB", &[(72, 8, 1 << 4)])
            .cap("MIN_EXTENDED_L2_CLUSTER_BITS"),
        Row::number("refcounts of 128 bits", &[(96, 4, 7)]).cap("MAX_REFCOUNT_ORDER"),
    ]
}

/// Sizes and places of tables, and the backing name.
fn places() -> Vec<Row> {
    vec![
        Row::number("an L1 table of more than 32 MiB", &[(36, 4, (4 << 20) + 1)]).cap("MAX_L1_BYTES"),
        Row::number("a disk for which an L1 table of 32 MiB is too short", &[(24, 8, 1 << 62)])
            .cap("MAX_L1_BYTES"),
        Row::number("a disk that is longer than its L1 table", &[(24, 8, 1 << 30)]),
        Row::number("an L1 table past 2^56", &[(40, 8, 1 << 56)]).cap("MAX_HOST_OFFSET"),
        Row::number("an L1 table between clusters", &[(40, 8, 0x3200)]),
        Row::number("an L1 table in the header", &[(40, 8, 0)]),
        Row::number("an L1 table past the end of the file", &[(40, 8, 1 << 40)]),
        Row::changed("an L1 table at the end of the file", Sound::Plain, |image| {
            let end = image.append(1);
            image.0.truncate(end as usize);
            image.set(40, end);
        }),
        Row::number("no refcount table", &[(56, 4, 0)]),
        Row::number("a refcount table of more than 8 MiB", &[(56, 4, 2049)]).cap("MAX_REFCOUNT_TABLE_BYTES"),
        Row::number("a refcount table past 2^56", &[(48, 8, 1 << 56)]).cap("MAX_HOST_OFFSET"),
        Row::number("a refcount table between clusters", &[(48, 8, 0x1200)]),
        Row::number("a refcount table in the header", &[(48, 8, 0)]),
        Row::number("a refcount table past the end of the file", &[(48, 8, 1 << 40)]),
        Row::changed("a refcount table of which the file has a half", Sound::Plain, |image| {
            let table = image.append(1);
            image.0.truncate(table as usize + 2048);
            image.set(48, table);
        }),
        Row::number("65537 snapshots", &[(60, 4, 65537)]).cap("MAX_SNAPSHOTS"),
        Row::number("snapshots in the header", &[(60, 4, 1)]),
        Row::number("snapshots between clusters", &[(60, 4, 1), (64, 8, 0x3200)]),
        Row::number("snapshots past 2^56", &[(60, 4, 1), (64, 8, 1 << 56)]).cap("MAX_HOST_OFFSET"),
        Row::number("a backing name of 1024 bytes", &[(8, 8, 0x300), (16, 4, 1024)]).cap("MAX_BACKING_NAME"),
        Row::number("a backing name that leaves the cluster", &[(8, 8, 4095), (16, 4, 2)]),
        Row::number("a backing name behind the cluster", &[(8, 8, 4097), (16, 4, 1)]),
        Row::number("a backing name at the end of all numbers", &[(8, 8, u64::MAX), (16, 4, 1)]),
        Row::number("a backing name in the header", &[(8, 8, 104), (16, 4, 1)]),
        Row::number("a backing name with a NUL byte", &[(8, 8, 0x900), (16, 4, 8)]),
        Row::changed("a file that ends inside the backing name", Sound::Plain, |image| {
            image.set(8, 0x300);
            image.set_len(16, 100, 4);
            image.0[0x300..0x364].fill(b'n');
            image.0.truncate(0x340);
        }),
    ]
}
