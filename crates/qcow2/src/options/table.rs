//! The rows of the table.

use super::{OptionDef, OptionKind, OptionValue, Shown};
use crate::create_options::{Preallocation, Version};
use crate::format::header::Compression;
use crate::offset::ClusterSize;

/// The options, in the order in which help texts list them.
pub static OPTIONS: &[OptionDef] = &[
    OptionDef {
        name: "backing_file",
        qmp_name: "backing-file",
        kind: OptionKind::Name,
        default: None,
        help: "Name of the backing file, as it is to stand in the header",
        needs_v3: false,
        set: |options, value| value.into_text().map(|name| options.backing_file = Some(name)),
        get: |options| options.backing_file.clone().map(OptionValue::Text),
        shown: None,
    },
    OptionDef {
        name: "backing_fmt",
        qmp_name: "backing-fmt",
        kind: OptionKind::Format,
        default: None,
        help: "Format of the backing file",
        needs_v3: false,
        set: |options, value| {
            let format = String::from_utf8(value.into_text()?).ok()?;
            options.backing_format = Some(format);
            Some(())
        },
        get: |options| options.backing_format.clone().map(|format| OptionValue::Text(format.into_bytes())),
        shown: None,
    },
    OptionDef {
        name: "cluster_size",
        qmp_name: "cluster-size",
        kind: OptionKind::PowerOfTwoSize {
            least: 1 << ClusterSize::MIN_BITS,
            most: 1 << ClusterSize::MAX_BITS,
        },
        default: Some("64K"),
        help: "Cluster size, a power of two from 512 to 2M",
        needs_v3: false,
        set: |options, value| value.into_number().map(|size| options.cluster_size = size),
        get: |options| Some(OptionValue::Number(options.cluster_size)),
        shown: None,
    },
    OptionDef {
        name: "compat",
        qmp_name: "version",
        kind: OptionKind::Choice(&[&["0.10", "v2"], &["1.1", "v3"]]),
        default: Some("1.1"),
        help: "Version of the format",
        needs_v3: false,
        set: |options, value| {
            options.version = match value.into_choice()? {
                "0.10" => Version::V2,
                "1.1" => Version::V3,
                _ => return None,
            };
            Some(())
        },
        get: |options| Some(OptionValue::Choice(options.version.as_str())),
        shown: Some(Shown {
            key: "compat",
            place: 0,
            value: |header| {
                let version = if header.version == 2 { Version::V2 } else { Version::V3 };
                Some(OptionValue::Choice(version.as_str()))
            },
        }),
    },
    OptionDef {
        name: "compression_type",
        qmp_name: "compression-type",
        kind: OptionKind::Choice(&[&["zlib"], &["zstd"]]),
        default: Some("zlib"),
        help: "How compressed clusters are compressed",
        needs_v3: true,
        set: |options, value| {
            options.compression = match value.into_choice()? {
                "zlib" => Compression::Deflate,
                "zstd" => Compression::Zstd,
                _ => return None,
            };
            Some(())
        },
        get: |options| Some(OptionValue::Choice(options.compression.as_str())),
        shown: Some(Shown {
            key: "compression-type",
            place: 1,
            value: |header| Some(OptionValue::Choice(header.compression.as_str())),
        }),
    },
    OptionDef {
        name: "data_file",
        qmp_name: "data-file",
        kind: OptionKind::Name,
        default: None,
        help: "Keep the guest data in this file",
        needs_v3: true,
        set: |options, value| value.into_text().map(|name| options.data_file = Some(name)),
        get: |options| options.data_file.clone().map(OptionValue::Text),
        shown: Some(Shown {
            key: "data-file",
            place: 4,
            value: |header| {
                let name = header.data_file.as_ref()?.name.as_ref()?;
                Some(OptionValue::Text(name.as_bytes().to_vec()))
            },
        }),
    },
    OptionDef {
        name: "data_file_raw",
        qmp_name: "data-file-raw",
        kind: OptionKind::Flag,
        default: Some("off"),
        help: "Keep the data file valid as a raw image",
        needs_v3: true,
        set: |options, value| value.into_flag().map(|raw| options.data_file_raw = raw),
        get: |options| Some(OptionValue::Flag(options.data_file_raw)),
        shown: Some(Shown {
            key: "data-file-raw",
            place: 5,
            value: |header| Some(OptionValue::Flag(header.data_file.as_ref()?.raw)),
        }),
    },
    OptionDef {
        name: "extended_l2",
        qmp_name: "extended-l2",
        kind: OptionKind::Flag,
        default: Some("off"),
        help: "32 subclusters in each cluster",
        needs_v3: true,
        set: |options, value| value.into_flag().map(|extended| options.extended_l2 = extended),
        get: |options| Some(OptionValue::Flag(options.extended_l2)),
        shown: Some(Shown {
            key: "extended-l2",
            place: 7,
            value: |header| (header.version >= 3).then_some(OptionValue::Flag(header.extended_l2)),
        }),
    },
    OptionDef {
        name: "lazy_refcounts",
        qmp_name: "lazy-refcounts",
        kind: OptionKind::Flag,
        default: Some("off"),
        help: "Postpone refcount updates",
        needs_v3: true,
        set: |options, value| value.into_flag().map(|lazy| options.lazy_refcounts = lazy),
        get: |options| Some(OptionValue::Flag(options.lazy_refcounts)),
        shown: Some(Shown {
            key: "lazy-refcounts",
            place: 2,
            value: |header| (header.version >= 3).then_some(OptionValue::Flag(header.lazy_refcounts())),
        }),
    },
    OptionDef {
        name: "preallocation",
        qmp_name: "preallocation",
        kind: OptionKind::Choice(&[&["off"], &["metadata"], &["falloc"], &["full"]]),
        default: Some("off"),
        help: "Space allocated at once",
        needs_v3: false,
        set: |options, value| {
            options.preallocation = Preallocation::from_name(value.into_choice()?)?;
            Some(())
        },
        get: |options| Some(OptionValue::Choice(options.preallocation.as_str())),
        shown: None,
    },
    OptionDef {
        name: "refcount_bits",
        qmp_name: "refcount-bits",
        kind: OptionKind::PowerOfTwo { least: 1, most: 64 },
        default: Some("16"),
        help: "Width of a refcount",
        needs_v3: true,
        set: |options, value| {
            options.refcount_bits = u32::try_from(value.into_number()?).ok()?;
            Some(())
        },
        get: |options| Some(OptionValue::Number(options.refcount_bits.into())),
        shown: Some(Shown {
            key: "refcount-bits",
            place: 3,
            value: |header| Some(OptionValue::Number(header.refcount_bits().into())),
        }),
    },
    OptionDef {
        name: "size",
        qmp_name: "size",
        kind: OptionKind::Size,
        default: None,
        help: "Virtual size",
        needs_v3: false,
        set: |options, value| value.into_number().map(|size| options.size = size),
        get: |options| Some(OptionValue::Number(options.size)),
        shown: None,
    },
];
